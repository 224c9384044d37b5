"""Change models: select layers, prepare them for training, calibrate, pack. The only file that walks a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .errors import CPQError
from .nn import (
    BY_PACKED,
    BY_TRAINING,
    LAYERS,
    PackedLayer,
    TrainingLayer,
    pack_layer,
    to_float,
    to_packed,
    to_training,
)
from .plan import QuantizationPlan, check_patterns, matches
from .quantizer import ActivationQuantizer, Quantizer
from .spec import LayerSpec

M = TypeVar("M", bound=nn.Module)


def training_layers(model: nn.Module) -> Iterator[tuple[str, TrainingLayer]]:
    """`(name, layer)` of every layer that trains on a grid."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, TrainingLayer))


def packed_layers(model: nn.Module) -> Iterator[tuple[str, PackedLayer]]:
    """`(name, layer)` of every packed layer."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, PackedLayer))


def quantizers(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """`(name, quantizer)` of every quantizer, of weights and of activations."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Quantizer))


def quantizer_parameter_names(model: nn.Module) -> set[str]:
    """Names of all parameters that belong to quantizers."""
    return {f"{name}.{key}" for name, module in quantizers(model) for key, _ in module.named_parameters(recurse=False)}


def plan_of(model: nn.Module) -> QuantizationPlan:
    """The plan a model was prepared with; `CPQError` if it was not."""
    return _prepared_module(model).cpq_plan


def _prepared_module(model: nn.Module) -> Any:
    for module in model.modules():  # a wrapper (DDP, a compiled module) comes first and does not carry the plan
        if "cpq_plan" in vars(module):
            return module
    if any(True for _ in packed_layers(model)):
        raise CPQError(
            "the model is packed: its weights are integers and cannot be trained, calibrated or packed again. Use the "
            "checkpoint that was saved before packing"
        )
    raise CPQError(
        "the model is not prepared for training: load it with `quantization_config=CPQConfig(...)` or call "
        "`cpq_hf.prepare_model(model, CPQConfig(...))`"
    )


# --- select ----------------------------------------------------------------------------------------------------------


def select(model: nn.Module, plan: QuantizationPlan) -> dict[str, LayerSpec]:
    """Decide what is quantized and how.

    Args:
        model (`nn.Module`): A float model; its weights may be on the meta device.
        plan (`QuantizationPlan`): The settings.

    Returns:
        `dict[str, LayerSpec]`: Dotted module name -> specification.

    Raises:
        CPQError: On a plan that breaks a rule, a pattern that matches nothing, a layer that cannot be quantized as
            asked, a model that is already prepared or packed, or nothing to quantize.
    """
    plan.check()
    _check_is_float(model)
    candidates = {name: module for name, module in model.named_modules() if type(module) in LAYERS and name}
    known = list(candidates)
    check_patterns("overrides", plan.overrides, known)
    check_patterns("modules_to_not_convert", plan.modules_to_not_convert or [], known)
    tied = _tied_modules(model)
    heads = _output_heads(model)

    selected = {}
    for name, module in candidates.items():
        kind = LAYERS[type(module)]
        named = plan.overridden(name)
        if plan.modules_to_not_convert is None:
            skipped = not named and (name in heads or name in tied)
        else:
            skipped = any(matches(pattern, name) for pattern in plan.modules_to_not_convert)
            if skipped and named:
                raise CPQError(
                    f"`{name}` is named by `overrides` and by `modules_to_not_convert`; drop one of the two"
                )
        if skipped or not (kind.has_float_input or plan.quantize_embeddings or named):
            continue
        if name in tied:
            raise CPQError(
                f"the weight of `{name}` is tied to another module; a tied weight stays in floating point. Leave "
                "`modules_to_not_convert=None`, or name it there"
            )
        if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse):
            raise CPQError(f"`{name}` has `max_norm` or `sparse` set, which cannot be quantized; leave it out")
        if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
            raise CPQError(
                f"the `forward` of `{name}` was replaced on the instance, so it cannot be quantized; leave it out"
            )
        try:
            selected[name] = plan.layer_spec(name, module.weight.shape, kind.transposed, kind.has_float_input)
        except CPQError as error:
            raise CPQError(f"`{name}`: {error}") from error
    _check_target(selected, plan)
    if not selected:
        raise CPQError(
            f"nothing would be quantized: of {len(known)} layers of a type that can be ("
            f"{', '.join(kind.__name__ for kind in LAYERS)}), all are left out as output head, tied weight, embedding "
            "or by `modules_to_not_convert`"
        )
    return selected


