"""Train an image classifier at a few bits: ResNet, ViT, MobileNetV2, ConvNeXt or any other model of the Hub.

    python recipes/image_classification.py --architecture vit --weight_bits 2 --activation_bits 4

needs no network: scikit-learn's handwritten digits and a small model made here, trained in float first. Your own:

    accelerate launch --config_file recipes/accelerate/one_gpu.yaml recipes/image_classification.py \
        --model_name_or_path microsoft/resnet-18 --dataset_name beans --label_column labels --float_epochs 3 \
        --weight_bits 4 --activation_bits 4 --num_train_epochs 10 --learning_rate 1e-4 --bf16

Every setting of CPQConfig and TrainingArguments is an option, as `--resume_from_checkpoint True` or `--push_to_hub`.
`output_dir` then holds `float`, `trained` (can be trained further), `packed` (what you publish).
"""

from __future__ import annotations

import itertools
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import datasets
import evaluate
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score
from transformers import AutoConfig, HfArgumentParser, Trainer, TrainingArguments, set_seed
from transformers import AutoModelForImageClassification as AutoModel
from transformers import ViTImageProcessorPil as SmallProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # 5.17 asks for torchvision otherwise

import cpq_hf
from cpq_hf import CPQCallback, CPQConfig, CPQError, CPQOptimizer

SMALL = {  # what `--architecture` makes, for images of 32x32
    "resnet": {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1], "layer_type": "basic"},
    "vit": {"image_size": 32, "patch_size": 8, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
            "intermediate_size": 128},
    "mobilenet_v2": {"image_size": 32, "depth_multiplier": 0.25, "output_stride": 16, "classifier_dropout_prob": 0.2},
    "convnext": {"hidden_sizes": [32, 64], "depths": [1, 1], "num_stages": 2, "layer_scale_init_value": 1.0},
}  # fmt: skip


@dataclass
class Arguments:
    model_name_or_path: str | None = field(default=None, metadata={"help": "model of the Hub, or folder"})
    architecture: str = field(default="resnet", metadata={"help": "small model, without one", "choices": [*SMALL]})
    dataset_name: str | None = field(default=None, metadata={"help": "data set of the Hub, or folder; else digits"})
    image_column: str = field(default="image", metadata={"help": "its column of images"})
    label_column: str = field(default="label", metadata={"help": "its column of classes"})
    metric: str | None = field(default=None, metadata={"help": "name or folder for evaluate.load; else accuracy"})
    float_epochs: float = field(default=0, metadata={"help": "epochs in float first; 12 for a small model"})
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
        output_dir="runs/image_classification", learning_rate=1e-4, lr_scheduler_type="cosine", warmup_steps=0.1,
        per_device_train_batch_size=32, per_device_eval_batch_size=128, logging_steps=50, save_strategy="epoch",
        remove_unused_columns=False, dataloader_pin_memory=gpu, use_cpu=not gpu, ddp_find_unused_parameters=False,
    )  # fmt: skip
    if parser.parse_args().model_name_or_path is None:  # a small model that knows nothing yet
        parser.set_defaults(float_epochs=12, num_train_epochs=12, learning_rate=5e-3)
    return parser.parse_args_into_dataclasses()


def load_data(args: Arguments, seed: int) -> tuple[datasets.DatasetDict, dict[int | str, str]]:
    """The parts `train` and `test`, and the name of the class for each label."""
    if args.dataset_name is None:
        images, labels = load_digits(return_X_y=True)
        pictures = [Image.fromarray((image * 15.9).astype("uint8")) for image in images.reshape(-1, 8, 8)]
        data = datasets.DatasetDict(train=datasets.Dataset.from_dict({"image": pictures, "label": labels}))
    else:
        data = datasets.load_dataset(args.dataset_name)
    if "train" not in data:
        raise SystemExit(f"the data have no part 'train', only: {', '.join(data)}")
    features = data["train"].features
    classes = (datasets.ClassLabel, datasets.Value)
    for option, what, kind in (("image_column", "images", datasets.Image), ("label_column", "classes", classes)):
        if (column := getattr(args, option)) not in features:
            raise SystemExit(f"the data have no column {column!r}; set --{option} to one of: {', '.join(features)}")
        if not isinstance(features[column], kind):
            raise SystemExit(f"the column {column!r} holds no {what}; set --{option} to one that does")
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


def load_float(args: Arguments, names: list[str]):
    """A model with an output for each class, a new one where it had others, and its image processor."""
    source, small = args.model_name_or_path, SMALL[args.architecture]
    config = AutoConfig.from_pretrained(source) if source else AutoConfig.for_model(args.architecture, **small)
    if set(config.label2id) != set(names):  # else the model knows these classes, maybe in another order
        config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    if source is None:
        return AutoModel.from_config(config), SmallProcessor(size={"height": 32, "width": 32})
    model = AutoModel.from_pretrained(source, config=config, dtype=torch.float32, ignore_mismatched_sizes=True)
    return model, AutoImageProcessor.from_pretrained(source, backend="pil")


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
    model, processor = load_float(args, [*names.values()])
    type(model).accepts_loss_kwargs = False  # ResNet claims to average over accumulated batches, but does not
    numbers = {label: model.config.label2id[name] for label, name in names.items()}
    metric = Accuracy() if args.metric is None else evaluate.load(args.metric)

    def to_inputs(batch):  # augmentation would go here
        images = [image.convert("RGB") for image in batch[args.image_column]]
        labels = [numbers[label] for label in batch[args.label_column]]
        return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"], "labels": labels}

    def compute_metrics(prediction):
        scores = metric.compute(predictions=prediction.predictions.argmax(-1), references=prediction.label_ids)
        return {"score": next(iter(scores.values()))} | scores

    data, tools = data.with_transform(to_inputs), {"processing_class": processor, "compute_metrics": compute_metrics}
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
        processor.save_pretrained(output / "packed")
    run.accelerator.wait_for_everyone()
    model = AutoModel.from_pretrained(output / "packed")
    scores["reloaded"] = score(model)

    if run.is_world_process_zero():
        report, size = cpq_hf.summarize(model), cpq_hf.verify_checkpoint(output / "packed")["bytes"]
        rows = (f"{name:10}{value:>12.4f}" for name, value in scores.items())
        print(f"\n{report}\n\n{'model':10}{args.metric or 'accuracy':>12}", *rows, sep="\n")
        print(f"{output / 'packed'}: mean {report.mean_bits:.2f} bits, {size / 1e6:.3f} MB")
        for part in (model, processor) if push else ():
            part.push_to_hub(training.hub_model_id or output.name, private=training.hub_private_repo)
    run.accelerator.end_training()
    if scores["reloaded"] != scores["trained"]:
        raise SystemExit("the packed model does not score as the trained one")


if __name__ == "__main__":
    try:
        main()
    except (CPQError, OSError) as error:  # a setting or a name to set right, which it says
        raise SystemExit(f"{error}") from error
