"""Describe how one tensor is quantized: frozen, self-validating, free of tensors.

A weight of any layer type is seen as a matrix `[rows, columns]`, `rows` being output channels (of all experts, where
the weights of fused experts are stacked in three dimensions). Each row is cut into
`groups` of equal length that share one step size `alpha`:

| granularity | groups per row | shape of alpha       |
|-------------|--------------|----------------------|
| `tensor`    | 1            | `[1]`                |
| `channel`   | 1            | `[rows, 1]`          |
| `group`     | columns / group_size | `[rows, groups]` |

These are the shapes under which `weight_scale` is stored in a packed checkpoint.
"""

from __future__ import annotations

import math
import reprlib
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from ..errors import CPQError

MIN_BITS, MAX_BITS = 2, 8
RAREST = 0.02  # probabilities of bits are kept this far from 0 and 1 where they divide
MOST_COLUMNS = 1 << 20  # among which a group size is proposed
CENTERED_BITS = 2  # the widest grid that is centred on zero where a weight asks for it
GRANULARITIES = ("tensor", "channel", "group")


def check_bits(value: object, field: str = "bits") -> None:
    """Raise unless `value` is a bit-width this package knows (an integer from 2 to 8)."""
    if isinstance(value, bool) or not isinstance(value, int) or not MIN_BITS <= value <= MAX_BITS:
        raise CPQError(f"`{field}` must be an integer from {MIN_BITS} to {MAX_BITS}, got {value!r}")


def check_min_bits(min_bits: int | None, bits: int) -> None:
    """Raise unless `min_bits` is None or a width below `bits`."""
    if min_bits is None:
        return
    check_bits(min_bits, "min_bits")
    if min_bits >= bits:
        raise CPQError(f"a learned width needs `min_bits` (={min_bits}) below the largest (={bits})")


class Grid(NamedTuple):
    """The levels that a tensor is rounded to, in steps.

    Args:
        bits (`int`): Bit-width.
        signed (`bool`): Levels `-2^(bits-1) .. 2^(bits-1)-1` if true, `0 .. 2^bits-1` if false.
        centered (`bool`, defaults to False): At 2 bits, levels lie at -1.5, -0.5, 0.5 and 1.5 steps.
    """

    bits: int
    signed: bool
    centered: bool = False

    @property
    def bounds(self) -> tuple[int, int]:
        """First and last level, `(lo, hi)`."""
        return (-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1) if self.signed else (0, 2**self.bits - 1)

    @property
    def offset(self) -> float:
        """Number of steps that is added to every level: 1/2 on a grid that is centred on zero, else 0."""
        return 0.5 if self.centered and self.bits <= CENTERED_BITS else 0.0

    @property
    def max_centered_level(self) -> int:
        """Last level of the widest nested grid that is centred; -1 where none is."""
        return self.of_width(CENTERED_BITS).bounds[1] if self.centered else -1

    def of_width(self, bits: int) -> Grid:
        """Return the grid of another bit-width, as DropBits nests it in this one."""
        return Grid(bits, self.signed, self.centered)

    def nested_max_levels(self, dropped: int) -> list[int]:
        """Return the last level of the grids with `dropped`, ..., 1 and 0 bits less."""
        return [self.of_width(bits).bounds[1] for bits in range(self.bits - dropped, self.bits + 1)]


