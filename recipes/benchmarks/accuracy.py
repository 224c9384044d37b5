"""Measure what quantization costs in accuracy: CPQ, LSQ and the peers on four tasks, all from the same float models.

    python recipes/benchmarks/accuracy.py                                  # the whole table: some hours on two cores
    python recipes/benchmarks/accuracy.py --tasks resnet --bits 2 --methods lsq cpq --seeds 2
    python recipes/benchmarks/report.py                                    # tables and plots from what is there

Every run is a line in `--results`, found again by its settings, so a second call only runs what is missing. For each
task and method the learning rate is the one of `RATES` with the best validation metric over the first two seeds (BERT:
five) at the narrowest width; test metrics are reported. Methods start from the same weights, see the same batches in
the same order and take the same number of steps. The other packages come with `pip install .[peers]`.

Settings say nothing of the code: after a change to tasks.py or to what CPQ does, start with empty `--results` and
`--float-models`.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from methods import PREPARE, covers, positions
from safetensors.torch import load_file, save_file
from tasks import TASKS, Batch, Task
from torch import Tensor, nn
from tqdm import tqdm

import cpq_hf

RATES = {
    "resnet": (6e-3, 18e-3, 54e-3),
    "vit": (2e-3, 6e-3, 18e-3),
    "bert": (1.3e-4, 4e-4, 1.3e-3),
    "llama": (4e-4, 1.3e-3, 4e-3),
    "mobilenet": (2e-3, 6e-3, 2e-2),
    "bert-large": (5e-5, 1.5e-4, 4.5e-4),
    "llama-large": (1e-4, 3e-4, 9e-4),
}
TUNING_SEEDS = {"bert": 5}  # where two, as elsewhere, tell rates hardly apart


@dataclass(frozen=True)
class Variant:
    """A row of the table: a method of methods.py with options, the row whose learning rate it shares, its widths."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    rate_of: str = ""
    min_bits: int = 2
    learns: bool = False  # up to two bits more than the width, whose mean is the target
    lengths_of: str = ""  # fixes the lengths that this row has learned, from the start


PLAIN = {"centered": False}
TAUGHT = {"distill": 0.9}
VARIANTS = {
    "rtn": Variant("rtn"),
    "lsq": Variant("lsq"),
    "torchao": Variant("torchao"),
    "brevitas": Variant("brevitas"),
    "quanto": Variant("quanto"),
    "cpq-ste": Variant("cpq", PLAIN | {"noise_start": 0.5, "noise_end": 0.5}),
    "cpq-plain": Variant("cpq", PLAIN),
    "cpq": Variant("cpq"),
    "cpq-flat": Variant("cpq", {"noise_end": 1 / 3}),
    "cpq-dropbits": Variant("cpq", {"dropbits": 0.1}, "cpq", min_bits=3),
    "cpq-learned": Variant("cpq", {"learn_bits": True}, "cpq", min_bits=3, learns=True),
    "cpq-learned-fixed": Variant("cpq", {}, "cpq", min_bits=3, lengths_of="cpq-learned"),
    "lsq-distilled": Variant("lsq", TAUGHT, "lsq"),
    "cpq-distilled": Variant("cpq", TAUGHT, "cpq"),
    "cpq-distilled-frozen": Variant("cpq", TAUGHT | {"freeze_oscillating": True}, "cpq"),
}

Settings = dict[str, Any]
Inspect = Callable[[nn.Module, int, torch.optim.Optimizer], None]


def take(batch: Batch, index: Any) -> Batch:
    return {key: value[index] for key, value in batch.items()}


def moved(batch: Batch, device: str) -> Batch:
    return {key: value.to(device) for key, value in batch.items()}


def evaluate(model: nn.Module, batch: Batch, task: Task) -> float:
    """Accuracy in percent, or perplexity."""
    model.eval()
    count, total = len(batch["labels"]), 0.0
    with torch.no_grad():
        for start in range(0, count, 200):
            part = take(batch, slice(start, start + 200))
            output = model(**part)
            size = len(part["labels"])
            right = (output.logits.argmax(-1) == part["labels"]).sum().item() if output.logits.dim() == 2 else 0.0
            total += output.loss.item() * size if task.is_language_model else 100.0 * right
    return math.exp(min(20.0, total / count)) if task.is_language_model else total / count


