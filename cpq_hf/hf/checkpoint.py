"""Prove a packed checkpoint whole: config.json against the headers of its files against checksums of its tensors."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CPQError
from ..nn.packed import packed_tensors
from ..spec import LayerSpec
from .config import QUANT_METHOD, CPQConfig

_DTYPES = {torch.int32: "I32", torch.float32: "F32", torch.int64: "I64"}


def checksum(tensor: Tensor) -> int:
    """CRC-32 of the bytes of a tensor as safetensors stores them."""
    data = tensor.detach().cpu().contiguous().flatten()
    return zlib.crc32(data.view(torch.uint8).numpy().data) if data.numel() else 0


def verify_checkpoint(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Prove that a packed checkpoint is whole and unaltered.

    Reads every byte of its tensors once. Nothing is unpickled or executed.

    Args:
        directory (`str` or `PathLike`): Folder with config.json and the safetensors files.

    Returns:
        `dict`: `{"files": [...], "layers": number of quantized layers, "tensors": number, "bytes": total size}`.

    Raises:
        CPQError: Naming file, layer and reason if anything is missing, truncated, altered or does not fit the table of
            layers.

    Example:

    ```python
    >>> import tempfile
    >>> from transformers import ResNetConfig, ResNetForImageClassification
    >>> from cpq_hf import CPQConfig, pack_model, prepare_model, verify_checkpoint
    >>> config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    >>> model = pack_model(prepare_model(ResNetForImageClassification(config), CPQConfig(weight_bits=2)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     model.save_pretrained(folder)
    ...     verify_checkpoint(folder)["layers"]
    3

    ```
    """
    directory = Path(directory)
    config_file = directory / "config.json"
    if not config_file.is_file():
        raise CPQError(f"{config_file}: no such file; a checkpoint needs its config.json")
    try:
        stored = json.loads(config_file.read_text(encoding="utf-8")).get("quantization_config")
    except (ValueError, AttributeError) as error:
        raise CPQError(f"{config_file}: not valid JSON ({error})") from error
    if not isinstance(stored, dict) or stored.get("quant_method") != QUANT_METHOD:
        raise CPQError(
            f"{config_file}: `quantization_config.quant_method` is not {QUANT_METHOD!r}; not a CPQ checkpoint"
        )
    config = CPQConfig.from_dict(stored)
    if not config.packed:
        raise CPQError(
            f"{directory} was saved during training, it is not packed; call `cpq_hf.pack_model(model)` and save again"
        )
    files = _weight_files(directory)
    tensors = verify_files(files, config)
    return {
        "files": [file.name for file in files],
        "layers": len(config.layer_specs()),
        "tensors": tensors,
        "bytes": sum(file.stat().st_size for file in files),
    }


def verify_files(files: Iterable[str | os.PathLike[str]], config: CPQConfig) -> int:
    """Check the tensors of packed weight files against a config; the number of tensors if all is well."""
    layers, checksums = config.layer_specs(), config.checksums
    if not isinstance(checksums, dict):
        raise CPQError("`quantization_config` of the checkpoint has no `checksums`; config.json is incomplete")
    expected = _expected_tensors(layers)
    found: dict[str, Path] = {}
    for file in map(Path, files):
        for name in _verify_file(file, expected, checksums):
            if name in found:
                raise CPQError(f"{file}: `{name}` is stored a second time; it is in {found[name].name} too")
            found[name] = file
    missing = sorted((set(expected) | set(checksums)) - set(found))
    if missing:
        where = ", ".join(sorted({file.name for file in found.values()})) or "the checkpoint"
        raise CPQError(f"{where}: {_of_layer(missing[0], layers)} is missing ({len(missing)} tensors in all)")
    return len(found)


def _verify_file(file: Path, expected: dict[str, tuple[list[int], str]], checksums: dict[str, int]) -> list[str]:
    try:
        with safe_open(file, framework="pt", device="cpu") as handle:
            names = list(handle.keys())
            for name in names:
                header = handle.get_slice(name)
                shape, dtype = header.get_shape(), header.get_dtype()
                layer = name.rpartition(".")[0]
                if name in expected and (shape, dtype) != expected[name]:
                    raise CPQError(
                        f"{file}: `{name}` of layer `{layer}` is {dtype} {shape}, config.json calls for "
                        f"{expected[name][1]} {expected[name][0]}"
                    )
                if name not in expected and name.endswith(".weight_packed"):
                    raise CPQError(f"{file}: layer `{layer}` is packed, but config.json does not list it")
                if name not in checksums:
                    raise CPQError(f"{file}: `{name}` of layer `{layer}` is not listed in config.json")
                if checksum(handle.get_tensor(name)) != checksums[name]:
                    raise CPQError(
                        f"{file}: `{name}` of layer `{layer}` was altered: its checksum is not the one in config.json"
                    )
    except FileNotFoundError as error:
        raise CPQError(f"{file}: no such file; download or copy the checkpoint again") from error
    except (SafetensorError, OSError) as error:
        raise CPQError(f"{file}: truncated or not a safetensors file ({error}); download or copy it again") from error
    return names


def _expected_tensors(layers: dict[str, LayerSpec]) -> dict[str, tuple[list[int], str]]:
    return {
        f"{layer}.{name}": (list(shape), _DTYPES[dtype])
        for layer, spec in layers.items()
        for name, (shape, dtype) in packed_tensors(spec).items()
    }


def _of_layer(name: str, layers: dict[str, LayerSpec]) -> str:
    layer = name.rpartition(".")[0]
    return f"`{name}` of {'quantized ' if layer in layers else ''}layer `{layer}`"


def _weight_files(directory: Path) -> list[Path]:
    index_file = directory / "model.safetensors.index.json"
    if not index_file.is_file():
        return [directory / "model.safetensors"]
    try:
        names = set(json.loads(index_file.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CPQError(f"{index_file}: not a valid index of weight files ({error!r})") from error
    for name in names:
        if Path(name).name != name:
            raise CPQError(f"{index_file}: {name!r} is not a plain file name")
    return [directory / name for name in sorted(names)]
