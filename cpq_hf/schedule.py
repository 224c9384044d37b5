"""Say what noise and drop rate hold at a given progress of training: pure functions of progress in [0, 1].

The noise scale falls geometrically from its first to its last value, so that the ratio between neighbouring steps is
constant. DropBits falls linearly and reaches zero at `DROPBITS_END`: the last part of training sees the very network
that is deployed. Weights that oscillate are frozen ever more readily (oscillation.py).
"""

from __future__ import annotations

DROPBITS_END = 0.75
LENGTHS_END = 0.25
FIRST_INDECISION, LAST_INDECISION = 0.4, 0.05


def noise_scale(progress: float, start: float, end: float) -> float:
    """Scale of the logistic noise, in grid steps, at `progress` (0 = first step, 1 = after the last)."""
    return start * (end / start) ** _clamp(progress)


def drop_rate(progress: float, rate: float) -> float:
    """Probability with which a bit is dropped, given that the bits below it are kept."""
    return rate * max(0.0, 1.0 - _clamp(progress) / DROPBITS_END)


def indecision(progress: float) -> float:
    """How far from any level, in steps, the mean of a weight that moves to and fro has to be for it to be frozen."""
    return FIRST_INDECISION + (LAST_INDECISION - FIRST_INDECISION) * _clamp(progress)


def learning_steps(total_steps: int) -> int:
    """Optimizer steps during which bit-lengths are learned; then they are decided, and the rest runs at fixed ones."""
    return max(1, round(total_steps * LENGTHS_END))


def _clamp(progress: float) -> float:
    return min(max(progress, 0.0), 1.0)
