"""Write a packed model as compressed-tensors' `pack-quantized`, which plain transformers and vLLM load.

What that format has no packed form for, or transformers reads wrongly (convolutions, `Conv1D`, embeddings), is written
in floating point with its weights on the grid: the same numbers in more bytes. What cannot be kept equal is refused.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import save_torch_state_dict
from packaging.version import Version
from transformers import PreTrainedModel

from ...errors import CPQError
from ...model.inspection import layer_type_name, packed_layers
from ...model.summary import summarize
from ...nn import PackedLayer
from ...tensor.spec import MAX_BITS, MIN_BITS
from ...version import __version__, how_to_install
from .containers import Container, choose_containers, partly_packed
from .initialized import initialized_by_name
from .reload import check_reload, default_inputs, difference, placed, run
from .schemes import quantization_config
from .stored import exact, rounded_scales, stored_tensors

logger = logging.getLogger(__name__)

OLDEST = "0.17"  # version of compressed-tensors with this layout of 3, 5, 6 and 7 bits
SIDE_FILE = "cpq_config.json"
PACKABLE = ("linear", "experts")
# Of the largest output. Equal weights on the same device give the same bits, but for the order of sums. Of unsigned
# inputs `x/s + z` is rounded instead of `x/s`: one that lies between two levels may then end at the other one.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
TOLERANCE_QUANTIZED_INPUTS = 1e-2


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
        container_bits (collection of `int`, defaults to 2 to 8): Widths that weights may be stored in, each in the
            next one that holds it: `(4, 8)` for tools that have no others.

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
    by_name = _initialized_by_name(model, layers)
    model.eval()
    weights = {n: layer.spec.weight for n, layer in layers.items() if _is_packed_there(layer) and n not in by_name}
    experts = [name for name in weights if layer_type_name(layers[name]) == "experts"]
    containers = choose_containers(weights, experts, container_bits)
    packed = {name: layers[name] for name in containers}
    untied = any(layer.holder is not layer for layer in packed.values())
    inputs = placed(model, default_inputs(model) if example_inputs is None else example_inputs)
    with exact(layers):
        with rounded_scales(packed):
            expected = run(model, inputs)
            tensors, checksums = stored_tensors(model, layers, containers, untied)
        rounding = 0.0 if model.dtype == torch.float32 else difference(expected, run(model, inputs))
    float_layers = {*summarize(model).float_layers, *(layers.keys() - packed.keys())}
    _warn(layers, containers, by_name, float_layers, rounding, model.dtype)

    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    if untied:
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    matrices = [name for name, tensor in tensors.items() if name.endswith(".weight") and tensor.dim() > 1]
    floats = {name.removesuffix(".weight") for name in matrices}  # under their names in the file, and in the model:
    config.quantization_config = quantization_config(
        packed, containers, model.base_model_prefix, floats | float_layers
    )
    with _folder_in_place(directory) as folder:
        save_torch_state_dict(tensors, folder, max_shard_size=max_shard_size)
        config.save_pretrained(folder)
        if model.can_generate() and model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        (folder / SIDE_FILE).write_text(json.dumps(_side_file(model, containers), indent=2), encoding="utf-8")
        scratch = folder / "check"
        scratch.mkdir()
        quantized_inputs = any(layer.spec.activation is not None for layer in packed.values())
        tolerance = TOLERANCE_QUANTIZED_INPUTS if quantized_inputs else TOLERANCE[model.dtype]
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
    try:
        installed = version("compressed-tensors")
    except PackageNotFoundError as error:
        raise CPQError(f"exporting needs the package compressed-tensors: {how_to_install('export')}") from error
    if Version(installed) < Version(OLDEST):
        raise CPQError(
            f"compressed-tensors {installed} has another layout; it takes {OLDEST}: {how_to_install('export')}"
        )
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
    if model.dtype not in TOLERANCE:
        raise CPQError(f"the model is {model.dtype}; export it in float32 (`model.float()`)")
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise CPQError(f"`{name}` is offloaded or on the meta device; load the model to a real device first")
    for name, layer in layers.items():
        if layer.spec.activation is not None:
            _check_input(name, layer, model.dtype)
    if not any(_is_packed_there(layer) for layer in layers.values()):
        kinds = ", ".join(sorted({layer_type_name(layer) for layer in layers.values()}))
        raise CPQError(
            f"compressed-tensors has packed weights for Linear layers and experts only, and the model has none that "
            f"are quantized (only {kinds}): use cpq's own format (`save_pretrained`) or `cpq_hf.export_onnx`"
        )
    return layers


def _initialized_by_name(model: PreTrainedModel, layers: Mapping[str, PackedLayer]) -> set[str]:
    """Linear layers that have to be in floating point, for transformers fails where they are packed."""
    there = {name for name, layer in layers.items() if _is_packed_there(layer)}
    by_name = initialized_by_name(model, [name for name in there if layer_type_name(layers[name]) == "linear"])
    reason = (
        "the `_init_weights` of its model in transformers reaches for its weight by name, and fails if it is packed"
    )
    if by_name == there:
        raise CPQError(
            f"{type(model).__name__} has no quantized layer that transformers loads packed. Of `{min(by_name)}` and "
            f"{len(by_name) - 1} others, {reason}: use cpq's own format (`save_pretrained`) or `cpq_hf.export_onnx`"
        )
    for name in sorted(by_name):
        if layers[name].spec.activation is not None:
            override = {name: {"activation_bits": None}}
            raise CPQError(
                f"the input of `{name}` is quantized, but this layer has to be in floating point: {reason}. "
                f"{_alternative(f'train it with `overrides={override}`')}"
            )
    return by_name


def _check_input(name: str, layer: PackedLayer, dtype: torch.dtype) -> None:
    kind = layer_type_name(layer)
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
    """Return whether a layer is packed in the export; a head that shares an embedding's weight is in float with it."""
    if layer_type_name(layer) not in PACKABLE:
        return False
    tied_to_float = layer.holder is not layer and layer_type_name(layer.holder) not in PACKABLE
    return not tied_to_float or layer.spec.activation is not None


def _warn(
    layers: Mapping[str, PackedLayer],
    containers: Mapping[str, Container],
    by_name: Collection[str],
    float_layers: Collection[str],
    rounding: float,
    dtype: torch.dtype,
) -> None:
    dense = [name for name in layers if name not in containers and name not in by_name]
    if dense:
        logger.warning(
            "written in floating point, as compressed-tensors packs Linear layers and experts only: %s",
            ", ".join(dense),
        )
    if by_name:
        logger.warning(
            "written in floating point, as transformers initializes them by name and cannot load them packed: %s",
            ", ".join(sorted(by_name)),
        )
    for in_float, beside in partly_packed(containers, float_layers):
        logger.warning(
            "vLLM fuses %s (in floating point) with %s (packed) and refuses such a layer: quantize all or none of "
            "them, with `modules_to_not_convert`. Transformers loads them as they are",
            ", ".join(in_float),
            ", ".join(beside),
        )
    if any(layers[name].spec.activation is not None for name in containers):
        logger.warning("vLLM has no kernel for packed weights with static quantized inputs: this is for transformers")
    if rounding:
        logger.warning("scales are stored in %s, which moves outputs by up to %.1e of the largest", dtype, rounding)


# --- what is written beside the tensors -----------------------------------------------------------------------------


def _side_file(model: Any, containers: Mapping[str, Container]) -> dict[str, Any]:
    """Return what compressed-tensors' config has no place for: the numbers of the training."""
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
