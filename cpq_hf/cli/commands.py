"""Verbs of `cpq-hf`: each returns a dict, which `--json` prints, and the text for people."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from transformers import AutoConfig, PreTrainedModel

from ..errors import CPQError
from ..export import default_inputs, export_compressed_tensors, export_onnx
from ..hf import pack_model, verify_checkpoint
from ..hf.checkpoint import STEM
from ..hf.hub import push_folder
from ..model.summary import readable_size, summarize

COMPANIONS = (  # files of tokenizers, processors and chat templates; `save_pretrained` writes generation_config.json
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.spm"),
    *("*preprocessor_config.json", "processor_config.json", "chat_template*", "additional_chat_templates/*"),
)
WRITERS: dict[str, Callable[..., Any]] = {"compressed-tensors": export_compressed_tensors, "onnx": export_onnx}


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Run the verb that was asked for."""
    transformers.utils.logging.set_verbosity_error()
    if args.json:
        transformers.utils.logging.disable_progress_bar()
    verbs = {verb.__name__: verb for verb in (inspect, pack, export, verify, push)}
    return verbs[args.verb](args)


def inspect(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Report bits, coverage and sizes of a checkpoint, per layer."""
    model = _load(args.model, args.revision)
    report = summarize(model)
    if not report.layers:
        raise CPQError(f"{args.model}: nothing in this {type(model).__name__} is quantized")
    if args.plot is not None:
        report.plot(args.plot)
    found = {"model": args.model, "class": type(model).__name__, "packed": _is_packed(model)} | report.to_dict()
    return found, report.table(shutil.get_terminal_size((10_000, 0)).columns)  # a file or a pipe gets whole lines


def pack(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Turn a checkpoint that was saved during training into packed integers."""
    model = _load(args.model, args.revision)
    pack_model(model)
    model.save_pretrained(args.folder, max_shard_size=args.max_shard_size)
    copied = _copy_companions(args.model, args.revision, Path(args.folder))
    found = {"folder": str(args.folder), "copied": copied} | verify_checkpoint(args.folder)
    text = f"{args.folder}: {found['layers']} packed layers, {readable_size(found['bytes'])}"
    return found, text + (f"; copied: {', '.join(copied)}" if copied else "")


def _copy_companions(model: str, revision: str | None, target: Path) -> list[str]:
    """Copy what a pipeline needs beside weights, as far as it is there; return the names of these files."""
    if _is_remote(model):
        model = snapshot_download(model, revision=revision, allow_patterns=list(COMPANIONS))
    source = Path(model)
    if source.resolve() == target.resolve():
        return []
    files = sorted({file for pattern in COMPANIONS for file in source.glob(pattern) if file.is_file()})
    for file in files:
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, part := copy.with_name(f".{copy.name}.part"))
        part.replace(copy)  # whole or not there
    return [file.relative_to(source).as_posix() for file in files]


def export(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Write a checkpoint that plain tools read."""
    model = _load(args.model, args.revision)
    inputs = default_inputs(model)
    if args.to == "onnx" and "input_ids" in inputs:  # the file has no inputs but those of the example
        inputs |= {"attention_mask": torch.ones_like(inputs["input_ids"])}
    WRITERS[args.to](model, args.target, inputs)
    return {"target": str(args.target), "format": args.to}, f"{args.target}: written as {args.to}"


def verify(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Verify that a packed checkpoint is whole."""
    folder = args.model
    if _is_remote(args.model):
        folder = snapshot_download(args.model, revision=args.revision, allow_patterns=["config.json", f"{STEM}*"])
    found = {"model": args.model} | verify_checkpoint(folder)
    count = f"{found['tensors']} tensors of {len(found['files'])} files, {found['layers']} packed layers"
    return found, f"{args.model}: whole: {count}, {readable_size(found['bytes'])}"


def push(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Push the folder of a packed checkpoint to the Hub."""
    commit = push_folder(
        args.folder,
        args.repo_id,
        private=args.private or None,
        revision=args.revision,
        commit_message=args.message,
        create_pr=args.create_pr,
    )
    return {"repo_id": args.repo_id, "commit": commit.oid, "url": commit.commit_url}, f"pushed: {commit.commit_url}"


# --- what the verbs share --------------------------------------------------------------------------------------------


def _is_remote(model: str) -> bool:
    if Path(model).is_dir():
        return False
    if Path(model).is_absolute() or model.startswith((".", "~")) or model.count("/") > 1 or Path(model).exists():
        raise CPQError(f"{model}: no such folder")
    return True


def _load(model: str, revision: str | None) -> Any:
    options: dict[str, Any] = {"revision": revision} if _is_remote(model) and revision is not None else {}
    config = AutoConfig.from_pretrained(model, **options)
    names = config.architectures or ["nothing"]
    loader = getattr(transformers, names[0], None)
    if not (isinstance(loader, type) and issubclass(loader, PreTrainedModel)):
        raise CPQError(f"{model}: its config.json names {names[0]!r}, which is no model class of transformers")
    return loader.from_pretrained(model, config=config, **options).eval()


def _is_packed(model: Any) -> bool:
    return bool(model.config.quantization_config.packed)