def _check_target(selected: Mapping[str, LayerSpec], plan: QuantizationPlan) -> None:
    """Raise if layers of fixed width alone keep the mean over weights above the target."""
    weights = [spec.weight for spec in selected.values()]
    least = sum(w.numel * (w.min_bits or w.bits) for w in weights) / max(1, sum(w.numel for w in weights))
    if plan.target_bits is not None and plan.budget == "weights" and least > plan.target_bits + 1e-9:
        raise CPQError(
            f"`target_bits` (={plan.target_bits}) cannot be met: with every learned layer at `min_bits` (="
            f"{plan.min_bits}) the mean is still {least:.2f}, for layers of fixed width; raise the target or let more "
            "layers learn"
        )


def _check_is_float(model: nn.Module) -> None:
    compiled = hasattr(model, "_orig_mod") or any(vars(m).get("_compiled_call_impl") for m in model.modules())
    if compiled:
        raise CPQError("the model is compiled already: prepare it first, then call `torch.compile`")
    if any(True for _ in packed_layers(model)):
        raise CPQError("the model is packed already: prepare the float model, or the checkpoint saved in training")
    if any(True for _ in training_layers(model)):
        raise CPQError("the model is prepared already; preparing it twice would quantize it twice")


def _output_heads(model: nn.Module) -> set[str]:
    """Names of the module that owns the last parameter (the output layer, by habit) and of the output embeddings."""
    last = [name for name, _ in model.named_parameters()][-1:]
    getter = getattr(model, "get_output_embeddings", None)
    output_embeddings = getter() if callable(getter) else None
    names = {name for name, module in model.named_modules() if module is output_embeddings}
    return names | {name.rpartition(".")[0] for name in last}


def _tied_modules(model: nn.Module) -> set[str]:
    """Names of modules whose weight is shared, by transformers' declaration or in fact."""
    declared = getattr(model, "all_tied_weights_keys", None) or {}
    tied = {name for pair in declared.items() for name in pair}
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    tied.update(name for names in owners.values() if len(names) > 1 for name in names)
    return {name.rpartition(".")[0] for name in tied}


# --- prepare ---------------------------------------------------------------------------------------------------------


def prepare(model: nn.Module, plan: QuantizationPlan) -> dict[str, LayerSpec]:
    """Make a float model with real weights train on the grid, in place. Nothing is changed if it raises."""
    selected = select(model, plan)
    for name in selected:
        check_finite(name, model.get_parameter(f"{name}.weight"))
    convert_to_training(model, selected, plan)
    initialize(model)
    return selected


def convert_to_training(model: Any, layers: Mapping[str, LayerSpec], plan: QuantizationPlan) -> None:
    """Swap the classes of the named float layers. Step sizes are then to be loaded, or set by [`initialize`]."""
    for name, spec in layers.items():
        layer = _float_layer(model, name, spec)
        to_training(layer, LAYERS[type(layer)].training, spec, plan.min_bits, name)
    model.cpq_plan = plan
    reset_schedule(model, plan)


def initialize(model: nn.Module) -> None:
    """Fit the step sizes of all weights by least squared error; those of activations wait for data."""
    for name, layer in training_layers(model):
        check_finite(name, layer.weight)
        layer.weight_quantizer.start_learning()
        layer.weight_quantizer.initialize(layer.weight)
        if layer.input_quantizer is not None:
            layer.input_quantizer.start_learning()
            layer.input_quantizer.reset()


def reset_schedule(model: nn.Module, plan: QuantizationPlan) -> None:
    """Put every quantizer where training begins: first noise, no DropBits. A controller moves it on from there."""
    for _, quantizer in quantizers(model):
        quantizer.begin(plan.noise_start)


def check_finite(name: str, weight: Tensor) -> None:
    """Raise if a weight holds NaN or infinity, or is not there."""
    if weight.is_meta:
        raise CPQError(f"the weight of `{name}` is offloaded or on the meta device; load it to a real device first")
    if not bool(torch.isfinite(weight).all()):
        raise CPQError(f"the weight of `{name}` holds NaN or infinite values; it cannot be quantized")


def _float_layer(model: nn.Module, name: str, spec: LayerSpec) -> Any:
    try:
        layer: Any = model.get_submodule(name)
    except AttributeError as error:
        raise CPQError(f"the table of quantized layers names `{name}`, which the model does not have") from error
    kind = LAYERS.get(type(layer))
    if kind is None or tuple(layer.weight.shape) != spec.weight.shape or kind.transposed != spec.weight.transposed:
        raise CPQError(
            f"`{name}` is a {type(layer).__name__} with a weight of shape {list(getattr(layer.weight, 'shape', []))}, "
            f"which does not fit its entry in the table of quantized layers: {spec.weight}"
        )
    return layer


