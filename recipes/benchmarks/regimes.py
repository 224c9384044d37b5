"""Where does the estimator matter? By optimizer and learning rate, all else equal.

    python recipes/benchmarks/regimes.py                     # the small ResNet at W2A2
    python recipes/benchmarks/regimes.py --task mobilenet    # depthwise layers, at W3A3

LSQ, straight-through in CPQ's own code (the same steps and grid, noise 1/2) and CPQ's estimator alone (noise from 1/3
to 0.1), on the same lopsided grid. Test accuracy, mean and standard deviation over seeds, and the distance of weights
to the grid. Runs are cached as in accuracy.py.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from statistics import mean

from accuracy import Results, Settings, settings_of
from report import spread
from tasks import TASKS, Task

ESTIMATORS = {"lsq": "LSQ", "cpq-ste": "straight-through", "cpq-plain": "CPQ's estimator"}
ADAMW_RATES = {"resnet": (6e-3, 18e-3, 54e-3, 108e-3), "mobilenet": (6e-4, 2e-3, 6e-3, 18e-3)}
SGD_RATES = {"resnet": (0.03, 0.1, 0.3, 1.0), "mobilenet": (0.01, 0.03, 0.1, 0.3)}


def settings(task: Task, name: str, optimizer: str, lr: float, seed: int, results: Results) -> Settings:
    chosen = settings_of(task, name, task.widths[-1], lr, seed, results)
    assert chosen is not None  # none of these rows waits for another
    if optimizer != "adamw":
        chosen["options"] = chosen["options"] | {"optimizer": optimizer}
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=ADAMW_RATES, default="resnet")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1)))
    parser.add_argument("--results", type=Path, default=Path("docs/results/accuracy.jsonl"))
    parser.add_argument("--float-models", default="runs/accuracy")
    args = parser.parse_args()
    results, task = Results(args.results), TASKS[args.task]
    rates = {"adamw": ADAMW_RATES[task.name], "sgd": SGD_RATES[task.name]}
    cells = [(optimizer, lr) for optimizer, chosen in rates.items() for lr in chosen]
    seeds = range(args.seeds)
    wanted = [settings(task, n, o, lr, seed, results) for o, lr in cells for n in ESTIMATORS for seed in seeds]
    results.run_missing(wanted, args.float_models, args.jobs, "regimes")
    print("| optimizer | rate | " + " | ".join(f"{label} | distance" for label in ESTIMATORS.values()) + " |")
    print("|---|---|" + "---|---|" * len(ESTIMATORS))
    for optimizer, lr in cells:
        cell = []
        for name in ESTIMATORS:
            found = [results.get(settings(task, name, optimizer, lr, seed, results)) for seed in seeds]
            tests = [run["test"] for run in found if run]
            distances = [run["cluster_distance"] for run in found if run]
            cell.append(f"{spread(tests)} | {mean(distances):.3f}" if tests else "- | -")
        print(f"| {optimizer} | {lr:g} | " + " | ".join(cell) + " |")


if __name__ == "__main__":
    main()
