"""Quantized weights that are parameters of a module which is no layer: fused experts, attention of torch.

The quantizers of such a weight live in a child module beside it, `in_proj_weight_quantizers`: a name that does not
begin with the parameter's and a dot, for transformers would take such a tensor for a part of the weight when it
renames parameters in a checkpoint. Once packed, the child takes the place and the name of the parameter.

The module then needs a forward that finds the weight there. It gets a class of its own for that, of one of ours and
its own one: [`refit`], by the table in `__init__.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..private_apis import mark_initialized
from ..tensor.quantizer import WeightQuantizer
from ..tensor.spec import LayerSpec
from .packed import PackedLayer, fill_packed
from .training import TrainingLayer, register_input_quantizer, swap_class

SUFFIX = "_quantizers"


class ParameterWeight(TrainingLayer):
    """The quantizers of one weight and of its input; the weight is a parameter of `owner`."""

    def __init__(self, owner: nn.Module, name: str, spec: LayerSpec, min_bits: int, layer_name: str) -> None:
        super().__init__()
        vars(self)["_owner"] = (owner,)  # a tuple, so that it is no child
        self.attribute = name
        device = self.weight.device
        self.weight_quantizer = WeightQuantizer(spec.weight, min_bits, device)
        register_input_quantizer(self, spec, min_bits, device, layer_name)

    @property
    def owner(self) -> nn.Module:
        """The module that has the weight."""
        module: nn.Module = vars(self)["_owner"][0]
        return module

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # others have it as a parameter
        parameter = self.owner._parameters[self.attribute]
        assert parameter is not None
        return parameter

    def quantized_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.weight_quantizer(self.weight, dtype)


class PackedParameterWeight(PackedLayer):
    """One such weight, packed."""


def grid_of(module: nn.Module, name: str) -> ParameterWeight | PackedParameterWeight | None:
    """Return what quantizes the parameter `name` of a module, or None where it is left in floating point."""
    return module._modules.get(name + SUFFIX) or module._modules.get(name)  # type: ignore[return-value]  # ours by name


def to_training_parameter(
    module: Any, name: str, cls: type[ParameterWeight], spec: LayerSpec, min_bits: int, layer_name: str
) -> None:
    """Put one parameter of a module on the grid, in place."""
    module.register_module(name + SUFFIX, cls(module, name, spec, min_bits, layer_name))


def to_packed_parameter(
    module: Any, name: str, cls: type[PackedParameterWeight], spec: LayerSpec, tensors: dict[str, Tensor]
) -> None:
    """Put a packed weight in the place of a parameter, float or one that trained."""
    layer = cls()
    fill_packed(layer, spec, module._parameters[name].dtype, tensors)
    module._modules.pop(name + SUFFIX, None)
    del module._parameters[name]
    module.register_module(name, layer)
    mark_initialized(module)


def to_float_parameter(module: Any, name: str, weight: nn.Parameter) -> None:
    """Put a float weight back in its place."""
    module._modules.pop(name + SUFFIX, None)
    module._modules.pop(name, None)
    module._parameters[name] = weight


class Refitted(nn.Module):
    """Mixin of the classes that modules get: what they did by themselves, they do with quantized weights."""

    float_class: type[nn.Module]


_CLASSES: dict[tuple[type[Refitted], type[nn.Module]], type[Refitted]] = {}


def refit(module: nn.Module, mixin: type[Refitted] | None) -> None:
    """Give a module the class of `mixin` and its own one, always the same class; None gives it back its own."""
    own = getattr(type(module), "float_class", type(module))
    if mixin is None:
        if own is not type(module):
            swap_class(module, own)
    elif not isinstance(module, mixin):
        if (mixin, own) not in _CLASSES:
            members = {"float_class": own, "__module__": __name__}
            _CLASSES[mixin, own] = type(f"CPQ{own.__name__}", (mixin, own), members)
        swap_class(module, _CLASSES[mixin, own])
