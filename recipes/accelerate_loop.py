"""Train a few-bit image classifier without Trainer: a loop of your own with `accelerate`, to start yours from.

    accelerate launch --config_file recipes/accelerate/cpu.yaml recipes/accelerate_loop.py --weight_bits 3

needs no network: scikit-learn's handwritten digits and a small ResNet, trained in float first. Your own:

    accelerate launch --config_file recipes/accelerate/many_gpus.yaml recipes/accelerate_loop.py \
        --model_name_or_path microsoft/resnet-18 --dataset_name beans --label_column labels --float_epochs 3

Every setting of CPQConfig is an option. What CPQ adds to a loop is marked with `CPQ`. `output_dir` then holds `float`,
`trained` (can be trained further), `packed` (what you publish) and checkpoints: to go on, add one to the same options.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import evaluate
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader
from transformers import AutoConfig, HfArgumentParser, ResNetConfig, get_cosine_schedule_with_warmup, set_seed
from transformers import AutoModelForImageClassification as AutoModel
from transformers import ViTImageProcessorPil as SmallProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # 5.17 asks for torchvision otherwise

import cpq_hf
from cpq_hf import CPQConfig, CPQController, CPQError


@dataclass
class Arguments:
    output_dir: str = field(default="runs/accelerate_loop", metadata={"help": "where models and checkpoints go"})
    model_name_or_path: str | None = field(default=None, metadata={"help": "model of the Hub, or folder"})
    dataset_name: str | None = field(default=None, metadata={"help": "data set of the Hub, or folder; else digits"})
    image_column: str = field(default="image", metadata={"help": "its column of images"})
    label_column: str = field(default="label", metadata={"help": "its column of classes"})
    float_epochs: int = field(default=0, metadata={"help": "epochs in float first; 12 for a small model"})
    num_train_epochs: int = field(default=12, metadata={"help": "epochs on the grid"})
    max_steps: int | None = field(default=None, metadata={"help": "end each training after so many steps"})
    batch_size: int = field(default=16, metadata={"help": "images in a batch of one process"})
    gradient_accumulation_steps: int = field(default=2, metadata={"help": "batches in an optimizer step"})
    learning_rate: float = field(default=1e-4, metadata={"help": "its largest value; 2e-3 for a small model"})
    save_steps: int = field(default=100, metadata={"help": "optimizer steps between checkpoints"})
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "folder of one, to go on with"})
    seed: int = field(default=0, metadata={"help": "seed of split, initial weights and data order"})
    hub_model_id: str | None = field(default=None, metadata={"help": "where the packed model is pushed in the end"})
    overwrite: bool = field(default=False, metadata={"help": "replace the packed model in output_dir"})


class Accuracy(evaluate.Metric):  # instantiated directly, so that nothing has to be downloaded
    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description="accuracy", citation="", features=features)

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": sum(p == r for p, r in zip(predictions, references, strict=True)) / len(references)}


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
    features, classes = data["train"].features, (datasets.ClassLabel, datasets.Value)
    for option, what, kind in (("image_column", "images", datasets.Image), ("label_column", "classes", classes)):
        if (column := getattr(args, option)) not in features:
            raise SystemExit(f"the data have no column {column!r}; set --{option} to one of: {', '.join(features)}")
        if not isinstance(features[column], kind):
            raise SystemExit(f"the column {column!r} holds no {what}; set --{option} to one that does")
    test = next((name for name in ("validation", "test") if name in data), None)
    data = data if test else data["train"].train_test_split(test_size=0.2, seed=seed)
    data = datasets.DatasetDict(train=data["train"], test=data[test or "test"])
    labels = {label for part in data.values() for label in part.unique(column)}
    names = getattr(features[column], "names", None)
    names = dict(enumerate(names)) if names else {label: str(label) for label in sorted(labels - {None})}
    if not labels <= names.keys():
        raise SystemExit(f"the column {column!r} has rows without a class; leave them out first")
    return data, names


@torch.no_grad()
def accuracy(accelerator: Accelerator, folder: Path, loader: DataLoader) -> float:
    """Of the model in a folder, over the rows of all processes, each counted once."""
    model, metric = accelerator.prepare_model(AutoModel.from_pretrained(folder), evaluation_mode=True), Accuracy()
    for batch in loader:
        predictions, labels = accelerator.gather_for_metrics((model(**batch).logits.argmax(-1), batch["labels"]))
        metric.add_batch(predictions=predictions, references=labels)
    return metric.compute()["accuracy"]


def train(accelerator: Accelerator, args: Arguments, model, loader: DataLoader, epochs: int, folder: Path) -> None:
    """Train a model, in float or on the grid, on batches of a prepared loader, and save it."""
    steps_in_epoch = math.ceil(len(loader) / args.gradient_accumulation_steps)
    quantized = hasattr(model.config, "quantization_config")
    steps, step = min(epochs * steps_in_epoch, args.max_steps or math.inf), 0
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
                accelerator.save_state(folder.parent / f"checkpoint-{step}")
            if step == steps:
                break
    plain, state = accelerator.unwrap_model(model), accelerator.get_state_dict(model)  # gathered from all processes
    plain.save_pretrained(folder, state_dict=state, is_main_process=accelerator.is_main_process)
    accelerator.wait_for_everyone()
    accelerator.free_memory()  # else the next checkpoints would hold it


def main() -> None:
    parser = HfArgumentParser((Arguments, CPQConfig))
    if parser.parse_args().model_name_or_path is None:  # a small model that knows nothing yet
        parser.set_defaults(float_epochs=12, learning_rate=2e-3)
    args, config = parser.parse_args_into_dataclasses()
    output, resume = Path(args.output_dir), args.resume_from_checkpoint is not None
    if (output / "packed").exists() and not args.overwrite:
        raise SystemExit(f"{output / 'packed'} holds a packed model; choose another --output_dir, or --overwrite it")
    order = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed)
    steps = {"gradient_accumulation_steps": args.gradient_accumulation_steps, "step_scheduler_with_optimizer": False}
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), dataloader_config=order, **steps)
    set_seed(args.seed)
    data, names = load_data(args, args.seed)
    source = (output / "float").resolve() if resume else args.model_name_or_path
    small = {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1], "layer_type": "basic"}
    shape = AutoConfig.from_pretrained(source) if source else ResNetConfig(**small)
    if set(shape.label2id) != {*names.values()}:  # else the model knows these classes, maybe in another order
        shape.id2label, shape.label2id = dict(enumerate(names.values())), {n: i for i, n in enumerate(names.values())}
    options = {"config": shape, "dtype": torch.float32, "ignore_mismatched_sizes": True}
    model = AutoModel.from_pretrained(source, **options) if source else AutoModel.from_config(shape)
    path, size = args.model_name_or_path, {"height": 32, "width": 32}
    processor = AutoImageProcessor.from_pretrained(path, backend="pil") if path else SmallProcessor(size=size)

    def to_inputs(batch):  # augmentation would go here
        images = [image.convert("RGB") for image in batch[args.image_column]]
        labels = [shape.label2id[names[label]] for label in batch[args.label_column]]
        return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"], "labels": labels}

    data = data.with_transform(to_inputs)
    loader = accelerator.prepare(DataLoader(data["train"], args.batch_size, shuffle=True))
    test_loader = accelerator.prepare(DataLoader(data["test"], 4 * args.batch_size))
    if not resume:
        train(accelerator, args, model, loader, args.float_epochs, output / "float")
    model = AutoModel.from_pretrained(output / "float", quantization_config=config)  # CPQ: on the grid
    train(accelerator, args, model, loader, args.num_train_epochs, output / "trained")
    if accelerator.is_main_process:  # CPQ: packed by one process, loaded again by all
        packed = cpq_hf.pack_model(AutoModel.from_pretrained(output / "trained"))
        packed.save_pretrained(output / "packed")
        processor.save_pretrained(output / "packed")
    accelerator.wait_for_everyone()
    folders = {"float": "float", "trained": "trained", "reloaded": "packed"}
    scores = {name: accuracy(accelerator, output / folder, test_loader) for name, folder in folders.items()}
    if accelerator.is_main_process:
        print(f"\n{cpq_hf.summarize(packed)}\n\n{'model':10}{'accuracy':>12}")
        print(*(f"{name:10}{score:>12.4f}" for name, score in scores.items()), sep="\n")
        print(f"{output / 'packed'}: {cpq_hf.verify_checkpoint(output / 'packed')['bytes'] / 1e6:.3f} MB")
        for part in (packed, processor) if args.hub_model_id else ():
            part.push_to_hub(args.hub_model_id)
    accelerator.end_training()
    if scores["reloaded"] != scores["trained"]:
        raise SystemExit("the packed model does not score as the trained one")


if __name__ == "__main__":
    try:
        main()
    except (CPQError, OSError) as error:  # a setting or a name to set right, which it says
        raise SystemExit(f"{error}") from error
