"""Write the model card of a packed model: what it is, how it was made, how it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.modelcard import TASK_MAPPING

from ..errors import CPQError
from ..model.summary import Summary, readable_size, summarize
from ..private_apis import auto_class_name, take_last_word
from ..version import __version__, how_to_install
from .config import CPQConfig

CARD, PICTURE = "README.md", "bits.png"
MARK = "<!-- Written by cpq_hf, anew at each save. Remove this line and the page is yours: it is then left alone. -->"
TRAINERS_MARK = "<!-- This model card has been generated automatically according to the information the Trainer"
HERE = "path/to/this/folder"  # until it is pushed
_NO_METRICS = ("epoch", "step", "total_flos")
_NO_METRIC_ENDS = ("_runtime", "_per_second", "_time")
_NO_HUB_DATA = ("csv", "json", "pandas", "parquet", "text", "generator")  # builders of `datasets` that only read files


@dataclass
class Training:
    """Facts of a training run.

    Args:
        settings (`dict`): Name and value of what was trained with.
        metrics (`dict`): Of the last evaluation of the model as it is.
        data (`tuple[str, str, str]`, *optional*): The data set of the metrics: name, configuration, split.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    data: tuple[str, str, str] | None = None


def note_training(model: Any, training: Training) -> None:
    """Note on a model how it was trained, for its model card. It is not saved elsewhere."""
    vars(model)["cpq_training"] = training


def noted_training(model: Any) -> Training:
    """Return what [`note_training`] was given, or nothing."""
    training: Training = vars(model).get("cpq_training", Training())
    return training


def training_of(args: Any, state: Any, metrics: Mapping[str, Any] | None, dataset: Any) -> Training:
    """Return what a `Trainer` knows of its run, from its arguments, its state and the data set of an evaluation."""
    processes, accumulated = args.world_size, args.gradient_accumulation_steps
    settings = {
        "steps": state.global_step,
        "epochs": None if state.epoch is None else round(state.epoch, 2),
        "batch size": f"{args.train_batch_size * processes * accumulated} ({args.train_batch_size} a device, "
        f"{processes} processes, {accumulated} accumulated)",
        "optimizer": str(args.optim).rpartition(".")[2].lower(),
        "learning rate": args.learning_rate,
        "schedule": f"{args.lr_scheduler_type.value}, {args.warmup_steps} warm-up",
        "weight decay": args.weight_decay,
        "gradient norm, at most": args.max_grad_norm,
        "label smoothing": args.label_smoothing_factor,
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "float32",
        "seed": args.seed,
    }
    numbers = {name: value for name, value in (metrics or {}).items() if _is_metric(name, value)}
    return Training(settings, numbers, _data(dataset))


def write_card(model: Any, folder: Path, place: str = HERE, known: ModelCardData | None = None) -> None:
    """Write the model card of a packed model, and its picture where matplotlib is installed.

    Args:
        model (`PreTrainedModel`): A packed model.
        folder (`Path`): Where to.
        place (`str`): Where the card says that the model is loaded from.
        known (`ModelCardData`, *optional*): What else is known of it.
    """
    report = summarize(model)
    try:
        report.plot(folder / PICTURE)
    except CPQError:  # a card without picture is better than no card
        (folder / PICTURE).unlink(missing_ok=True)
    data = card_data(model, noted_training(model), known or ModelCardData())
    body = _body(model, report, data.base_model, place, picture=(folder / PICTURE).exists())
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n").save(folder / CARD)


def announce_push(model: Any, folder: Path, place: str) -> None:
    """Note that a Trainer is about to save a model to `folder` and to push it from there to `place`."""
    vars(model)["cpq_push"] = (folder.resolve(), place)


def take_over_from_trainer(model: Any, folder: Path) -> None:
    """After a save: if it is the one of an announced push, take the last word on the model card from the Trainer.

    A model card that somebody wrote comes back as it was, otherwise ours takes up what the Trainer knew.
    """
    announced, place = vars(model).get("cpq_push", (None, HERE))
    if announced != folder.resolve():
        return
    del vars(model)["cpq_push"]
    card = folder / CARD
    users = card.read_text(encoding="utf-8") if is_users(card) else None

    def complete() -> None:
        if users is not None:
            card.write_text(users, encoding="utf-8")
        else:
            write_card(model, folder, place, ModelCard.load(card, ignore_metadata_errors=True).data)

    take_last_word(model, card, complete)


def card_data(model: Any, training: Training, known: ModelCardData) -> ModelCardData:
    """The metadata by which the Hub finds a model."""
    task, base = _task(model), model.config.quantization_config.base_model
    results, datasets = known.eval_results, known.datasets
    if training.data is not None:
        name, configuration, split = training.data
        datasets = [name]
        if task is not None and training.metrics:
            results = [
                EvalResult(
                    task_type=task,
                    dataset_type=name,
                    dataset_name=name,
                    dataset_config=configuration,
                    dataset_split=split,
                    metric_type=metric.removeprefix("eval_"),
                    metric_value=value,
                )
                for metric, value in training.metrics.items()
            ]
    return ModelCardData(
        base_model=base,
        base_model_relation=None if base is None else "quantized",
        datasets=datasets,
        eval_results=results,
        language=known.language,
        library_name="transformers",
        license=known.license,
        model_name=type(model).__name__ if results else None,
        pipeline_tag=task,
        tags=sorted({"cpq", "quantized", *(model.model_tags or ()), *(known.tags or ())}),
    )


