"""Look at a model: its layers, its quantizers, their names. Changes nothing; conversion.py does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..distributed import full_tensor, local_shard
from ..errors import CPQError
from ..nn import SUFFIX, PackedLayer, ParameterWeight, TrainingLayer, quantized_layer_type, weight_name
from ..tensor.activation_quantizer import ActivationQuantizer
from ..tensor.quantizer import Quantizer
from ..torch_private import foreach_norm
from .settings import QuantizationSettings


def training_layers(model: nn.Module) -> Iterator[tuple[str, TrainingLayer]]:
    """`(name, layer)` of every layer that trains on a grid; one that is a parameter of a module has that name."""
    return (
        (name.removesuffix(SUFFIX) if isinstance(module, ParameterWeight) else name, module)
        for name, module in model.named_modules()
        if isinstance(module, TrainingLayer)
    )


def packed_layers(model: nn.Module) -> Iterator[tuple[str, PackedLayer]]:
    """`(name, layer)` of every packed layer."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, PackedLayer))


def quantizers(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """`(name, quantizer)` of every quantizer, of weights and of activations."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Quantizer))


def transformers_models(model: nn.Module) -> Iterator[PreTrainedModel]:
    """The model and those inside of it that are of transformers, each with a config."""
    return (module for module in model.modules() if isinstance(module, PreTrainedModel))


def quantizer_parameter_names(model: nn.Module) -> set[str]:
    """Names of all parameters that belong to quantizers."""
    return {f"{name}.{key}" for name, module in quantizers(model) for key, _ in module.named_parameters(recurse=False)}


def quantized_parameter_names(model: nn.Module) -> set[str]:
    """Names of all float parameters that layers which train put on a grid."""
    return {weight_name(name, layer) for name, layer in training_layers(model)}


def settings_of(model: nn.Module) -> QuantizationSettings:
    """Return the settings that a model was prepared with; `CPQError` if it was not."""
    return prepared_module(model).cpq_settings


def prepared_module(model: nn.Module) -> Any:
    """The module that was prepared, inside of whatever wraps it; `CPQError` if there is none."""
    for module in model.modules():  # a wrapper (DDP, a compiled module) comes first and carries no settings
        if "cpq_settings" in vars(module):
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


def is_calibrated(model: nn.Module) -> bool:
    """Return whether every quantizer of an activation knows its range; of a sharded model, asked in every process."""
    found = [item for _, item in quantizers(model) if isinstance(item, ActivationQuantizer)]
    return not any(bool(full_tensor(item.signed.detach()).isnan()) for item in found)  # NaN until it is known


@torch.no_grad()
def first_not_finite(model: nn.Module) -> str | None:
    """Name of the first trained parameter that holds NaN or infinite values; of a sharded model, in this process."""
    trained = {name: local_shard(p.detach()) for name, p in model.named_parameters() if p.requires_grad and p.numel()}
    tensors = {name: tensor for name, tensor in trained.items() if tensor.numel()}
    largest = foreach_norm(list(tensors.values()), ord=torch.inf)
    if not largest or bool(
        torch.isfinite(torch.stack([norm.float().to(largest[0].device) for norm in largest])).all()
    ):
        return None
    return next(name for name, norm in zip(tensors, largest, strict=True) if not bool(torch.isfinite(norm)))


def layer_type_name(layer: nn.Module) -> str:
    """Name of a layer's row in the table of layers."""
    return quantized_layer_type(layer).name
