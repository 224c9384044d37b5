"""Hold the bit-width of one quantizer: fixed, or learned as a chain of probabilities.

`P_j` is the probability that bit `j = min_bits+1 .. max_bits` is kept: the running product of `sigmoid(bit_logits)`,
so that a bit can only be kept where those below it are. While the width is learned, every element draws its width from
these probabilities (DropBits), and the gradient flows into `bit_logits`; evaluation uses the bits that are more likely
kept than not. A width that is fixed is written into `bit_logits` as +-`FIXED_LOGIT`, where the sigmoid is exactly 1 or
0, so that it travels with every checkpoint.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import copy_full_tensors, full_tensor
from .spec import ActivationSpec, WeightSpec

FIXED_LOGIT = 1e4
FIRST_LOGIT = 2.0  # P of the first bit that can be dropped: 0.88


class LearnedWidth(nn.Module):
    """Part of every quantizer: its bit-width, and `bit_logits` where the width is learned.

    Args:
        spec (`WeightSpec` or `ActivationSpec`): The (largest) bit-width, and the smallest if it is learned.
        min_bits (`int`): Bits that DropBits never drops where the width is not learned.
        device (`torch.device`): Where `bit_logits` lives.
    """

    spec: WeightSpec | ActivationSpec
    bit_logits: nn.Parameter | None

    def __init__(self, spec: WeightSpec | ActivationSpec, min_bits: int, device: torch.device) -> None:
        super().__init__()
        self.spec = spec
        self.min_bits = min(min_bits if spec.min_bits is None else spec.min_bits, spec.bits)
        logits = None
        if spec.min_bits is not None:
            logits = nn.Parameter(torch.zeros(spec.bits - spec.min_bits, dtype=torch.float32, device=device))
        self.register_parameter("bit_logits", logits)
        # What `bit_logits` says, as Python values: reading the tensor in a step would wait for the device. None until
        # it is known, and again whenever a checkpoint may have changed the tensor.
        self._is_fixed: bool | None = None
        self._fixed_bits = spec.bits

    @property
    def max_bits(self) -> int:
        """Bits of the finest grid, to which the step size belongs."""
        return self.spec.bits

    @property
    def learning(self) -> bool:
        """True while the width is being learned."""
        if self.bit_logits is None:
            return False
        if self._is_fixed is None:
            self._is_fixed = bool((full_tensor(self.bit_logits.detach()).abs() > FIXED_LOGIT / 2).all())
            self._fixed_bits = self._likely_bits()
        return not self._is_fixed

    @property
    def bits(self) -> int:
        """Bit-width in evaluation, and once packed."""
        return self._likely_bits() if self.learning else self._fixed_bits

    @torch.no_grad()
    def keep_probabilities(self) -> Tensor:
        """Return `P_j` of a learned width, `[max_bits - min_bits]`."""
        assert self.bit_logits is not None
        return full_tensor(self.bit_logits).sigmoid().cumprod(0)

    def start_learning(self) -> None:
        """Make every bit likely, as at the start of training."""
        if self.bit_logits is not None:
            self.bit_logits.data.fill_(FIRST_LOGIT)
            self._is_fixed = None

    @torch.no_grad()
    def fix_width(self, bits: int) -> None:
        """End the learning of the width at `bits`."""
        assert self.bit_logits is not None
        kept = torch.arange(self.min_bits + 1, self.max_bits + 1, device=self.bit_logits.device) <= bits
        copy_full_tensors([self.bit_logits], [torch.where(kept, FIXED_LOGIT, -FIXED_LOGIT)])
        self._is_fixed, self._fixed_bits = True, bits

    def bits_text(self) -> str:
        """Return the width for people: `"4"`, or `"2..5"` while it is learned."""
        learning = self.bit_logits is not None and (self.bit_logits.is_meta or self.learning)
        return f"{self.min_bits}..{self.max_bits}" if learning else str(self.bits)

    def _likely_bits(self) -> int:
        return self.min_bits + int((self.keep_probabilities() > 0.5).sum())

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._is_fixed = None
