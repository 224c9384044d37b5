"""The table of layers: each float layer that is covered, with the layer that trains and the one that is packed.

A subclass of a float layer keeps its own `forward`, which calls ours or finds its weight on the grid
(weight_access.py). What gives several outputs is more than a layer, a router for instance, and is left alone; so are
torch's own subclasses. Weights may be parameters of a module that is no layer (parameter_weights.py): of fused
experts, known by their stacked weights whatever their class (experts.py), and of torch's attention (attention.py).
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
from .experts import Experts, ExpertWeight, PackedExpertWeight, expert_weights
from .packed import PackedConv1D, PackedConv1d, PackedConv2d, PackedConv3d, PackedEmbedding, PackedLayer, PackedLinear
from .parameter_weights import PackedParameterWeight, ParameterWeight, Refitted, refit
from .training import CPQConv1D, CPQConv1d, CPQConv2d, CPQConv3d, CPQEmbedding, CPQLinear, TrainingLayer
from .weight_access import uses


class LayerType(NamedTuple):
    """One row of the table: the classes of a layer, and how its weight and input look."""

    name: str
    training: type[TrainingLayer]
    packed: type[PackedLayer]
    transposed: bool = False
    has_float_input: bool = True


LAYERS: dict[type[nn.Module], LayerType] = {
    nn.Linear: LayerType("linear", CPQLinear, PackedLinear),
    nn.Conv2d: LayerType("conv2d", CPQConv2d, PackedConv2d),
    nn.Conv1d: LayerType("nn.conv1d", CPQConv1d, PackedConv1d),
    nn.Conv3d: LayerType("conv3d", CPQConv3d, PackedConv3d),
    Conv1D: LayerType("conv1d", CPQConv1D, PackedConv1D, transposed=True),
    nn.Embedding: LayerType("embedding", CPQEmbedding, PackedEmbedding, has_float_input=False),
    OutProjection: LayerType("attention", CPQOutProjection, PackedOutProjection),
}
EXPERTS = LayerType("experts", ExpertWeight, PackedExpertWeight)
ATTENTION = LayerType("attention", AttentionWeight, PackedAttentionWeight)
QUANTIZED_TYPES: dict[type[nn.Module], LayerType] = {
    quantized: kind for kind in (*LAYERS.values(), EXPERTS, ATTENTION) for quantized in (kind.training, kind.packed)
}


def layer_type(module: nn.Module) -> LayerType | None:
    """Return the row of a float layer, None where it is not covered."""
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
    """Return what a layer of `float_class` becomes, always the same class: `row_class`, or a subclass of both."""
    if float_class in LAYERS:
        return row_class
    both = (float_class, row_class)
    if both not in _SUBCLASSES:
        _SUBCLASSES[both] = type(f"{row_class.__name__}{float_class.__name__}", both, {"__module__": __name__})
    return _SUBCLASSES[both]


def parameter_weights(module: nn.Module) -> tuple[LayerType, dict[str, nn.Parameter]]:
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


def quantized_layer_type(layer: nn.Module) -> LayerType:
    """The row of a layer that trains, or of a packed one."""
    return next(
        QUANTIZED_TYPES[cls] for cls in type(layer).__mro__ if cls in QUANTIZED_TYPES
    )  # FSDP2 makes a subclass of it


def float_class_of(layer: nn.Module) -> type[nn.Module]:
    """The class of the float layer that such a layer was made from."""
    bases = type(layer).__mro__
    return bases[1] if bases[0] not in QUANTIZED_TYPES else next(base for base in bases if base in LAYERS)
