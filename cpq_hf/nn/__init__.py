"""Layers, two for each float layer: one that trains and one that is packed and serves.

`LAYERS` is the one table of what is covered. A subclass of a float layer keeps its own `forward`, which calls ours or
finds its weight on the grid (reads.py). What gives several outputs is more than a layer, a router for instance, and is
left alone; so are torch's own subclasses. Weights may be parameters of a module that is no layer (parameters.py): of
fused experts, known by their stacked weights whatever their class (experts.py), and of torch's attention
(attention.py).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple, TypeVar

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..torch_private import OutProjection
from .attention import (
    Attention,
    AttentionWeight,
    CPQOutProjection,
    Encoder,
    EncoderLayer,
    PackedAttentionWeight,
    PackedOutProjection,
    attention_weights,
    is_covered,
)
from .experts import Experts, ExpertWeight, PackedExpertWeight, check_experts, expert_weights, is_transposed
from .packed import (
    PackedConv1D,
    PackedConv1d,
    PackedConv2d,
    PackedConv3d,
    PackedEmbedding,
    PackedLayer,
    PackedLinear,
    empty_tensors,
    to_float,
    to_packed,
    trained_tensors,
)
from .parameters import (
    SUFFIX,
    PackedParameterWeight,
    ParameterWeight,
    Refitted,
    refit,
    to_float_parameter,
    to_packed_parameter,
    to_training_parameter,
)
from .reads import hide_weights, show_weights, uses, weights_taken
from .training import CPQConv1D, CPQConv1d, CPQConv2d, CPQConv3d, CPQEmbedding, CPQLinear, TrainingLayer, to_training


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
    nn.Conv3d: Kind("conv3d", CPQConv3d, PackedConv3d),
    Conv1D: Kind("conv1d", CPQConv1D, PackedConv1D, transposed=True),
    nn.Embedding: Kind("embedding", CPQEmbedding, PackedEmbedding, has_float_input=False),
    OutProjection: Kind("attention", CPQOutProjection, PackedOutProjection),
}
EXPERTS = Kind("experts", ExpertWeight, PackedExpertWeight)
ATTENTION = Kind("attention", AttentionWeight, PackedAttentionWeight)
KINDS: dict[type[nn.Module], Kind] = {
    quantized: kind for kind in (*LAYERS.values(), EXPERTS, ATTENTION) for quantized in (kind.training, kind.packed)
}


def kind_of(module: nn.Module) -> Kind | None:
    """The row of a float layer, None where it is not covered."""
    own = type(module)
    if own in LAYERS:
        return LAYERS[own]
    weight = module._parameters.get("weight")
    if weight is None or not weight.is_floating_point() or own.__module__.startswith("torch."):
        return None
    if isinstance(module, (TrainingLayer, PackedLayer)) or uses(own).returns_several:
        return None
    return next((LAYERS[base] for base in own.__mro__ if base in LAYERS), None)


R = TypeVar("R", bound=TrainingLayer | PackedLayer)
_SUBCLASSES: dict[tuple[type[nn.Module], type[nn.Module]], type] = {}


def quantized_class(float_class: type[nn.Module], row_class: type[R]) -> type[R]:
    """What a layer of `float_class` becomes, always the same class: `row_class`, or a subclass of both."""
    if float_class in LAYERS:
        return row_class
    both = (float_class, row_class)
    if both not in _SUBCLASSES:
        _SUBCLASSES[both] = type(f"{row_class.__name__}{float_class.__name__}", both, {"__module__": __name__})
    return _SUBCLASSES[both]


def parameter_weights(module: nn.Module) -> tuple[Kind, dict[str, nn.Parameter]]:
    """The row of the weights that are parameters of a float module, and these by name; none for most modules."""
    found = expert_weights(module)
    return (EXPERTS, found) if found else (ATTENTION, attention_weights(module))


def weight_name(name: str, layer: nn.Module) -> str:
    """Name in the float model of the weight of a quantized layer."""
    return name if isinstance(layer, (ParameterWeight, PackedParameterWeight)) else f"{name}.weight"


def fit_class(module: nn.Module, inside: Collection[nn.Module]) -> None:
    """Give a module the class that the quantized layers inside of it ask for; once all are in float, its own."""
    mixin: type[Refitted] | None = None
    if inside and isinstance(module, nn.TransformerEncoder):
        mixin = Encoder
    elif inside and isinstance(module, nn.TransformerEncoderLayer):
        mixin = EncoderLayer
    elif inside and is_covered(module):
        mixin = Attention
    elif any(isinstance(child, (ExpertWeight, PackedExpertWeight)) for child in module._modules.values()):
        mixin = Experts
    refit(module, mixin)


def row_of(layer: nn.Module) -> Kind:
    """The row of a layer that trains, or of a packed one."""
    return next(KINDS[cls] for cls in type(layer).__mro__ if cls in KINDS)  # FSDP2 makes a subclass of it


def float_class_of(layer: nn.Module) -> type[nn.Module]:
    """The class of the float layer that such a layer was made from."""
    bases = type(layer).__mro__
    return bases[1] if bases[0] not in KINDS else next(base for base in bases if base in LAYERS)


__all__ = [
    "ATTENTION",
    "EXPERTS",
    "KINDS",
    "LAYERS",
    "SUFFIX",
    "CPQConv1D",
    "CPQConv1d",
    "CPQConv2d",
    "CPQConv3d",
    "CPQEmbedding",
    "CPQLinear",
    "Kind",
    "PackedConv1D",
    "PackedConv1d",
    "PackedConv2d",
    "PackedConv3d",
    "PackedEmbedding",
    "PackedExpertWeight",
    "PackedLayer",
    "PackedLinear",
    "PackedParameterWeight",
    "ParameterWeight",
    "TrainingLayer",
    "check_experts",
    "empty_tensors",
    "fit_class",
    "float_class_of",
    "hide_weights",
    "is_covered",
    "is_transposed",
    "kind_of",
    "parameter_weights",
    "quantized_class",
    "row_of",
    "show_weights",
    "to_float",
    "to_float_parameter",
    "to_packed",
    "to_packed_parameter",
    "to_training",
    "to_training_parameter",
    "trained_tensors",
    "weight_name",
    "weights_taken",
]
