"""Quantizers: the parameters of one tensor's grid, their place in the schedule, and the calls into the arithmetic.

Parameters are float32 whatever the model's dtype (`_apply` refuses to cast them), have at least one dimension (FSDP2
shards no scalars) and sit in the graph of every step (DDP and FSDP2 wait for a gradient of each). The step size is
stored as its logarithm, so no update can make it negative. Its gradient is scaled by `1/sqrt(N * hi)`, with `N` the
elements that share it (Esser et al., "Learned Step Size Quantization", ICLR 2020), so that it moves at the pace of the
weights.

`noise` and `drop_rate` are tensors, not Python numbers, so that a schedule that moves every step recompiles nothing.
They are not saved, because they follow from the progress of training.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import full_tensor
from .fake_quantize import fake_quantize, nearest_levels
from .learned_width import LearnedWidth
from .recompute import passed_on, remember
from .spec import ActivationSpec, Grid, WeightSpec
from .step_size import least_squares_alpha


class Quantizer(LearnedWidth):
    """Base of the quantizers of weights and of activations.

    Args:
        spec (`WeightSpec` or `ActivationSpec`): The (largest) bit-width, and the smallest if it is learned.
        scale_shape (`tuple[int, ...]`): Shape of `log_alpha`, the logarithm of the step size.
        min_bits (`int`): Bits that DropBits never drops.
        device (`torch.device`): Where the parameters live; the meta device while a checkpoint loads.
    """

    noise: Tensor
    drop_rate: Tensor

    def __init__(
        self, spec: WeightSpec | ActivationSpec, scale_shape: tuple[int, ...], min_bits: int, device: torch.device
    ) -> None:
        super().__init__(spec, min_bits, device)
        self.log_alpha = nn.Parameter(torch.zeros(scale_shape, dtype=torch.float32, device=device))
        for name in ("noise", "drop_rate"):
            self.register_buffer(name, torch.zeros(1, dtype=torch.float32, device=device), persistent=False)
        self.dropping = False  # true while `drop_rate` is above 0: reading the tensor would wait for the device

    def reset_schedule(self, noise: float) -> None:
        """Put the quantizer where training begins, whatever loading has left: first noise, no DropBits."""
        for buffer in self.buffers():
            buffer.zero_()
        self.noise.fill_(noise)
        self._is_fixed = None

    def alpha(self) -> Tensor:
        """Return the step size of the grid of `bits`, shape of `log_alpha`, without gradient."""
        return self.log_alpha.detach().exp() * self._ratio(self.bits)

    def _ratio(self, bits: int) -> float:
        """Return how many steps of the finest grid fit into one step of the grid of `bits`."""
        return float(2 ** (self.max_bits - bits))

    def current_spec(self) -> Any:
        """Return the spec of the grid as it is evaluated and packed: a learned width as it stands."""
        return replace(self.spec, bits=self.bits, min_bits=None)

    def _quantize(
        self, x: Tensor, shape: tuple[int, ...], finest: Grid, elements: float, dtype: torch.dtype | None
    ) -> Tensor:
        """Round `x` to the grid, with DropBits in training.

        Args:
            x (`Tensor`): Values; `log_alpha` in the shape `shape` broadcasts against them.
            shape (`tuple[int, ...]`): See `x`.
            finest (`Grid`): The grid of `max_bits`.
            elements (`float`): How many elements share a step size.
            dtype (`torch.dtype`, *optional*): Of the result, if `x` is float32; else it has that of `x`, because
                autocast leaves a narrower dtype to the operation.
        """
        alpha = self.log_alpha.exp().view(shape)
        bits, keep_prob = self.bits if not self.learning or not self.training else self.max_bits, None
        if self.training and self.learning:
            assert self.bit_logits is not None
            keep_prob = self.bit_logits.sigmoid().cumprod(0)
        elif self.bit_logits is not None:  # its gradient is zero, but it has one: see the head of this file
            alpha = alpha * self._ratio(bits) + 0 * self.bit_logits.sum()
        elif self.training and self.dropping and self.min_bits < bits:
            keep_prob = (1 - self.drop_rate).expand(bits - self.min_bits).cumprod(0)
        own = finest.of_width(bits)
        return remember(
            fake_quantize(
                x,
                alpha,
                self.noise,
                own,
                alpha_gradient_scale=gradient_scale(elements, own),
                dtype=dtype if x.dtype == torch.float32 else None,
                keep_prob=keep_prob,
            )
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        """Move to another device, but stay float32 when the model is cast."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)


