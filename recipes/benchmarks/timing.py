"""How the benchmarks time and weigh: rounds in which every contender has a turn, medians, ratios within a round."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)


def paired(
    steps: dict[Name, Callable[[], object]],
    rounds: int,
    warmup: int = 3,
    before: Callable[[Name], object] = lambda name: None,
) -> dict[Name, list[float]]:
    """Seconds of each call, round by round. The order rotates, so that none always comes after the same.

    `before` is called with the name ahead of each call, and not timed.
    """
    times: dict[Name, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for number in range(warmup + rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            before(name)
            synchronize()
            start = time.perf_counter()
            steps[name]()
            synchronize()
            if number >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def ratio(times: dict[Name, list[float]], name: Name, to: Name) -> float:
    """Median of the ratios within a round, which cancel what else the machine was doing."""
    return median(a / b for a, b in zip(times[name], times[to], strict=True))


def resident(field: str) -> float:
    """A line of /proc/self/status in MB: `VmRSS` (now) or `VmHWM` (at its highest)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))


def peak_during(work: Callable[[], object]) -> float:
    """The highest resident memory during a call, in MB (Linux); on a GPU, the highest allocated there."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() / 2**20
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the highest starts anew from now
    work()
    return resident("VmHWM")