def optimizer_for(model: nn.Module, lr: float, name: str) -> torch.optim.Optimizer:
    """AdamW, or SGD with momentum; step sizes of any method and vectors do not decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    names = {id(p): n for n, p in model.named_parameters()}
    decays = [p.dim() > 1 and "quant" not in names[id(p)] for p in trained]
    groups = [
        {"params": [p for p, decay in zip(trained, decays, strict=True) if decay is wanted], "weight_decay": value}
        for wanted, value in ((True, 0.01), (False, 0.0))
    ]
    return torch.optim.SGD(groups, lr=lr, momentum=0.9) if name == "sgd" else torch.optim.AdamW(groups, lr=lr)


def train(
    model: nn.Module,
    train_part: Batch,
    task: Task,
    steps: int,
    lr: float,
    seed: int,
    controlled: bool = False,
    before_step: Inspect | None = None,
    after_step: Inspect | None = None,
    optimizer_name: str = "adamw",
) -> None:
    """Warm-up over a tenth of the steps, a cosine to zero, gradients clipped to norm 1, one batch order a seed."""
    optimizer = optimizer_for(model, lr, optimizer_name)
    warm = max(1, steps // 10)

    def rate(step: int) -> float:
        return min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * max(0, step - warm) / (steps - warm)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    controller = cpq_hf.CPQController(model, optimizer, steps) if controlled else None
    order = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model.train()
    waiting: list[Tensor] = []
    for step in range(steps):
        if not waiting:
            waiting = [
                rows
                for rows in torch.randperm(len(train_part["labels"]), generator=order).split(task.batch_size)
                if len(rows) == task.batch_size
            ]
        model(**take(train_part, waiting.pop())).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if before_step:
            before_step(model, step, optimizer)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if after_step:
            after_step(model, step, optimizer)
    if controller:
        controller.detach()


def levels(method: str, model: nn.Module) -> list[Tensor]:
    return [v.round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for v, bits in positions(method, model)]


def cluster_distance(method: str, model: nn.Module) -> float | None:
    total = count = 0.0
    for v, bits in positions(method, model):
        inside = v[(v > -(2 ** (bits - 1)) - 0.5) & (v < 2 ** (bits - 1) - 0.5)]
        total += (inside - inside.round()).abs().sum().item()
        count += inside.numel()
    return total / count if count else None


class Flips:
    """Share of weights whose level changes in one step, seen at ten steps of the last fifth of training."""

    def __init__(self, method: str, steps: int) -> None:
        self.method, self.shares = method, []
        self.watched = set(range(steps - steps // 5, steps, max(1, steps // 50)))
        self.before_levels: list[Tensor] = []

    def before(self, model: nn.Module, step: int, _: Any) -> None:
        if step in self.watched:
            self.before_levels = levels(self.method, model)

    def after(self, model: nn.Module, step: int, _: Any) -> None:
        if step in self.watched and self.before_levels:
            pairs = list(zip(self.before_levels, levels(self.method, model), strict=True))
            self.shares.append(sum((a != b).sum().item() for a, b in pairs) / sum(a.numel() for a, _ in pairs))


def float_model(task: Task, seed: int, folder: Path, device: str = "cpu") -> nn.Module:
    """Trained once and kept."""
    path = folder / f"{task.name}-{seed}-{task.float_steps}.safetensors"
    torch.manual_seed(seed)
    model = task.model().to(device)
    if path.exists():
        model.load_state_dict(load_file(path))
        return model
    train(model, moved(task.parts(seed).train, device), task, task.float_steps, task.float_lr, seed)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    save_file(model.state_dict(), temporary)
    temporary.replace(path)
    return model


def run(settings: Settings, folder: str, device: str = "cpu") -> dict[str, Any]:
    """One line of the results: the settings and what came out."""
    torch.set_num_threads(1)
    task = TASKS[settings["task"]]
    seed, method, options = settings["seed"], settings["method"], dict(settings["options"])
    train_part, validation, test = (
        moved(getattr(task.parts(seed), part), device) for part in ("train", "validation", "test")
    )
    model = float_model(task, seed, Path(folder), device)
    result: dict[str, Any] = {}
    if method != "float":
        weight, optimizer = options.pop("distill", 0.0), options.pop("optimizer", "adamw")
        teacher = copy.deepcopy(model) if weight else None
        model = PREPARE[method](model, tuple(settings["bits"]), take(train_part, slice(0, 256)), **options)
        if teacher is not None:
            cpq_hf.distill(model, teacher, weight, temperature=1.0)
        flips, started = Flips(method, settings["steps"]), time.perf_counter()
        if method != "rtn":
            train(
                model, train_part, task, settings["steps"], settings["lr"], seed + 1000, method == "cpq",
                flips.before, flips.after, optimizer,
            )  # fmt: skip
            result["seconds"] = round(time.perf_counter() - started, 2)
            result["flips"] = mean(flips.shares) if flips.shares else None
        result["cluster_distance"] = cluster_distance(method, model)
        if method == "cpq":
            report = cpq_hf.summarize(model)
            result["mean_bits"] = report.mean_bits
            result["layer_bits"] = {layer.name: layer.spec.weight.bits for layer in report.layers}
    result["validation"] = evaluate(model, validation, task)
    result["test"] = evaluate(model, test, task)
    return settings | {"result": result}


class Results:
    """All runs by their settings, in a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.runs = {self.key(line): line["result"] for line in map(json.loads, lines)}

    @staticmethod
    def key(settings: Settings) -> str:
        return json.dumps({k: v for k, v in settings.items() if k != "result"}, sort_keys=True)

    def get(self, settings: Settings) -> dict[str, Any] | None:
        return self.runs.get(self.key(settings))

    def add(self, line: dict[str, Any]) -> None:
        self.runs[self.key(line)] = line["result"]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, sort_keys=True) + "\n")

    def run_missing(self, wanted: Iterable[Settings], folder: str, jobs: int, label: str, device: str = "cpu") -> None:
        unique = {self.key(settings): settings for settings in wanted}
        missing = [settings for settings in unique.values() if self.get(settings) is None]
        if not missing:
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=context) as pool:
            futures = {pool.submit(run, settings, folder, device): settings for settings in missing}
            for future in tqdm(as_completed(futures), total=len(missing), desc=label, disable=None):
                try:
                    self.add(future.result())
                except Exception as error:
                    print(f"failed: {futures[future]}: {error!r}", file=sys.stderr)


