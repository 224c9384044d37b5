"""The tensors of an export: packed ones as compressed-tensors names them, all others as `save_pretrained` does."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from ...errors import CPQError
from ...model.inspection import layer_type_name
from ...nn import PackedLayer, weight_name
from ...private_apis import names_not_saved, names_of_the_hub
from .containers import Container, contained
from .plain import checksum

SCALE_ERROR = 2**-8  # a scale in bfloat16 is off by no more


@contextmanager
def exact(layers: Mapping[str, PackedLayer]) -> Iterator[None]:
    """For its duration, packed layers compute as in training, whatever `fast_inference` has switched on."""
    before = {name: layer.fast for name, layer in layers.items()}
    try:
        for layer in layers.values():
            layer.fast = False
        yield
    finally:
        for name, layer in layers.items():
            layer.fast = before[name]


@contextmanager
def rounded_scales(layers: Mapping[str, PackedLayer]) -> Iterator[None]:
    """For its duration, packed layers compute with the scales that are stored: those of the model's dtype."""
    before = {name: layer.holder.weight_scale for name, layer in layers.items()}
    rounded = {name: scale.to(layers[name].dtype).float() for name, scale in before.items()}
    for name, scale in before.items():
        if bool(((rounded[name] - scale).abs() > SCALE_ERROR * scale).any()):
            raise CPQError(
                f"the scales of `{name}` (down to {float(scale.min()):.1e}) are too small for {layers[name].dtype}: "
                "export the model in float32 (`model.float()`) or bfloat16"
            )
    try:
        for name, layer in layers.items():
            layer.holder.weight_scale = rounded[name]
        yield
    finally:
        for name, layer in layers.items():
            layer.holder.weight_scale = before[name]


def stored_tensors(
    model: Any, layers: Mapping[str, PackedLayer], containers: Mapping[str, Container], untied: bool
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return what is stored, and the CRC-32 of every tensor that a model loaded from it must hold.

    Args:
        model: The packed model.
        layers: Name -> layer of all its packed layers.
        containers: Those of the layers that are stored packed; the others are in floating point.
        untied: Whether weights that are shared in the model are stored for each layer.
    """
    ours = {f"{name}.{key}" for name, layer in layers.items() for key in layer._buffers}
    tied = {} if untied else (getattr(model, "all_tied_weights_keys", None) or {})
    skipped = {*tied, *names_not_saved(model)} | ours
    stored = {name: tensor for name, tensor in model.state_dict().items() if name not in skipped}
    expected = {name: checksum(tensor) for name, tensor in (stored | dict(model.named_buffers())).items()}
    expected = {name: value for name, value in expected.items() if name not in skipped}
    experts: dict[str, Tensor] = {}
    for name, layer in layers.items():
        weight = weight_name(name, layer)
        if weight in tied or (layer.holder is not layer and name not in containers):
            continue
        dense = layer.quantized_weight()
        expected[weight] = checksum(dense)
        if name not in containers:
            stored[weight] = dense
        elif layer_type_name(layer) == "experts":
            experts |= _expert_tensors(model, name, layer, containers[name])
        else:
            stored |= _linear_tensors(name, layer, containers[name])
    stored = _checkpoint_names(model, stored)
    for name in stored:
        if experts and re.search(r"\.experts\.(\d+\.|gate_up_proj$|up_proj$|down_proj$)", name):
            raise CPQError(
                f"`{name}` is in floating point while other experts are quantized, which transformers cannot load: "
                "use cpq's own format (`save_pretrained`), or quantize all experts or none"
            )
    return _unshared(stored | experts), expected


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor with a memory of its own, as files have them."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes or not tensor.is_contiguous():
            tensors[name] = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(storage.data_ptr())
    return tensors


def _linear_tensors(name: str, layer: PackedLayer, container: Container) -> dict[str, Tensor]:
    words, scale = contained(layer, container)
    tensors = _weight_tensors(f"{name}.weight", words, scale.to(layer.dtype), layer.spec.weight.columns)
    activation = layer.spec.activation
    if activation is not None:
        tensors[f"{name}.input_scale"] = layer.input_scale.clone()
        if not activation.signed:  # levels 0 .. 2^b-1 are stored as signed ones
            zero = -(2 ** (activation.bits - 1))
            tensors[f"{name}.input_zero_point"] = torch.full_like(layer.input_scale, zero, dtype=torch.int8)
    return tensors


def _expert_tensors(model: Any, name: str, layer: PackedLayer, container: Container) -> dict[str, Tensor]:
    """A stacked weight `[experts, out, in]` as single experts, in the way that transformers saves it."""
    shape, split = layer.spec.weight.shape, []
    if not layer.spec.weight.transposed:
        stacked = contained(layer, container)
        split = [_checkpoint_names(model, {name: part.view(*shape[:2], -1)}) for part in stacked]
    if not split or any(not key.endswith(".weight") or part.dim() > 2 for key, part in split[0].items()):
        raise CPQError(
            f"the experts `{name}` of {type(model).__name__} are not stored one by one in checkpoints, and "
            "transformers reads no other packed ones: use cpq's own format (`save_pretrained`), or leave them in "
            f"floating point with `modules_to_not_convert=[{name!r}]`"
        )
    tensors: dict[str, Tensor] = {}
    for key, words in split[0].items():
        words, scale = (part[key].view(len(words), -1) for part in split)  # 5.17 drops dimensions of 1
        tensors |= _weight_tensors(key, words, scale.to(layer.dtype), layer.spec.weight.columns)
    return tensors


def _weight_tensors(weight: str, words: Tensor, scale: Tensor, columns: int) -> dict[str, Tensor]:
    shape = torch.tensor([len(words), columns])
    return {f"{weight}_packed": words, f"{weight}_scale": scale, f"{weight}_shape": shape}


def _checkpoint_names(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as `save_pretrained` of a model that is not ours would write them: names of the Hub, single experts."""
    with names_of_the_hub(model):
        return revert_weight_conversion(model, tensors)
