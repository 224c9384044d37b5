"""Fused experts: a module whose weights are parameters of three dimensions, one matrix an expert.

transformers calls them `gate_up_proj` (or `up_proj`) and `down_proj`, `[experts, out, in]` or, with `is_transposed`,
`[experts, in, out]`, and computes with them in several ways (a loop, batched, grouped). So the module keeps its
forward, and for its duration finds the weights on the grid where it looks for its parameters.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import CPQError
from ..private_apis import experts_implementation, has_gate
from ..tensor.recompute import kept_as_recipes
from ..tensor.spec import LayerSpec
from .parameter_weights import PackedParameterWeight, ParameterWeight, Refitted, grid_of

INPUTS = ("gate_up_proj", "up_proj")
OUTPUT = "down_proj"


def expert_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """The stacked weights of a module of fused experts; empty for any other."""
    own = {name: module._parameters.get(name) for name in (*INPUTS, OUTPUT)}
    found = {name: parameter for name, parameter in own.items() if parameter is not None and parameter.dim() == 3}
    return found if OUTPUT in found and len(found) > 1 else {}


def is_transposed(module: nn.Module) -> bool:
    """Return whether the weights of these experts are stored `[experts, in, out]`."""
    return bool(getattr(module, "is_transposed", False))


class ExpertWeight(ParameterWeight):
    """The quantizers of one stacked weight and of its input."""

    def count_uses(self, inputs: tuple[Any, ...], output: Any) -> tuple[float, float]:
        """As for any layer; a token goes to some of the experts, on average over them."""
        tokens, chosen = inputs[0].numel() / inputs[0].shape[-1], inputs[1].shape[-1]
        spec = self.weight_quantizer.spec
        elements = inputs[0].numel() if self.attribute in INPUTS else tokens * chosen * spec.columns
        return tokens * chosen / spec.shape[0], elements


class PackedExpertWeight(PackedParameterWeight):
    """One stacked weight, packed."""


class Experts(Refitted):
    """Experts with weights on the grid, in training and packed."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        parameters = self._parameters
        weights = dict(parameters)  # a copy: the parameters never leave the module, not even for the time of a call
        quantized: list[Tensor] = []
        for name in (*INPUTS, OUTPUT):  # loops, not comprehensions: torch.compile cannot look into their closures here
            grid = grid_of(self, name)
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
        down = grid_of(self, OUTPUT)
        return hidden if down is None else down.quantized_input(hidden)


def check_experts(module: nn.Module, name: str, spec: LayerSpec) -> None:
    """Raise where the inputs of experts cannot be quantized."""
    if spec.activation is None:
        return
    remedy = "set `activation_bits` to None for it through `overrides`"
    implementation = experts_implementation(getattr(module, "config", None))
    if not has_gate(type(module)) or not getattr(module, "has_gate", True):
        raise CPQError(f"the inputs of the experts `{name}` are out of reach in {type(module).__name__}: {remedy}")
    if implementation in (None, "eager"):
        raise CPQError(
            f"the inputs of the experts `{name}` are out of reach with experts_implementation={implementation!r}: "
            f"load the model with experts_implementation='grouped_mm', or {remedy}"
        )
