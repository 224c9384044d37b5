"""Write a packed model as compressed-tensors' `pack-quantized`, which plain transformers and vLLM load.

What that format has no packed form for, or transformers reads wrongly (convolutions, `Conv1D`, embeddings), is written
in floating point with its weights on the grid: the same numbers in more bytes. What cannot be kept equal is refused.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ..errors import CPQError
from ..nn import PackedLayer
from ..packing import pack
from ..spec import MAX_BITS, MIN_BITS, ActivationSpec
from ..summary import summarize
from ..surgery import layer_kind, packed_layers
from ..version import __version__
from .containers import Container, choose_containers, contained
from .plain import checksum
from .reload import check_reload, default_inputs, difference, placed, run

logger = logging.getLogger(__name__)

FORMAT = "pack-quantized"
SIDE_FILE = "cpq_config.json"
PACKABLE = ("linear", "experts")
EXPERT_TARGET = r"re:.*\.experts\.\d+\.\w+$"  # under any name: vLLM asks for its own, transformers for the word
SCALE_ERROR = 2**-8  # a scale in bfloat16 is off by no more
# Of the largest output. Equal weights on the same device give the same bits but for the order of sums. Quantized inputs
# make a jump of it where one lies at the border of two levels: `x/s + z` is rounded in place of `x/s`.
TOLERANCE, TOLERANCE_QUANTIZED_INPUTS = 1e-5, 1e-2


def export_compressed_tensors(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    example_inputs: Mapping[str, Any] | None = None,
    max_shard_size: int | str = "50GB",
    container_bits: Collection[int] = range(MIN_BITS, MAX_BITS + 1),
) -> dict[str, Any]:
    """Write a packed model for plain transformers (with the package compressed-tensors) and vLLM.

    Before it is kept, the folder is loaded in a process that cannot import cpq_hf: every tensor must be the same bit
    for bit, and the outputs for `example_inputs` equal. Nothing is left behind if it raises. Layers that inference
    engines fuse are written with one width and granularity, without a change of their numbers; convolutions and
    embeddings are written in floating point. Tokenizers and processors are not written.

    Args:
        model (`PreTrainedModel`): A packed model, from [`pack_model`] or `from_pretrained`.
        directory (`str` or `PathLike`): Where to write. Must not exist, or be empty.
        example_inputs (`dict`, *optional*): Keyword arguments of the model to compare outputs on. Models that take
            `input_ids` or `pixel_values` alone have a default.
        max_shard_size (`int` or `str`, defaults to `"50GB"`): As in `save_pretrained`.
        container_bits (collection of `int`, defaults to 2 to 8): Widths that weights may be stored in, each in the next
            one that holds it: `(4, 8)` for tools that have no others.

    Returns:
        `dict`: `files`, `bytes` of the weights, `containers` (layer -> bits, None for floating point), `difference`
        between the outputs here and there, and `rounding`: how far outputs moved because scales are stored in the
        model's dtype (0 in float32), both relative to the largest output.

    Raises:
        CPQError: If compressed-tensors is not installed, the folder is not empty, or the model is not packed, holds
            something that the format cannot express (the message names layer, reason and alternative), or does not
            reload as the same model.

    Example:

    ```python
    model = cpq_hf.pack_model(model)
    cpq_hf.export_compressed_tensors(model, "my-model-w4-ct")
    tokenizer.save_pretrained("my-model-w4-ct")
    ```
    """
    directory = Path(directory)
    _check_environment(directory, container_bits)
    layers = _checked_layers(model)
    weights = {name: layer.spec.weight for name, layer in layers.items() if _is_packed_there(layer)}
    experts = [name for name in weights if layer_kind(layers[name]) == "experts"]
    containers = choose_containers(weights, experts, container_bits)
    packed = {name: layers[name] for name in containers}
    inputs = placed(model, default_inputs(model) if example_inputs is None else example_inputs)
    as_trained = run(model, inputs)
    with _rounded_scales(packed, containers):
        expected = run(model, inputs)
        untied = _untied(layers)
        tensors, checksums = _tensors(model, layers, containers, untied)
    rounding = difference(expected, as_trained)
    _warn(layers, containers, rounding, model.dtype)

    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    if untied:
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    config.quantization_config = _quantization_config(model, packed, containers)
    with _folder_in_place(directory) as folder:
        save_torch_state_dict(tensors, folder, max_shard_size=max_shard_size)
        config.save_pretrained(folder)
        if model.can_generate() and model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        (folder / SIDE_FILE).write_text(json.dumps(_side_file(model, containers), indent=2), encoding="utf-8")
        scratch = folder / "check"
        scratch.mkdir()
        quantized_inputs = any(layer.spec.activation is not None for layer in packed.values())
        tolerance = TOLERANCE_QUANTIZED_INPUTS if quantized_inputs else TOLERANCE
        apart = check_reload(model, folder, scratch, inputs, expected, checksums, tolerance)
        shutil.rmtree(scratch)
    files = sorted(directory.glob("*.safetensors"))
    return {
        "files": [file.name for file in files],
        "bytes": sum(file.stat().st_size for file in files),
        "containers": {name: containers[name].bits if name in containers else None for name in layers},
        "difference": apart,
        "rounding": rounding,
    }


# --- what is refused -------------------------------------------------------------------------------------------------


def _check_environment(directory: Path, container_bits: Collection[int]) -> None:
    if find_spec("compressed_tensors") is None:
        raise CPQError("exporting needs the package compressed-tensors: pip install cpq-hf[export]")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CPQError(f"{directory} exists and is not an empty folder; choose another, nothing is overwritten")
    known = range(MIN_BITS, MAX_BITS + 1)
    if not container_bits or any(bits not in known for bits in container_bits):
        raise CPQError(f"`container_bits` must hold integers from {MIN_BITS} to {MAX_BITS}, got {container_bits!r}")


def _checked_layers(model: PreTrainedModel) -> dict[str, PackedLayer]:
    """The packed layers of a model that can be exported."""
    layers = dict(packed_layers(model))
    if not layers:
        raise CPQError("the model is not packed: call `cpq_hf.pack_model(model)` first")
    if getattr(transformers, type(model).__name__, None) is not type(model):
        raise CPQError(f"{type(model).__name__} is not a class of transformers, so plain transformers cannot load it")
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise CPQError(f"`{name}` is offloaded or on the meta device; load the model to a real device first")
    for name, layer in layers.items():
        if layer.spec.activation is not None:
            _check_input(name, layer, model.dtype)
    if not any(_is_packed_there(layer) for layer in layers.values()):
        kinds = ", ".join(sorted({layer_kind(layer) for layer in layers.values()}))
        raise CPQError(
            f"compressed-tensors has packed weights for Linear layers and experts only, and the model has none that "
            f"are quantized (only {kinds}): use cpq's own format (`save_pretrained`) or `cpq_hf.export_onnx`"
        )
    return layers


def _check_input(name: str, layer: PackedLayer, dtype: torch.dtype) -> None:
    kind = layer_kind(layer)
    if kind != "linear":
        reason = "transformers turns experts into float ones" if kind == "experts" else "it does so for Linear only"
        override = {name: {"activation_bits": None}}
        raise CPQError(
            f"the input of `{name}` ({kind}) is quantized, which compressed-tensors cannot do: {reason}. "
            f"{_alternative(f'train it with `overrides={override}`')}"
        )
    if dtype != torch.float32:
        raise CPQError(
            f"the input of `{name}` is quantized and the model is {dtype}: plain transformers divides by the step "
            "size in that dtype, which puts inputs on other levels. Export it in float32: `model.float()`"
        )


def _alternative(other: str) -> str:
    return f"use cpq's own format (`save_pretrained`) or `cpq_hf.export_onnx`, or {other}"


def _is_packed_there(layer: PackedLayer) -> bool:
    """Whether a layer is packed in the export; a head that shares an embedding's weight is in float with it."""
    if layer_kind(layer) not in PACKABLE:
        return False
    tied_to_float = layer.holder is not layer and layer_kind(layer.holder) not in PACKABLE
    return not tied_to_float or layer.spec.activation is not None


