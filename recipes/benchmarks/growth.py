"""How the cost of a training step grows: with layers, bits, batch and accumulation. CPQ over float, paired.

    python recipes/benchmarks/growth.py --plot docs/growth.png

The small Llama of step_time.py (width 256, 4 layers, 8 x 128 tokens) at W4A8, of which one thing changes at a time. A
step is forward and backward over all batches that are accumulated, AdamW and the controller. Also timed: how much of
it is the forward pass of the weights' quantizers, the most that quantizing once per optimizer step, not once a batch,
could save.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable
from pathlib import Path
from statistics import median

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from step_time import build
from timing import paired, ratio

from cpq_hf import CPQConfig, CPQController, calibrate_model, prepare_model
from cpq_hf.tensor.kernels.fake_quantize import cpu
from cpq_hf.tensor.quantizer import WeightQuantizer

USUAL = {"layers": 4, "bits": 4, "batch": 8, "accumulation": 1}
GROWTH = {"layers": [1, 2, 4, 8], "bits": [2, 3, 4, 6, 8], "batch": [1, 2, 4, 8, 16], "accumulation": [1, 2, 4, 8]}


def step_of(quantized: bool, layers: int, bits: int, batch: int, accumulation: int, device: str) -> Callable[[], None]:
    torch.manual_seed(0)
    model = build("llama", large=False, depth=layers).to(device).train()
    ids = torch.randint(8192, (batch, 128), device=device)
    if quantized:
        model = prepare_model(model, CPQConfig(weight_bits=bits, activation_bits=8))
        calibrate_model(model, [{"input_ids": ids}])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    if quantized:
        CPQController(model.train(), optimizer, total_steps=10**6)

    def step() -> None:
        for _ in range(accumulation):
            (model(input_ids=ids, labels=ids).loss / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def weights_of(layers: int, bits: int, device: str) -> Callable[[], None]:
    """The forward pass of all quantizers of weights."""
    model = prepare_model(build("llama", large=False, depth=layers).to(device), CPQConfig(weight_bits=bits)).train()
    pairs = [
        (module.weight_quantizer, module.weight)
        for module in model.modules()
        if isinstance(getattr(module, "weight_quantizer", None), WeightQuantizer)
    ]

    def forward() -> None:
        for quantizer, weight in pairs:
            quantizer(weight)

    return forward


def measure(setting: dict[str, int], rounds: int, device: str) -> dict[str, list[float]]:
    steps = {
        "float": step_of(False, device=device, **setting),
        "CPQ": step_of(True, device=device, **setting),
        "weights": weights_of(setting["layers"], setting["bits"], device),
    }
    return paired(steps, rounds, warmup=2)


def plot(curves: dict[str, list[tuple[int, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(3 * len(curves), 2.8), sharey=True, layout="constrained")
    for axis, (what, points) in zip(axes, curves.items(), strict=True):
        axis.plot(*zip(*points, strict=True), marker="o")
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set_xlabel(what)
        axis.set_xticks([x for x, _ in points])
    axes[0].set_ylabel("step time over float")
    axes[0].set_ylim(bottom=0.9)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plot", type=Path, help="picture to write")
    args = parser.parse_args()
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, {args.rounds} rounds, "
        f"CPQ kernel: {cpu.name()}\n\n"
        "| what | value | float ms | CPQ ms | CPQ over float | weights quantized in forward, of a CPQ step |\n"
        "|---|---|---|---|---|---|"
    )
    curves: dict[str, list[tuple[int, float]]] = {}
    for what, values in GROWTH.items():
        for value in values:
            setting = USUAL | {what: value}
            times = measure(setting, args.rounds, args.device)
            curves.setdefault(what, []).append((value, ratio(times, "CPQ", "float")))
            share = ratio(times, "weights", "CPQ") * setting["accumulation"]
            print(
                f"| {what} | {value} | {median(times['float']) * 1e3:.0f} | {median(times['CPQ']) * 1e3:.0f} | "
                f"{curves[what][-1][1]:.2f} | {share:.1%} |",
                flush=True,
            )
    if args.plot:
        plot(curves, args.plot)


if __name__ == "__main__":
    main()
