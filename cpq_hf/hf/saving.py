"""Write a packed model to a folder: under names that need the plugin, sealed, verified, and only then in place."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from ..errors import CPQError
from ..private_apis import drop_last_word
from .card import CARD, is_users, take_over_from_trainer, write_card
from .checkpoint import INDEX, NEEDS_PLUGIN, STEM, WEIGHTS, config_checksum, read_json, verify_checkpoint
from .hub import push_folder

_OF_HUB = ("repo_id", "private", "token", "revision", "create_pr", "commit_message", "commit_description")


def save_packed(model: Any, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
    """`save_pretrained` of a packed model.

    Everything is written to a temporary folder inside of `save_directory`, verified, and moved from there, so that a
    save that fails leaves what was there before. Weights of an earlier save are then removed; a model card that
    somebody wrote is left alone.

    Args:
        model (`PreTrainedModel`): A packed model.
        save_directory (`str` or `PathLike`): The folder, made if it is not there.
        push_to_hub (`bool`, defaults to False): Push the folder too.
        kwargs: Other arguments of `save_pretrained`, and of [`push_folder`] with `repo_id`.

    Raises:
        CPQError: If `variant` is given, for transformers would not look for it; if what was written does not verify,
            or the push fails.
    """
    if kwargs.get("variant") is not None:
        raise CPQError(
            f"`variant` (={kwargs['variant']!r}): a packed model is saved under one name; use another folder instead"
        )
    directory = Path(save_directory)
    directory.mkdir(parents=True, exist_ok=True)
    drop_last_word(model)  # of a push that was cut off
    of_hub = {name: kwargs.pop(name) for name in _OF_HUB if name in kwargs}
    with tempfile.TemporaryDirectory(dir=directory, prefix="_saving-") as temporary:  # `Trainer` uploads no `_*`
        folder = Path(temporary)
        type(model).save_pretrained(model, folder, **kwargs)
        if not (folder / "config.json").exists():  # not the main process
            return
        _rename_weights(folder)
        _seal(folder / "config.json")
        verify_checkpoint(folder)
        if not is_users(directory / CARD):
            write_card(model, folder)
        written = {file.name for file in folder.iterdir()}
        for name in sorted(written, key="config.json".__eq__):  # last, for without it there is no checkpoint
            (folder / name).replace(directory / name)
    for file in directory.iterdir():
        if WEIGHTS.fullmatch(file.name) and file.name not in written:
            file.unlink()
    take_over_from_trainer(model, directory)
    if push_to_hub:
        push_folder(directory, of_hub.pop("repo_id", directory.name), verified=True, **of_hub)


def _rename_weights(folder: Path) -> None:
    index_file = folder / "model.safetensors.index.json"
    if index_file.exists():
        index = read_json(index_file)
        index_file.unlink()
    else:
        names = read_json(folder / "config.json")["quantization_config"]["checksums"]
        size = (folder / "model.safetensors").stat().st_size
        index = {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    index["weight_map"] = {name: _renamed(file) for name, file in sorted(index["weight_map"].items())}
    for file in folder.glob("model*.safetensors"):
        file.rename(folder / _renamed(file.name))
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _renamed(name: str) -> str:
    return STEM + name.removeprefix("model")


def _seal(config_file: Path) -> None:
    content = read_json(config_file) | {"transformers_weights": NEEDS_PLUGIN}
    content["quantization_config"]["config_checksum"] = config_checksum(content)
    config_file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
