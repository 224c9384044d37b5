"""Train a small ResNet on handwritten digits, quantize it to W4A4 and W2A4 with CPQ, pack, save, reload, compare.

    python recipes/quickstart.py

needs no network and a few minutes on two cores. The data are scikit-learn's bundled 8x8 digits, scaled up to 32x32.
Everything in between is what you would do with your own model: `from_pretrained`, `Trainer`, `save_pretrained`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import evaluate
import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score
from transformers import (
    AutoModelForImageClassification,
    HfArgumentParser,
    ResNetConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)

import cpq_hf
from cpq_hf import CPQCallback, CPQConfig, CPQOptimizer
from cpq_hf.nn import TrainingLayer


@dataclass
class Arguments:
    output_dir: str = field(default="runs/quickstart", metadata={"help": "where checkpoints and the picture go"})
    float_epochs: float = field(default=12, metadata={"help": "epochs of the float model"})
    quantized_epochs: float = field(default=12, metadata={"help": "epochs of each quantized model"})
    max_steps: int = field(default=-1, metadata={"help": "stop each training after so many steps (for tests)"})
    seed: int = field(default=0, metadata={"help": "seed of split, initial weights and data order"})


class Accuracy(evaluate.Metric):
    """Share of right answers. Instantiated directly, so that nothing has to be downloaded."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description="accuracy", citation="", features=features)

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


def digits(seed: int) -> datasets.DatasetDict:
    images, labels = load_digits(return_X_y=True)
    pixels = images.reshape(-1, 1, 8, 8).repeat(4, axis=2).repeat(4, axis=3).astype(np.float32) / 8 - 1
    data = datasets.Dataset.from_dict({"pixel_values": pixels, "labels": labels}).class_encode_column("labels")
    return data.train_test_split(test_size=1 / 3, seed=seed, stratify_by_column="labels").with_format("torch")


def small_resnet() -> ResNetConfig:
    return ResNetConfig(
        num_channels=1,
        embedding_size=16,
        hidden_sizes=[16, 32, 64],
        depths=[1, 1, 1],
        layer_type="basic",
        num_labels=10,
    )


def trainer(model, data: datasets.DatasetDict, args: Arguments, name: str, epochs: float, lr: float) -> Trainer:
    training = TrainingArguments(
        output_dir=str(Path(args.output_dir) / f"{name}-training"),
        num_train_epochs=epochs,
        max_steps=args.max_steps,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=256,
        learning_rate=lr,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.01,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=args.seed,
    )
    metric = Accuracy()
    quantized = name != "float"
    return Trainer(
        model=model,
        args=training,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        compute_metrics=lambda p: metric.compute(predictions=p.predictions.argmax(-1), references=p.label_ids),
        callbacks=[CPQCallback()] if quantized else None,
        optimizer_cls_and_kwargs=(CPQOptimizer, {"args": training}) if quantized else None,
    )


def accuracy(model, data: datasets.DatasetDict) -> float:
    """Accuracy on the test part of any model, by hand."""
    metric = Accuracy()
    model.eval()
    for batch in data["test"].iter(batch_size=256):
        with torch.no_grad():
            predictions = model(pixel_values=batch["pixel_values"].to(model.device)).logits.argmax(-1).cpu()
        metric.add_batch(predictions=predictions, references=batch["labels"])
    return metric.compute()["accuracy"]


def grid_positions(model) -> np.ndarray:
    """All quantized weights in units of their step size."""
    layers = [module for module in model.modules() if isinstance(module, TrainingLayer)]
    positions = [
        (layer.weight.detach().flatten(1) / layer.weight_quantizer.alpha().view(-1, 1)).flatten() for layer in layers
    ]
    return torch.cat(positions).cpu().numpy()


def draw(before: np.ndarray, after: np.ndarray, bits: int, path: Path) -> None:
    # the 2-bit grid is centred on zero: its levels are at -1.5, -0.5, 0.5 and 1.5 steps
    levels = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)) + (0.5 if bits == 2 else 0.0)
    lo, hi = levels[0], levels[-1]
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    for axes, positions, title in zip(
        figure.subplots(1, 2, sharey=True), (before, after), ("before training", "after training"), strict=True
    ):
        axes.hist(positions, bins=np.linspace(lo - 1.5, hi + 1.5, 181), density=True, color="#3465a4")
        for level in levels:
            axes.axvline(level, color="#cc0000", linewidth=0.8)
        inside = positions[(positions > lo - 0.5) & (positions < hi + 0.5)]
        distance = np.abs(inside[:, None] - levels).min(axis=1).mean()
        axes.set_title(f"{title}: mean distance to the grid {distance:.3f}", fontsize=11)
        axes.set_xlabel("weight / step size (red: the levels of the grid)")
    figure.suptitle(f"Weights of the {bits}-bit ResNet on their grid")
    figure.savefig(path, dpi=130)


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    started, output = time.time(), Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    datasets.disable_progress_bars()
    set_seed(args.seed)
    data = digits(args.seed)
    print(f"{len(data['train'])} training and {len(data['test'])} test images\n\n[1/3] float")

    model = AutoModelForImageClassification.from_config(small_resnet())
    trainer(model, data, args, "float", args.float_epochs, lr=5e-3).train()
    model.save_pretrained(output / "float")
    float_size = (output / "float" / "model.safetensors").stat().st_size
    rows = [("float", None, accuracy(model, data), None, 32.0, float_size)]

    for number, bits in enumerate((4, 2), start=2):
        name = f"w{bits}a4"
        print(f"\n[{number}/3] {name}: {bits}-bit weights, 4-bit activations")
        model = AutoModelForImageClassification.from_pretrained(
            output / "float", quantization_config=CPQConfig(weight_bits=bits, activation_bits=4)
        )
        cpq_hf.calibrate_model(model, [{"pixel_values": data["train"][:256]["pixel_values"]}])
        rounded, before = accuracy(model, data), grid_positions(model)
        trainer(model, data, args, name, args.quantized_epochs, lr=5e-3).train()
        after, trained, report = grid_positions(model), accuracy(model, data), cpq_hf.summarize(model)
        cpq_hf.pack_model(model)
        model.save_pretrained(output / name)
        size = cpq_hf.verify_checkpoint(output / name)["bytes"]
        reloaded = AutoModelForImageClassification.from_pretrained(output / name)
        rows.append((name, rounded, trained, accuracy(reloaded, data), report.mean_bits, size))
    draw(before, after, bits, output / "weights.png")

    print(f"\nAccuracy on the {len(data['test'])} test images (rounded: float weights on the grid, before training)")
    print(f"{'model':8}{'rounded':>10}{'trained':>10}{'reloaded':>10}{'mean bits':>11}{'file size':>12}{'ratio':>8}")
    for name, *accuracies, mean_bits, size in rows:
        cells = "".join(f"{'-' if value is None else format(value, '.2%'):>10}" for value in accuracies)
        print(f"{name:8}{cells}{mean_bits:>11.2f}{size / 1000:>9.1f} KB{float_size / size:>7.1f}x")
    print(f"\nThe last model, layer by layer\n{report}\n\nPicture: {output / 'weights.png'}")
    print(f"Checkpoints: {', '.join(str(output / row[0]) for row in rows)}   ({time.time() - started:.0f} s in all)")
    print(
        "Next: put your own model into `from_pretrained(..., quantization_config=CPQConfig(weight_bits=4))`, add\n"
        "`callbacks=[CPQCallback()]` to your Trainer, then `cpq_hf.pack_model(model)` and `model.push_to_hub(...)`."
    )


if __name__ == "__main__":
    main()
