"""Train a text classifier at a few bits: BERT, RoBERTa, DistilBERT or any other model of the Hub.

    python recipes/text_classification.py --weight_bits 3 --activation_bits 8

needs no network: a small BERT, made here and trained in float first, learns which package of the Python standard
library a piece of source code is from. Your own model and data:

    accelerate launch --config_file recipes/accelerate/one_gpu.yaml recipes/text_classification.py \
        --model_name_or_path bert-base-cased --dataset_name nyu-mll/glue --dataset_config rte \
        --text_column sentence1 sentence2 --float_epochs 3 --learning_rate 3e-5 --bf16

Every setting of CPQConfig and TrainingArguments is an option, as `--resume_from_checkpoint True` or `--push_to_hub`.
`output_dir` then holds `float`, `trained` (can be trained further), `packed` (what you publish).
"""

from __future__ import annotations

import itertools
import shutil
import sysconfig
from dataclasses import dataclass, field, replace
from pathlib import Path

import datasets
import evaluate
import torch
from sklearn.metrics import accuracy_score
from transformers import AutoConfig, AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments, set_seed
from transformers import AutoModelForSequenceClassification as AutoModel
from transformers import BertTokenizer as SmallTokenizer

import cpq_hf
from cpq_hf import CPQCallback, CPQConfig, CPQError, CPQOptimizer

PACKAGES = ("asyncio", "email", "http", "importlib", "json", "logging", "multiprocessing", "unittest", "urllib", "xml")


@dataclass
class Arguments:
    model_name_or_path: str | None = field(default=None, metadata={"help": "model of the Hub, or folder"})
    dataset_name: str | None = field(default=None, metadata={"help": "data set of the Hub, or folder; else source"})
    dataset_config: str | None = field(default=None, metadata={"help": "which of its configurations"})
    text_column: list[str] = field(default_factory=lambda: ["text"], metadata={"help": "its column of text, or two"})
    label_column: str = field(default="label", metadata={"help": "its column of classes"})
    max_length: int = field(default=128, metadata={"help": "tokens that are kept of a text"})
    metric: str | None = field(default=None, metadata={"help": "name or folder for evaluate.load; else accuracy"})
    float_epochs: float = field(default=0, metadata={"help": "epochs in float first; 8 for a small model"})
    overwrite: bool = field(default=False, metadata={"help": "replace the packed model in output_dir"})


class Accuracy(evaluate.Metric):  # instantiated directly, so that nothing has to be downloaded
    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description="accuracy", citation="", features=features)

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


def parse() -> tuple[Arguments, CPQConfig, TrainingArguments]:
    gpu = torch.accelerator.is_available()
    parser = HfArgumentParser((Arguments, CPQConfig, TrainingArguments))
    parser.set_defaults(
        output_dir="runs/text_classification", learning_rate=3e-5, lr_scheduler_type="cosine", warmup_steps=0.1,
        per_device_train_batch_size=32, per_device_eval_batch_size=128, logging_steps=50, save_strategy="epoch",
        remove_unused_columns=False, dataloader_pin_memory=gpu, use_cpu=not gpu, ddp_find_unused_parameters=False,
    )  # fmt: skip
    if parser.parse_args().model_name_or_path is None:  # a small model that knows nothing yet
        parser.set_defaults(float_epochs=8, num_train_epochs=4, learning_rate=1e-3, max_length=64)
    return parser.parse_args_into_dataclasses()


def load_data(args: Arguments, seed: int) -> tuple[datasets.DatasetDict, dict[int | str, str]]:
    """The parts `train` and `test`, and the name of the class for each label."""
    if args.dataset_name is None:
        library, texts = Path(sysconfig.get_paths()["stdlib"]), {}
        for name in PACKAGES:
            files = sorted((library / name).rglob("*.py"))
            texts[name] = "".join(file.read_text(encoding="utf-8") for file in files)[:200_000]
        rows = [{"text": t[i : i + 200], "label": name} for name, t in texts.items() for i in range(0, len(t), 200)]
        data = datasets.DatasetDict(train=datasets.Dataset.from_list(rows))
    else:
        data = datasets.load_dataset(args.dataset_name, args.dataset_config)
    if "train" not in data:
        raise SystemExit(f"the data have no part 'train', only: {', '.join(data)}")
    features = data["train"].features
    for option, column in [("label_column", args.label_column), *(("text_column", name) for name in args.text_column)]:
        if column not in features:
            raise SystemExit(f"the data have no column {column!r}; set --{option} to one of: {', '.join(features)}")
        if not isinstance(features[column], (datasets.ClassLabel, datasets.Value)):
            raise SystemExit(f"the column {column!r} holds neither text nor classes; set --{option} to one that does")
        if option == "text_column" and "string" not in features[column].dtype:
            raise SystemExit(f"the column {column!r} holds no text; set --text_column to one that does")
    test = next((name for name in ("validation", "test") if name in data), None)
    if test is None:
        data, test = data["train"].train_test_split(test_size=0.2, seed=seed), "test"
    data = datasets.DatasetDict(train=data["train"], test=data[test])
    labels = {label for part in data.values() for label in part.unique(args.label_column)}
    names = getattr(features[args.label_column], "names", None)
    names = dict(enumerate(names)) if names else {label: str(label) for label in sorted(labels - {None})}
    if not labels <= names.keys():
        raise SystemExit(f"the column {args.label_column!r} has rows without a class; leave them out first")
    return data, names


