"""The hooks by which transformers builds, loads and saves a CPQ model: translate and delegate.

Three kinds of checkpoint come in, told apart by config.json: a float one (no `quantization_config`: select layers,
load, fit step sizes), one saved during training (a table of layers: convert these, load, everything must have been
there), and a packed one (the same with `packed`: verify the files, convert to packed layers, load).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from ..errors import CPQError
from ..model import conversion, inspection
from ..model.selection import candidates, select, tied_groups
from ..private_apis import (
    expect_missing,
    mark_quantized,
    names_not_saved,
    save_under_own_names,
    stop_expecting,
    was_loaded,
)
from ..tensor.spec import LayerSpec
from .card import repository
from .checkpoint import INDEX, STEM, checksum, names_packed_weights, verify_config, verify_files, weight_files
from .config import QUANT_METHOD, CPQConfig
from .hub import push_to_hub
from .saving import save_packed

logger = logging.getLogger(__name__)

_QUANTIZER_KEYS = r"\.(weight|input)_quantizer\."


class CPQHfQuantizer(HfQuantizer):
    """Quantizer of transformers for `quant_method="cpq"`."""

    quantization_config: CPQConfig

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        placed = device_map.values() if isinstance(device_map, dict) else [device_map]
        if "disk" in placed:
            raise CPQError(
                "`device_map` offloads modules to disk, which a quantized model does not support: give it more "
                "memory, or place modules on 'cpu' or a GPU"
            )

    def update_attn_implementation(self, config: Any) -> Any:
        """Called before transformers builds a model or looks for weights: the moment to name those of a packed one.

        What is at hand by now is checked, for transformers builds whatever config.json says.
        """
        if self.quantization_config.packed or names_packed_weights(config):
            config_file = _config_file(config)
            if config_file is not None:
                verify_config(config_file)
                if any(config_file.parent.glob(f"{STEM}*")):
                    weight_files(config_file.parent / INDEX)
            config.transformers_weights = INDEX
        return config

    update_tp_plan = update_attn_implementation  # the hook of that moment in transformers 5.17

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        if config.packed:
            del model.config.transformers_weights  # the name has served; the config may be used again
            config = _verified(checkpoint_files or [], config)
            layers = layers_in_model(model, config.layer_specs())
            conversion.convert_to_packed(model, layers)
            _forget_ties(model, layers)
            self.quantization_config = config.resolved(layers, packed=True)
            return
        if config.layers is None:
            layers = select(model, config)
            expect_missing(model, _QUANTIZER_KEYS)
        else:
            layers = layers_in_model(model, config.layer_specs())
        self.fresh = config.layers is None
        self.quantization_config = config.resolved(layers)
        _note_base_model(model, self.quantization_config)
        conversion.convert_to_training(model, layers, self.quantization_config)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        _save_as_given(model)
        if config.packed:
            return
        if self.fresh:
            stop_expecting(model, _QUANTIZER_KEYS)
            conversion.initialize(model)
        else:
            _check_all_loaded(model)
        conversion.reset_schedule(model, config)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor] | None, dict]:
        """Called before config.json is written: the moment to note the checksums of what is about to be saved."""
        state_dict = getattr(self, "state_dict", None)
        if self.quantization_config.packed:
            unsaved = {*(getattr(model, "all_tied_weights_keys", None) or ()), *names_not_saved(model)}
            all_tensors = model.state_dict() if state_dict is None else state_dict
            tensors = {name: tensor for name, tensor in all_tensors.items() if name not in unsaved}
            self.quantization_config.checksums = {name: checksum(tensor) for name, tensor in tensors.items()}
        return state_dict, {}

    def remove_quantization_config(self, model: PreTrainedModel) -> None:
        """After `dequantize`, a plain model saves plainly."""
        super().remove_quantization_config(model)
        for name in ("save_pretrained", "push_to_hub"):
            vars(model).pop(name, None)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """For `model.dequantize()`: a plain float model, its weights rounded to the grid."""
        if conversion.dequantize(model):
            logger.warning("activations of the dequantized model are not quantized any more, its outputs will differ")
        return model if dtype is None else nn.Module.to(model, dtype)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    # Trainer asks both before it accepts a model, even one that it only evaluates. That a packed model is not trained
    # is seen to by the layers themselves, the controller and the callback.
    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def attach(model: Any, config: CPQConfig) -> None:
    """Give a converted model what `from_pretrained` would have given it, so that it saves and loads alike."""
    conversion.own_configs(model)
    _note_base_model(model, config)
    quantizer = CPQHfQuantizer(config, pre_quantized=True)
    model.hf_quantizer = quantizer
    model.config.quantization_config = config
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD
    for part in inspection.transformers_models(model):
        mark_quantized(part.config)
    _save_as_given(model)


def _note_base_model(model: Any, config: CPQConfig) -> None:
    if config.base_model is None:
        config.base_model = repository(model.config.name_or_path)


def _save_as_given(model: Any) -> None:
    """Save under the model's own names, so that a resumed run finds every tensor, and what `state_dict` holds.

    transformers replaces the argument `state_dict` of `save_pretrained` by what the quantizer returns, but a Trainer
    hands in there what it has gathered from all processes (FSDP, DeepSpeed).
    """
    save_under_own_names(model)
    model.save_pretrained = MethodType(_save_pretrained, model)
    model.push_to_hub = MethodType(_push_to_hub, model)


def _save_pretrained(
    self: Any, save_directory: Any, is_main_process: bool = True, state_dict: Any = None, **kwargs: Any
) -> None:
    save = save_packed if self.hf_quantizer.quantization_config.packed else type(self).save_pretrained
    self.hf_quantizer.state_dict = state_dict
    try:
        save(self, save_directory, is_main_process=is_main_process, state_dict=state_dict, **kwargs)
    finally:
        self.hf_quantizer.state_dict = None


def _push_to_hub(self: Any, *args: Any, **kwargs: Any) -> Any:
    packed = self.hf_quantizer.quantization_config.packed
    return (push_to_hub if packed else type(self).push_to_hub)(self, *args, **kwargs)


def _config_file(config: Any) -> Path | None:
    """Return the config.json that a config was read from, if it is in a folder.

    A config from the Hub keeps no commit by which it could be found, nor does one keep its path that a model class
    read instead of an auto class: these are checked beside the weights.
    """
    beside = Path(config.name_or_path) / "config.json"
    return beside if config.name_or_path and beside.is_file() else None


def _verified(checkpoint_files: list[str], config: CPQConfig) -> CPQConfig:
    """The config beside packed files that have been verified; `config` where they lie there without one."""
    beside = next((Path(file).parent / "config.json" for file in checkpoint_files), None)
    if beside is not None and beside.is_file():
        config = verify_config(beside)
    verify_files(checkpoint_files, config)
    return config


def layers_in_model(model: PreTrainedModel, layers: dict[str, LayerSpec]) -> dict[str, LayerSpec]:
    """The table of a checkpoint under the names that `model` uses.

    A checkpoint of a model with a head loads into the bare base model and the other way round: then names lose or
    gain the base model's prefix, and layers of a head that is not there are left out. A head that is tied to a
    quantized embedding is quantized with it.
    """
    names = set(candidates(model))
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    inside = {name: spec for name, spec in layers.items() if name.startswith(prefix)}
    choices = [layers]
    if prefix:
        choices += [_renamed(inside, lambda name: name.removeprefix(prefix)), _renamed(layers, lambda n: prefix + n)]
    for chosen in choices:
        if chosen and all(name in names for name in chosen):
            for holder, *others in tied_groups(model):
                if holder in chosen:
                    tied = replace(chosen[holder], activation=None, tied_to=holder)
                    chosen = {name: tied for name in others if name in names} | chosen
            return chosen
    absent = next(name for name in layers if name not in names)
    raise CPQError(
        f"config.json lists the quantized layer `{absent}`, which {type(model).__name__} does not have; load the "
        "checkpoint with the model class that saved it"
    )


def _renamed(layers: dict[str, LayerSpec], rename: Callable[[str], str]) -> dict[str, LayerSpec]:
    return {
        rename(name): replace(spec, tied_to=None if spec.tied_to is None else rename(spec.tied_to))
        for name, spec in layers.items()
    }


def _check_all_loaded(model: nn.Module) -> None:
    names = inspection.quantizer_parameter_names(model)
    absent = [name for name, parameter in model.named_parameters() if name in names and not was_loaded(parameter)]
    if absent:
        raise CPQError(
            f"the checkpoint lacks `{absent[0]}` of layer `{absent[0].rpartition('.')[0].rpartition('.')[0]}` "
            f"({len(absent)} quantizer parameters in all); it is incomplete"
        )


def _forget_ties(model: PreTrainedModel, layers: dict[str, LayerSpec]) -> None:
    """Packed layers have no weight parameter that could be tied."""
    packed = {f"{name}.weight" for name in layers}  # parameters of experts and attention are never tied
    ties = model.all_tied_weights_keys
    for target, source in list(ties.items()):
        if target in packed or source in packed:
            del ties[target]
