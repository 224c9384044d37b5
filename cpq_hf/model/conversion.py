"""Change models: prepare them for training, calibrate, pack. Walks them with inspection.py and selection.py only."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..distributed import is_sharded
from ..errors import CPQError
from ..nn import (
    PackedLayer,
    PackedParameterWeight,
    ParameterWeight,
    TrainingLayer,
    empty_tensors,
    fit_class,
    float_class_of,
    hide_weights,
    quantized_class,
    quantized_layer_type,
    show_weights,
    to_float,
    to_float_parameter,
    to_packed,
    to_packed_parameter,
    to_training,
    to_training_parameter,
    trained_tensors,
    weights_taken,
)
from ..tensor.activation_quantizer import ActivationQuantizer
from ..tensor.spec import LayerSpec
from .inspection import (
    packed_layers,
    prepared_module,
    quantizer_parameter_names,
    quantizers,
    settings_of,
    training_layers,
)
from .selection import Candidate, candidates, join, select
from .settings import QuantizationSettings

logger = logging.getLogger(__name__)
M = TypeVar("M", bound=nn.Module)


# --- prepare ---------------------------------------------------------------------------------------------------------


def prepare(model: nn.Module, settings: QuantizationSettings) -> dict[str, LayerSpec]:
    """Make a float model with real weights train on the grid, in place. Nothing is changed if it raises."""
    selected, found = select(model, settings), candidates(model)
    for name in selected:
        check_finite(name, found[name].weight)
    convert_to_training(model, selected, settings)
    initialize(model)
    return selected


def own_configs(model: nn.Module) -> None:
    """Give a model its own copy of every config that its modules hold, so that changes affect this model only.

    A model made with `Model(config)` or `AutoModel.from_config(config)` shares the config with all others made from
    it. Modules that hold one object (attention reads its implementation there) hold one copy of it afterwards, and a
    config inside of another one is copied with it: hence one memo for all.
    """
    copies: dict[int, Any] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, PreTrainedConfig):
                vars(module)[name] = copy.deepcopy(value, copies)


def convert_to_training(model: Any, layers: Mapping[str, LayerSpec], settings: QuantizationSettings) -> None:
    """Swap the classes of the named float layers. Step sizes are then to be loaded, or set by [`initialize`]."""
    found = _fitting_candidates(model, layers)
    for name, spec in _holders_first(layers):
        module, kind, attribute = found[name].module, found[name].kind, found[name].attribute
        if issubclass(kind.training, ParameterWeight):
            to_training_parameter(module, attribute, kind.training, spec, settings.min_bits, name)
        else:
            holder = None if spec.tied_to is None else found[spec.tied_to].module
            training_class = quantized_class(type(module), kind.training)
            to_training(module, training_class, spec, settings.min_bits, name, holder)
    _serve_weights(model, layers)
    model.cpq_settings = settings
    model.register_load_state_dict_pre_hook(_check_state)
    reset_schedule(model, settings)


def _serve_weights(model: nn.Module, layers: Mapping[str, LayerSpec]) -> None:
    """Let modules that compute with weights of these layers themselves find them on the grid."""
    for name, module in model.named_modules():
        fit_class(module, [layer for layer in module.modules() if isinstance(layer, (TrainingLayer, PackedLayer))])
        hide_weights(module)
        taken = [path for path in weights_taken(module) if join(name, path) in layers]
        if taken:
            show_weights(module, taken)


_STEPS = "quantizer.log_alpha"


def _check_state(model: nn.Module, state: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    """Before a state is loaded: raise if it is that of a model which was quantized otherwise.

    PyTorch would say so of shapes alone, and a Trainer that resumes does not ask it to be strict. A state without any
    quantizer is that of a float model, which may be loaded.
    """
    if "cpq_settings" not in vars(model):  # packed or made float since
        return
    wanted = {prefix + name: model.get_parameter(name) for name in quantizer_parameter_names(model)}
    given = {name for name in state if name.startswith(prefix) and name.endswith(_STEPS)}
    steps = {name for name in wanted if name.endswith(_STEPS)}
    for name in sorted(given ^ steps) if given else ():
        layer = name.removeprefix(prefix).rpartition(".")[0]
        raise CPQError(
            f"the state to load {'has' if name in given else 'lacks'} `{layer}`, which this model "
            f"{'lacks' if name in given else 'has'}: it was saved with another config ({len(given ^ steps)} "
            "quantizers differ). Load it into a model that was prepared with the config that it was saved with"
        )
    for name in sorted(given):
        if state[name].shape != wanted[name].shape:
            raise CPQError(
                f"`{name}` has the shape {list(state[name].shape)} in the state to load and "
                f"{list(wanted[name].shape)} in this model: it was saved with another `granularity` or `group_size`"
            )


def initialize(model: nn.Module) -> None:
    """Fit the step sizes of all weights by least squared error; those of activations wait for data."""
    for name, layer in training_layers(model):
        if layer.tied_to is None:
            check_finite(name, layer.weight)
            layer.weight_quantizer.start_learning()
            layer.weight_quantizer.initialize(layer.weight)
        if layer.input_quantizer is not None:
            layer.input_quantizer.start_learning()
            layer.input_quantizer.reset()


def reset_schedule(model: nn.Module, settings: QuantizationSettings) -> None:
    """Put every quantizer where training begins: first noise, no DropBits. A controller moves it on from there."""
    for _, quantizer in quantizers(model):
        quantizer.reset_schedule(settings.noise_start)


def check_finite(name: str, weight: Tensor) -> None:
    """Raise if a weight holds NaN or infinity, or is not there."""
    if weight.is_meta:
        raise CPQError(f"the weight of `{name}` is offloaded or on the meta device; load it to a real device first")
    if hasattr(weight, "ds_id"):
        raise CPQError(
            f"the weight of `{name}` is partitioned by DeepSpeed: prepare the model before `TrainingArguments` with "
            "ZeRO-3 are made, or load it with `from_pretrained(..., quantization_config=...)`"
        )
    if not bool(torch.isfinite(weight).all()):
        raise CPQError(f"the weight of `{name}` holds NaN or infinite values; it cannot be quantized")


def _fitting_candidates(model: nn.Module, layers: Mapping[str, LayerSpec]) -> dict[str, Candidate]:
    """The float layers that a table names; `CPQError` if one is not there or does not fit its entry."""
    found = candidates(model)
    for name, spec in layers.items():
        layer = found.get(name)
        if layer is None:
            raise CPQError(
                f"the table of quantized layers names `{name}`, which is no layer of the model that could be"
            )
        if tuple(layer.weight.shape) != spec.weight.shape or layer.transposed != spec.weight.transposed:
            raise CPQError(
                f"`{name}` is a {type(layer.module).__name__} with a weight of shape {list(layer.weight.shape)}, "
                f"which does not fit its entry in the table of quantized layers: {spec.weight}"
            )
        if spec.tied_to is not None and (spec.tied_to not in layers or layers[spec.tied_to].tied_to is not None):
            raise CPQError(
                f"the table of quantized layers ties `{name}` to `{spec.tied_to}`, which holds no quantized weight"
            )
    return found


def _holders_first(layers: Mapping[str, LayerSpec]) -> list[tuple[str, LayerSpec]]:
    return sorted(layers.items(), key=lambda item: item[1].tied_to is not None)


# --- calibrate -------------------------------------------------------------------------------------------------------


def calibrate_model(model: M, batches: Iterable[Mapping[str, Any] | Tensor]) -> M:
    """Fit the step size and the sign of every quantized activation to data.

    Training does this on its first batch. Call it to use more data, or to evaluate or pack a model that is not
    trained. Batches run in evaluation mode without gradients; the model's mode is left as it was. In a distributed
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
    settings_of(model)
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
    prepared = prepared_module(model)
    layers = dict(training_layers(model))
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise CPQError(
            "the model is spread over processes (FSDP), so it cannot be packed in place: save it "
            "(`trainer.save_model(folder)`), then in one process load the folder with `from_pretrained` and pack that"
        )
    for name, layer in layers.items():
        check_finite(name, layer.weight)
        check_finite(f"{name}.weight_quantizer", layer.weight_quantizer.log_alpha)
        if any(item is not None and item.learning for item in (layer.weight_quantizer, layer.input_quantizer)):
            raise CPQError(
                f"the bit-widths of `{name}` are still being learned: call `CPQController.finish()` before packing, "
                "which fixes them under the target (CPQCallback does so when training ends)"
            )
        if layer.input_quantizer is not None:
            check_finite(f"{name}.input_quantizer", layer.input_quantizer.log_alpha)
    _check_inputs_were_seen(layers)
    final = {name: trained_tensors(layer) for name, layer in layers.items()}
    for name, layer in layers.items():
        spec, tensors = final[name]
        packed_class = quantized_layer_type(layer).packed
        if isinstance(layer, ParameterWeight) and issubclass(packed_class, PackedParameterWeight):
            to_packed_parameter(layer.owner, layer.attribute, packed_class, spec, tensors)
        else:
            holder = None if spec.tied_to is None else layers[spec.tied_to]
            packed_class = quantized_class(float_class_of(layer), packed_class)
            to_packed(layer, packed_class, spec, tensors, holder)
    model.eval()
    del prepared.cpq_settings
    packed = {name: layer.layer_spec() for name, layer in packed_layers(model)}
    _serve_weights(model, packed)
    return packed