@dataclass(frozen=True)
class WeightSpec:
    """Description of how one weight tensor is quantized.

    Args:
        shape (`tuple[int, ...]`): Shape of the float weight.
        bits (`int`): Bit-width, 2 to 8. Weights use the signed grid `-2^(bits-1) .. 2^(bits-1)-1`.
        granularity (`str`): What shares a step size: `"tensor"`, `"channel"` (a row) or `"group"` (part of a row).
        group_size (`int`, *optional*): Columns per group; only with `granularity="group"`.
        transposed (`bool`): The weight is stored `[in, out]`, as transformers' `Conv1D` does.
        stacked (`bool`): Matrices of fused experts, `[experts, out, in]` (or `[experts, in, out]`).
        min_bits (`int`, *optional*): Set while the bit-width is learned, between `min_bits` and `bits`.
        centered (`bool`): At 2 bits, put the levels at -1.5, -0.5, 0.5 and 1.5 steps instead of -2, -1, 0 and 1.

    Raises:
        CPQError: On bits outside 2..8, an unknown granularity, or a group size that does not divide the columns.
    """

    shape: tuple[int, ...]
    bits: int = 4
    granularity: str = "channel"
    group_size: int | None = None
    transposed: bool = False
    min_bits: int | None = None
    centered: bool = False
    stacked: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        if len(self.shape) < 2 + self.stacked or any(type(size) is not int or size < 0 for size in self.shape):
            raise CPQError(f"`shape` must be sizes in {2 + self.stacked} dimensions or more, got {list(self.shape)}")
        for name in ("transposed", "centered", "stacked"):
            if not isinstance(getattr(self, name), bool):
                raise CPQError(f"`{name}` must be true or false, got {getattr(self, name)!r}")
        check_bits(self.bits)
        check_min_bits(self.min_bits, self.bits)
        check_granularity(self.granularity)
        if (self.granularity == "group") != (self.group_size is not None):
            raise CPQError(
                f"`group_size` (={self.group_size}) goes with `granularity='group'` and only with it; "
                f"`granularity` is {self.granularity!r}"
            )
        size = self.group_size
        if size is not None and (type(size) is not int or size < 1):
            raise CPQError(f"`group_size` must be a positive integer, got {size!r}")
        if size is not None and self.columns % size:
            divisors = [n for n in range(min(self.columns, MOST_COLUMNS), 0, -1) if self.columns % n == 0]
            near = sorted(divisors, key=lambda n: abs(math.log(n / size)))[:3]
            raise CPQError(
                f"`group_size` (={size}) does not divide the {self.columns} input features of a weight of "
                f"shape {list(self.shape)}; choose {', '.join(map(str, near))}, or `granularity='channel'` for this "
                "layer through `overrides`"
            )

    @property
    def rows(self) -> int:
        if self.stacked:
            return self.shape[0] * self.shape[2 if self.transposed else 1]
        return self.shape[1] if self.transposed else self.shape[0]

    @property
    def columns(self) -> int:
        return self.numel // max(1, self.rows)

    @property
    def groups(self) -> int:
        return self.columns // self.group_size if self.group_size is not None else 1

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def scale_shape(self) -> tuple[int, ...]:
        return (1,) if self.granularity == "tensor" else (self.rows, self.groups)

    @property
    def elements_per_scale(self) -> int:
        return self.numel // max(1, math.prod(self.scale_shape))

    @property
    def grid(self) -> Grid:
        """Levels of the weight."""
        return Grid(self.bits, signed=True, centered=self.centered)

    def to_dict(self) -> dict[str, Any]:
        return _as_dict(self) | {"shape": list(self.shape)}


@dataclass(frozen=True)
class ActivationSpec:
    """Description of how one activation is quantized: one step size, signed or unsigned as found from data.

    Args:
        bits (`int`): Bit-width, 2 to 8.
        signed (`bool`, *optional*): Grid `-2^(bits-1) .. 2^(bits-1)-1` if true, `0 .. 2^bits-1` if false; `None`
            until calibration has seen data.
        min_bits (`int`, *optional*): Set while the bit-width is learned, between `min_bits` and `bits`.
    """

    bits: int
    signed: bool | None = None
    min_bits: int | None = None

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_min_bits(self.min_bits, self.bits)
        if not isinstance(self.signed, bool | None):
            raise CPQError(f"`signed` must be true, false or null, got {self.signed!r}")

    @property
    def grid(self) -> Grid:
        """Levels of the activation; the sign must be known."""
        return Grid(self.bits, signed=bool(self.signed))

    def to_dict(self) -> dict[str, Any]:
        return _as_dict(self)


@dataclass(frozen=True)
class LayerSpec:
    """Description of how one layer is quantized: its weight and, where asked for, its input.

    `tied_to` names the layer whose weight it shares, quantizer and all.
    """

    weight: WeightSpec
    activation: ActivationSpec | None = None
    tied_to: str | None = None

    def to_dict(self) -> dict[str, Any]:
        values = {"weight": self.weight.to_dict(), "activation": self.activation and self.activation.to_dict()}
        return values if self.tied_to is None else values | {"tied_to": self.tied_to}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LayerSpec:
        """Read what `to_dict` wrote; anything else is a `CPQError`."""
        try:
            activation, tied_to = data["activation"], data.get("tied_to")
            if not isinstance(tied_to, str | None):
                raise CPQError(f"`tied_to` must be the name of a layer, got {tied_to!r}")
            weight = WeightSpec(**data["weight"])
            return cls(weight, None if activation is None else ActivationSpec(**activation), tied_to)
        except (KeyError, TypeError, AttributeError) as error:
            raise CPQError(f"not a description of a quantized layer: {reprlib.repr(data)}") from error


def check_granularity(value: object, field: str = "granularity") -> None:
    """Raise unless `value` names a granularity."""
    if value not in GRANULARITIES:
        raise CPQError(f"`{field}` must be one of {', '.join(map(repr, GRANULARITIES))}, got {value!r}")


def _as_dict(spec: WeightSpec | ActivationSpec) -> dict[str, Any]:
    """As `asdict`, without the fields of special cases where they do not apply."""
    values = asdict(spec)
    special = ("min_bits", "centered", "stacked")
    return {name: value for name, value in values.items() if name not in special or value}
