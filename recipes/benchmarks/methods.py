"""The methods that accuracy.py compares: how each prepares a float model, and where its weights lie on their grid.

All quantize the same layers, first and last included, where they can: torchao's quantization-aware training has no
convolutions, so the ViT's first layer stays in floating point there (to its advantage) and the ResNet is left out;
quanto has no 3-bit weights and no activations below 8 bits. Peers run with the settings that their documentation
gives for training: a scale per output channel (quanto: its own), one per tensor for activations (torchao: one per
token, found anew in each batch).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from lsq import LSQ, prepare_lsq
from torch import Tensor, nn

import cpq_hf
from cpq_hf.nn import TrainingLayer

Positions = list[tuple[Tensor, int]]  # weights in steps of their grid, and the bit-width, layer by layer


def prepare_cpq(model: nn.Module, bits: tuple[int, int], batch: dict[str, Tensor], **fields: Any) -> nn.Module:
    config = cpq_hf.CPQConfig(
        **({"weight_bits": bits[0], "activation_bits": bits[1], "modules_to_not_convert": []} | fields)
    )
    cpq_hf.prepare_model(model, config)
    return cpq_hf.calibrate_model(model, [batch])


def prepare_lsq_like(model: nn.Module, bits: tuple[int, int], batch: dict[str, Tensor]) -> nn.Module:
    probe = prepare_cpq(copy.deepcopy(model), bits, batch)
    layers = {name: layer for name, layer in probe.named_modules() if isinstance(layer, TrainingLayer)}
    signed = {name: bool(layer.input_quantizer.resolved_spec().signed) for name, layer in layers.items()}
    return prepare_lsq(model, set(layers), bits[0], bits[1], signed)


def prepare_torchao(model: nn.Module, bits: tuple[int, int], batch: dict[str, Tensor]) -> nn.Module:
    from torchao.quantization import PerAxis, PerToken, quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    def dtype(width: int) -> torch.dtype:
        return getattr(torch, f"int{width}")

    weight = IntxFakeQuantizeConfig(dtype(bits[0]), PerAxis(0), is_symmetric=True)
    activation = IntxFakeQuantizeConfig(dtype(bits[1]), PerToken(), is_symmetric=False)
    quantize_(model, QATConfig(weight_config=weight, activation_config=activation, step="prepare"))
    return model


def prepare_brevitas(model: nn.Module, bits: tuple[int, int], batch: dict[str, Tensor]) -> nn.Module:
    import brevitas.nn as qnn
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat, Uint8ActPerTensorFloat

    probe = prepare_cpq(copy.deepcopy(model), bits, batch)
    for name, layer in probe.named_modules():
        if not isinstance(layer, TrainingLayer):
            continue
        old: Any = model.get_submodule(name)
        signed = layer.input_quantizer.resolved_spec().signed
        settings = {
            "weight_quant": Int8WeightPerChannelFloat,
            "weight_bit_width": bits[0],
            "input_quant": Int8ActPerTensorFloat if signed else Uint8ActPerTensorFloat,
            "input_bit_width": bits[1],
            "bias": old.bias is not None,
        }
        if isinstance(old, nn.Linear):
            new = qnn.QuantLinear(old.in_features, old.out_features, **settings)
        else:
            new = qnn.QuantConv2d(
                old.in_channels, old.out_channels, old.kernel_size, stride=old.stride, padding=old.padding,
                dilation=old.dilation, groups=old.groups, **settings,
            )  # fmt: skip
        new.load_state_dict(old.state_dict(), strict=False)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    return model


def prepare_quanto(model: nn.Module, bits: tuple[int, int], batch: dict[str, Tensor]) -> nn.Module:
    from optimum import quanto

    quanto.quantize(model, weights=getattr(quanto, f"qint{bits[0]}"), activations=getattr(quanto, f"qint{bits[1]}"))
    with torch.no_grad(), quanto.Calibration(streamline=False):
        model.eval()(**batch)
    return model


PREPARE: dict[str, Callable[..., nn.Module]] = {
    "rtn": prepare_cpq,
    "lsq": prepare_lsq_like,
    "cpq": prepare_cpq,
    "torchao": prepare_torchao,
    "brevitas": prepare_brevitas,
    "quanto": prepare_quanto,
}


def covers(method: str, task: str, bits: tuple[int, int]) -> bool:
    """Whether a method can do it: one linear layer of a ResNet does not count as quantizing it."""
    if method == "torchao":
        return task not in ("resnet", "mobilenet")
    return method != "quanto" or (bits[0] in (2, 4, 8) and bits[1] == 8)


@torch.no_grad()
def positions(method: str, model: nn.Module) -> Positions:
    """Weights in steps of their grid, shifted so that levels are `-2^(b-1) .. 2^(b-1)-1`; nothing for quanto."""
    found = []
    for layer in model.modules():
        if isinstance(layer, TrainingLayer):
            alpha, spec = layer.weight_quantizer.alpha(), layer.layer_spec().weight
            found.append((layer.weight.flatten(1) / alpha.view(-1, 1) - spec.grid.offset, spec.bits))
        elif isinstance(getattr(layer, "weight_lsq", None), LSQ):
            lsq = layer.weight_lsq
            found.append((layer.weight.flatten(1) / lsq.step.view(-1, 1), lsq.hi.bit_length() + 1))
        elif method == "brevitas" and hasattr(layer, "quant_weight"):
            quantized = layer.quant_weight()
            found.append((layer.weight.flatten(1) / quantized.scale.reshape(-1, 1), int(quantized.bit_width)))
        elif method == "torchao" and type(layer).__name__ == "FakeQuantizedLinear":
            quantizer = layer.weight_fake_quantizer
            quantizer(layer.weight)
            width = {torch.int2: 2, torch.int3: 3, torch.int4: 4, torch.int8: 8}[quantizer.config.dtype]
            found.append((layer.weight / quantizer.scale.view(-1, 1), width))
    return found