class WeightQuantizer(Quantizer):
    """Quantize a weight; in training with DropBits, while `dropping` is set or the width is learned.

    Args:
        spec (`WeightSpec`): Bit-width, granularity and shape.
        min_bits (`int`): Bits that DropBits never drops.
        device (`torch.device`): Device of the weight.
    """

    spec: WeightSpec

    def __init__(self, spec: WeightSpec, min_bits: int, device: torch.device) -> None:
        super().__init__(spec, spec.scale_shape, min_bits, device)

    def forward(self, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return a weight of any floating dtype rounded to the grid, in the same shape, in `dtype` or its own."""
        spec = self.spec
        grouped = to_grouped(weight, spec)
        quantized = self._quantize(grouped, self._shape, spec.grid, spec.elements_per_scale, dtype)
        return passed_on(quantized, from_grouped(quantized, spec))

    def current_spec(self) -> WeightSpec:
        spec: WeightSpec = super().current_spec()
        return replace(spec, centered=spec.grid.offset > 0)

    @property
    def _current_grid(self) -> Grid:
        return self.spec.grid.of_width(self.bits)

    @property
    def _shape(self) -> tuple[int, ...]:
        """`[1]` -> `[1, 1, 1]`; `[rows, groups]` -> `[rows, groups, 1]`."""
        return (1, 1, 1) if self.log_alpha.dim() == 1 else (*self.log_alpha.shape, 1)

    @torch.no_grad()
    def initialize(self, weight: Tensor) -> None:
        """Set the step size to the one with the least squared rounding error of `weight`."""
        rows = to_grouped(weight, self.spec)
        if self.spec.granularity == "tensor":
            rows = rows.reshape(1, 1, -1)
        bits = self.max_bits if self.learning else self.bits
        alpha = least_squares_alpha(rows, self.spec.grid.of_width(bits)) / self._ratio(bits)
        self.log_alpha.copy_(alpha.log().reshape(self.log_alpha.shape))

    @torch.no_grad()
    def levels(self, weight: Tensor) -> Tensor:
        """Return the integer levels of `weight` as the packed form stores them: int8 `[rows, columns]`."""
        alpha = self.alpha().view(self._shape)
        levels = nearest_levels(to_grouped(weight, self.spec), alpha, self._current_grid)
        return levels.flatten(1).to(torch.int8)

    @torch.no_grad()
    def cluster_distance(self, weight: Tensor) -> Tensor:
        """Return the mean distance to the nearest level of the weights inside the grid, in steps.

        It is 0.25 if they are spread evenly.
        """
        v = to_grouped(weight, self.spec).float() / self.alpha().view(self._shape) - self._current_grid.offset
        lo, hi = self._current_grid.bounds
        inside = (v > lo - 0.5) & (v < hi + 0.5)
        return full_tensor(((v - v.round()).abs() * inside).sum()) / full_tensor(inside.sum()).clamp(min=1)

    def extra_repr(self) -> str:
        group = f", group_size={self.spec.group_size}" if self.spec.group_size else ""
        return f"bits={self.bits_text()}, granularity={self.spec.granularity}{group}"


def gradient_scale(elements: float, grid: Grid) -> float:
    """Return `1/sqrt(N * hi)`, `N` the elements that share a step size (of an activation: those of one example)."""
    return 1 / math.sqrt(max(1.0, elements) * grid.bounds[1])


def to_grouped(weight: Tensor, spec: WeightSpec) -> Tensor:
    """View a weight as `[rows, groups, columns/groups]`."""
    rows_first = weight.transpose(-2, -1) if spec.transposed else weight
    matrix = rows_first.flatten(0, 1) if spec.stacked else rows_first.flatten(1)
    return matrix.unflatten(1, (spec.groups, -1))


def from_grouped(grouped: Tensor, spec: WeightSpec) -> Tensor:
    """Undo [`to_grouped`]; the result is contiguous."""
    matrix = grouped.flatten(1)
    if not spec.transposed:
        return matrix.view(spec.shape)
    stacked = matrix.view(*spec.shape[:-2], spec.shape[-1], spec.shape[-2])
    return stacked.transpose(-2, -1).contiguous()
