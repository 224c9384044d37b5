"""Learned Step Size Quantization (Esser et al., ICLR 2020) as published, in eager PyTorch: the method to compare with.

The step is a plain parameter; rounding passes gradients straight through inside the range; the gradient of the step
is scaled by 1/sqrt(N * hi); the initial step is 2 <|x|> / sqrt(hi).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def round_pass(x: Tensor) -> Tensor:
    return (x.round() - x).detach() + x


def grad_scale(x: Tensor, scale: float) -> Tensor:
    return (x - x * scale).detach() + x * scale


class LSQ(nn.Module):
    """Quantizer of one tensor: a step per output channel for weights, one step for activations."""

    def __init__(self, bits: int, signed: bool, channels: int | None = None) -> None:
        super().__init__()
        self.lo, self.hi = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        self.step = nn.Parameter(torch.zeros(channels or 1))
        self.started = False

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.dim() - 1)) if self.step.numel() > 1 else (1,)
        if not self.started:
            size = x.detach().abs().flatten(1).mean(1) if self.step.numel() > 1 else x.detach().abs().mean()
            self.step.data.copy_(2 * size / math.sqrt(self.hi) + 1e-9)
            self.started = True
        elements = x.numel() / self.step.numel() if self.step.numel() > 1 else x.numel() / x.shape[0]
        step = grad_scale(self.step, 1 / math.sqrt(elements * self.hi)).view(shape)
        return round_pass((x / step).clamp(self.lo, self.hi)) * step


class LSQLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.input_lsq(x), self.weight_lsq(self.weight), self.bias)


class LSQConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(self.input_lsq(x), self.weight_lsq(self.weight), self.bias)


CLASSES: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: LSQLinear, nn.Conv2d: LSQConv2d}


def prepare_lsq(
    model: nn.Module, names: set[str], weight_bits: int, activation_bits: int | None, signed_inputs: dict[str, bool]
) -> nn.Module:
    """Convert the named layers of `model` in place."""
    for name in names:
        layer = model.get_submodule(name)
        layer.__class__ = CLASSES[type(layer)]
        layer.weight_lsq = LSQ(weight_bits, signed=True, channels=layer.weight.shape[0])
        layer.weight_lsq(layer.weight)
        signed = signed_inputs.get(name, True)
        layer.input_lsq = nn.Identity() if activation_bits is None else LSQ(activation_bits, signed)
    return model
