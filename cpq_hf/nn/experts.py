"""Fused experts: a module whose weights are parameters of three dimensions, one matrix an expert.

transformers calls them `gate_up_proj` (or `up_proj`) and `down_proj`, `[experts, out, in]` or, with `is_transposed`,
`[experts, in, out]`, and computes with them in several ways (a loop, batched, grouped). So the module keeps its
forward, and for its duration finds the weights on the grid where it looks for its parameters.

The quantizers of a weight live in a child module beside it, `gate_up_proj_quantizers`: a name that does not begin with
the parameter's and a dot, for transformers would take such a tensor for a part of the weight when it renames
parameters in a checkpoint. Once packed, the child takes the place and the name of the parameter.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import CPQError
from ..quantizer import WeightQuantizer
from ..recompute import kept_as_recipes
from ..spec import LayerSpec
from .packed import PackedLayer, fill_packed
from .training import TrainingLayer, register_input_quantizer, swap_class

INPUTS = ("gate_up_proj", "up_proj")
OUTPUT = "down_proj"
SUFFIX = "_quantizers"


def expert_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """The stacked weights of a module of fused experts; empty for any other."""
    own = {name: module._parameters.get(name) for name in (*INPUTS, OUTPUT)}
    found = {name: parameter for name, parameter in own.items() if parameter is not None and parameter.dim() == 3}
    return found if OUTPUT in found and len(found) > 1 else {}


def is_transposed(module: nn.Module) -> bool:
    """Whether the weights of these experts are stored `[experts, in, out]`."""
    return bool(getattr(module, "is_transposed", False))


class ExpertWeight(TrainingLayer):
    """The quantizers of one stacked weight and of its input; the weight is a parameter of `owner`."""

    def __init__(self, owner: nn.Module, name: str, spec: LayerSpec, min_bits: int, layer_name: str) -> None:
        super().__init__()
        vars(self)["_owner"] = (owner,)  # a tuple, so that it is no child
        self.attribute = name
        device = self.weight.device
        self.weight_quantizer = WeightQuantizer(spec.weight, min_bits, device)
        register_input_quantizer(self, spec, min_bits, device, layer_name)

    @property
    def owner(self) -> nn.Module:
        """The module of the experts."""
        module: nn.Module = vars(self)["_owner"][0]
        return module

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # others have it as a parameter
        parameter = self.owner._parameters[self.attribute]
        assert parameter is not None
        return parameter

    def quantized_weight(self) -> Tensor:
        return self.weight_quantizer(self.weight)

    def count_uses(self, inputs: tuple[Any, ...], output: Any) -> tuple[float, float]:
        """As for any layer; a token goes to some of the experts, on average over them."""
        tokens, chosen = inputs[0].numel() / inputs[0].shape[-1], inputs[1].shape[-1]
        spec = self.weight_quantizer.spec
        elements = inputs[0].numel() if self.attribute in INPUTS else tokens * chosen * spec.columns
        return tokens * chosen / spec.shape[0], elements


class PackedExpertWeight(PackedLayer):
    """One stacked weight, packed."""


class Experts(nn.Module):
    """What the experts that train and the packed ones share; the classes are made for each class of experts."""

    float_class: type[nn.Module]

    def grid(self, name: str) -> TrainingLayer | PackedLayer | None:
        """What quantizes the weight `name`, or None where it is left in floating point."""
        return self._modules.get(name + SUFFIX) or self._modules.get(name)  # type: ignore[return-value]  # ours by name

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        parameters = self._parameters
        weights = dict(parameters)  # a copy: the parameters never leave the module, not even for the time of a call
        quantized: list[Tensor] = []
        for name in (*INPUTS, OUTPUT):  # loops, not comprehensions: torch.compile cannot look into their closures here
            grid = self.grid(name)
            if grid is not None:
                quantized.append(grid.quantized_weight())
                weights[name] = quantized[-1]  # type: ignore[assignment]  # no Parameter, for a call
                if name in INPUTS:
                    hidden_states = grid.quantized_input(hidden_states)
                    quantized.append(hidden_states)
        vars(self)["_parameters"] = weights
        try:
            with kept_as_recipes(*quantized):
                return super().forward(hidden_states, *args, **kwargs)
        finally:
            vars(self)["_parameters"] = parameters

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        hidden: Tensor = super()._apply_gate(gate_up)  # type: ignore[misc]  # the float class has it
        down = self.grid(OUTPUT)
        return hidden if down is None else down.quantized_input(hidden)


_CLASSES: dict[type[nn.Module], type[Experts]] = {}


def experts_class(float_class: type[nn.Module]) -> type[Experts]:
    """The class that quantizes experts of `float_class`, always the same one."""
    if float_class not in _CLASSES:
        members = {"float_class": float_class, "__module__": __name__}
        _CLASSES[float_class] = type(f"CPQ{float_class.__name__}", (Experts, float_class), members)
    return _CLASSES[float_class]


def check_experts(module: nn.Module, name: str, spec: LayerSpec) -> None:
    """Raise where the inputs of experts cannot be quantized."""
    if spec.activation is None:
        return
    remedy = "set `activation_bits` to None for it through `overrides`"
    implementation = getattr(getattr(module, "config", None), "_experts_implementation", None)
    if not hasattr(type(module), "_apply_gate") or not getattr(module, "has_gate", True):
        raise CPQError(f"the inputs of the experts `{name}` are out of reach in {type(module).__name__}: {remedy}")
    if implementation in (None, "eager"):
        raise CPQError(
            f"the inputs of the experts `{name}` are out of reach with experts_implementation={implementation!r}: "
            f"load the model with experts_implementation='grouped_mm', or {remedy}"
        )


def to_training_experts(module: Any, name: str, spec: LayerSpec, min_bits: int, layer_name: str) -> None:
    """Put one stacked weight of a module on the grid, in place."""
    layer = ExpertWeight(module, name, spec, min_bits, layer_name)
    _become_experts(module)
    module.register_module(name + SUFFIX, layer)


def to_packed_experts(module: Any, name: str, spec: LayerSpec, tensors: dict[str, Tensor]) -> None:
    """Put a packed weight in the place of one stacked weight, float or one that trained."""
    layer = PackedExpertWeight()
    fill_packed(layer, spec, module._parameters[name].dtype, tensors)
    _become_experts(module)
    module._modules.pop(name + SUFFIX, None)
    del module._parameters[name]
    module.register_module(name, layer)
    module._is_hf_initialized = True


def to_float_experts(module: Any, name: str, weight: nn.Parameter) -> None:
    """Put a float weight back in its place; with the last one the module has its own class again."""
    module._modules.pop(name + SUFFIX, None)
    module._modules.pop(name, None)
    module._parameters[name] = weight
    if not any(isinstance(child, (ExpertWeight, PackedExpertWeight)) for child in module._modules.values()):
        swap_class(module, module.float_class)


def _become_experts(module: nn.Module) -> None:
    if not isinstance(module, Experts):
        swap_class(module, experts_class(type(module)))
