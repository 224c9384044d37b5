"""Layers that train: the float layer with its weight, and where asked for its input, put on the grid in forward.

Each is a subclass of the float layer and keeps its parameter names, so `isinstance` checks, initialisation and float
checkpoints work as before. A layer is converted in place by [`to_training`], by swapping its class.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import CPQError
from ..private_apis import hook_of
from ..tensor.activation_quantizer import ActivationQuantizer
from ..tensor.quantizer import WeightQuantizer
from ..tensor.recompute import dtype_of_product, multiply
from ..tensor.spec import LayerSpec


class TrainingLayer(nn.Module):
    """Base of all layers that train: `weight`, `weight_quantizer`, `input_quantizer` (or None)."""

    weight: Tensor
    weight_quantizer: WeightQuantizer
    input_quantizer: ActivationQuantizer | None
    tied_to: str | None = None  # name of the layer whose weight and weight quantizer this one shares

    def quantized_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight on the grid, shape of `weight`, in `dtype` or its own."""
        return self.weight_quantizer(
            self._parameters["weight"], dtype
        )  # `weight` may be shown on the grid: weight_access.py

    def quantized_input(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The input on the grid, in `dtype` or its own, or as it is where activations are not quantized."""
        return x if self.input_quantizer is None else self.input_quantizer(x, dtype)

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Input and weight on the grid, float32 at once in the dtype to which autocast would cast it."""
        dtype = dtype_of_product(x)
        return self.quantized_input(x, dtype), self.quantized_weight(dtype)

    @property
    def owner(self) -> nn.Module:
        """The module that is called where the weight is used: this one."""
        return self

    def count_uses(self, inputs: tuple[Any, ...], output: Any) -> tuple[float, float]:
        """From a call of `owner`: with how many inputs each weight was multiplied, and the elements of the input."""
        if not inputs[0].is_floating_point():  # looking up a row multiplies nothing
            return 0.0, 0.0
        return output.numel() / self.weight_quantizer.spec.rows, inputs[0].numel()

    def layer_spec(self) -> LayerSpec:
        """Return how this layer is quantized, a learned width as it stands."""
        activation = None if self.input_quantizer is None else self.input_quantizer.current_spec()
        return LayerSpec(self.weight_quantizer.current_spec(), activation, self.tied_to)


class CPQLinear(TrainingLayer, nn.Linear):
    """`nn.Linear` on the grid."""

    def forward(self, input: Tensor) -> Tensor:
        return multiply(F.linear, *self.operands(input), self.bias)


class CPQConv2d(TrainingLayer, nn.Conv2d):
    """`nn.Conv2d` on the grid; any stride, dilation, groups and padding mode."""

    def forward(self, input: Tensor) -> Tensor:
        return multiply(self._conv_forward, *self.operands(input), self.bias)


class CPQConv1d(TrainingLayer, nn.Conv1d):
    """`nn.Conv1d` on the grid, that of audio models; any stride, dilation, groups and padding mode."""

    def forward(self, input: Tensor) -> Tensor:
        return multiply(self._conv_forward, *self.operands(input), self.bias)


class CPQConv3d(TrainingLayer, nn.Conv3d):
    """`nn.Conv3d` on the grid, that of video models; any stride, dilation, groups and padding mode."""

    def forward(self, input: Tensor) -> Tensor:
        return multiply(self._conv_forward, *self.operands(input), self.bias)


class CPQConv1D(TrainingLayer, Conv1D):  # type: ignore[misc]
    """transformers' `Conv1D` (a linear layer with its weight stored `[in, out]`) on the grid."""

    def forward(self, x: Tensor) -> Tensor:
        return multiply(conv1d_forward, *self.operands(x), self.bias)


class FixedVocabulary(nn.Module):
    """An embedding with one step size a row cannot be resized; transformers would do it by assigning this size."""

    @property
    def num_embeddings(self) -> int:
        # a mixin: `layer_spec` comes from the layer that it is mixed into
        return self.layer_spec().weight.rows  # type: ignore[operator]

    @num_embeddings.setter
    def num_embeddings(self, value: int) -> None:
        raise CPQError(
            f"a quantized embedding of {self.num_embeddings} rows cannot be resized to {value}; call "
            "`resize_token_embeddings` on the float model, then prepare it"
        )


class CPQEmbedding(FixedVocabulary, TrainingLayer, nn.Embedding):
    """`nn.Embedding` on the grid; a row is a channel."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.quantized_weight()
        return F.embedding(input, weight, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)


def conv1d_forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`[..., in] @ [in, out] + [out] -> [..., out]`."""
    return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[1])


def swap_class(layer: Any, new_class: type[nn.Module]) -> None:
    """Change the class of a layer. A hook of accelerate holds on to the old `forward`, so it is put on anew."""
    hook = hook_of(layer)
    if hook is not None:
        remove_hook_from_module(layer)
        del layer.forward  # accelerate leaves the old method on the instance
    layer.__class__ = new_class
    if hook is not None:
        add_hook_to_module(layer, hook)


def to_training(
    layer: Any, training_class: type[TrainingLayer], spec: LayerSpec, min_bits: int, name: str, holder: Any = None
) -> None:
    """Turn a float layer into `training_class` in place. Its step sizes still have to be initialized or loaded.

    `holder` is the layer that has the weight quantizer if the weight is tied; it stays that layer's child alone.
    """
    device = layer.weight.device
    swap_class(layer, training_class)
    if holder is None:
        layer.register_module("weight_quantizer", WeightQuantizer(spec.weight, min_bits, device))
    else:
        vars(layer)["weight_quantizer"], layer.tied_to = holder.weight_quantizer, spec.tied_to
    register_input_quantizer(layer, spec, min_bits, device, name)


def drop_quantizers(layer: TrainingLayer) -> None:
    """Take from a layer what [`to_training`] gave it."""
    del layer.weight_quantizer, layer.input_quantizer
    vars(layer).pop("tied_to", None)


def register_input_quantizer(
    layer: nn.Module, spec: LayerSpec, min_bits: int, device: torch.device, name: str
) -> None:
    """Give a layer the quantizer of its input, or None."""
    activation = spec.activation
    quantizer = None if activation is None else ActivationQuantizer(activation, min_bits, device, name)
    layer.register_module("input_quantizer", quantizer)
