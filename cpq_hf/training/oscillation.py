"""Freeze weights that oscillate between two levels.

Where the best value of a weight lies between two levels, an optimizer pushes it across the boundary, finds it too far
on the other side, and pushes it back, for ever: the other weights train against noise, and the level it has when
training ends is chance (Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", ICML 2022). Distilled
models have many such weights. Freezing them, each at the level where it has mostly been, one after the other while
training goes on, lets the rest make up for the choice. That is the paper's idea. Detection is ours, with three bytes
per weight: every `INTERVAL` optimizer steps,

    n = the level now, n' = the level at the last look
    r = mean - n              running mean of the level, relative to the level (bfloat16; infinite: frozen)
    back = n != n' and n is nearer to the mean than n'
    frozen, at the level nearest to the mean: back and the mean is further than `indecision` from any level

A weight that drifts moves away from its mean, however fast, and is left alone. A frozen weight is put on the centre of
its level, which follows the step size. The two tensors live in the optimizer's state of the weight, and so are saved,
sharded and resumed like its moments.
"""

from __future__ import annotations

from typing import Any

import torch

from ..nn import TrainingLayer
from ..tensor.quantizer import from_grouped, to_grouped

INTERVAL = 4
MOMENTUM = 0.15  # share of the level now in the running mean: a memory of about seven looks
LEVEL, DRIFT = "cpq_level", "cpq_drift"  # keys in the optimizer's state


@torch.no_grad()
def freeze_oscillating(layers: list[TrainingLayer], optimizer: torch.optim.Optimizer, indecision: float) -> None:
    """Look once at the weights of some layers and freeze those that oscillate.

    Layers whose bit-width is still being learned are left out: their levels are not fixed yet.

    Args:
        layers (`list[TrainingLayer]`): Layers that hold their weight.
        optimizer (`torch.optim.Optimizer`): The optimizer that trains them, after its first step.
        indecision (`float`): Distance of the mean from the nearest level, in step sizes, 0 to 1/2, from which a weight
            that comes back is frozen.
    """
    for layer in layers:
        if layer.weight_quantizer.learning or not layer.weight.requires_grad:
            continue
        state: dict[str, Any] = optimizer.state[layer.weight]
        if state:  # an optimizer that finds a state does not make its own, so ours must not be the first
            _look(layer, state, indecision)


def _look(layer: TrainingLayer, state: dict[str, Any], indecision: float) -> None:
    quantizer = layer.weight_quantizer
    spec = quantizer.current_spec()
    lo, hi = spec.grid.bounds
    alpha = quantizer.alpha()
    alpha = alpha.view((1, 1, 1) if alpha.dim() == 1 else (*alpha.shape, 1))
    # [rows, groups, columns/groups], float32
    level = (to_grouped(layer.weight.detach(), spec) / alpha - spec.grid.offset).round_().clamp_(lo, hi)
    if LEVEL not in state:
        state[LEVEL], state[DRIFT] = level.to(torch.int8), torch.zeros_like(level, dtype=torch.bfloat16)
        return
    before, drift = state[LEVEL].to(level.dtype), state[DRIFT].to(level.dtype)  # loading may have cast them
    frozen = drift.isinf()
    moved = level - before
    back = moved * drift > 0  # towards the mean
    drift = torch.where(frozen, 0.0, drift - moved)  # relative to the new level; no infinity - infinity = NaN
    caught = back & ((drift - drift.round()).abs() > indecision) & ~frozen
    drift.mul_(1 - MOMENTUM)  # mean += MOMENTUM * (level - mean), written for mean - level
    level = torch.where(frozen, before, torch.where(caught, (level + drift.round()).clamp_(lo, hi), level))
    frozen = frozen | caught
    state[LEVEL], state[DRIFT] = level.to(torch.int8), torch.where(frozen, torch.inf, drift).to(torch.bfloat16)
    # the optimizer has a gradient for frozen weights too, and moves them; each look puts them back
    weight = torch.where(frozen, (level + spec.grid.offset) * alpha, to_grouped(layer.weight.detach(), spec))
    layer.weight.copy_(from_grouped(weight.to(layer.weight.dtype), spec))
