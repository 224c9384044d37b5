"""What several processes must agree on, with real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def torchrun(name: str) -> None:
    """Run a script of this folder in two processes; it says "equal" when all went well."""
    script = Path(__file__).with_name(name)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "equal" in done.stdout


def test_every_rank_ends_up_with_the_same_activation_grid():
    torchrun("distributed_calibration.py")
