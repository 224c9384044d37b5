"""Turn the results of accuracy.py into docs/results.md: one table a task and width between its marks, and plots.

python recipes/benchmarks/report.py               # from docs/results/accuracy.jsonl
python recipes/benchmarks/report.py --histograms  # trains three small models for the picture of weights, too
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from accuracy import VARIANTS, Results, best_rate, float_model, float_settings, settings_of, take, train
from matplotlib.figure import Figure
from methods import PREPARE, covers, positions
from scipy.stats import t as student
from tasks import TASKS, Task

BEGIN, END = "<!-- tables: written by recipes/benchmarks/report.py -->", "<!-- end of tables -->"
LABELS = {
    "rtn": "RTN (rounding only)",
    "lsq": "LSQ",
    "torchao": "torchao",
    "brevitas": "Brevitas",
    "quanto": "optimum-quanto",
    "cpq-ste": "straight-through in CPQ's code",
    "cpq-plain": "CPQ's estimator alone",
    "cpq": "CPQ",
    "cpq-flat": "CPQ, noise held at 1/3",
    "cpq-dropbits": "CPQ, DropBits 0.1",
    "cpq-learned": "CPQ, learned lengths",
    "cpq-learned-fixed": "CPQ, these lengths from the start",
    "lsq-distilled": "LSQ, distilled",
    "cpq-distilled": "CPQ, distilled",
    "cpq-distilled-frozen": "CPQ, distilled, oscillating weights frozen",
}
COLORS = {"lsq": "#888888", "cpq": "#3465a4", "cpq-distilled": "#cc0000", "cpq-distilled-frozen": "#73d216",
          "lsq-distilled": "#f57900", "rtn": "#d3d7cf",
          "cpq-learned": "#4e9a06", "brevitas": "#75507b", "torchao": "#c17d11", "quanto": "#555753"}  # fmt: skip


def runs_of(results: Results, task: Task, name: str, bits: tuple[int, int], seeds: int) -> dict[int, dict[str, Any]]:
    """Seed -> result, of the seeds that are there."""
    variant = VARIANTS[name]
    if bits[0] < variant.min_bits or not covers(variant.method, task.name, bits):
        return {}
    lr = None if variant.method == "rtn" else best_rate(results, task, name)
    if lr is None and variant.method != "rtn":
        return {}
    settings = {seed: settings_of(task, name, bits, lr, seed, results) for seed in range(seeds)}
    return {seed: found for seed, chosen in settings.items() if chosen and (found := results.get(chosen))}


def loss(task: Task, float_metric: float, metric: float) -> float:
    """Quantization loss: points of accuracy, or of perplexity; positive is worse than float."""
    return metric - float_metric if task.is_language_model else float_metric - metric


def interval(values: list[float]) -> str:
    """Mean and 95 % confidence interval, by Student's t."""
    if len(values) < 2:
        return f"{mean(values):+.2f}"
    half = student.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return f"{mean(values):+.2f} ± {half:.2f}"


def spread(values: list[float]) -> str:
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def optional(values: list[float | None], form: str, factor: float = 1.0) -> str:
    known = [value for value in values if value is not None]
    return format(factor * mean(known), form) if known else "-"


def table(results: Results, task: Task, bits: tuple[int, int], seeds: int) -> str:
    """One Markdown table, or nothing if there is nothing but the float models."""
    floats = {seed: found["test"] for seed in range(seeds) if (found := results.get(float_settings(task, seed)))}
    baseline = runs_of(results, task, "lsq", bits, seeds)
    rows = []
    for name, label in LABELS.items():
        runs = runs_of(results, task, name, bits, seeds)
        if not runs:
            continue
        losses = {seed: loss(task, floats[seed], run["test"]) for seed, run in runs.items()}
        pairs = [losses[s] - loss(task, floats[s], baseline[s]["test"]) for s in losses if s in baseline]
        items = list(runs.values())
        rows.append(
            f"| {label} | {spread([run['test'] for run in items])} | {spread(list(losses.values()))} | "
            f"{interval(pairs) if pairs and name != 'lsq' else '-'} | "
            f"{optional([run.get('cluster_distance') for run in items], '.3f')} | "
            f"{optional([run.get('flips') for run in items], '.3f', 100)} | "
            f"{optional([run.get('mean_bits') for run in items], '.2f')} | "
            f"{optional([run.get('seconds') for run in items], '.0f')} | {len(items)} |"
        )
    if not rows:
        return ""
    head = (
        f"**{task.name}, W{bits[0]}A{bits[1]}** ({task.metric}; float {spread(list(floats.values()))})\n\n"
        f"| method | {task.metric} | loss | loss minus LSQ's | distance | flips % | bits | s | seeds |\n"
        "|---|---|---|---|---|---|---|---|---|\n"
    )
    return head + "\n".join(rows) + "\n"