def _body(model: Any, report: Summary, base_model: Any, place: str, picture: bool) -> str:
    config, training = model.config.quantization_config, noted_training(model)
    loader = auto_class_name(model) or type(model).__name__
    widths = sorted({layer.spec.weight.bits for layer in report.layers})
    bits = f"{widths[0]}" if len(widths) == 1 else f"{widths[0]} to {widths[-1]} (mean {report.mean_bits:.2f})"
    of_base = f" of [{base_model}](https://huggingface.co/{base_model})" if base_model else ""
    inputs = sorted({layer.spec.activation.bits for layer in report.layers if layer.spec.activation is not None})
    sections = [
        f"# {place if place != HERE else type(model).__name__}\n\n{MARK}",
        f"`{type(model).__name__}`{of_base}, trained with weights of {bits} bits by Cluster-Promoting Quantization "
        "(`cpq_hf`) and stored as packed integers.",
        _table(
            ("", ""),
            {
                "Weights quantized": f"{report.quantized_elements:,} of {report.all_elements:,} "
                f"({report.quantized_elements / report.all_elements:.1%}), in {len(report.layers)} layers",
                "Bits a quantized weight": f"{report.mean_bits:.2f}",
                "Bits a weight, over all": f"{report.mean_bits_all:.2f}",
                "Bits of inputs": " to ".join(map(str, dict.fromkeys((*inputs[:1], *inputs[-1:])))) or "not quantized",
                "Size": f"{readable_size(report.packed_bytes)} ({readable_size(report.float_bytes)} in float32)",
                "In floating point": ", ".join(f"`{name}`" for name in list(report.float_layers)[:8]) or "nothing",
            },
        ),
        f"![Bits by layer]({PICTURE})" if picture else "",
        "## Load it",
        f"```python\nimport cpq_hf  # {how_to_install()}\nfrom transformers import {loader}\n\n"
        f'model = {loader}.from_pretrained("{place}")\n```',
        "Without the plugin these files are not loaded: transformers stops, naming it. Where the plugin is, write a "
        "checkpoint that plain tools read, for transformers and vLLM or for ONNX Runtime:",
        f"```bash\ncpq-hf export {place} plain-model --to compressed-tensors\n"
        f"cpq-hf export {place} model.onnx --to onnx\n```",
        f"`cpq-hf verify {place}` proves the files whole.",
        _results(training),
        "## How it was made",
        f"```python\n{_recipe(config)}\n```",
        _table(("Training", ""), training.settings) if training.settings else "",
        f"Versions: cpq_hf {__version__}, "
        f"transformers {transformers.__version__}, torch {torch.__version__}, "
        f"huggingface_hub {huggingface_hub.__version__}.",
    ]
    return "\n\n".join(section for section in sections if section)


def repository(name: str) -> str | None:
    """`name` if it can be that of a repository on the Hub and is no local folder."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if name and not Path(name).exists() else None


def is_users(card: Path) -> bool:
    """Return whether a card is there that neither this package nor a `Trainer` wrote."""
    if not card.is_file():
        return False
    text = card.read_text(encoding="utf-8", errors="replace")
    return MARK not in text and TRAINERS_MARK not in text


def _task(model: Any) -> str | None:
    name = type(model).__name__
    mappings: dict[str, Any] = TASK_MAPPING
    return next((task for task, classes in mappings.items() if name in classes.values()), None)


def _is_metric(name: str, value: Any) -> bool:
    return isinstance(value, (int, float)) and name not in _NO_METRICS and not name.endswith(_NO_METRIC_ENDS)


def _data(dataset: Any) -> tuple[str, str, str] | None:
    name = getattr(dataset, "builder_name", None)  # `datasets` is not required here
    if name is None or name in _NO_HUB_DATA:
        return None
    return name, str(dataset.config_name), str(dataset.split)


def _results(training: Training) -> str:
    if not training.metrics:
        return ""
    data = "the evaluation data" if training.data is None else f"`{training.data[0]}` ({', '.join(training.data[1:])})"
    values = {name.removeprefix("eval_"): f"{value:.6g}" for name, value in training.metrics.items()}
    return (
        f"## Results\n\nOn {data}, of the packed model or of the same model before packing, bit for bit alike:\n\n"
        + (_table(("Metric", "Value"), values))
    )


def _recipe(config: CPQConfig) -> str:
    lines = [f"    {name}={getattr(config, name)!r}," for name in config.field_names()]
    return "CPQConfig(\n" + "\n".join(lines) + "\n)"


def _table(head: tuple[str, str], rows: Mapping[str, Any]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    return "\n".join(lines)
