"""Decide which weights of a model are quantized and how. Reads a model, changes nothing."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..errors import CPQError
from ..nn import (
    ATTENTION,
    EXPERTS,
    LAYERS,
    LayerType,
    PackedLayer,
    TrainingLayer,
    check_experts,
    is_covered,
    is_transposed,
    layer_type,
    parameter_weights,
    weights_taken,
)
from ..private_apis import hook_of
from ..tensor.spec import LayerSpec
from ..torch_private import is_compiled
from .settings import QuantizationSettings, check_patterns, matches

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """A float weight that can be quantized: that of a layer, or a parameter of fused experts or torch's attention."""

    module: Any
    kind: LayerType
    attribute: str = "weight"
    called: bool = True  # else its weight is taken by another module, which gives it no input

    @property
    def weight(self) -> Tensor:
        weight: Tensor = getattr(self.module, self.attribute)
        return weight

    @property
    def transposed(self) -> bool:
        return is_transposed(self.module) if self.kind is EXPERTS else self.kind.transposed

    def spec(self, settings: QuantizationSettings, name: str) -> LayerSpec:
        """Return how the settings quantize it under this name."""
        stacked = self.kind is EXPERTS
        has_input = self.kind.has_float_input and self.called
        return settings.layer_spec(name, self.weight.shape, self.transposed, has_input, stacked)


def join(name: str, path: str) -> str:
    """Dotted name of what is at `path` inside of the module `name`."""
    return f"{name}.{path}".strip(".")


def candidates(model: nn.Module) -> dict[str, Candidate]:
    """Every weight of a float model that can be quantized, by the dotted name of its layer.

    One of experts or attention, which is no layer's, has its own name.
    """
    found = {}
    not_called = {
        join(name, path)
        for name, module in model.named_modules()
        for path, called in weights_taken(module).items()
        if not called
    }
    out_of_reach = {
        join(name, "out_proj")
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention) and not is_covered(module)
    }
    for name, module in model.named_modules():
        kind = layer_type(module) if name and name not in out_of_reach else None
        if kind is not None:
            found[name] = Candidate(module, kind, called=name not in not_called)
        kind, parameters = parameter_weights(module)
        for attribute in parameters:
            found[join(name, attribute)] = Candidate(module, kind, attribute)
    return found


def select(model: nn.Module, settings: QuantizationSettings) -> dict[str, LayerSpec]:
    """Decide what is quantized and how.

    Layers that share one weight (tied embeddings) are quantized together, with one quantizer, or not at all.

    Args:
        model (`nn.Module`): A float model; its weights may be on the meta device.
        settings (`QuantizationSettings`): Which layers to quantize and how.

    Returns:
        `dict[str, LayerSpec]`: Dotted name of the layer -> specification. A layer that holds a shared weight comes
        before those that are tied to it.

    Raises:
        CPQError: On settings that break a rule, a pattern that matches nothing, a layer that cannot be quantized as
            asked, a model that is already prepared or packed, or nothing to quantize.
    """
    settings.check()
    _check_is_float(model)
    found = candidates(model)
    known = list(found)
    check_patterns("overrides", settings.overrides, known)
    check_patterns("modules_to_not_convert", settings.modules_to_not_convert or [], known)
    heads = _output_heads(model)
    groups = tied_groups(model)
    tied = {name for group in groups for name in group}

    selected = {}
    for group in groups:
        if _is_wanted_together(group, found, settings, heads):
            holder = next((name for name in group if settings.overridden(name)), group[0])
            weight = _spec(group[0], found[group[0]], settings, holder).weight
            for name in group:
                spec = _spec(name, found[name], settings)
                selected[name] = replace(spec, weight=weight, tied_to=None if name == group[0] else group[0])
    for name, candidate in found.items():
        if name not in tied and _is_wanted(name, candidate, settings, heads):
            selected[name] = _spec(name, candidate, settings)
    _check_target(selected, settings)
    layers = [cls.__name__ for cls, kind in LAYERS.items() if kind.name != ATTENTION.name]
    types = ", ".join((*layers, "nn.MultiheadAttention", "fused experts"))
    if not known:
        raise CPQError(
            f"{type(model).__name__} has no layer of a type that can be quantized ({types}); "
            "layers whose weight is computed (weight norm) and recurrent ones cannot be"
        )
    if not selected:
        raise CPQError(
            f"nothing would be quantized: of {len(known)} layers of a type that can be ("
            f"{types}), all are left out as output head, tied "
            "weight, embedding or by `modules_to_not_convert`"
        )
    _warn_of_uncovered(model, found, selected)
    return selected


def _warn_of_uncovered(model: nn.Module, found: Mapping[str, Candidate], selected: Mapping[str, LayerSpec]) -> None:
    """Warn where most of what multiplies is of types that are not covered, such as experts of another form."""
    covered = {id(candidate.weight) for candidate in found.values()}
    others: dict[str, int] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if parameter.dim() >= 2 and id(parameter) not in covered and not isinstance(module, nn.Embedding):
                others[name] = others.get(name, 0) + parameter.numel()
    quantized = sum(spec.weight.numel for spec in selected.values() if spec.tied_to is None)
    if sum(others.values()) > quantized:
        largest = sorted(others, key=lambda name: -others[name])[:3]
        logger.warning(
            "%s of the weights are in layers of types that are not covered, and stay in float: %s (%d in all)",
            f"{sum(others.values()) / (sum(others.values()) + quantized):.0%}",
            ", ".join(f"`{name}` ({type(model.get_submodule(name)).__name__})" for name in largest), len(others),
        )  # fmt: skip