def plot_metric(results: Results, seeds: int, path: Path) -> None:
    """The metric against the bit-width of weights, one panel a task."""
    figure, legend = Figure(figsize=(11, 7.5), layout="constrained"), {}
    for axes, task in zip(figure.subplots(2, 2).flat, list(TASKS.values())[:4], strict=True):
        widths = {bits[0]: bits for bits in reversed(task.widths)}.values()  # of two, the first
        floats = [found["test"] for seed in range(seeds) if (found := results.get(float_settings(task, seed)))]
        if floats:
            axes.axhline(mean(floats), color="black", linewidth=0.8, linestyle=":", label="float")
        for number, (name, color) in enumerate(COLORS.items()):
            points = [
                (bits[0] + 0.03 * (number - 4), [run["test"] for run in runs.values()])
                for bits in widths
                if (runs := runs_of(results, task, name, bits, seeds))
            ]
            if points and name != "rtn":  # far below everything at 2 bits
                spreads = [stdev(values) if len(values) > 1 else 0.0 for _, values in points]
                axes.errorbar(
                    [width for width, _ in points], [mean(values) for _, values in points], yerr=spreads, marker="o",
                    markersize=4, linewidth=1, capsize=2, color=color, label=LABELS[name],
                )  # fmt: skip
        axes.set_title(f"{task.name}, activations of {', '.join(str(b) for _, b in widths)} bits", fontsize=10)
        axes.set_xlabel("bits of the weights")
        axes.set_ylabel(task.metric)
        axes.set_xticks(sorted({bits for bits, _ in task.widths}))
        handles, labels = axes.get_legend_handles_labels()
        legend |= dict(zip(labels, handles, strict=True))
    if legend:
        figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=5, fontsize=8)
    figure.suptitle("Test metric, mean and standard deviation over seeds", fontsize=11)
    figure.savefig(path, dpi=110)


def plot_lengths(results: Results, seeds: int, path: Path) -> bool:
    """Learned bits by layer at a mean of 3, one panel a task; a dot is a seed."""
    found = {
        task.name: layers
        for task in TASKS.values()
        for bits in task.widths
        if bits[0] == 3
        and (layers := [run["layer_bits"] for run in runs_of(results, task, "cpq-learned", bits, seeds).values()])
    }
    if not found:
        return False
    figure = Figure(figsize=(11, 3.6 * len(found)), layout="constrained")
    for axes, (name, layers) in zip(figure.subplots(len(found), 1, squeeze=False).flat, found.items(), strict=True):
        names = list(layers[0])
        for index, layer in enumerate(names):
            for number, run in enumerate(layers):
                axes.plot(index + 0.12 * (number - len(layers) / 2), run[layer], "o", color="#3465a4", markersize=3)
        axes.set_xticks(
            range(len(names)), [".".join(layer.split(".")[-4:]) for layer in names], rotation=90, fontsize=6
        )
        axes.set_yticks(range(2, 6))
        axes.grid(axis="y", linewidth=0.4)
        axes.set_title(f"{name}: bits by layer, learned for a mean of 3 (a dot is a seed)", fontsize=10)
    figure.savefig(path, dpi=110)
    return True


def plot_histograms(folder: Path, path: Path) -> None:
    """Weights of the ResNet in steps of their grid: before, half-way and after training, for three estimators."""
    task = TASKS["resnet"]
    part = task.parts(0).train
    figure = Figure(figsize=(11, 7), layout="constrained")
    cases = {"LSQ": ("lsq", {}), "CPQ, estimator alone": ("cpq", {"centered": False}), "CPQ": ("cpq", {})}
    grid = figure.subplots(3, 3, sharey="row")
    for row, (label, (method, options)) in zip(grid, cases.items(), strict=True):
        model = PREPARE[method](float_model(task, 0, folder), (2, 2), take(part, slice(0, 256)), **options)
        seen = [torch.cat([v.flatten() for v, _ in positions(method, model)])]

        def note(model: Any, step: int, _: Any, method: str = method, seen: list = seen) -> None:
            if step + 1 in (task.steps // 2, task.steps):
                seen.append(torch.cat([v.flatten() for v, _ in positions(method, model)]))

        train(model, part, task, task.steps, 18e-3, 1000, method == "cpq", after_step=note)
        for axes, values, when in zip(row, seen, ("before training", "half-way", "after"), strict=True):
            axes.hist(values.numpy(), bins=torch.linspace(-3.5, 2.5, 121).numpy(), density=True, color="#3465a4")
            inside = values[(values > -2.5) & (values < 1.5)]
            distance = (inside - inside.round()).abs().mean().item()
            for level in range(-2, 2):
                axes.axvline(level, color="#cc0000", linewidth=0.7)
            axes.set_title(f"{label}, {when}: distance {distance:.3f}", fontsize=9)
    figure.suptitle("Weights of the ResNet at W2A2 in steps of their grid (red: levels)", fontsize=11)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("docs/results/accuracy.jsonl"))
    parser.add_argument("--page", type=Path, default=Path("docs/results.md"), help="gets the tables between its marks")
    parser.add_argument("--float-models", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--seeds", type=int, default=10, help="up to so many, where they are there")
    parser.add_argument("--histograms", action="store_true")
    args = parser.parse_args()
    results, folder = Results(args.results), args.results.parent
    tables = [
        text
        for task in TASKS.values()
        for bits in sorted(task.widths)
        if (text := table(results, task, bits, args.seeds))
    ]
    before, _, rest = args.page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    args.page.write_text(f"{before}{BEGIN}\n\n" + "\n".join(tables) + f"\n{END}{after}", encoding="utf-8")
    plot_metric(results, args.seeds, folder / "metric.png")
    plot_lengths(results, args.seeds, folder / "lengths.png")
    if args.histograms:
        plot_histograms(args.float_models, folder / "weights.png")
    print("\n".join(tables))


if __name__ == "__main__":
    main()
