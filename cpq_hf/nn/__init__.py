"""Layers, two for each float layer: one that trains and one that is packed and serves.

`LAYERS` is the one table of what is covered. A layer is looked up by its exact type: a subclass may use its weight in
its own way, so it is reported as not covered instead of being converted blindly. Fused experts are known by their
stacked weights instead, whatever their class: experts.py.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D

from .experts import (
    SUFFIX,
    ExpertWeight,
    PackedExpertWeight,
    check_experts,
    expert_weights,
    is_transposed,
    to_float_experts,
    to_packed_experts,
    to_training_experts,
)
from .packed import (
    PackedConv1D,
    PackedConv1d,
    PackedConv2d,
    PackedEmbedding,
    PackedLayer,
    PackedLinear,
    empty_tensors,
    to_float,
    to_packed,
    trained_tensors,
)
from .training import CPQConv1D, CPQConv1d, CPQConv2d, CPQEmbedding, CPQLinear, TrainingLayer, to_training


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
    nn.Conv1d: Kind("nn.conv1d", CPQConv1d, PackedConv1d),
    Conv1D: Kind("conv1d", CPQConv1D, PackedConv1D, transposed=True),
    nn.Embedding: Kind("embedding", CPQEmbedding, PackedEmbedding, has_float_input=False),
}
EXPERTS = Kind("experts", ExpertWeight, PackedExpertWeight)
KINDS: dict[type[nn.Module], Kind] = {
    quantized: kind for kind in (*LAYERS.values(), EXPERTS) for quantized in (kind.training, kind.packed)
}

__all__ = [
    "EXPERTS",
    "KINDS",
    "LAYERS",
    "SUFFIX",
    "CPQConv1D",
    "CPQConv1d",
    "CPQConv2d",
    "CPQEmbedding",
    "CPQLinear",
    "ExpertWeight",
    "Kind",
    "PackedConv1D",
    "PackedConv1d",
    "PackedConv2d",
    "PackedEmbedding",
    "PackedExpertWeight",
    "PackedLayer",
    "PackedLinear",
    "TrainingLayer",
    "check_experts",
    "empty_tensors",
    "expert_weights",
    "is_transposed",
    "to_float",
    "to_float_experts",
    "to_packed",
    "to_packed_experts",
    "to_training",
    "to_training_experts",
    "trained_tensors",
]
