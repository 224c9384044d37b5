"""Run an experiment of the paper: a float model, then each width and variant of it quantized in all layers.

    python recipes/paper/run.py lenet5-mnist                          # data from the Hub
    python recipes/paper/run.py vgg7-cifar10 --data folder --bits 2   # from train/<class>/*.png, test/<class>/*.png
    accelerate launch --num_processes 8 recipes/paper/run.py resnet18-imagenet --workers 8
    python recipes/paper/table.py                                     # the table, from what is there

Variants: `plain`, `dropbits`, `learned` (lengths that meet the width on average) and `learned-fixed` (those lengths
fixed from the start, the control). Each run is a line in `results.jsonl` under `--output`, found again by its
settings: a second call runs what is missing, and a run that was cut off goes on from its last epoch. Settings say
nothing of the code: after a change to it start with an empty `--output`.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from data import Data, load
from experiments import BITS, EXPERIMENTS, MIN_BITS, VARIANTS, quantization
from models import pretrained_model, random_model
from results import Results, Settings, digest
from safetensors.torch import load_file, save_file
from torch import nn
from training import measure, trainer_of
from transformers import Trainer

import cpq_hf
from cpq_hf import CPQConfig


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--data", help="name on the Hub, or a folder; the paper's data if left out")
    parser.add_argument("--bits", nargs="+", type=int, choices=BITS, default=BITS, help="of weights and activations")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=1, help="runs of each, from the one float model")
    parser.add_argument("--model", help="pretrained model, name or folder; the one of the experiment if left out")
    parser.add_argument("--random_init", action="store_true", help="train the float model too, from random weights")
    parser.add_argument("--max_steps", type=int, default=-1, help="stop each training after so many steps")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images, for each training process")
    parser.add_argument("--output", type=Path, default=Path("runs/paper"), help="where results and checkpoints go")
    args = parser.parse_args()
    pretrained = "/" in EXPERIMENTS[args.experiment].model and not args.random_init
    if args.model and not pretrained:
        parser.error("--model is for a pretrained model; this one starts from random weights")
    args.start = (args.model or EXPERIMENTS[args.experiment].model) if pretrained else None
    return args


class Runner:
    """One experiment on one data set."""

    def __init__(self, args: argparse.Namespace, data: Data) -> None:
        self.args, self.data = args, data
        self.experiment = EXPERIMENTS[args.experiment]
        self.results = Results(args.output / "results.jsonl")
        self.processes = PartialState(cpu=not torch.accelerator.is_available())

    def settings(self, variant: str, **more: Any) -> Settings:
        start = self.args.start or "random"
        return {
            "experiment": self.args.experiment,
            "variant": variant,
            "data": self.data.name,
            "start": Path(start).name if Path(start).is_dir() else start,
            "max_steps": self.args.max_steps,
            "table": asdict(self.experiment),
        } | more

    def folder(self, settings: Settings) -> Path:
        return self.args.output / f"{self.args.experiment}-{settings['variant']}-{digest(settings)}"

    def trainer(self, model: nn.Module, settings: Settings, quantized: bool) -> Trainer:
        return trainer_of(
            self.experiment,
            model,
            self.data,
            self.folder(settings),
            quantized,
            settings.get("seed", 0),
            max_steps=self.args.max_steps,
            dataloader_num_workers=self.args.workers,
        )

    def finish(self, settings: Settings, result: dict[str, Any]) -> None:
        """Write the line; then the checkpoints are not needed any more."""
        self.results.add(settings, result, write=self.processes.is_main_process)
        if self.processes.is_main_process:
            shutil.rmtree(self.folder(settings), ignore_errors=True)
            print(f"{settings['variant']} {settings.get('bits', 32)} bits: {result['top1_error']:.2f} % top-1 error")
        self.processes.wait_for_everyone()

    def float_model(self) -> nn.Module:
        """Load the pretrained model, or train one once and keep it."""
        settings = self.settings("float")
        kept = self.folder(settings).with_suffix(".safetensors")
        if self.args.start:
            model = pretrained_model(self.experiment, self.data.classes, self.args.start)
        else:
            model = random_model(self.experiment, self.data.classes, seed=0)
        if self.results.get(settings) is None:
            result = measure(self.trainer(model, settings, quantized=False), train=not self.args.start)
            if not self.args.start and self.processes.is_main_process:
                kept.parent.mkdir(parents=True, exist_ok=True)
                save_file({name: value.contiguous() for name, value in model.state_dict().items()}, kept)
            self.finish(settings, result)
        elif not self.args.start:
            model.load_state_dict(load_file(kept))
        return model.cpu()

    def run_settings(self, variant: str, bits: int, seed: int, lengths: dict[str, int] | None = None) -> Settings:
        return self.settings(variant, bits=bits, seed=seed, config=quantization(variant, bits, lengths))

    def quantized(self, float_model: nn.Module, variant: str, bits: int, seed: int) -> None:
        """One run, unless its result is there."""
        lengths = None
        if variant == "learned-fixed":
            learned = self.results.get(self.run_settings("learned", bits, seed))
            if learned is None:
                print(f"learned-fixed {bits} bits: needs the lengths of the variant `learned`; run that first")
                return
            lengths = learned["layer_bits"]
        settings = self.run_settings(variant, bits, seed, lengths)
        if self.results.get(settings) is not None:
            return
        model = cpq_hf.prepare_model(copy.deepcopy(float_model), CPQConfig(**settings["config"]))
        result = measure(self.trainer(model, settings, quantized=True))
        report = cpq_hf.summarize(model)
        result |= {"mean_bits": report.mean_bits, "packed_bytes": report.packed_bytes}
        result["layer_bits"] = {layer.name: layer.spec.weight.bits for layer in report.layers}
        self.finish(settings, result)


def main() -> None:
    args = parse()
    experiment = EXPERIMENTS[args.experiment]
    try:
        runner = Runner(args, load(experiment, args.data or experiment.data))
        processes = runner.processes.num_processes
        if torch.cuda.device_count() > 1 and processes == 1:
            raise ValueError(
                "several GPUs: start with `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one of them"
            )
        if experiment.batch_size % processes:
            raise ValueError(f"a batch of {experiment.batch_size} does not divide among {processes} processes")
        model = runner.float_model()
    except ValueError as error:
        sys.exit(f"error: {error}")
    for bits in args.bits:
        for variant in (name for name in VARIANTS if name in args.variants):
            if VARIANTS[variant].needs_bits_to_drop and bits == MIN_BITS:
                continue
            for seed in range(args.seeds):
                runner.quantized(model, variant, bits, seed)


if __name__ == "__main__":
    main()