# --- calibrate -------------------------------------------------------------------------------------------------------


def calibrate_model(model: M, batches: Iterable[Mapping[str, Any] | Tensor]) -> M:
    """Fit the step size and the sign of every quantized activation to data.

    Training does this by itself on its first batch; call it to use more data, or to evaluate or pack a model that is
    not trained. Batches run in evaluation mode without gradients; the model's mode is left as it was. In a distributed
    run every process calls it, and all end up with the same grid.

    Args:
        model (`nn.Module`): A prepared model.
        batches (iterable of `dict` or `Tensor`): Model inputs: dicts are passed as keyword arguments, anything else
            as the single positional argument.

    Returns:
        `nn.Module`: The same model.

    Raises:
        CPQError: If the model is not prepared, no batch was given, or an activation is NaN or infinite.

    Example:

    ```python
    >>> import torch
    >>> from torch import nn
    >>> from cpq_hf import CPQConfig, calibrate_model, prepare_model
    >>> model = nn.Sequential(nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 2))
    >>> model = prepare_model(model, CPQConfig(activation_bits=4))
    >>> calibrate_model(model, [torch.randn(4, 16), torch.randn(4, 16)])[1].input_quantizer
    ActivationQuantizer(bits=4, signed=False)

    ```
    """
    plan_of(model)
    activations = [module for _, module in quantizers(model) if isinstance(module, ActivationQuantizer)]
    was_training = model.training
    model.eval()
    for quantizer in activations:
        quantizer.collect()
    count = 0
    try:
        with torch.no_grad():
            for batch in batches:
                model(**batch) if isinstance(batch, Mapping) else model(batch)
                count += 1
        if count == 0:
            raise CPQError("`batches` is empty; give at least one batch of model inputs")
    except BaseException:
        for quantizer in activations:
            quantizer.discard_collected()
        raise
    finally:
        model.train(was_training)
    for quantizer in activations:
        quantizer.fit_collected()
    return model


# --- pack ------------------------------------------------------------------------------------------------------------


def pack(model: nn.Module) -> dict[str, LayerSpec]:
    """Replace every layer that trains by its packed form, in place. Nothing is changed if it raises."""
    prepared = _prepared_module(model)
    layers = dict(training_layers(model))
    for name, layer in layers.items():
        check_finite(name, layer.weight)
        check_finite(f"{name}.weight_quantizer", layer.weight_quantizer.log_alpha)
        if any(item is not None and item.learning for item in (layer.weight_quantizer, layer.input_quantizer)):
            raise CPQError(
                f"the bit-lengths of `{name}` are still being learned: `CPQController.finish()` decides them under "
                "the target (CPQCallback does so when training ends)"
            )
        if layer.input_quantizer is not None:
            check_finite(f"{name}.input_quantizer", layer.input_quantizer.log_alpha)
            layer.input_quantizer.resolved_spec()
    for layer in layers.values():
        pack_layer(layer, BY_TRAINING[type(layer)].packed)
    model.eval()
    del prepared.cpq_plan
    return {name: layer.layer_spec() for name, layer in packed_layers(model)}


def convert_to_packed(model: nn.Module, layers: Mapping[str, LayerSpec]) -> None:
    """Swap the classes of the named float layers for packed ones with empty buffers, to be loaded."""
    for name, spec in layers.items():
        layer = _float_layer(model, name, spec)
        to_packed(layer, LAYERS[type(layer)].packed, spec)


def dequantize(model: nn.Module) -> bool:
    """Turn every quantized layer back into a float layer with its weight on the grid, in place.

    Returns:
        `bool`: Whether inputs of layers were quantized too, which float layers no longer do.
    """
    layers: list[Any] = [layer for _, layer in (*training_layers(model), *packed_layers(model))]
    lost = any(layer.layer_spec().activation is not None for layer in layers)
    float_classes = {c: base for base, kind in LAYERS.items() for c in (kind.training, kind.packed)}
    for layer in layers:
        to_float(layer, float_classes[type(layer)])
    for module in model.modules():
        vars(module).pop("cpq_plan", None)
    return lost


def layer_kind(layer: nn.Module) -> str:
    """Name of a layer's row in the table of layers."""
    return (BY_TRAINING.get(type(layer)) or BY_PACKED[type(layer)]).name
