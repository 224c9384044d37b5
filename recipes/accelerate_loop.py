"""Train a few-bit model without Trainer: a loop of your own with `accelerate`, to start yours from.

    accelerate launch --config_file recipes/accelerate/cpu.yaml recipes/accelerate_loop.py --weight_bits 3

needs no network: scikit-learn's handwritten digits and a small ResNet, trained in float first. Several GPUs, and going
on where an interrupted run stopped:

    accelerate launch --config_file recipes/accelerate/many_gpus.yaml recipes/accelerate_loop.py \
        --weight_bits 5 --learn_bits --target_bits 3 --resume_from_checkpoint runs/accelerate_loop/checkpoint-200

What CPQ adds to a loop is marked with `CPQ`. `output_dir` then holds `float`, `trained` (on the grid, can be trained
further), `packed` (integers, what you publish) and checkpoints.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import evaluate
import numpy as np
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification as AutoModel
from transformers import HfArgumentParser, ResNetConfig, get_cosine_schedule_with_warmup

import cpq_hf
from cpq_hf import CPQConfig, CPQController


@dataclass
class Arguments:
    output_dir: str = field(default="runs/accelerate_loop", metadata={"help": "where models and checkpoints go"})
    weight_bits: int = field(default=4, metadata={"help": "bit-width of weights; with learn_bits, the largest"})
    activation_bits: int | None = field(default=None, metadata={"help": "bit-width of inputs; else left in float"})
    learn_bits: bool = field(default=False, metadata={"help": "learn the bit-width of each layer"})
    target_bits: float | None = field(default=None, metadata={"help": "their mean, at most; with learn_bits"})
    float_epochs: int = field(default=12, metadata={"help": "epochs in float first"})
    num_train_epochs: int = field(default=12, metadata={"help": "epochs on the grid"})
    max_steps: int | None = field(default=None, metadata={"help": "end each training after so many steps"})
    batch_size: int = field(default=16, metadata={"help": "images in a batch of one process"})
    gradient_accumulation_steps: int = field(default=2, metadata={"help": "batches in an optimizer step"})
    learning_rate: float = field(default=2e-3, metadata={"help": "its largest value"})
    save_steps: int = field(default=100, metadata={"help": "optimizer steps between checkpoints"})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "folder of the checkpoint to go on with"}
    )
    seed: int = field(default=0, metadata={"help": "seed of split, initial weights and data order"})
    hub_model_id: str | None = field(default=None, metadata={"help": "where the packed model is pushed in the end"})
    overwrite: bool = field(default=False, metadata={"help": "replace the packed model in output_dir"})


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
    data = datasets.Dataset.from_dict({"pixel_values": pixels, "labels": labels})
    return data.train_test_split(test_size=0.2, seed=seed).with_format("torch")


def small_resnet() -> ResNetConfig:
    shape = {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1], "layer_type": "basic"}
    return ResNetConfig(num_channels=1, num_labels=10, **shape)


@torch.no_grad()
def accuracy(accelerator: Accelerator, model, loader: DataLoader) -> float:
    """Over the rows of all processes, each counted once."""
    metric = Accuracy()
    model.eval()
    for batch in loader:
        predictions, labels = accelerator.gather_for_metrics((model(**batch).logits.argmax(-1), batch["labels"]))
        metric.add_batch(predictions=predictions, references=labels)
    return metric.compute()["accuracy"]


def train(accelerator: Accelerator, args: Arguments, model, loader: DataLoader, epochs: int, quantized: bool):
    """Train a model on batches of a prepared loader and return it wrapped."""
    steps_in_epoch = math.ceil(len(loader) / args.gradient_accumulation_steps)
    steps, step = args.max_steps or epochs * steps_in_epoch, 0
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, weight_decay=0)  # CPQ: steps must not decay
    scheduler = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    if quantized:
        controller = CPQController(model, optimizer, steps)  # CPQ: before `prepare`; it hooks into `optimizer.step`
        accelerator.register_for_checkpointing(controller)  # CPQ: what it learned is part of a checkpoint
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    if quantized and args.resume_from_checkpoint is not None:
        accelerator.load_state(args.resume_from_checkpoint)
        step = controller.step
    model.train()
    while step < steps:
        epoch, done = divmod(step, steps_in_epoch)
        loader.set_epoch(epoch)  # of which the order of the data depends
        for batch in accelerator.skip_first_batches(loader, done * args.gradient_accumulation_steps):
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            scheduler.step()
            step += 1
            if step % 50 == 0:
                accelerator.print(f"step {step} of {steps}: loss {loss.item():.4f}")
            if quantized and (step % args.save_steps == 0 or step == steps):
                accelerator.save_state(Path(args.output_dir) / f"checkpoint-{step}")
            if step == steps:
                break
    return model


def save(accelerator: Accelerator, model, folder: Path) -> None:
    """Gathered from all processes, written by one."""
    state = accelerator.get_state_dict(model)
    plain = accelerator.unwrap_model(model)
    plain.save_pretrained(folder, state_dict=state, is_main_process=accelerator.is_main_process)
    accelerator.wait_for_everyone()


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    output = Path(args.output_dir)
    config = CPQConfig(
        weight_bits=args.weight_bits, activation_bits=args.activation_bits, learn_bits=args.learn_bits,
        target_bits=args.target_bits,
    )  # fmt: skip
    if (output / "packed").exists() and not args.overwrite:
        raise SystemExit(f"{output / 'packed'} holds a packed model; choose another --output_dir, or --overwrite it")
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        step_scheduler_with_optimizer=False,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
    )
    set_seed(args.seed)
    datasets.disable_progress_bars()
    data = digits(args.seed)
    train_loader, test_loader = accelerator.prepare(
        DataLoader(data["train"], args.batch_size, shuffle=True), DataLoader(data["test"], 4 * args.batch_size)
    )

    if args.resume_from_checkpoint is None:
        model = AutoModel.from_config(small_resnet())
        model = train(accelerator, args, model, train_loader, args.float_epochs, quantized=False)
        save(accelerator, model, output / "float")
        accelerator.free_memory()  # else the next checkpoints would hold it
    model = accelerator.prepare_model(AutoModel.from_pretrained(output / "float"), evaluation_mode=True)
    scores = {"float": accuracy(accelerator, model, test_loader)}
    accelerator.free_memory()

    model = AutoModel.from_pretrained(output / "float", quantization_config=config)  # CPQ: on the grid
    model = train(accelerator, args, model, train_loader, args.num_train_epochs, quantized=True)
    scores["trained"] = accuracy(accelerator, model, test_loader)
    save(accelerator, model, output / "trained")

    if accelerator.is_main_process:  # CPQ: packed by one process, loaded again by all
        shutil.rmtree(output / "packed", ignore_errors=True)
        packed = cpq_hf.pack_model(AutoModel.from_pretrained(output / "trained"))
        packed.save_pretrained(output / "packed")
        cpq_hf.verify_checkpoint(output / "packed")
        if args.hub_model_id:
            packed.push_to_hub(args.hub_model_id)
    accelerator.wait_for_everyone()
    model = accelerator.prepare_model(AutoModel.from_pretrained(output / "packed"), evaluation_mode=True)
    scores["reloaded"] = accuracy(accelerator, model, test_loader)

    report = cpq_hf.summarize(model)
    accelerator.print(f"\n{report}\n\n{'model':10}{'accuracy':>12}")
    accelerator.print(*(f"{name:10}{score:>12.4f}" for name, score in scores.items()), sep="\n")
    megabytes = sum(file.stat().st_size for file in (output / "packed").glob("*.safetensors")) / 1e6
    accelerator.print(f"{output / 'packed'}: mean {report.mean_bits:.2f} bits, {megabytes:.3f} MB")
    accelerator.end_training()
    if scores["reloaded"] != scores["trained"]:
        raise SystemExit("the packed model does not score as the trained one")


if __name__ == "__main__":
    main()
