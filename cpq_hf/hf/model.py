"""Prepare a model for training, and pack it."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel

from ..errors import CPQError
from ..model import conversion
from .config import CPQConfig
from .quantizer import attach

M = TypeVar("M", bound=nn.Module)


def prepare_model(model: M, config: CPQConfig) -> M:
    """Make a float model train on the grid, in place, as `from_pretrained(..., quantization_config=config)` does.

    Parameter names stay as they are; each quantized layer gains a `weight_quantizer` and, with `activation_bits`, an
    `input_quantizer`. Call it before the optimizer is made and before `torch.compile`.

    Args:
        model (`nn.Module`): A transformers model or any other.
        config (`CPQConfig`): The settings.

    Returns:
        `nn.Module`: The same model.

    Raises:
        CPQError: If the config breaks a rule, fits no layer, or the model is compiled, prepared or packed already, or
            holds NaN. The model is then unchanged.

    Example:

    ```python
    >>> from torch import nn
    >>> from cpq_hf import CPQConfig, prepare_model
    >>> model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> prepare_model(model, CPQConfig(weight_bits=3))[0].weight_quantizer
    WeightQuantizer(bits=3, granularity=channel)

    ```
    """
    if not isinstance(config, CPQConfig):
        raise CPQError(f"`config` must be a CPQConfig, got {type(config).__name__}")
    config = copy.deepcopy(config)  # what the user does to theirs later changes no model
    # One object: `model.cpq_settings` and `model.config.quantization_config` both hold it.
    config.note_layers(conversion.prepare(model, config))
    if isinstance(model, PreTrainedModel):
        attach(model, config)
    return model


def pack_model(model: M) -> M:
    """Replace trained weights by packed integers, in place. Outputs in evaluation stay bit-identical.

    A transformers model can then be saved with `save_pretrained` or `push_to_hub`; it is put in evaluation mode, for
    it can no longer be trained.

    Args:
        model (`nn.Module`): A prepared model, trained or calibrated.

    Returns:
        `nn.Module`: The same model.

    Raises:
        CPQError: If the model is not prepared, an activation was never calibrated, or a weight is NaN. The model is
            then unchanged.

    Example:

    ```python
    >>> import torch
    >>> from torch import nn
    >>> from cpq_hf import CPQConfig, pack_model, prepare_model
    >>> model = prepare_model(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 2)), CPQConfig(weight_bits=3))
    >>> x = torch.randn(4, 16)
    >>> trained = model.eval()(x)
    >>> torch.equal(pack_model(model)(x), trained)
    True
    >>> model[0].weight_packed.shape
    torch.Size([8, 2])

    ```
    """
    layers = conversion.pack(model)
    if isinstance(model, PreTrainedModel):
        attach(model, model.config.quantization_config.resolved(layers, packed=True))
    return model