def _is_wanted(name: str, candidate: Candidate, settings: QuantizationSettings, heads: set[str]) -> bool:
    named = settings.overridden(name)
    if _is_skipped(name, settings, named) or (settings.modules_to_not_convert is None and name in heads and not named):
        return False
    return candidate.kind.has_float_input or settings.quantize_embeddings or named


def _is_skipped(name: str, settings: QuantizationSettings, named: bool) -> bool:
    skipped = any(matches(pattern, name) for pattern in settings.modules_to_not_convert or ())
    if skipped and named:
        raise CPQError(f"`{name}` is named by `overrides` and by `modules_to_not_convert`; drop one of the two")
    return skipped


def _is_wanted_together(
    group: list[str], found: Mapping[str, Candidate], settings: QuantizationSettings, heads: set[str]
) -> bool:
    named = any(settings.overridden(name) for name in group)
    skipped = [_is_skipped(name, settings, named) for name in group]
    if any(skipped):
        return False
    layers = [name for name in group if name in found]
    embedded = any(not found[name].kind.has_float_input for name in layers)
    if embedded and not (named or settings.quantize_embeddings):
        asked = [name for name in layers if found[name].kind.has_float_input]
        if asked and settings.modules_to_not_convert is not None:
            others = ", ".join(f"`{name}`" for name in group if name != asked[0])
            raise CPQError(
                f"the weight of `{asked[0]}` is tied to that of {others}: set `quantize_embeddings=True` to quantize "
                f"it for both, or leave it in floating point with `modules_to_not_convert=[{asked[0]!r}]`"
            )
        return False
    if not embedded and not any(_is_wanted(name, found[name], settings, heads) for name in layers):
        return False
    for name in group:
        if name not in found or found[name].kind.transposed:
            if not (embedded or named or settings.modules_to_not_convert is not None):
                return False
            raise CPQError(
                f"`{name}` cannot be quantized, and shares its weight with "
                f"{', '.join(f'`{other}`' for other in group if other != name)}: leave it in floating point with "
                f"`modules_to_not_convert=[{name!r}]`"
            )
    return True


def _spec(
    name: str, candidate: Candidate, settings: QuantizationSettings, configured_as: str | None = None
) -> LayerSpec:
    """The specification of a selected weight, by the settings for its name or for another's."""
    module = candidate.module
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse):
        raise CPQError(f"`{name}` has `max_norm` or `sparse` set, which cannot be quantized; leave it out")
    if "forward" in vars(module) and hook_of(module) is None:
        raise CPQError(
            f"the `forward` of `{name}` was replaced on the instance, so it cannot be quantized; leave it out"
        )
    try:
        spec = candidate.spec(settings, configured_as or name)
    except CPQError as error:
        raise CPQError(f"`{name}`: {error}") from error
    if candidate.kind is EXPERTS:
        check_experts(module, name, spec)
    return spec


def _check_target(selected: Mapping[str, LayerSpec], settings: QuantizationSettings) -> None:
    """Raise if layers of fixed width alone keep the mean over weights above the target."""
    weights = [spec.weight for spec in selected.values() if spec.tied_to is None]
    least = sum(w.numel * (w.min_bits or w.bits) for w in weights) / max(1, sum(w.numel for w in weights))
    if settings.target_bits is not None and settings.budget == "weights" and least > settings.target_bits + 1e-9:
        raise CPQError(
            f"`target_bits` (={settings.target_bits}) cannot be met: with every learned layer at `min_bits` (="
            f"{settings.min_bits}) the mean is still {least:.2f}, because some layers have a fixed width; "
            "raise the target or let more layers learn"
        )


def _check_is_float(model: nn.Module) -> None:
    if any(is_compiled(module) for module in model.modules()):
        raise CPQError("the model is compiled already: prepare it first, then call `torch.compile`")
    if any(isinstance(module, PackedLayer) for module in model.modules()):
        raise CPQError("the model is packed already: prepare the float model, or the checkpoint saved in training")
    if any(isinstance(module, TrainingLayer) for module in model.modules()):
        raise CPQError("the model is prepared already; preparing it twice would quantize it twice")


def _output_heads(model: nn.Module) -> set[str]:
    """Names of the module that owns the last parameter (usually the output layer) and of the output embeddings."""
    last = [name for name, _ in model.named_parameters()][-1:]
    getter = getattr(model, "get_output_embeddings", None)
    output_embeddings = getter() if callable(getter) else None
    names = {name for name, module in model.named_modules() if module is output_embeddings}
    return names | {name.rpartition(".")[0] for name in last}


def tied_groups(model: nn.Module) -> list[list[str]]:
    """Names of modules that share a weight, by transformers' declaration or in fact; the one that holds it first."""
    holders = dict(_declared_ties(model))
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.endswith(".weight"):
            owners.setdefault(id(parameter), []).append(name)
    for names in owners.values():
        declared = [holders.get(name, name) for name in names if name in holders or name in holders.values()]
        holder = declared[0] if declared else names[0]
        holders |= {name: holder for name in names if name != holder}
    groups: dict[str, list[str]] = {}
    for name, holder in holders.items():
        groups.setdefault(holder, [holder]).append(name)
    return [[name.removesuffix(".weight") for name in group] for group in groups.values()]


def _declared_ties(model: nn.Module) -> Iterator[tuple[str, str]]:
    """`(weight, weight that holds it)`, chains followed to their end."""
    declared = getattr(model, "all_tied_weights_keys", None) or {}
    for name, holder in declared.items():
        while holder in declared:
            holder = declared[holder]
        if name.endswith(".weight"):
            yield name, holder