def _warn(
    layers: Mapping[str, PackedLayer], containers: Mapping[str, Container], rounding: float, dtype: torch.dtype
) -> None:
    dense = [name for name in layers if name not in containers]
    if dense:
        logger.warning(
            "written in floating point, as compressed-tensors packs Linear layers and experts only: %s",
            ", ".join(dense),
        )
    if any(layers[name].spec.activation is not None for name in containers):
        logger.warning("vLLM has no kernel for packed weights with static quantized inputs: this is for transformers")
    if rounding:
        logger.warning("scales are stored in %s, which moves outputs by up to %.1e of the largest", dtype, rounding)


# --- tensors ---------------------------------------------------------------------------------------------------------


@contextmanager
def _rounded_scales(layers: Mapping[str, PackedLayer], containers: Mapping[str, Container]) -> Iterator[None]:
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


def _untied(layers: Mapping[str, PackedLayer]) -> bool:
    """Whether a weight that is shared in the model is stored twice: as a float embedding and as a packed head."""
    return any(layer.holder is not layer and _is_packed_there(layer) for layer in layers.values())


def _tensors(
    model: Any, layers: Mapping[str, PackedLayer], containers: Mapping[str, Container], untied: bool
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """What is stored, and the CRC-32 of what is then loaded."""
    ours = {f"{name}.{key}" for name, layer in layers.items() for key in layer._buffers}
    tied = {} if untied else (getattr(model, "all_tied_weights_keys", None) or {})
    skipped = {*tied, *(model._keys_to_ignore_on_save or ())} | ours
    stored = {name: tensor for name, tensor in model.state_dict().items() if name not in skipped}
    expected = {name: checksum(tensor) for name, tensor in stored.items()}
    experts = {}
    for name, layer in layers.items():
        is_expert = layer_kind(layer) == "experts"
        weight = name if is_expert else f"{name}.weight"
        if weight in tied or (layer.holder is not layer and name not in containers):
            continue
        dense = layer.quantized_weight()
        expected[weight] = checksum(dense)
        if name not in containers:
            stored[weight] = dense
        elif is_expert:
            experts |= _expert_tensors(model, name, layer, containers[name])
        else:
            stored |= _linear_tensors(name, layer, containers[name])
    stored = _checkpoint_names(model, stored)
    for name in stored:
        if experts and re.search(r"\.experts\.(\d+\.|gate_up_proj$|up_proj$|down_proj$)", name):
            raise CPQError(
                f"`{name}` is in floating point while other experts are quantized, which transformers cannot load: use "
                "cpq's own format (`save_pretrained`), or quantize all experts or none"
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
    levels, scale = contained(layer, container)
    tensors = _weight_tensors(f"{name}.weight", levels, scale.to(layer.dtype), container)
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
    if not split or any(not key.endswith(".weight") or part.dim() != 2 for key, part in split[0].items()):
        raise CPQError(
            f"the experts `{name}` of {type(model).__name__} are not stored one by one in checkpoints, and "
            "transformers reads no other packed ones: use cpq's own format (`save_pretrained`), or leave them in "
            f"floating point with `modules_to_not_convert=[{name!r}]`"
        )
    tensors = {}
    for key, levels in split[0].items():
        tensors |= _weight_tensors(key, levels, split[1][key].to(layer.dtype), container)
    return tensors


def _weight_tensors(weight: str, levels: Tensor, scale: Tensor, container: Container) -> dict[str, Tensor]:
    return {
        f"{weight}_packed": pack(levels, container.bits),
        f"{weight}_scale": scale,
        f"{weight}_shape": torch.tensor(levels.shape),
    }


def _checkpoint_names(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as `save_pretrained` of a model that is not ours would write them: names of the Hub, single experts."""
    kept = vars(model).pop("_weight_conversions", None)
    try:
        return revert_weight_conversion(model, tensors)
    finally:
        if kept is not None:
            model._weight_conversions = kept


# --- configs ---------------------------------------------------------------------------------------------------------


def _quantization_config(
    model: Any, layers: Mapping[str, PackedLayer], containers: Mapping[str, Container]
) -> dict[str, Any]:
    schemes: dict[tuple[bool, Container, ActivationSpec | None], list[str]] = {}
    for name, layer in layers.items():
        schemes.setdefault((layer_kind(layer) == "experts", containers[name], layer.spec.activation), []).append(name)
    groups: dict[str, Any] = {}
    # experts first: transformers takes the first group with a target that has "experts" in it ("shared_experts" has)
    for (of_experts, container, activation), names in sorted(schemes.items(), key=lambda item: not item[0][0]):
        targets = [EXPERT_TARGET] if of_experts else _targets(names, model.base_model_prefix)
        groups[f"group_{len(groups)}"] = {
            "format": FORMAT,
            "targets": targets,
            "weights": _arguments(container.bits, container.group_size, "channel"),
            "input_activations": activation and _arguments(activation.bits, None, "tensor", bool(activation.signed)),
            "output_activations": None,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name in _holders_of_matrices(model) if name not in containers],
    }


def _arguments(bits: int, group_size: int | None, strategy: str, symmetric: bool = True) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": strategy if group_size is None else "group",
        "group_size": group_size,
        "dynamic": False,
    }


def _targets(names: list[str], prefix: str) -> list[str]:
    """Regular expressions for exactly these layers, in the whole model and in its base model; few, as all are tried."""
    places: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        head, number, tail = re.fullmatch(r"(.*?)(\d*)((?<=\d)\..*|)", name).groups()  # type: ignore[union-attr]
        places.setdefault((head, tail), []).append(number)
    targets = []
    for (head, tail), numbers in places.items():
        start = f"({re.escape(prefix)}\\.)?" if prefix and head.startswith(f"{prefix}.") else ""
        head = head.removeprefix(f"{prefix}.") if start else head
        choice = f"({'|'.join(numbers)})" if len(numbers) > 1 else numbers[0]
        targets.append(f"re:{start}{re.escape(head)}{choice}{re.escape(tail)}$")
    return targets


def _holders_of_matrices(model: Any) -> list[str]:
    return [*summarize(model).float_layers, *(name for name, _ in packed_layers(model))]


def _side_file(model: Any, containers: Mapping[str, Container]) -> dict[str, Any]:
    """What compressed-tensors' config has no place for: the numbers of the training."""
    report = summarize(model).to_dict()
    layers = {
        name: values | {"container_bits": containers[name].bits if name in containers else None}
        for name, values in report["layers"].items()
    }
    for values in layers.values():
        values.pop("cluster_distance")
    return {
        "cpq_hf": __version__,
        "mean_bits": report["mean_bits"],
        "mean_bits_all": report["mean_bits_all"],
        "coverage": report["coverage"],
        "layers": layers,
    }


@contextmanager
def _folder_in_place(directory: Path) -> Iterator[Path]:
    """A folder beside `directory` that takes its place at the end, or goes if something fails."""
    partial = directory.with_name(f"{directory.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        if directory.exists():
            directory.rmdir()
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
