"""Layers, two for each float layer: one that trains and one that is packed and serves.

`LAYERS` is the one table of what is covered. A layer is looked up by its exact type: a subclass may use its weight in
its own way, so it is reported as not covered instead of being converted blindly.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D

from .packed import (
    PackedConv1D,
    PackedConv2d,
    PackedEmbedding,
    PackedLayer,
    PackedLinear,
    pack_layer,
    to_float,
    to_packed,
)
from .training import CPQConv1D, CPQConv2d, CPQEmbedding, CPQLinear, TrainingLayer, to_training


class Kind(NamedTuple):
    """One row of the table: the classes of a layer, and how its weight and input look."""

    name: str
    training: type[TrainingLayer]
    packed: type[PackedLayer]
    transposed: bool = False
    has_float_input: bool = True


LAYERS: dict[type[nn.Module], Kind] = {
    nn.Linear: Kind("linear", CPQLinear, PackedLinear),
    nn.Conv2d: Kind("conv2d", CPQConv2d, PackedConv2d),
    Conv1D: Kind("conv1d", CPQConv1D, PackedConv1D, transposed=True),
    nn.Embedding: Kind("embedding", CPQEmbedding, PackedEmbedding, has_float_input=False),
}
BY_TRAINING: dict[type[nn.Module], Kind] = {kind.training: kind for kind in LAYERS.values()}
BY_PACKED: dict[type[nn.Module], Kind] = {kind.packed: kind for kind in LAYERS.values()}

__all__ = [
    "BY_PACKED",
    "BY_TRAINING",
    "LAYERS",
    "CPQConv1D",
    "CPQConv2d",
    "CPQEmbedding",
    "CPQLinear",
    "Kind",
    "PackedConv1D",
    "PackedConv2d",
    "PackedEmbedding",
    "PackedLayer",
    "PackedLinear",
    "TrainingLayer",
    "pack_layer",
    "to_float",
    "to_packed",
    "to_training",
]
