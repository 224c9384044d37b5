"""What a training step costs: float against plain LSQ against CPQ, in one run, paired; memory against the textbook.

    python recipes/benchmarks/step_time.py

Each round times one step of every method, in an order that rotates; printed are medians over the rounds and medians of
the ratios within a round, which cancel what else the machine was doing. LSQ is `lsq.py`, eager as CPQ is.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
import transformers
from lsq import LSQ, prepare_lsq
from torch import Tensor, nn
from transformers import HfArgumentParser, ResNetConfig, ResNetForImageClassification

from cpq_hf import CPQConfig, CPQController, calibrate_model, prepare_model
from cpq_hf.grid import fake_quantize
from cpq_hf.kernels import cpu


@dataclass
class Arguments:
    rounds: int = field(default=40, metadata={"help": "timed rounds"})
    warmup: int = field(default=5, metadata={"help": "rounds before timing"})
    tokens: int = field(default=256, metadata={"help": "rows of the input of the linear layer"})
    batch: int = field(default=32, metadata={"help": "images per step of the ResNet"})
    memory: bool = field(default=True, metadata={"help": "also measure peak memory, in processes of their own"})


class OneLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(768, 3072)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).square().mean()


class SmallResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        config = ResNetConfig(
            num_channels=1, embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic"
        )
        self.net = ResNetForImageClassification(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(pixel_values=x).logits.square().mean()


def methods(build: Callable[[], nn.Module], x: Tensor, weight_bits: int, activation_bits: int | None, dropbits: float):
    """`{method: function that makes one training step}`, all from the same weights and on the same layers."""

    def cpq(dropbits: float) -> nn.Module:
        torch.manual_seed(0)
        config = CPQConfig(
            weight_bits=weight_bits, activation_bits=activation_bits, dropbits=dropbits, modules_to_not_convert=[]
        )
        return calibrate_model(prepare_model(build(), config), [x])

    prepared = cpq(0.0)
    layers = {name: module for name, module in prepared.named_modules() if hasattr(module, "weight_quantizer")}
    signs = {name: bool(m.input_quantizer.resolved_spec().signed) for name, m in layers.items() if m.input_quantizer}
    torch.manual_seed(0)
    models = {"float": build()}
    torch.manual_seed(0)
    models["LSQ"] = prepare_lsq(build(), set(layers), weight_bits, activation_bits, signs)
    models["CPQ"] = prepared
    models["CPQ + DropBits"] = cpq(dropbits)

    def step_of(name: str, model: nn.Module) -> Callable[[], None]:
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        if name.startswith("CPQ"):
            CPQController(model, optimizer, total_steps=10**6)  # so that noise and drop rate stay as at the start

        def step() -> None:
            model(x).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return {name: step_of(name, model) for name, model in models.items()}


def quantizer_only(rows: int, columns: int, bits: int):
    """Forward and backward of the quantizer of one weight."""
    torch.manual_seed(0)
    weight = (torch.randn(rows, columns) * 0.05).requires_grad_()
    g = torch.randn(rows, columns)
    lsq = LSQ(bits, signed=True, channels=rows)
    alpha, noise = torch.full((rows, 1), 0.02, requires_grad=True), torch.tensor([0.2])
    return {
        "copy": lambda: weight.detach().clone(),
        "LSQ": lambda: lsq(weight).backward(g),
        "CPQ": lambda: fake_quantize(weight, alpha, noise, bits, True).backward(g),
    }


def paired(steps: dict[str, Callable[[], object]], args: Arguments) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for number in range(args.warmup + args.rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.perf_counter()
            steps[name]()
            elapsed = time.perf_counter() - start
            if number >= args.warmup:
                times[name].append(elapsed)
    return times


def report(title: str, times: dict[str, list[float]], base: str) -> None:
    def ratio(name: str, to: str) -> float:
        return median(a / b for a, b in zip(times[name], times[to], strict=True))

    print(f"\n{title}\n{'':16}{'ms':>9}{'of ' + base:>12}{'of LSQ':>10}")
    for name, values in times.items():
        print(f"{name:16}{median(values) * 1e3:9.2f}{ratio(name, base):12.2f}{ratio(name, 'LSQ'):10.2f}")


def textbook(x: Tensor, alpha: Tensor, noise: Tensor, bits: int) -> Tensor:
    """The method with a grid dimension and autograd: what the closed form replaces."""
    levels = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    v = (x / alpha)[..., None]
    above, below = torch.sigmoid((levels + 0.5 - v) / noise), torch.sigmoid((levels - 0.5 - v) / noise)
    above, below = above.clone(), below.clone()
    above[..., -1], below[..., 0] = 1, 0
    probabilities = above - below
    one_hot = (levels == v.round().clamp(levels[0], levels[-1])).float()
    return alpha * ((one_hot + probabilities - probabilities.detach()) * levels).sum(-1)


def peak_of(form: str) -> float:
    """Peak resident memory in MB that forward and backward of one 768x3072 weight add, in a process of its own."""
    weight, g = torch.randn(768, 3072, requires_grad=True), torch.randn(768, 3072)
    alpha, noise, bits = torch.full((768, 1), 0.5, requires_grad=True), torch.tensor([0.2]), 4
    lsq = LSQ(bits, signed=True, channels=768)
    forms = {
        "LSQ": lambda x: lsq(x),
        "CPQ": lambda x: fake_quantize(x, alpha, noise, bits, True),
        "textbook": lambda x: textbook(x, alpha, noise, bits),
    }
    small = torch.randn(768, 8, requires_grad=True)
    forms[form](small).sum().backward()  # what the libraries themselves allocate once
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now
    before = resident("VmRSS")
    forms[form](weight).backward(g)
    return resident("VmHWM") - before


def resident(field_name: str) -> float:
    """A line of /proc/self/status in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(field_name + ":"))


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, float32, {args.rounds} rounds, "
        f"CPQ kernel: {cpu.name()}"
    )
    times = paired(quantizer_only(3072, 768, 4), args)
    report("Quantizer of one 3072x768 weight, 4 bits per channel, forward + backward", times, "copy")

    torch.manual_seed(0)
    x = torch.randn(args.tokens, 768)
    times = paired(methods(OneLinear, x, 4, None, dropbits=0.1), args)
    report(f"Training step of one Linear 768 -> 3072, {args.tokens} rows, W4", times, "float")

    images = torch.randn(args.batch, 1, 32, 32)
    times = paired(methods(SmallResNet, images, 4, 4, dropbits=0.1), args)
    report(f"Training step of a small ResNet, {args.batch} images 32x32, W4A4", times, "float")

    if args.memory and Path("/proc/self/clear_refs").exists():
        print("\nPeak memory that the quantizer of a 768x3072 weight (9.4 MB) adds at 4 bits, forward + backward")
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            for form in ("LSQ", "CPQ", "textbook"):
                print(f"{form:16}{pool.apply(peak_of, (form,)):9.1f} MB")


if __name__ == "__main__":
    main()
