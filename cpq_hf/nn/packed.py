"""Layers that serve: integer words in place of the weight, the same arithmetic as the layer that trained.

A packed layer holds three buffers, those of compressed-tensors' `pack-quantized` (see `packing.py`):

    weight_packed int32 [rows, ceil(columns*bits/32)], weight_scale float32 [1] | [rows, groups], weight_shape int64

and `input_scale` float32 [1] where its input is quantized. Its output equals, bit for bit, what the layer that trained
gives in evaluation: levels and scales are the same numbers, multiplied in the same float32. A layer that is told to be
`fast` (fast_inference.py) adds up in another order instead, and never holds a float weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import CPQError
from ..private_apis import mark_initialized
from ..tensor.fake_quantize import nearest_levels
from ..tensor.kernels.packed import dequantize, multiply
from ..tensor.packing import pack, words_per_row
from ..tensor.quantizer import from_grouped
from ..tensor.spec import LayerSpec
from ..torch_private import has_unsaved_buffers
from .training import FixedVocabulary, TrainingLayer, conv1d_forward, drop_quantizers, swap_class


class PackedLayer(nn.Module):
    """Base of all packed layers."""

    spec: LayerSpec
    dtype: torch.dtype
    weight_packed: Tensor
    weight_scale: Tensor
    input_scale: Tensor
    fast: bool = False  # multiply straight from the words, which rounds in another order: see fast_inference.py

    @property
    def holder(self) -> PackedLayer:
        """The layer that holds the weight: this one, or the one that its weight is tied to."""
        return vars(self).get("_holder", (self,))[0]  # in a tuple, to be no child

    def quantized_weight(self) -> Tensor:
        """The weight as floating-point numbers: shape of the float layer's, in the layer's dtype."""
        return from_grouped(self._dequantized(self.holder.weight_packed, self.holder.weight_scale), self.spec.weight)

    def quantized_input(self, x: Tensor) -> Tensor:
        """The input on the grid, or as it is where activations are not quantized."""
        if self.training and torch.is_grad_enabled():
            raise CPQError(
                "this model is packed: its weights are integers and cannot be trained. Call `model.eval()` to use it, "
                "or train from the checkpoint that was saved before packing"
            )
        activation = self.spec.activation
        if activation is None:
            return x
        levels = nearest_levels(x, self.input_scale, activation.grid)
        return levels.mul_(self.input_scale).to(x.dtype)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, for code that looks at a layer's weight. Made anew at each access."""
        weight = self.quantized_weight()
        mark_initialized(weight)  # there is nothing here for transformers to init
        return weight

    @weight.setter
    def weight(self, value: object) -> None:
        raise CPQError("the weight of a packed layer cannot be replaced; change the model before packing it")

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in `nn.Module`, which assigns parameters through here, but a packed layer never gets a float weight."""
        if name == "weight":
            raise CPQError("the weight of a packed layer cannot be replaced; change the model before packing it")
        super().register_parameter(name, param)

    def layer_spec(self) -> LayerSpec:
        """Return how this layer is quantized."""
        return self.spec

    def fast_product(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """`x @ weight.T + bias` without a float weight, or None where the exact path is to do it."""
        if not self.fast or (x.dtype != self.dtype and not torch.is_autocast_enabled(x.device.type)):
            return None
        weight, holder = self.spec.weight, self.holder
        return multiply(x, holder.weight_packed, holder.weight_scale, bias, weight.bits, weight.grid.offset)

    def _dequantized(self, words: Tensor, scale: Tensor) -> Tensor:
        """Packed rows -> `[rows, columns]` in the layer's dtype."""
        weight = self.spec.weight
        return dequantize(words, scale, weight.bits, weight.columns, weight.grid.offset, self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLayer:
        """Move everything, cast what the float layer would cast, but keep the scales float32."""
        kept = {name: buffer for name, buffer in self._buffers.items() if name.endswith("_scale")}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        if not self.holder.weight_scale.is_meta:
            self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def extra_repr(self) -> str:
        weight, activation = self.spec.weight, self.spec.activation
        inputs = "" if activation is None else f", input_bits={activation.bits}, input_signed={activation.signed}"
        return f"shape={list(weight.shape)}, bits={weight.bits}, granularity={weight.granularity}{inputs}"


class PackedLinear(PackedLayer, nn.Linear):
    """`nn.Linear` from packed weights."""

    def forward(self, input: Tensor) -> Tensor:
        x = self.quantized_input(input)
        product = self.fast_product(x, self.bias)
        return F.linear(x, self.quantized_weight(), self.bias) if product is None else product


class PackedConv2d(PackedLayer, nn.Conv2d):
    """`nn.Conv2d` from packed weights."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(self.quantized_input(input), self.quantized_weight(), self.bias)


class PackedConv1d(PackedLayer, nn.Conv1d):
    """`nn.Conv1d` from packed weights."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(self.quantized_input(input), self.quantized_weight(), self.bias)


class PackedConv3d(PackedLayer, nn.Conv3d):
    """`nn.Conv3d` from packed weights."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(self.quantized_input(input), self.quantized_weight(), self.bias)


class PackedConv1D(PackedLayer, Conv1D):  # type: ignore[misc]
    """transformers' `Conv1D` from packed weights."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.quantized_input(x)
        product = self.fast_product(x, self.bias)
        return conv1d_forward(x, self.quantized_weight(), self.bias) if product is None else product


class PackedEmbedding(FixedVocabulary, PackedLayer, nn.Embedding):
    """`nn.Embedding` from packed weights: only the rows that are looked up are unpacked."""

    def forward(self, input: Tensor) -> Tensor:
        holder, rows = self.holder, input.flatten()
        scale = holder.weight_scale if holder.weight_scale.dim() == 1 else holder.weight_scale[rows]
        return self._dequantized(holder.weight_packed[rows], scale).view(*input.shape, self.spec.weight.columns)


def packed_tensors(spec: LayerSpec) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor a packed layer stores beside its bias; a tied weight is stored elsewhere."""
    weight, tensors = spec.weight, {}
    if spec.tied_to is None:
        tensors = {
            "weight_packed": ((weight.rows, words_per_row(weight.columns, weight.bits)), torch.int32),
            "weight_scale": (weight.scale_shape, torch.float32),
            "weight_shape": ((len(weight.shape),), torch.int64),
        }
    return tensors if spec.activation is None else tensors | {"input_scale": ((1,), torch.float32)}


def empty_tensors(spec: LayerSpec, device: torch.device) -> dict[str, Tensor]:
    """Buffers for a checkpoint to fill."""
    return {
        name: torch.empty(shape, dtype=kind, device=device) for name, (shape, kind) in packed_tensors(spec).items()
    }


@torch.no_grad()
def trained_tensors(layer: TrainingLayer) -> tuple[LayerSpec, dict[str, Tensor]]:
    """Return what a layer that trained becomes: its final specification, and its packed tensors."""
    spec, tensors = layer.layer_spec(), {}
    if spec.tied_to is None:
        tensors = {
            "weight_packed": pack(layer.weight_quantizer.levels(layer.weight), spec.weight.bits),
            "weight_scale": layer.weight_quantizer.alpha(),
            "weight_shape": torch.tensor(spec.weight.shape, device=layer.weight.device),
        }
    if layer.input_quantizer is None or not layer.input_quantizer.calibrated:
        return replace(spec, activation=None), tensors  # as it is evaluated
    activation = layer.input_quantizer.resolved_spec()
    return replace(spec, activation=activation), tensors | {"input_scale": layer.input_quantizer.alpha()}


def fill_packed(layer: Any, spec: LayerSpec, dtype: torch.dtype, tensors: dict[str, Tensor]) -> None:
    """Give a packed layer what makes it one."""
    for name, tensor in tensors.items():
        layer.register_buffer(name, tensor)
    layer.spec, layer.dtype = spec, dtype
    # transformers has nothing to init here, except what a subclass does not save (the scale of Gemma's embedding)
    mark_initialized(layer, not has_unsaved_buffers(layer))


def to_packed(
    layer: Any, packed_class: type[PackedLayer], spec: LayerSpec, tensors: dict[str, Tensor], holder: Any = None
) -> None:
    """Turn a layer, float or one that trained, into `packed_class` in place; `holder` has its weight if it is tied."""
    dtype = layer.weight.dtype
    if isinstance(layer, TrainingLayer):
        drop_quantizers(layer)
    del layer.weight
    swap_class(layer, packed_class)
    fill_packed(layer, spec, dtype, tensors)
    if holder is not None:
        vars(layer)["_holder"] = (holder,)


def to_float(layer: Any, float_class: type[nn.Module], weight: nn.Parameter) -> None:
    """Turn a layer that trains, or a packed one, into the float layer that it came from, with this weight."""
    if isinstance(layer, TrainingLayer):
        drop_quantizers(layer)
    else:
        for name in packed_tensors(layer.spec):
            delattr(layer, name)
        for name in ("_holder", "fast"):
            vars(layer).pop(name, None)
        del layer.spec, layer.dtype
    swap_class(layer, float_class)
    layer.register_parameter("weight", weight)
