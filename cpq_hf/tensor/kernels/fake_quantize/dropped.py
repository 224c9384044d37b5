"""DropBits as the kernels take it: which element drops which bits."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Dropped(NamedTuple):
    """Bit-widths of the elements of one tensor.

    Args:
        keep_prob (`Tensor` of shape `[n]`, float32): Probability that each of the `n` bits that may go is kept.
        seed (`Tensor` of shape `[1]`, int64): Decides which element drops which bits. Triton draws from it, and draws
            again in backward, which costs it nothing beside the reading of memory.
        max_level (`Tensor`, uint8, shape and strides of the tensor, *optional*): Last level of each element's grid,
            drawn from the seed, for kernels that do not draw. On a CPU a second draw costs more than a byte per
            element: with a draw in forward, recomputation and backward a step of BERT-base took 1.10 of the time.
    """

    keep_prob: Tensor
    seed: Tensor
    max_level: Tensor | None