def _check_inputs_were_seen(layers: Mapping[str, TrainingLayer]) -> None:
    """Raise if no range of an activation is known; where it is of some layers, the others were never reached."""
    inputs = {name: layer.input_quantizer for name, layer in layers.items() if layer.input_quantizer is not None}
    unseen = [name for name, quantizer in inputs.items() if not quantizer.calibrated]
    if unseen and len(unseen) == len(inputs):
        inputs[unseen[0]].resolved_spec()
    if unseen:
        logger.warning(
            "%d of %d layers got no input other than zeros in training or calibration, so their inputs stay in "
            "floating point: %s", len(unseen), len(inputs), ", ".join(unseen),
        )  # fmt: skip


def convert_to_packed(model: nn.Module, layers: Mapping[str, LayerSpec]) -> None:
    """Swap the classes of the named float layers for packed ones with empty buffers, to be loaded."""
    found = _fitting_candidates(model, layers)
    for name, spec in _holders_first(layers):
        module, kind, attribute = found[name].module, found[name].kind, found[name].attribute
        tensors = empty_tensors(spec, found[name].weight.device)
        if issubclass(kind.packed, PackedParameterWeight):
            to_packed_parameter(module, attribute, kind.packed, spec, tensors)
        else:
            holder = None if spec.tied_to is None else found[spec.tied_to].module
            to_packed(module, quantized_class(type(module), kind.packed), spec, tensors, holder)
    _serve_weights(model, layers)


@torch.no_grad()
def dequantize(model: nn.Module) -> bool:
    """Turn every quantized layer back into a float layer with its weight on the grid, in place.

    Returns:
        `bool`: Whether inputs of layers were quantized too, which float layers no longer do.
    """
    model.eval()  # the full grid, no DropBits
    layers: dict[str, Any] = dict((*training_layers(model), *packed_layers(model)))
    lost = any(layer.layer_spec().activation is not None for layer in layers.values())
    ties = {name: layer.layer_spec().tied_to or name for name, layer in layers.items()}
    weights = {name: nn.Parameter(layers[name].quantized_weight()) for name in set(ties.values())}
    owners = {child: module for module in model.modules() for child in module._modules.values()}
    for name, layer in layers.items():
        if isinstance(layer, (ParameterWeight, PackedParameterWeight)):
            to_float_parameter(owners[layer], name.rpartition(".")[2], weights[name])
        else:
            to_float(layer, float_class_of(layer), weights[ties[name]])
    _serve_weights(model, {})
    for module in model.modules():
        vars(module).pop("cpq_settings", None)
    return lost
