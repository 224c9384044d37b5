"""Recipes as a user runs them: as programs, for two steps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(script: str, *arguments: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / script), *arguments],
        cwd=cwd,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


def test_quickstart(tmp_path):
    printed = run("quickstart.py", "--max_steps", "2", cwd=tmp_path)
    table = [line.split() for line in printed.splitlines() if line.startswith(("float ", "w4a4 ", "w2a4 "))]
    assert [row[0] for row in table] == ["float", "w4a4", "w2a4"]
    for _, _, trained, reloaded, bits, *_ in table[1:]:
        assert trained == reloaded
        assert bits in ("4.00", "2.00")
    assert "cpq/cluster_distance" not in printed  # two steps log nothing
    assert (tmp_path / "runs/quickstart/weights.png").stat().st_size > 10_000
    assert "Next: put your own model" in printed


def test_step_time_benchmark(tmp_path):
    printed = run("benchmarks/step_time.py", "--rounds", "2", "--warmup", "1", "--memory", "false", cwd=tmp_path)
    assert printed.count("CPQ + DropBits") == 2
    assert printed.count("of LSQ") == 3
