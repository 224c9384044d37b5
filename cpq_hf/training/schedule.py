"""Pure functions of the progress of training, in [0, 1]: noise scale, drop rate, freezing limit.

The noise scale falls geometrically from its first to its last value, so that the ratio between neighbouring steps is
constant. DropBits falls linearly and reaches zero at `DROPBITS_END`: the last part of training sees the very network
that is deployed. Weights that oscillate are frozen ever more readily (oscillation.py).
"""

from __future__ import annotations

DROPBITS_END = 0.75
LEARNING_END = 0.25  # of the learning of bit-widths: three quarters of training are left to run at the fixed widths
# Early, only weights halfway between two levels are frozen, because the others may still find one. At the end, nearly
# all that oscillate are: one that is left ends on whatever level the last step put it.
FIRST_INDECISION, LAST_INDECISION = 0.4, 0.05


def noise_scale(progress: float, start: float, end: float) -> float:
    """Return the scale of the logistic noise, in step sizes of the grid; progress 0: first step, 1: the end."""
    return start * (end / start) ** _clamp(progress)


def drop_rate(progress: float, rate: float) -> float:
    """Return the probability with which a bit is dropped, given that the bits below it are kept."""
    return rate * max(0.0, 1.0 - _clamp(progress) / DROPBITS_END)


def indecision(progress: float) -> float:
    """Return the distance from any level, in step sizes, from which the mean of an oscillating weight is frozen."""
    return FIRST_INDECISION + (LAST_INDECISION - FIRST_INDECISION) * _clamp(progress)


def learning_steps(total_steps: int) -> int:
    """Return for how many optimizer steps bit-widths are learned; then they are fixed."""
    return max(1, round(total_steps * LEARNING_END))


def _clamp(progress: float) -> float:
    return min(max(progress, 0.0), 1.0)
