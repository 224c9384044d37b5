"""Learn bit-widths under a budget: the regularizer, its multiplier, and the decision.

Every learned quantizer `l` holds logits `phi_j` of its bits `j = min_bits+1 .. max_bits`; `P_j` is the running product
of `sigmoid(phi)`. With `N_l` the cost of a quantizer (weights, or multiply-accumulates),

    bits_l = min_bits + sum_j P_j        R = sum_l N_l bits_l / sum_l N_l

is the expected mean width. A step descends along `dL/dphi + lambda * dR/dphi`; the multiplier `lambda` climbs while R
is above the target, and falls, below zero if need be, while R is under it (dual ascent).

The learner moves the logits with an Adam that is separate from the optimizer of the weights. Their pace is then a
share of the training run, whatever optimizer, learning rate or weight decay the weights have. All logits of a learner
lie in one matrix `phi`, `[learned widths, most bits]`, where shorter rows end with zeros. A step is a few operations
on that matrix, and reads nothing back from the device. Part-way through training [`WidthLearner.fix_widths`] turns
probabilities into widths.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import copy_full_tensors, full_tensor
from ..errors import CPQError
from ..model.inspection import quantizers
from ..tensor.quantizer import Quantizer, WeightQuantizer
from ..torch_private import foreach_add_, foreach_copy_

# Adam moves a logit by about its learning rate, TRAVEL / steps, if its gradients agree. From a certain bit to an
# unlikely one is a distance of about 7, so twice that leaves time to turn back.
TRAVEL = 15.0
BETAS = (0.9, 0.99)  # shorter memory than Adam's 0.999: learning may take only 100 steps
# Gradients of logits are as small as the loss of a large model makes them, and Adam's usual 1e-8 would slow them down.
# This one only keeps the zeros that fill up the rows of `phi` from becoming 0 / 0.
EPS = 1e-20
LIMIT = 5.0  # of the logits: P between 0.007 and 0.993, so that the gradient can still bring back every bit
# The multiplier is the sum of two parts, in units of the size of the loss gradient over that of the regularizer, per
# bit of violation. The integral part (dual ascent; CLIMB over the whole learning time) is what holds R at the target:
# it keeps its value when the violation is zero. With it alone, R swings around the target, because the logits lag
# behind the multiplier. The proportional part reacts at once and damps that.
CLIMB = 10.0
PROPORTION = 2.0
SCALE_MOMENTUM = 0.99  # of the running mean of that unit: single batches make it jump
MIN_STEPS = 100  # with fewer learning steps, chance decides


class WidthLearner:
    """Moves the logits of some quantizers towards a mean bit-width.

    Args:
        items (`Sequence[Quantizer]`): All quantizers that the mean counts, also those of fixed width; at least one
            learns.
        costs (`Sequence[float]`): `N_l` of each quantizer.
        ties (`Sequence[int]`): Quantizers with the same number, and the same range of widths, get the same width.
        target (`float`, *optional*): Mean width in bits to end at or under; None leaves the widths to the loss.
        steps (`int`): Optimizer steps until the widths are fixed.
    """

    def __init__(
        self, items: Sequence[Quantizer], costs: Sequence[float], ties: Sequence[int], target: float | None, steps: int
    ) -> None:
        self.items, self.target, self.steps = list(items), target, steps
        self.ties = [(tie, item.min_bits, item.max_bits) for tie, item in zip(ties, self.items, strict=True)]
        self.learned = [index for index, item in enumerate(self.items) if item.bit_logits is not None]
        logits = self._logits()
        device = logits[0].device
        self.phi = nn.Parameter(torch.zeros(len(logits), max(item.numel() for item in logits), device=device))
        self._valid = torch.zeros_like(self.phi)  # 1 where `phi` holds a logit, 0 where it is filled up
        foreach_add_(self._rows_of(self._valid), 1.0)
        self.set_costs(costs)
        numbers = {tie: number for number, tie in enumerate(dict.fromkeys(self.ties[i] for i in self.learned))}
        self._tie = torch.tensor([numbers[self.ties[index]] for index in self.learned], device=device)
        self.multiplier, self.integral, self.scale = (torch.zeros(1, device=device) for _ in range(3))
        self.gradient = torch.zeros_like(self._valid)  # of the last step: of the loss, plus multiplier times penalty
        self._adam = self._make_adam()
        self._fixed_logits: list[Tensor] | None = None  # the logits, once they do not change any more

    def _make_adam(self) -> Any:
        # The fused Adam skips a step if a tensor `found_inf` says so, on the device, where the others need an `if` and
        # so wait for the device. Typed as Any because torch declares no such attribute: GradScaler sets it likewise.
        adam: Any = torch.optim.Adam([self.phi], lr=TRAVEL / self.steps, betas=BETAS, eps=EPS, fused=True)
        # A first step that is skipped makes the moments, all zero, which a saved state can then be copied into.
        self.phi.grad, adam.found_inf = torch.zeros_like(self.phi), torch.ones((), device=self.phi.device)
        adam.step()
        return adam

    def set_costs(self, costs: Sequence[float]) -> None:
        """Replace `N_l`; only their ratios count.

        Raises:
            CPQError: If all of them are zero.
        """
        total = sum(costs)
        if total <= 0:
            raise CPQError(
                "no layer was used in the first training step, so there are no multiply-accumulates or inputs to "
                "count; use `budget='weights'`, and fixed widths for activations"
            )
        self.costs = list(costs)
        self.shares = [cost / total for cost in costs]
        learned = [[self.shares[index]] for index in self.learned]
        self._learned_shares = torch.tensor(learned, device=self.phi.device)  # [learned widths, 1]

    @property
    def active(self) -> bool:
        """Say if any width is still being learned."""
        return any(self.items[index].learning for index in self.learned)

    @torch.no_grad()
    def step(self, grad_scale: Tensor | None = None) -> None:
        """Move the logits by one step, from the gradients that they hold.

        A step with a gradient that is NaN or infinite changes nothing.

        Args:
            grad_scale (`Tensor`, *optional*): Factor by which a `GradScaler` has multiplied the gradients.
        """
        if not self.active:
            return
        parameters = self._logits()
        self.phi.copy_(self._stacked([full_tensor(parameter.detach()) for parameter in parameters]))
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        gradient = self._stacked([full_tensor(gradient) for gradient in gradients])
        if grad_scale is not None:
            gradient = gradient / grad_scale
        # With an overflow, a scaler calls a fused optimizer all the same, and leaves it to that to skip the step. The
        # hook of the controller runs then too.
        finite = torch.isfinite(gradient).all()
        gradient = torch.where(finite, gradient, 0)
        penalty, mean = self._penalty()
        self._move_multiplier(gradient.norm() / penalty.norm().clamp(min=1e-12), mean, finite)
        self.gradient = gradient + self.multiplier * penalty
        # Tied rows get the sum of their gradients, so they stay equal: all began at the same logits.
        self.phi.grad = torch.zeros_like(self.gradient).index_add_(0, self._tie, self.gradient)[self._tie]
        self._adam.found_inf = (~finite).float()
        self._adam.step()
        copy_full_tensors(parameters, self._rows_of(self.phi.detach().clamp(-LIMIT, LIMIT)))

    def _penalty(self) -> tuple[Tensor, Tensor]:
        """Return `dR/dphi`, `[learned widths, most bits]`, and R, `[]`, both at the present `phi`."""
        probability = self.phi.sigmoid()
        keep = probability.cumprod(1) * self._valid
        # dR/dphi_j = N_l / sum N * (1 - sigmoid(phi_j)) * sum of P_m over m >= j; the flips sum from the right
        penalty = self._learned_shares * (1 - probability) * keep.flip(1).cumsum(1).flip(1) * self._valid
        return penalty, self._fixed_mean() + (keep.sum(1, keepdim=True) * self._learned_shares).sum()

    def _move_multiplier(self, ratio: Tensor, mean: Tensor, finite: Tensor) -> None:
        """Move the multiplier by how far `mean`, in bits, is above the target; by nothing where `finite` is false.

        `ratio` is the norm of the loss gradient over that of the penalty.
        """
        beta = torch.where(self._count == 0, 0.0, SCALE_MOMENTUM)  # the first ratio replaces the zero at the start
        self.scale.copy_(torch.where(finite, beta * self.scale + (1 - beta) * ratio, self.scale))
        if self.target is None:
            return
        excess = self.scale * (mean - self.target)
        climbed = self.integral + CLIMB / self.steps * excess
        self.integral.copy_(torch.where(finite, climbed, self.integral))
        self.multiplier.copy_(torch.where(finite, climbed + PROPORTION * excess, self.multiplier))

    @torch.no_grad()
    def hold(self) -> Callable[[], None]:
        """Note the logits and clear their gradients, before the optimizer's step; return what puts them back after it.

        The logits are among the optimizer's parameters too, where weight decay and momentum would move them. They
        have to stay there, because FSDP2 cannot resume an optimizer that has a parameter without state. So the
        optimizer may move them, and the move is undone.
        """
        parameters = self._logits()
        values = self._fixed_logits
        if values is None:
            values = [full_tensor(parameter.detach()).clone() for parameter in parameters]
            self._fixed_logits = None if self.active else values
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()  # not None: then the optimizer would make no state for it
        return lambda: copy_full_tensors(parameters, values)

    def fix_widths(self) -> None:
        """Fix every width, with the mean at or under the target; waits for the device."""
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
        """Return the expected mean width `R`, in bits; waits for the device."""
        expected = [
            item.min_bits + float(item.keep_probabilities().sum()) if item.learning else item.bits
            for item in self.items
        ]
        return sum(share * bits for share, bits in zip(self.shares, expected, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers, fit for JSON."""
        return {name: tensor.tolist() for name, tensor in self._state().items()} | {"costs": self.costs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned.

        Raises:
            CPQError: If it is not the state of a learner, or that of one with other layers or widths.
        """
        self._fixed_logits = None
        try:
            self.set_costs([float(cost) for cost in state["costs"]])
            for name, own in self._state().items():
                own.copy_(torch.tensor(state[name], device=own.device).view(own.shape))
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            raise CPQError(
                f"the saved state of the learned bit-widths does not fit this model ({error}); resume with the same "
                "model and config"
            ) from error

    @property
    def _count(self) -> Tensor:
        """Steps that moved the logits, `[1]`: not those with an overflow."""
        return self._adam.state[self.phi]["step"].view(1)

    def _state(self) -> dict[str, Tensor]:
        """Return the tensors that a resumed run needs, by their names in `state_dict`; writing to them sets them."""
        moments = self._adam.state[self.phi]
        return {
            "multiplier": self.multiplier, "integral": self.integral, "scale": self.scale,
            "count": self._count, "first": moments["exp_avg"], "second": moments["exp_avg_sq"],
        }  # fmt: skip

    def _logits(self) -> list[nn.Parameter]:
        found = [self.items[index].bit_logits for index in self.learned]
        return [logits for logits in found if logits is not None]

    def _rows_of(self, matrix: Tensor) -> list[Tensor]:
        """Return views of the rows of a matrix, each as long as the logits that it stands for."""
        return [row[: logits.numel()] for row, logits in zip(matrix.unbind(), self._logits(), strict=True)]

    def _stacked(self, rows: list[Tensor]) -> Tensor:
        """Stack rows of different lengths, filled up with zeros: `[learned widths, most bits]`."""
        out = torch.zeros_like(self._valid)
        foreach_copy_(self._rows_of(out), rows)
        return out

    def _fixed_mean(self) -> float:
        """Return the part of R that is not a sum of P: smallest widths of the learned, widths of the others."""
        learned = set(self.learned)
        return sum(
            share * (item.min_bits if index in learned else item.bits)
            for index, (share, item) in enumerate(zip(self.shares, self.items, strict=True))
        )


def assign(
    keep: Sequence[Sequence[float]], min_bits: Sequence[int], costs: Sequence[float], budget: float | None
) -> list[int]:
    """Turn probabilities into bit-widths whose cost is at or under a budget.

    A bit is kept where that is more likely than not. While the sum of `cost * width` is above the budget, the least
    certain last bit goes. The most likely bits that fit then take the room that is left.

    Args:
        keep (`Sequence[Sequence[float]]`): The non-increasing probabilities of the bits above `min_bits`, per item.
        min_bits (`Sequence[int]`): The width that an item never goes below, per item.
        costs (`Sequence[float]`): The cost of one bit, per item.
        budget (`float`, *optional*): Upper limit on the sum of cost times width; None for no limit.

    Returns:
        `list[int]`: The widths, per item.

    Raises:
        CPQError: If even the smallest widths cost more.
    """
    above = [sum(p > 0.5 for p in chain) for chain in keep]

    def total() -> float:
        return sum(cost * (least + more) for cost, least, more in zip(costs, min_bits, above, strict=True))

    if budget is None:
        return [least + more for least, more in zip(min_bits, above, strict=True)]
    slack = 1e-9 * max(1.0, abs(budget))  # sums of shares are not exact, and a target may be met exactly
    least_cost = sum(cost * least for cost, least in zip(costs, min_bits, strict=True))
    if least_cost > budget + slack:
        raise CPQError(
            f"the target cannot be met: the smallest widths cost {least_cost:.3f} bits of a budget of {budget:.3f}; "
            "raise `target_bits` or lower `min_bits`"
        )
    while total() > budget + slack:  # the last bit of an item first: P falls from bit to bit
        index = min((i for i in range(len(keep)) if above[i] > 0), key=lambda i: keep[i][above[i] - 1])
        above[index] -= 1
    while True:
        room = budget + slack - total()
        fits = [i for i in range(len(keep)) if above[i] < len(keep[i]) and costs[i] <= room]
        if not fits:
            return [least + more for least, more in zip(min_bits, above, strict=True)]
        above[max(fits, key=lambda i: keep[i][above[i]])] += 1


# Layers that inference engines run as one multiplication, at one width: their names in Llama, BERT and T5 (attention),
# then in Llama, Mixtral and T5 (gate and up).
FUSED = ("q_proj|k_proj|v_proj", "query|key|value", "q|k|v", "gate_proj|up_proj", "w1|w3", "wi_0|wi_1")


def ties(names: Sequence[str]) -> list[int]:
    """Number the layers; those that inference engines fuse share a number: q/k/v, gate/up, all experts of a layer."""
    keys: dict[str, int] = {}
    numbers = []
    for name in names:
        parent, _, child = re.sub(r"\bexperts\.\d+", "experts", name).rpartition(".")
        fused = next((group for group in FUSED if child in group.split("|")), child)
        numbers.append(keys.setdefault(f"{parent}.{fused}", len(keys)))
    return numbers


def bit_penalty(model: nn.Module) -> Tensor:
    """Return the expected mean bit-width of the quantized weights, differentiable, to add to a loss.

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
