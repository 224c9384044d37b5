"""Quantize a layer's input, and observe it first: sign and step size are found from data.

Until the range is known, values pass unchanged in evaluation. In training the quantizer calibrates on the first batch
that it sees, over all processes, so that they share one grid. `signed` is a parameter without gradient: NaN until
calibrated, then 0 or 1. It travels with every checkpoint, and FSDP and DDP treat it like any parameter.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import CPQError
from .quantizer import Quantizer
from .spec import ActivationSpec, Grid
from .step_size import least_squares_alpha

SAMPLE_SIZE = 1 << 16


class ActivationQuantizer(Quantizer):
    """Quantize an activation with one step size.

    Args:
        spec (`ActivationSpec`): Bit-width.
        min_bits (`int`): Bits that DropBits never drops.
        device (`torch.device`): Device of the layer.
        name (`str`): Dotted name of the layer, for error messages.
    """

    spec: ActivationSpec

    def __init__(self, spec: ActivationSpec, min_bits: int, device: torch.device, name: str = "") -> None:
        super().__init__(spec, (1,), min_bits, device)
        self.name = name
        self.signed = nn.Parameter(torch.full((1,), math.nan, device=device, dtype=torch.float32), requires_grad=False)
        self._known_signed: bool | None = None  # the value of `signed`, so that a step reads no tensor
        self._observer: InputObserver | None = None  # while calibration collects

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return an input of any floating dtype rounded to the grid, in the same shape, in `dtype` or its own."""
        if self._observer is not None:
            self._observer.observe(x)
            return x
        if not self.calibrated and not self._calibrates_on(x):
            return x
        elements = x.numel() / max(1, x.shape[0])
        return self._quantize(x, (1,), Grid(self.max_bits, bool(self._known_signed)), elements, dtype)

    def _calibrates_on(self, x: Tensor) -> bool:
        """Fit the grid to the first batch of training; False where there is no grid yet and `x` has to pass."""
        if self.training:
            self.fit(InputObserver(x))
            return self.calibrated  # nothing but zeros tells no range
        if bool(x.any()):  # zeros are on every grid
            warnings.warn(
                "activation quantizers are not calibrated yet, activations pass in full precision: run a training "
                "step or `cpq_hf.calibrate_model(model, batches)` first",
                stacklevel=3,
            )
        return False

    def reset_schedule(self, noise: float) -> None:
        """Reset the schedule, and mark `signed` as not trainable again, because loading replaces it."""
        super().reset_schedule(noise)
        self.signed.requires_grad_(False)

    @property
    def calibrated(self) -> bool:
        """True once the range is known."""
        if self._known_signed is None and not self.signed.is_meta:
            value = self.signed.item()
            self._known_signed = None if math.isnan(value) else value > 0
        return self._known_signed is not None

    @torch.no_grad()
    def reset(self) -> None:
        """Forget the range."""
        self.log_alpha.zero_()
        self.signed.fill_(math.nan)
        self._known_signed = None

    def collect(self) -> None:
        """Start to observe inputs, which pass unchanged until [`fit_collected`] or [`discard_collected`]."""
        self._observer = InputObserver()

    def discard_collected(self) -> None:
        """End `collect` without a change."""
        self._observer = None

    def fit_collected(self) -> None:
        """End `collect` and fit the grid to what was observed."""
        observer, self._observer = self._observer or InputObserver(), None
        self.fit(observer)

    @torch.no_grad()
    def fit(self, observer: InputObserver) -> None:
        """Choose sign and step size by least squares on samples, from all processes where there are several.

        Raises:
            CPQError: If a sample is NaN or infinite.
        """
        sample = observer.gather_sample(self.log_alpha.device)
        if not bool(torch.isfinite(sample).all()):
            raise CPQError(
                f"the input of `{self.name}` is NaN or infinite in calibration; check the batch and the float model"
            )
        if not bool(sample.any()):
            return
        signed = bool((sample < 0).any())
        bits = self.max_bits if self.learning else self.bits
        alpha = least_squares_alpha(sample[None], Grid(bits, signed)) / self._ratio(bits)
        self.log_alpha.copy_(alpha.log().view(1))
        self.signed.fill_(float(signed))
        self._known_signed = signed

    def resolved_spec(self) -> ActivationSpec:
        """Return the spec with its sign filled in; raises `CPQError` before calibration."""
        if not self.calibrated:
            raise CPQError(
                f"the activations of `{self.name}` were never calibrated: train a step or run "
                "`cpq_hf.calibrate_model` first"
            )
        return replace(self.current_spec(), signed=self._known_signed)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._known_signed = None

    def extra_repr(self) -> str:
        return f"bits={self.bits_text()}, signed={self._known_signed}"


class InputObserver:
    """Samples of the inputs of one layer."""

    def __init__(self, *inputs: Tensor) -> None:
        self._samples = [_sample(x) for x in inputs]

    def observe(self, x: Tensor) -> None:
        """Take a sample of `x`."""
        self._samples.append(_sample(x))

    def gather_sample(self, device: torch.device) -> Tensor:
        """Return one sample of all that was observed, on all processes: float32, `[n]`."""
        sample = _sample(torch.cat(self._samples) if self._samples else torch.zeros(1, device=device))
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            gathered = [torch.empty_like(sample) for _ in range(dist.get_world_size())]
            dist.all_gather(gathered, sample)
            sample = torch.cat(gathered)
        return sample


def _sample(x: Tensor) -> Tensor:
    """Return `SAMPLE_SIZE + 2` values of `x`, always from the same places for one size, with the smallest and largest.

    Padding with zeros is neutral: zero is on every grid. The generator is a private one, so that calibration leaves
    the random numbers of training alone.
    """
    flat = x.detach().flatten().float()
    sample = flat.new_zeros(SAMPLE_SIZE + 2)
    if flat.numel() == 0:
        return sample
    if flat.numel() <= SAMPLE_SIZE:
        sample[: flat.numel()] = flat
    else:
        places = torch.randint(flat.numel(), (SAMPLE_SIZE,), generator=torch.Generator().manual_seed(0))
        sample[:SAMPLE_SIZE] = flat[places.to(flat.device)]
        sample[SAMPLE_SIZE:] = torch.stack([flat.min(), flat.max()])
    return sample