def load_float(args: Arguments, texts: list[str], names: list[str]):
    """A model with an output for each class, a new one where it had others, and its tokenizer."""
    if (source := args.model_name_or_path) is None:
        tokenizer = SmallTokenizer(do_lower_case=False).train_new_from_iterator(texts, 2000, show_progress=False)
        shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
        config = AutoConfig.for_model(
            "bert", vocab_size=len(tokenizer), max_position_embeddings=args.max_length, **shape
        )
    else:
        config, tokenizer = AutoConfig.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    if set(config.label2id) != set(names):  # else the model knows these classes, maybe in another order
        config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    options = {"config": config, "dtype": torch.float32, "ignore_mismatched_sizes": True}
    return AutoModel.from_pretrained(source, **options) if source else AutoModel.from_config(config), tokenizer


def main() -> None:
    args, config, training = parse()
    output, resume = Path(training.output_dir), training.resume_from_checkpoint
    resume = resume == "True" or resume  # the last checkpoint, or that of a folder
    push, training.push_to_hub = training.push_to_hub, False  # the packed model only, in the end
    if (output / "packed").exists() and not args.overwrite:
        raise SystemExit(f"{output / 'packed'} holds a packed model; choose another --output_dir, or --overwrite it")
    args.model_name_or_path = args.model_name_or_path if resume is None else str((output / "float").resolve())
    set_seed(training.seed)
    datasets.disable_progress_bars()
    data, names = load_data(args, training.seed)
    model, tokenizer = load_float(args, data["train"][args.text_column[0]], [*names.values()])
    type(model).accepts_loss_kwargs = False  # BERT claims to average over accumulated batches, but does not
    numbers = {label: model.config.label2id[name] for label, name in names.items()}
    metric = Accuracy() if args.metric is None else evaluate.load(args.metric)

    def to_inputs(batch):
        inputs = tokenizer(*(batch[name] for name in args.text_column), truncation=True, max_length=args.max_length)
        return {**inputs, "labels": [numbers[label] for label in batch[args.label_column]]}

    def compute_metrics(prediction):
        scores = metric.compute(predictions=prediction.predictions.argmax(-1), references=prediction.label_ids)
        return {"score": next(iter(scores.values()))} | scores

    data, tools = data.with_transform(to_inputs), {"processing_class": tokenizer, "compute_metrics": compute_metrics}
    parts = {"train_dataset": data["train"], "eval_dataset": data["test"]} | tools

    def score(model) -> float:
        run = Trainer(model, training, **parts)
        run.is_fsdp_enabled = run.is_deepspeed_enabled = False  # they cannot evaluate what they did not train
        return run.evaluate()["eval_score"]

    if resume is None:  # 1. the float model, trained if asked for
        floating = {"num_train_epochs": args.float_epochs, "save_strategy": "no", "load_best_model_at_end": False}
        run = Trainer(model, replace(training, **floating), **parts)
        if args.float_epochs:
            run.train()
        run.save_model(output / "float")
        run.accelerator.wait_for_everyone()
    scores = {"float": score(AutoModel.from_pretrained(output / "float"))}

    model = AutoModel.from_pretrained(output / "float", quantization_config=config)  # 2. on the grid, trained there
    cpq = {"callbacks": [CPQCallback()], "optimizer_cls_and_kwargs": (CPQOptimizer, {"args": training})}
    run = Trainer(model, training, **parts, **cpq)
    cpq_hf.calibrate_model(model.to(training.device), itertools.islice(run.get_train_dataloader(), 4))
    scores["rounded"] = score(model)
    run.train(resume_from_checkpoint=resume)
    run.save_model(output / "trained")
    run.accelerator.wait_for_everyone()
    model = AutoModel.from_pretrained(output / "trained")  # the same in each process, batch statistics included
    scores["trained"] = score(model)

    cpq_hf.pack_model(model)  # 3. as integers; saved by one process, loaded again by all
    if run.is_world_process_zero():
        shutil.rmtree(output / "packed", ignore_errors=True)
        model.save_pretrained(output / "packed")
        tokenizer.save_pretrained(output / "packed")
    run.accelerator.wait_for_everyone()
    model = AutoModel.from_pretrained(output / "packed")
    scores["reloaded"] = score(model)

    if run.is_world_process_zero():
        report, size = cpq_hf.summarize(model), cpq_hf.verify_checkpoint(output / "packed")["bytes"]
        rows = (f"{name:10}{value:>12.4f}" for name, value in scores.items())
        print(f"\n{report}\n\n{'model':10}{args.metric or 'accuracy':>12}", *rows, sep="\n")
        print(f"{output / 'packed'}: mean {report.mean_bits:.2f} bits, {size / 1e6:.3f} MB")
        for part in (model, tokenizer) if push else ():
            part.push_to_hub(training.hub_model_id or output.name, private=training.hub_private_repo)
    run.accelerator.end_training()
    if scores["reloaded"] != scores["trained"]:
        raise SystemExit("the packed model does not score as the trained one")


if __name__ == "__main__":
    try:
        main()
    except (CPQError, OSError) as error:  # a setting or a name to set right, which it says
        raise SystemExit(f"{error}") from error
