"""The learnable quantizer of one tensor: its parameters, its place in the schedule, and calls into the grid.

Parameters are float32 whatever the model's dtype (`_apply` refuses to cast them), have at least one dimension (FSDP2
shards no scalars) and are found in every graph. The step size is stored as its logarithm, so no update can make it
negative. Its gradient is scaled by `1/sqrt(N * hi)` with `N` the elements that share it (Esser et al., "Learned Step
Size Quantization", ICLR 2020), so that it moves at the pace of the weights.

`noise` and `drop_rate` are tensors, not Python numbers, so that a schedule that moves every step recompiles nothing;
they are not saved, because they follow from the progress of training alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import fitting, grid
from .errors import CPQError
from .recompute import passed_on, remember
from .sharding import assign_whole, whole
from .spec import ActivationSpec, Grid, WeightSpec

DECIDED = 1e4
FIRST_LOGIT = 2.0  # P of the first bit that can be dropped: 0.88


class Quantizer(nn.Module):
    """What the quantizers of weights and of activations share.

    A learned width is a chain of probabilities `P_j` that bit `j = min_bits+1 .. bits` is kept, the running product of
    `sigmoid(bit_logits)`. While it is learned, every element draws its width from them (DropBits), and the gradient
    flows into `bit_logits`; evaluation uses the bits that are more likely kept than not. A decided width is written
    into `bit_logits` as +-`DECIDED`, where the sigmoid is exactly 1 or 0, so that it travels with every checkpoint.

    Args:
        spec (`WeightSpec` or `ActivationSpec`): The (largest) bit-width, and the smallest if it is learned.
        scale_shape (`tuple[int, ...]`): Shape of `log_alpha`.
        min_bits (`int`): Bits that DropBits never drops.
        device (`torch.device`): Where the parameters live; the meta device while a checkpoint loads.
    """

    spec: WeightSpec | ActivationSpec
    noise: Tensor
    drop_rate: Tensor
    bit_logits: nn.Parameter | None

    def __init__(
        self, spec: WeightSpec | ActivationSpec, scale_shape: tuple[int, ...], min_bits: int, device: torch.device
    ) -> None:
        super().__init__()
        self.spec = spec
        self.log_alpha = nn.Parameter(torch.zeros(scale_shape, dtype=torch.float32, device=device))
        for name in ("noise", "drop_rate"):
            self.register_buffer(name, torch.zeros(1, dtype=torch.float32, device=device), persistent=False)
        self.min_bits = min(min_bits if spec.min_bits is None else spec.min_bits, spec.bits)
        self.dropping = False
        logits = None
        if spec.min_bits is not None:
            logits = nn.Parameter(torch.zeros(spec.bits - spec.min_bits, dtype=torch.float32, device=device))
        self.register_parameter("bit_logits", logits)
        self._decided: bool | None = None  # what `bit_logits` says, so that a step reads no tensor
        self._bits = spec.bits

    def begin(self, noise: float) -> None:
        """Put the quantizer where training begins, whatever loading has left: first noise, no DropBits."""
        for buffer in self.buffers():
            buffer.zero_()
        self.noise.fill_(noise)
        self._decided = None

    @property
    def max_bits(self) -> int:
        """Bits of the finest grid, to which `log_alpha` belongs."""
        return self.spec.bits

    def alpha(self) -> Tensor:
        """Step size of the grid of `bits`, shape of `log_alpha`, without gradient."""
        return self.log_alpha.detach().exp() * self._coarser(self.bits)

    def _coarser(self, bits: int) -> float:
        """Steps of the finest grid in one step of the grid of `bits`."""
        return float(2 ** (self.max_bits - bits))

    @property
    def learning(self) -> bool:
        """Whether the width is still being learned."""
        if self.bit_logits is None:
            return False
        if self._decided is None:
            self._decided = bool((whole(self.bit_logits.detach()).abs() > DECIDED / 2).all())
            self._bits = self._likely_bits()
        return not self._decided

    @property
    def bits(self) -> int:
        """Bit-width of the grid: in evaluation, and once packed."""
        return self._likely_bits() if self.learning else self._bits

    def current_spec(self) -> Any:
        """The spec of the grid as it is evaluated and packed: a learned width as it stands."""
        return replace(self.spec, bits=self.bits, min_bits=None)

    @torch.no_grad()
    def keep_probabilities(self) -> Tensor:
        """`P_j` of a learned width, `[max_bits - min_bits]`."""
        assert self.bit_logits is not None
        return whole(self.bit_logits).sigmoid().cumprod(0)

    def start_learning(self) -> None:
        """Begin with every bit likely."""
        if self.bit_logits is not None:
            self.bit_logits.data.fill_(FIRST_LOGIT)
            self._decided = None

    @torch.no_grad()
    def decide(self, bits: int) -> None:
        """Fix a learned width."""
        assert self.bit_logits is not None
        kept = torch.arange(self.min_bits + 1, self.max_bits + 1, device=self.bit_logits.device) <= bits
        assign_whole([self.bit_logits], [torch.where(kept, DECIDED, -DECIDED)])
        self._decided, self._bits = True, bits  # known here, so that the next step need not ask the device

    def _likely_bits(self) -> int:
        return self.min_bits + int((self.keep_probabilities() > 0.5).sum())

    def _quantize(
        self,
        x: Tensor,
        shape: tuple[int, ...],
        full_grid: Grid,
        elements: float,
        dtype: torch.dtype | None = None,
        seed: Tensor | None = None,
    ) -> Tensor:
        """Round `x` to the grid, with DropBits in training; `shape` makes `log_alpha` broadcast against it.

        `full_grid` is the grid of `max_bits`, `elements` how many share a step size.
        """
        alpha = self.log_alpha.exp().view(shape)
        if x.dtype != torch.float32:  # autocast leaves a dtype below that to the operation itself
            dtype = None
        keep = None
        learning = self.learning
        if self.training and learning:
            assert self.bit_logits is not None
            keep, bits = self.bit_logits.sigmoid().cumprod(0), self.max_bits
        else:
            bits = self.bits
            if self.bit_logits is not None:  # a parameter that is trained sits in the graph of every step
                alpha = alpha * self._coarser(bits) + 0 * self.bit_logits.sum()
            elif self.training and self.dropping and self.min_bits < bits:
                keep = (1 - self.drop_rate).expand(bits - self.min_bits).cumprod(0)
        own = full_grid.of_width(bits)
        scale = gradient_scale(elements, own)
        return remember(grid.fake_quantize(x, alpha, self.noise, own, scale, dtype, keep, seed))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._decided = None


class WeightQuantizer(Quantizer):
    """Quantizes a weight; under training, with DropBits while `dropping` is set or the width is learned.

    Args:
        spec (`WeightSpec`): Bit-width, granularity and shape.
        min_bits (`int`): Bits that DropBits never drops.
        device (`torch.device`): Device of the weight.
    """

    spec: WeightSpec

    def __init__(self, spec: WeightSpec, min_bits: int, device: torch.device) -> None:
        super().__init__(spec, spec.scale_shape, min_bits, device)

    def forward(self, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Weight of any floating dtype -> the same shape, on the grid, in `dtype` or its own."""
        spec = self.spec
        grouped = to_grouped(weight, spec)
        quantized = self._quantize(grouped, self._shape, spec.grid, spec.elements_per_scale, dtype)
        return passed_on(quantized, from_grouped(quantized, spec))

    def current_spec(self) -> WeightSpec:
        spec: WeightSpec = super().current_spec()
        return replace(spec, centered=spec.offset > 0)

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
        alpha = fitting.least_squares_alpha(rows, self.spec.grid.of_width(bits)) / self._coarser(bits)
        self.log_alpha.copy_(alpha.log().reshape(self.log_alpha.shape))

    @torch.no_grad()
    def levels(self, weight: Tensor) -> Tensor:
        """Integer levels of `weight` as the packed form stores them: int8 `[rows, columns]`."""
        grouped = to_grouped(weight, self.spec)
        alpha = self.alpha().view(self._shape)
        levels = grid.nearest_levels(grouped, alpha, self.spec.grid.of_width(self.bits))
        return levels.flatten(1).to(torch.int8)

    @torch.no_grad()
    def cluster_distance(self, weight: Tensor) -> Tensor:
        """Mean distance to the nearest level, in steps, of the weights inside the grid: 0.25 if spread evenly."""
        v = to_grouped(weight, self.spec).float() / self.alpha().view(self._shape)
        own = self.spec.grid.of_width(self.bits)
        v = v - own.offset
        lo, hi = own.bounds
        inside = (v > lo - 0.5) & (v < hi + 0.5)
        return whole(((v - v.round()).abs() * inside).sum()) / whole(inside.sum()).clamp(min=1)

    def extra_repr(self) -> str:
        group = f", group_size={self.spec.group_size}" if self.spec.group_size else ""
        return f"bits={_bits_text(self)}, granularity={self.spec.granularity}{group}"


