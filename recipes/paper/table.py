"""Fill the table of README.md from the results of run.py.

python recipes/paper/table.py                 # from runs/paper/results.jsonl
python recipes/paper/table.py --results FILE --page FILE

Runs that were cut short with `--max_steps` are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from experiments import BITS, EXPERIMENTS, MIN_BITS, VARIANTS
from results import Settings, read

BEGIN, END = "<!-- table: written by recipes/paper/table.py -->", "<!-- end of table -->"
HEAD = ("experiment", "W/A", "variant", "paper: error %", "ours: error %", "top-5 error %", "mean bits", "runs")

# What the paper reports, top-1 error in percent by (experiment, bits, variant), from the paper's own tables only.
# Nothing is here yet: README.md says why, and what is known at second hand.
PUBLISHED: dict[tuple[str, int, str], float] = {}

Row = tuple[str, int, str]


def grid() -> list[Row]:
    """All rows in the order of the table: experiment, bits (32 for the float model), variant."""
    rows: list[Row] = []
    for experiment in EXPERIMENTS:
        rows.append((experiment, 32, "float"))
        for bits in BITS:
            names = [name for name, kind in VARIANTS.items() if bits > MIN_BITS or not kind.needs_bits_to_drop]
            rows += [(experiment, bits, name) for name in names]
    return rows


def conditions(settings: Settings) -> str:
    """What runs of one row must have in common: all but the seed and the lengths that it led to."""
    config = {name: value for name, value in settings.get("config", {}).items() if name != "overrides"}
    return json.dumps({name: value for name, value in settings.items() if name != "seed"} | {"config": config})


def rows_of(lines: list[dict[str, Any]]) -> dict[Row, list[dict[str, Any]]]:
    """Results by row.

    Raises:
        ValueError: If runs of one row differ in more than their seed.
    """
    rows: dict[Row, list[dict[str, Any]]] = {}
    seen: dict[Row, str] = {}
    for line in lines:
        settings = line["settings"]
        if settings["max_steps"] != -1:
            continue
        row = (settings["experiment"], settings.get("bits", 32), settings["variant"])
        if seen.setdefault(row, conditions(settings)) != conditions(settings):
            raise ValueError(
                f"runs of {row} differ in data, model or training; keep those that belong together in a file of "
                "their own, and give it with `--results`"
            )
        rows.setdefault(row, []).append(line["result"])
    return rows


def spread(values: list[float]) -> str:
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def cells(row: Row, results: list[dict[str, Any]]) -> list[str]:
    experiment, bits, variant = row
    published = PUBLISHED.get(row)
    paper = "not verified" if published is None else f"{published:.2f}"
    if not results:
        return [experiment, f"{bits}/{bits}", variant, paper, "open", "", "", ""]
    top1, top5 = ([result[name] for result in results] for name in ("top1_error", "top5_error"))
    widths = "32" if variant == "float" else spread([result["mean_bits"] for result in results])
    return [experiment, f"{bits}/{bits}", variant, paper, spread(top1), spread(top5), widths, str(len(results))]


def table(lines: list[dict[str, Any]]) -> str:
    found = rows_of(lines)
    body = [HEAD, ("---",) * len(HEAD), *(cells(row, found.get(row, [])) for row in grid())]
    return "\n".join("| " + " | ".join(row) + " |" for row in body)


def fill(page: Path, text: str) -> None:
    """Put `text` between the marks of a page.

    Raises:
        ValueError: If the page lacks one of them.
    """
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} has no lines {BEGIN!r} and {END!r}, between which the table goes; add them")
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("runs/paper/results.jsonl"))
    parser.add_argument("--page", type=Path, default=Path(__file__).with_name("README.md"))
    args = parser.parse_args()
    lines = read(args.results)
    try:
        fill(args.page, table(lines))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    used = sum(len(results) for results in rows_of(lines).values())
    print(f"{args.page}: {used} runs in the table, {len(lines) - used} with --max_steps left out")


if __name__ == "__main__":
    main()
