"""Prove a packed checkpoint whole: config.json against the headers of its files against checksums of its tensors.

The weights are stored as `cpq_model*.safetensors`, always with an index, and config.json has under
`transformers_weights` a text that is no file name. Without the plugin, transformers would skip a quantization that it
does not know and leave layers random: so it ends with an error that shows that text, or finds no `model.safetensors`.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils.logging import tqdm

from ..errors import CPQError
from ..nn.packed import packed_tensors
from ..tensor.kernels.crc import crc32
from ..tensor.spec import LayerSpec
from ..version import how_to_install
from .config import QUANT_METHOD, CPQConfig

STEM = "cpq_model"
INDEX = f"{STEM}.safetensors.index.json"
WEIGHTS = re.compile(rf"(model|{STEM})(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?")  # packed or not
NEEDS_PLUGIN = f"{INDEX}, which is read after `import cpq_hf` ({how_to_install()})"  # its wording may change

_DTYPES = {torch.int32: "I32", torch.float32: "F32", torch.int64: "I64"}
_UNSEALED = ("transformers_version", "transformers_weights")  # what a user may lose or change without another model


def names_packed_weights(config: Any) -> bool:
    """Tell by `transformers_weights`, in the words of any version, that a model config is of a packed checkpoint."""
    return str(getattr(config, "transformers_weights", None)).startswith(INDEX)


def checksum(tensor: Tensor) -> int:
    """CRC-32 of dtype, shape, and the bytes as safetensors stores them."""
    kind = zlib.crc32(f"{tensor.dtype} {list(tensor.shape)}".encode())
    return crc32(tensor.detach().cpu().contiguous(), kind)


def config_checksum(content: dict[str, Any]) -> int:
    """CRC-32 of what config.json says, without the checksum itself; order and white space do not count."""
    sealed = {key: value for key, value in content.items() if key not in _UNSEALED}
    quantization = {k: v for k, v in content["quantization_config"].items() if k != "config_checksum"}
    text = json.dumps(sealed | {"quantization_config": quantization}, sort_keys=True)
    return zlib.crc32(text.encode())


def verify_checkpoint(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Prove that a packed checkpoint is whole and unaltered.

    Reads every byte of its tensors once, after config.json and the headers of all files were compared. Nothing is
    unpickled or executed. Checksums find damage; somebody who alters a checkpoint on purpose can make new ones.

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
    config = verify_config(directory / "config.json")
    files = weight_files(directory / INDEX)
    tensors = verify_files(files, config)
    return {
        "files": [file.name for file in files],
        "layers": len(config.layer_specs()),
        "tensors": tensors,
        "bytes": sum(file.stat().st_size for file in files),
    }


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; `CPQError` for anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CPQError(f"{file}: no such file; download or copy the checkpoint again") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CPQError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise CPQError(f"{file}: not valid JSON of a checkpoint (an object), but a {type(content).__name__}")
    return content


def verify_config(file: Path) -> CPQConfig:
    """Check config.json of a packed checkpoint by itself."""
    content = read_json(file)
    stored = content.get("quantization_config")
    if not isinstance(stored, dict) or stored.get("quant_method") != QUANT_METHOD:
        raise CPQError(f"{file}: `quantization_config.quant_method` is not {QUANT_METHOD!r}; not a CPQ checkpoint")
    config: CPQConfig = CPQConfig.from_dict(stored)
    if not config.packed:
        raise CPQError(
            f"{file.parent} was saved during training, it is not packed; call `cpq_hf.pack_model(model)` and save "
            "again"
        )
    if config.config_checksum is None:
        raise CPQError(f"{file}: `quantization_config` has no `config_checksum`; config.json is incomplete")
    if config.config_checksum != config_checksum(content):
        raise CPQError(
            f"{file}: altered since it was saved: it does not fit its `config_checksum`. Copy it again; to change a "
            "config, load the model, change `model.config` and save the model"
        )
    config.layer_specs()
    return config


def weight_files(index_file: Path) -> list[Path]:
    """The files that an index names."""
    index = read_json(index_file)
    places = index.get("weight_map")
    if not isinstance(index.get("metadata"), dict) or not isinstance(places, dict) or not places:
        raise CPQError(f"{index_file}: not a valid index of weight files: it needs a `weight_map` and `metadata`")
    for name in places.values():
        if not isinstance(name, str) or re.fullmatch(r"\w[\w.-]*\.safetensors", name) is None:
            raise CPQError(f"{index_file}: {name!r} is not a plain file name of a safetensors file")
    return [index_file.parent / name for name in sorted(set(places.values()))]


def verify_files(files: Iterable[str | os.PathLike[str]], config: CPQConfig) -> int:
    """Check the tensors of packed weight files against a config; the number of tensors if all is well."""
    layers, checksums = config.layer_specs(), config.checksums
    if checksums is None:
        raise CPQError("`quantization_config` of the checkpoint has no `checksums`; config.json is incomplete")
    expected = _expected_tensors(layers)
    found: dict[str, Path] = {}
    for file in map(Path, files):
        for name in _verify_header(file, expected, checksums):
            if name in found:
                raise CPQError(f"{file}: `{name}` is stored a second time; it is in {found[name].name} too")
            found[name] = file
    missing = sorted((set(expected) | set(checksums)) - set(found))
    if missing:
        where = ", ".join(sorted({file.name for file in found.values()})) or "the checkpoint"
        raise CPQError(f"{where}: {_of_layer(missing[0], layers)} is missing ({len(missing)} tensors in all)")
    progress = tqdm(found, desc="Verifying tensors", delay=2)
    for file in sorted(set(found.values())):
        with safe_open(file, framework="pt", device="cpu") as handle:
            for name in handle.keys():  # noqa: SIM118 - not a dict
                progress.update()
                if checksum(handle.get_tensor(name)) != checksums[name]:
                    raise CPQError(
                        f"{file}: {_of_layer(name, layers)} was altered: its checksum is not the one in config.json"
                    )
    return len(found)


def _verify_header(file: Path, expected: dict[str, tuple[list[int], str]], checksums: dict[str, int]) -> list[str]:
    try:
        with safe_open(file, framework="pt", device="cpu") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 - not a dict
            headers = {name: (piece.get_shape(), piece.get_dtype()) for name, piece in slices.items()}
    except FileNotFoundError as error:
        raise CPQError(f"{file}: no such file; download or copy the checkpoint again") from error
    except (SafetensorError, OSError) as error:
        raise CPQError(f"{file}: truncated or not a safetensors file ({error}); download or copy it again") from error
    for name, (shape, dtype) in headers.items():
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
    return list(headers)


def _expected_tensors(layers: dict[str, LayerSpec]) -> dict[str, tuple[list[int], str]]:
    return {
        f"{layer}.{name}": (list(shape), _DTYPES[dtype])
        for layer, spec in layers.items()
        for name, (shape, dtype) in packed_tensors(spec).items()
    }


def _of_layer(name: str, layers: dict[str, LayerSpec]) -> str:
    layer = name.rpartition(".")[0]
    return f"`{name}` of {'quantized ' if layer in layers else ''}layer `{layer}`"
