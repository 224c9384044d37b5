"""Choose the container of each weight for tools that run packed integers: its width, and what shares a scale.

Inference engines fuse layers (query, key and value; gate and up; all experts of a model) and then know one width and
one granularity for all of them. Both can be widened without a change of any number: a level fits into more bits, and a
scale can be repeated for smaller groups. So a set of fused layers takes the widest of its widths and the greatest
group that divides all of theirs.

The levels of a centred 2-bit grid lie at -1.5, -0.5, 0.5 and 1.5 steps, which no integer format has. They are the odd
multiples -3, -1, 1 and 3 of half a step: exact, in a container of 3 bits.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from ...errors import CPQError
from ...nn import PackedLayer
from ...tensor.packing import pack, unpack
from ...tensor.spec import WeightSpec
from ...training.bit_widths import ties

EXPERTS = -1  # the number of the set that holds the experts of all layers; others count from 0


@dataclass(frozen=True)
class Container:
    """`bits` of a value, and the columns that share a scale; None for a whole row."""

    bits: int
    group_size: int | None


def choose_containers(
    weights: Mapping[str, WeightSpec], experts: Collection[str], widths: Collection[int]
) -> dict[str, Container]:
    """The container of each weight.

    Args:
        weights: Dotted name of the layer -> its weight.
        experts: Those that are stacked weights of experts.
        widths: Bit-widths that a container may have.

    Raises:
        CPQError: If a weight fits into none of these widths.
    """
    numbers = dict(zip(weights, ties(list(weights)), strict=True)) | dict.fromkeys(experts, EXPERTS)
    containers = {}
    for name, number in numbers.items():
        fused = [weights[other] for other in weights if numbers[other] == number]
        needed = max(weight.bits + (weight.grid.offset > 0) for weight in fused)
        if needed > max(widths):
            raise CPQError(
                f"`{name}` needs a container of {needed} bits, `container_bits` (={sorted(widths)}) has none that wide"
            )
        grouped = any(weight.group_size is not None for weight in fused)
        size = math.gcd(*(weight.group_size or weight.columns for weight in fused))
        containers[name] = Container(min(bits for bits in widths if bits >= needed), size if grouped else None)
    return containers


def partly_packed(packed: Collection[str], floats: Collection[str]) -> list[tuple[list[str], list[str]]]:
    """Sets of fused layers that are packed in part: `(names in floating point, names packed)` of each."""
    names = sorted({*packed, *floats})
    numbers = dict(zip(names, ties(names), strict=True))
    sets: dict[int, tuple[list[str], list[str]]] = {}
    for name in names:
        sets.setdefault(numbers[name], ([], []))[name in packed].append(name)
    return [parts for parts in sets.values() if all(parts)]


def contained(layer: PackedLayer, container: Container) -> tuple[Tensor, Tensor]:
    """Words and scales of a packed weight as its container has them.

    Returns:
        `tuple[Tensor, Tensor]`: int32 `[rows, words per row]`, and float32 `[rows, columns / group_size]`.
    """
    weight, words, scale = layer.spec.weight, layer.holder.weight_packed, layer.holder.weight_scale
    if container.bits != weight.bits:
        levels = unpack(words, weight.bits, weight.columns)
        if weight.grid.offset:  # (q + 1/2) s = (2q + 1) s/2
            levels, scale = levels.mul_(2).add_(1), scale / 2
        words = pack(levels, container.bits)
    groups = 1 if container.group_size is None else weight.columns // container.group_size
    if scale.dim() == 1:
        return words, scale.expand(weight.rows, groups)
    return words, scale.repeat_interleave(groups // scale.shape[1], dim=1)