class ActivationQuantizer(Quantizer):
    """Quantizes a layer's input with one step size; whether it is signed is found from data.

    Until calibrated it lets values pass in evaluation, and calibrates itself on the first batch it sees in training
    (over all processes, so that they share one grid). `signed` is a parameter without gradient: NaN until calibrated,
    then 0 or 1. It travels with every checkpoint, and FSDP and DDP treat it like any parameter.

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
        self._known_signed: bool | None = None  # what `signed` says, so that a step reads no tensor
        self._samples: list[Tensor] | None = None  # not None while calibration collects

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Input of any floating dtype -> the same shape, on the grid, in `dtype` or its own."""
        if self._samples is not None:
            self._samples.append(_sample(x))
            return x
        if not self.calibrated:
            if not self.training:
                if not bool(x.any()):  # zeros are on every grid
                    return x
                warnings.warn(
                    "activation quantizers are not calibrated yet, activations pass in full precision: run a training "
                    "step or `cpq_hf.calibrate_model(model, batches)` first",
                    stacklevel=2,
                )
                return x
            self.fit([_sample(x)])
            if not self.calibrated:  # nothing but zeros so far
                return x
        elements = x.numel() / max(1, x.shape[0])
        return self._quantize(x, (1,), Grid(self.max_bits, bool(self._known_signed)), elements, dtype)

    def begin(self, noise: float) -> None:
        """As for any quantizer; and `signed` is not trained, which loading forgets when it replaces parameters."""
        super().begin(noise)
        self.signed.requires_grad_(False)

    @property
    def calibrated(self) -> bool:
        """Whether the range is known."""
        if self._known_signed is None and not self.signed.is_meta:
            value = self.signed.item()
            self._known_signed = None if math.isnan(value) else value > 0
        return self._known_signed is not None

    @torch.no_grad()
    def reset(self) -> None:
        """Back to where nothing is known of the data."""
        self.log_alpha.zero_()
        self.signed.fill_(math.nan)
        self._known_signed = None

    def collect(self) -> None:
        """From now on, record samples of the input and let it pass."""
        self._samples = []

    def discard_collected(self) -> None:
        """End `collect` without a change."""
        self._samples = None

    def fit_collected(self) -> None:
        """End `collect` and fit the grid to what was recorded."""
        samples, self._samples = self._samples or [], None
        self.fit(samples)

    @torch.no_grad()
    def fit(self, samples: list[Tensor]) -> None:
        """Choose sign and step size by least squares on samples, from all processes where there are several."""
        sample = _sample(torch.cat(samples) if samples else self.signed.new_zeros(1))
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            gathered = [torch.empty_like(sample) for _ in range(dist.get_world_size())]
            dist.all_gather(gathered, sample)
            sample = torch.cat(gathered)
        if not bool(torch.isfinite(sample).all()):
            raise CPQError(
                f"the input of `{self.name}` is NaN or infinite in calibration; check the batch and the float model"
            )
        if not bool(sample.any()):
            return
        signed = bool((sample < 0).any())
        bits = self.max_bits if self.learning else self.bits
        alpha = fitting.least_squares_alpha(sample[None], Grid(bits, signed)) / self._coarser(bits)
        self.log_alpha.copy_(alpha.log().view(1))
        self.signed.fill_(float(signed))
        self._known_signed = signed

    def resolved_spec(self) -> ActivationSpec:
        """The spec with its sign filled in; raises `CPQError` before calibration."""
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
        return f"bits={_bits_text(self)}, signed={self._known_signed}"


