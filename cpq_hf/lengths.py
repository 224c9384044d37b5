"""Learn bit-widths under a budget: the regulariser, its multiplier, and the decision.

Every learned quantizer `l` holds logits `phi_j` of its bits `j = min_bits+1 .. max_bits`; `P_j` is the running product
of `sigmoid(phi)`. With `N_l` the cost of a quantizer (weights, or multiply-accumulates),

    bits_l = min_bits + sum_j P_j        R = sum_l N_l bits_l / sum_l N_l

is the expected mean width. A step descends along `dL/dphi + lambda * dR/dphi`; the multiplier `lambda` climbs while R
is above the target and falls, below zero if need be, while it is under (dual ascent). The learner moves the logits
itself, by the rule of Adam: their pace then is a share of the training run, whatever optimizer, learning rate or
weight decay the weights have. Part-way through training [`LengthLearner.decide`] turns probabilities into widths.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .contents import quantizers
from .errors import CPQError
from .quantizer import Quantizer, WeightQuantizer
from .sharding import assign_whole, whole

TRAVEL = 15.0  # how far a logit can move while widths are learned; from sure to unlikely is about 7
# The multiplier is the sum of an integral (dual ascent) and a proportional part, which damps it, both in units of the
# size of the loss gradient over that of the regulariser, per bit of violation; the integral over the learning time.
CLIMB = 10.0
PROPORTION = 2.0
LIMIT = 5.0  # of the logits: P between 0.007 and 0.993, so that every bit can still come back
BETAS = (0.9, 0.99)
LEAST_STEPS = 100  # fewer learning steps than that decide by chance


class LengthLearner:
    """Moves the logits of some quantizers towards a mean width.

    Args:
        items (`Sequence[Quantizer]`): All quantizers that the mean counts, of fixed width too; at least one learns.
        costs (`Sequence[float]`): `N_l` of each.
        ties (`Sequence[int]`): Quantizers with the same number, and the same range of widths, get the same width.
        target (`float`, *optional*): Mean width to end at or under; None leaves the widths to the loss.
        steps (`int`): Optimizer steps until the decision.
    """

    def __init__(
        self, items: Sequence[Quantizer], costs: Sequence[float], ties: Sequence[int], target: float | None, steps: int
    ) -> None:
        self.items, self.target, self.steps = list(items), target, steps
        self.ties = [(tie, item.min_bits, item.max_bits) for tie, item in zip(ties, self.items, strict=True)]
        self.learned = [index for index, item in enumerate(self.items) if item.bit_logits is not None]
        logits = self._logits()
        device = logits[0].device
        self._valid = torch.zeros(len(logits), max(item.numel() for item in logits), device=device)
        torch._foreach_add_(self._rows_of(self._valid), 1.0)
        self.set_costs(costs)
        numbers = {tie: number for number, tie in enumerate(dict.fromkeys(self.ties[i] for i in self.learned))}
        self._tie = torch.tensor([numbers[self.ties[index]] for index in self.learned], device=device)
        self.multiplier, self.integral, self.scale, self.count = (torch.zeros(1, device=device) for _ in range(4))
        self.first, self.second, self.gradient = (torch.zeros_like(self._valid) for _ in range(3))
        self._decided: list[Tensor] | None = None  # the logits, once they do not change any more

    def set_costs(self, costs: Sequence[float]) -> None:
        """Replace `N_l`; they count relative to their sum."""
        total = sum(costs)
        if total <= 0:
            raise CPQError(
                "no layer was used in the first training step, so there are no multiply-accumulates or inputs to "
                "count; use `budget='weights'`, and fixed widths for activations"
            )
        self.costs = list(costs)
        self.shares = [cost / total for cost in costs]
        learned = [[self.shares[index]] for index in self.learned]
        self._learned_shares = torch.tensor(learned, device=self._valid.device)

    @property
    def active(self) -> bool:
        """Whether anything is still being learned."""
        return any(self.items[index].learning for index in self.learned)

    @torch.no_grad()
    def step(self, grad_scale: Tensor | None = None) -> None:
        """One step, from the gradients that the logits hold; see [`hold`] for what the optimizer makes of them."""
        if not self.active:
            return
        parameters, valid = self._logits(), self._valid
        logits = self._stacked([whole(parameter.detach()) for parameter in parameters])
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        gradient = self._stacked([whole(gradient) for gradient in gradients])
        if grad_scale is not None:
            gradient = gradient / grad_scale
        probability = logits.sigmoid()
        keep = probability.cumprod(1) * valid
        shares = self._learned_shares
        # dR/dphi_j = N_l / sum N * (1 - sigmoid(phi_j)) * sum of P_m over m >= j
        penalty = shares * (1 - probability) * keep.flip(1).cumsum(1).flip(1) * valid
        finite = torch.isfinite(gradient).all()  # a scaler that found an overflow skips this step
        gradient = torch.where(finite, gradient, 0)
        ratio = gradient.norm() / penalty.norm().clamp(min=1e-12)
        beta = torch.where(self.count == 0, 0.0, BETAS[1])
        self.scale.copy_(torch.where(finite, beta * self.scale + (1 - beta) * ratio, self.scale))
        if self.target is not None:
            mean = self._fixed_mean() + (keep.sum(1, keepdim=True) * shares).sum()
            excess = self.scale * (mean - self.target)
            climbed = self.integral + CLIMB / self.steps * excess
            self.integral.copy_(torch.where(finite, climbed, self.integral))
            self.multiplier.copy_(torch.where(finite, climbed + PROPORTION * excess, self.multiplier))
        self.gradient = gradient + self.multiplier * penalty
        tied = torch.zeros_like(self.gradient).index_add_(0, self._tie, self.gradient)[self._tie]
        self.count.add_(finite)
        moved = logits - TRAVEL / self.steps * self._adam(tied, finite)
        moved = torch.where(finite, moved.clamp(-LIMIT, LIMIT), logits)
        assign_whole(parameters, self._rows_of(moved))

    @torch.no_grad()
    def hold(self) -> Callable[[], None]:
        """Note the logits as they are and clear their gradients; what is returned puts them back.

        The optimizer has them too, and may decay them. It is let do so between the two, since one that holds a
        parameter without any state cannot be resumed under FSDP2.
        """
        parameters = self._logits()
        values = self._decided
        if values is None:
            values = [whole(parameter.detach()).clone() for parameter in parameters]
            self._decided = None if self.active else values
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()
        return lambda: assign_whole(parameters, values)

    def decide(self) -> None:
        """Fix every width, the mean at or under the target."""
        if not self.active:
            return
        keep = [self.items[index].keep_probabilities().tolist() for index in self.learned]
        groups: dict[tuple[int, int, int], list[int]] = {}
        for row, index in enumerate(self.learned):
            groups.setdefault(self.ties[index], []).append(row)
        representatives = [rows[0] for rows in groups.values()]
        budget = None
        if self.target is not None:
            fixed = sum(
                share * item.bits
                for index, (share, item) in enumerate(zip(self.shares, self.items, strict=True))
                if index not in self.learned
            )
            budget = self.target - fixed
        widths = assign(
            [keep[row] for row in representatives],
            [self.items[self.learned[row]].min_bits for row in representatives],
            [sum(self.shares[self.learned[row]] for row in rows) for rows in groups.values()],
            budget,
        )
        for rows, bits in zip(groups.values(), widths, strict=True):
            for row in rows:
                self.items[self.learned[row]].fix_width(bits)

    def expected_bits(self) -> float:
        """Expected mean width, `R`; waits for the device."""
        expected = [
            item.min_bits + float(item.keep_probabilities().sum()) if item.learning else item.bits
            for item in self.items
        ]
        return sum(share * bits for share, bits in zip(self.shares, expected, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, fit for JSON."""
        names = ("multiplier", "integral", "scale", "count", "first", "second")
        return {name: getattr(self, name).tolist() for name in names} | {"costs": self.costs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` wrote."""
        self._decided = None
        try:
            self.set_costs([float(cost) for cost in state["costs"]])
            for name in ("multiplier", "integral", "scale", "count", "first", "second"):
                own: Tensor = getattr(self, name)
                own.copy_(torch.tensor(state[name], device=own.device).view(own.shape))
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            raise CPQError(
                f"the saved state of the learned bit-lengths does not fit this model ({error}); resume with the same "
                "model and config"
            ) from error

    def _logits(self) -> list[nn.Parameter]:
        found = [self.items[index].bit_logits for index in self.learned]
        return [logits for logits in found if logits is not None]

    def _rows_of(self, matrix: Tensor) -> list[Tensor]:
        """Views of the rows of a matrix, each as long as the logits that it stands for."""
        return [row[: logits.numel()] for row, logits in zip(matrix.unbind(), self._logits(), strict=True)]

    def _stacked(self, rows: list[Tensor]) -> Tensor:
        """One row each, filled up with zeros."""
        out = torch.zeros_like(self._valid)
        torch._foreach_copy_(self._rows_of(out), rows)
        return out

    def _fixed_mean(self) -> float:
        """What the mean holds besides the sum of P: smallest widths of the learned, widths of the others."""
        learned = set(self.learned)
        return sum(
            share * (item.min_bits if index in learned else item.bits)
            for index, (share, item) in enumerate(zip(self.shares, self.items, strict=True))
        )

    def _adam(self, gradient: Tensor, finite: Tensor) -> Tensor:
        for moment, beta, value in ((self.first, BETAS[0], gradient), (self.second, BETAS[1], gradient.square())):
            moment.copy_(torch.where(finite, beta * moment + (1 - beta) * value, moment))
        first = self.first / (1 - BETAS[0] ** self.count.clamp(min=1))
        second = self.second / (1 - BETAS[1] ** self.count.clamp(min=1))
        return first / (second.sqrt() + 1e-20)


def assign(
    keep: Sequence[Sequence[float]], min_bits: Sequence[int], costs: Sequence[float], budget: float | None
) -> list[int]:
    """Turn probabilities into widths whose cost is at or under a budget.

    A bit is kept where that is more likely than not. While the sum of `cost * width` is above the budget, the least
    certain last bit goes; whatever room that leaves then takes the most likely bits that fit.

    Args:
        keep: For each item, the non-increasing probabilities of its bits above `min_bits`.
        min_bits: For each item, the width that it never goes below.
        costs: For each item, the cost of one bit.
        budget: Upper limit on the sum of cost times width; None for none.

    Returns:
        `list[int]`: The widths.

    Raises:
        CPQError: If even the smallest widths cost more.
    """
    above = [sum(p > 0.5 for p in chain) for chain in keep]

    def total() -> float:
        return sum(cost * (least + more) for cost, least, more in zip(costs, min_bits, above, strict=True))

    if budget is None:
        return [least + more for least, more in zip(min_bits, above, strict=True)]
    slack = 1e-9 * max(1.0, abs(budget))
    least_cost = sum(cost * least for cost, least in zip(costs, min_bits, strict=True))
    if least_cost > budget + slack:
        raise CPQError(
            f"the target cannot be met: the smallest widths cost {least_cost:.3f} bits of a budget of {budget:.3f}; "
            "raise `target_bits` or lower `min_bits`"
        )
    while total() > budget + slack:
        index = min((i for i in range(len(keep)) if above[i] > 0), key=lambda i: keep[i][above[i] - 1])
        above[index] -= 1
    while True:
        room = budget + slack - total()
        fits = [i for i in range(len(keep)) if above[i] < len(keep[i]) and costs[i] <= room]
        if not fits:
            return [least + more for least, more in zip(min_bits, above, strict=True)]
        above[max(fits, key=lambda i: keep[i][above[i]])] += 1


FUSED = ("q_proj|k_proj|v_proj", "query|key|value", "q|k|v", "gate_proj|up_proj", "w1|w3", "wi_0|wi_1")


def ties(names: Sequence[str]) -> list[int]:
    """Number the layers; those that inference engines fuse share a number: q/k/v, gate/up, experts of a layer."""
    keys: dict[str, int] = {}
    numbers = []
    for name in names:
        parent, _, child = re.sub(r"\bexperts\.\d+", "experts", name).rpartition(".")
        fused = next((group for group in FUSED if child in group.split("|")), child)
        numbers.append(keys.setdefault(f"{parent}.{fused}", len(keys)))
    return numbers


def bit_penalty(model: nn.Module) -> Tensor:
    """Expected mean width of the quantized weights, in bits, differentiable: for a loss of your own.

    Args:
        model (`nn.Module`): A prepared model, with `learn_bits=True` for the result to have a gradient.

    Returns:
        `Tensor`: One number, float32: `R = sum_l N_l bits_l / sum_l N_l`, `N_l` the weights of a layer.

    Raises:
        CPQError: If the model holds no quantizer of weights.

    Example:

    ```python
    loss = model(**batch).loss + 0.1 * cpq_hf.bit_penalty(model)
    ```
    """
    found = [item for _, item in quantizers(model) if isinstance(item, WeightQuantizer)]
    if not found:
        raise CPQError("the model has no quantized weights that train; prepare it with `cpq_hf.prepare_model` first")
    weights = sum(item.spec.numel for item in found)
    total = torch.zeros((), device=found[0].log_alpha.device)
    for item in found:
        if item.bit_logits is not None and item.learning:
            total = total + item.spec.numel * (item.min_bits + item.bit_logits.sigmoid().cumprod(0).sum())
        else:
            total = total + item.spec.numel * item.bits
    return total / weights