def settings_of(
    task: Task, name: str, bits: tuple[int, int], lr: float | None, seed: int, results: Results
) -> Settings | None:
    """The settings of one run; None while the run whose lengths it takes over is missing."""
    variant = VARIANTS[name]
    options, trained = dict(variant.options), variant.method != "rtn"
    if variant.learns:
        options |= {"weight_bits": bits[0] + 2, "target_bits": float(bits[0])}
    if variant.lengths_of:
        settings = settings_of(task, variant.lengths_of, bits, lr, seed, results)
        source = settings and results.get(settings)
        if not source:
            return None
        options["overrides"] = {layer: {"weight_bits": width} for layer, width in source["layer_bits"].items()}
    return {
        "task": task.name, "method": variant.method, "bits": list(bits), "options": options, "seed": seed,
        "lr": lr if trained else None, "steps": task.steps if trained else 0,
    }  # fmt: skip


def float_settings(task: Task, seed: int) -> Settings:
    return {"task": task.name, "method": "float", "options": {}, "seed": seed, "steps": task.float_steps}


def tuning_settings(results: Results, task: Task, name: str, lr: float) -> list[Settings]:
    """Rates are tuned at the narrowest width that the method has."""
    name = VARIANTS[name].rate_of or name
    bits = min((b for b in task.widths if covers(VARIANTS[name].method, task.name, b)), key=lambda bits: bits[0])
    found = [settings_of(task, name, bits, lr, seed, results) for seed in range(TUNING_SEEDS.get(task.name, 2))]
    return [settings for settings in found if settings]


def best_rate(results: Results, task: Task, name: str) -> float | None:
    """The rate with the best mean validation metric over the tuning seeds; None while one is missing."""
    scores = {}
    for lr in RATES[task.name]:
        found = [results.get(settings) for settings in tuning_settings(results, task, name, lr)]
        if any(item is None for item in found):
            return None
        scores[lr] = mean(item["validation"] for item in found if item)
    return (min if task.is_language_model else max)(scores, key=scores.__getitem__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, default=list(TASKS)[:4], help="default: the four small ones"
    )
    parser.add_argument("--methods", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4], help="bit-widths of weights")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1)), help="runs at a time, a core each")
    parser.add_argument("--results", type=Path, default=Path("docs/results/accuracy.jsonl"))
    parser.add_argument("--float-models", default="runs/accuracy", help="folder of the float models")
    parser.add_argument("--device", default="cpu", help="cpu, cuda")
    args = parser.parse_args()
    results = Results(args.results)
    tasks = [TASKS[name] for name in args.tasks]
    results.run_missing(
        [float_settings(task, seed) for task in tasks for seed in range(args.seeds)],
        args.float_models, args.jobs, "float", args.device,
    )  # fmt: skip
    cells = [
        (task, name, bits)
        for task in tasks
        for bits in task.widths
        for name in args.methods
        if bits[0] in args.bits
        and bits[0] >= VARIANTS[name].min_bits
        and covers(VARIANTS[name].method, task.name, bits)
    ]
    tuning = [
        settings
        for task, name in dict.fromkeys((task, name) for task, name, _ in cells if VARIANTS[name].method != "rtn")
        for lr in RATES[task.name]
        for settings in tuning_settings(results, task, name, lr)
    ]
    results.run_missing(tuning, args.float_models, args.jobs, "learning rates", args.device)
    for _ in range(2):  # the second time for rows that take over what others have learned
        table = [
            settings_of(task, name, bits, best_rate(results, task, name), seed, results)
            for task, name, bits in cells
            if VARIANTS[name].method == "rtn" or best_rate(results, task, name) is not None
            for seed in range(args.seeds)
        ]
        found = [settings for settings in table if settings]
        results.run_missing(found, args.float_models, args.jobs, "table", args.device)


if __name__ == "__main__":
    main()