def gradient_scale(elements: float, grid: Grid) -> float:
    """Return `1/sqrt(N * hi)`, `N` the elements that share a step size (of an activation: those of one example)."""
    return 1 / math.sqrt(max(1.0, elements) * grid.bounds[1])


def to_grouped(weight: Tensor, spec: WeightSpec) -> Tensor:
    """Weight -> view `[rows, groups, columns/groups]`."""
    rows_first = weight.transpose(-2, -1) if spec.transposed else weight
    matrix = rows_first.flatten(0, 1) if spec.stacked else rows_first.flatten(1)
    return matrix.unflatten(1, (spec.groups, -1))


def from_grouped(grouped: Tensor, spec: WeightSpec) -> Tensor:
    """Inverse of [`to_grouped`], contiguous."""
    matrix = grouped.flatten(1)
    if not spec.transposed:
        return matrix.view(spec.shape)
    stacked = matrix.view(*spec.shape[:-2], spec.shape[-1], spec.shape[-2])
    return stacked.transpose(-2, -1).contiguous()


def _bits_text(quantizer: Quantizer) -> str:
    logits = quantizer.bit_logits
    learning = logits is not None and (logits.is_meta or quantizer.learning)
    return f"{quantizer.min_bits}..{quantizer.max_bits}" if learning else str(quantizer.bits)


SAMPLE_SIZE = 1 << 16


def _sample(x: Tensor) -> Tensor:
    """A fixed number of values of `x`, always the same places for one size, its smallest and largest among them.

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
