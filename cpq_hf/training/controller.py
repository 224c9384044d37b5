"""Run schedules and the learning of bit-widths: one hook on the optimizer, called once per optimizer step.

The hook runs before the step (a pre-hook), when the gradients of all accumulated batches are there and clipped. That
is when the logits of learned widths have a gradient to learn from, and whatever is set then holds for the next forward
pass. A post-hook would come too late: by then the optimizer would have moved the logits, by its own rule and rate. A
second hook, after the step, only puts the logits back where the learner left them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import CPQError
from ..model.inspection import quantizers, settings_of, training_layers
from ..nn import TrainingLayer
from ..tensor.activation_quantizer import ActivationQuantizer
from ..tensor.quantizer import Quantizer, WeightQuantizer
from ..torch_private import foreach_add_, foreach_zero_
from . import bit_widths, oscillation, schedule
from .bit_widths import WidthLearner
from .costs import CostCounter

logger = logging.getLogger(__name__)


class CPQController:
    """Sets noise and DropBits of every quantizer of a model and learns bit-widths, in step with an optimizer.

    Create it before `accelerator.prepare`; nothing else is needed in the loop. It registers a hook that runs right
    before each optimizer step, hence once however many batches are accumulated, and never for a step that a
    `GradScaler` skips. Noise and drop rate of step `t` are pure functions of `t / total_steps`.

    With `learn_bits`, the first quarter of the steps learns the bit-widths and then fixes them, with the mean at or
    under `target_bits`. The rest trains at fixed widths, without DropBits in these layers. A bit less doubles the step
    size, so fixing changes nothing in a layer whose likely width it keeps. Where a run ends earlier, [`finish`] fixes
    them.

    With `freeze_oscillating`, weights that oscillate between two levels are frozen, ever more readily.

    Args:
        model (`nn.Module`): A prepared model, wrapped or not.
        optimizer (`torch.optim.Optimizer`): The optimizer that trains it, wrapped or not.
        total_steps (`int`): Optimizer steps of the whole run.

    Raises:
        CPQError: If the model is not prepared, or is packed, or `total_steps` is not a positive integer.

    Example:

    ```python
    >>> import torch
    >>> from torch import nn
    >>> from cpq_hf import CPQConfig, CPQController, prepare_model
    >>> model = prepare_model(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 2)), CPQConfig())
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> controller = CPQController(model, optimizer, total_steps=2)
    >>> for _ in range(2):
    ...     model(torch.randn(4, 16)).square().sum().backward()
    ...     optimizer.step()
    >>> round(controller.noise, 3), controller.drop_rate
    (0.1, 0.0)

    ```
    """

    def __init__(self, model: nn.Module, optimizer: Any, total_steps: int) -> None:
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
            raise CPQError(f"`total_steps` must be a positive number of optimizer steps, got {total_steps!r}")
        self.settings = settings_of(model)
        self.total_steps = total_steps
        self.step = 0
        self.learning_steps = schedule.learning_steps(total_steps)
        self._layers = dict(training_layers(model))
        self._quantizers = [quantizer for _, quantizer in quantizers(model)]
        self._learners = self._make_learners()
        # The hook sits on the optimizer inside accelerate's wrapper, whose `step` also runs for batches that are only
        # accumulated, and for steps that a GradScaler skips.
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        self._handles = [optimizer.register_step_pre_hook(self._before_step)]
        if self._learners:
            self._handles.append(optimizer.register_step_post_hook(self._put_logits_back))
        self._put_back: list[Callable[[], None]] = []
        self._costs = CostCounter(self._layers.values())
        if self.learning:
            if self.settings.budget == "macs" or "activation" in self._learners:
                self._costs.start()
            self._warn_of_few_steps()
        self._apply_schedule()

    @property
    def noise(self) -> float:
        """Return the noise scale of weights in the coming step, in step sizes of the grid."""
        return schedule.noise_scale(self.step / self.total_steps, self.settings.noise_start, self.settings.noise_end)

    @property
    def drop_rate(self) -> float:
        """Return the DropBits rate of weights in the coming step, a probability."""
        return schedule.drop_rate(self.step / self.total_steps, self.settings.dropbits)

    @property
    def learning(self) -> bool:
        """Say if any bit-width is still being learned."""
        return any(learner.active for learner in self._learners.values())

    def metrics(self) -> dict[str, float]:
        """Return numbers of learned widths for a log, none where no width is learned; waits for the device."""
        found = {}
        for kind, learner in self._learners.items():
            prefix = "" if kind == "weight" else "activation_"
            found[f"{prefix}expected_bits"] = learner.expected_bits()
            found[f"{prefix}multiplier"] = float(learner.multiplier)
        return found

    def finish(self) -> None:
        """Fix bit-widths that are still being learned, with the mean at or under the target."""
        if not self.learning:
            return
        logger.warning(
            "training ended at step %d, before the bit-widths were to be fixed at step %d of %d: they are fixed now, "
            "and the model has not trained at them",
            self.step, self.learning_steps, self.total_steps,
        )  # fmt: skip
        self._fix_widths()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: plain numbers, fit for JSON."""
        state: dict[str, Any] = {
            "step": self.step, "total_steps": self.total_steps, "settings": self.settings.checkpoint_fields(),
        }  # fmt: skip
        learners = {kind: learner.state_dict() for kind, learner in self._learners.items()}
        return state | ({"lengths": learners} if learners else {})  # the name under which checkpoints have it

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken. The schedule follows the `total_steps` of this controller.

        Raises:
            CPQError: If it is not the state of a controller, or that of a model which was quantized otherwise.
        """
        step = state.get("step")
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise CPQError(f"not the state of a CPQController: `step` is {step!r}, expected a number of steps")
        self.settings.check_resumes(state.get("settings", {}))
        saved = state.get("lengths", {})
        for kind, learner in self._learners.items():
            if kind in saved:
                learner.load_state_dict(saved[kind])
                self._costs.stop()  # the saved ones are those of the first batch
            elif learner.active:
                logger.warning("no saved state of the learned bit-widths: their multiplier starts again from zero")
        self.step = step
        self._apply_schedule()

    def advance(self, optimizer: torch.optim.Optimizer) -> None:
        """Count one optimizer step, after its backward pass.

        For optimizers that call their hooks once per parameter group and not once per step, as under DeepSpeed.
        `detach` the controller from the optimizer then.
        """
        self._before_step(optimizer)

    def detach(self) -> None:
        """Remove the hooks; the quantizers stay as they are."""
        self._costs.stop()
        for handle in self._handles:
            handle.remove()

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # The forward and backward passes of this step are done, so what is set now holds for the next one.
        self.step += 1
        self._warn_of_weights_taken()
        self._take_costs()
        self._learn_widths(optimizer)
        self._freeze_oscillating(optimizer)
        self._hold_logits()
        self._apply_schedule()

    def _take_costs(self) -> None:
        if not self._costs.counting:
            return
        self._costs.stop()
        self._costs.gather()
        if self.settings.budget == "macs" and "weight" in self._learners:
            self._learners["weight"].set_costs(self._costs.multiply_accumulates())
        if "activation" in self._learners:
            self._learners["activation"].set_costs(self._costs.input_elements())

    def _learn_widths(self, optimizer: torch.optim.Optimizer) -> None:
        for learner in self._learners.values():
            # A fused optimizer unscales gradients inside its step, which is still to come. Others have no such
            # attribute: a GradScaler has unscaled their gradients before.
            learner.step(getattr(optimizer, "grad_scale", None))
        if self.step >= self.learning_steps and self.learning:
            self._fix_widths()

    def _fix_widths(self) -> None:
        for learner in self._learners.values():
            learner.fix_widths()

    def _freeze_oscillating(self, optimizer: torch.optim.Optimizer) -> None:
        # not before the first step, because the optimizer has no state yet in which to note levels
        if self.settings.freeze_oscillating and self.step > 1 and self.step % oscillation.INTERVAL == 0:
            held = [layer for layer in self._layers.values() if _holds(layer)]
            oscillation.freeze_oscillating(held, optimizer, schedule.indecision(self.step / self.total_steps))

    def _hold_logits(self) -> None:
        # also once widths are fixed: weight decay would still pull the logits, which then say the width, towards zero
        self._put_back = [learner.hold() for learner in self._learners.values()]

    def _put_logits_back(self, *_: Any) -> None:
        for put_back in self._put_back:
            put_back()

    def _apply_schedule(self) -> None:
        # Weights gather on the grid as the noise falls. Activations are no parameters that could gather, so their
        # noise stays as it began. The values are tensors on the device, written by one kernel for all quantizers:
        # compiled code would be compiled again for every new Python number.
        noises = [quantizer.noise for quantizer in self._quantizers if isinstance(quantizer, WeightQuantizer)]
        foreach_zero_(noises)
        foreach_add_(noises, self.noise)
        progress = self.step / self.total_steps
        for kind, most in (
            (WeightQuantizer, self.settings.dropbits),
            (ActivationQuantizer, self.settings.activation_dropbits),
        ):
            dropped = [quantizer for quantizer in self._quantizers if isinstance(quantizer, kind)]
            if not dropped:  # the _foreach operations take no empty lists
                continue
            rate = schedule.drop_rate(progress, most)
            foreach_zero_([quantizer.drop_rate for quantizer in dropped])
            foreach_add_([quantizer.drop_rate for quantizer in dropped], rate)
            for quantizer in dropped:
                # not the tensor compared with zero, which would wait for the device; compiles again once, at the end
                quantizer.dropping = rate > 0

    def _make_learners(self) -> dict[str, WidthLearner]:
        layers = list(self._layers.values())
        ties = bit_widths.ties(list(self._layers)) if self.settings.tie_bits else list(range(len(layers)))
        tied = list(zip(layers, ties, strict=True))
        learners = {"weight": self._weight_learner(tied), "activation": self._activation_learner(tied)}
        return {kind: learner for kind, learner in learners.items() if learner is not None}

    def _weight_learner(self, tied: list[tuple[TrainingLayer, int]]) -> WidthLearner | None:
        found = [(layer.weight_quantizer, tie) for layer, tie in tied if _holds(layer)]
        sizes = [float(item.spec.numel) for item, _ in found]  # until a batch has told multiply-accumulates, if asked
        return self._learner(found, sizes, self.settings.target_bits)

    def _activation_learner(self, tied: list[tuple[TrainingLayer, int]]) -> WidthLearner | None:
        found = [(layer.input_quantizer, tie) for layer, tie in tied if layer.input_quantizer is not None]
        return self._learner(found, [1.0] * len(found), self.settings.target_activation_bits)  # until a batch has told

    def _learner(
        self, found: Sequence[tuple[Quantizer, int]], costs: list[float], target: float | None
    ) -> WidthLearner | None:
        if all(item.bit_logits is None for item, _ in found):
            return None
        return WidthLearner([item for item, _ in found], costs, [tie for _, tie in found], target, self.learning_steps)

    def _warn_of_few_steps(self) -> None:
        if self.learning_steps < bit_widths.MIN_STEPS:
            logger.warning(
                "bit-widths are learned during the first %d of %d optimizer steps, too few to tell bits apart: "
                "train at least %d steps, or set `learn_bits=False`",
                self.learning_steps, self.total_steps, round(bit_widths.MIN_STEPS / schedule.LEARNING_END),
            )  # fmt: skip

    def _warn_of_weights_taken(self) -> None:
        """After the first backward pass: warn of weights with a gradient that did not come through their quantizer."""
        if self.step != 1:
            return
        alphas = {name: layer.weight_quantizer.log_alpha for name, layer in self._layers.items()}
        taken = [n for n, layer in self._layers.items() if layer.weight.grad is not None and alphas[n].requires_grad]
        taken = [name for name in taken if alphas[name].grad is None]
        if taken:
            logger.warning(
                "the model computes with the weight of %d layers without calling them, so these train in floating "
                "point, and change when they are packed: %s. Leave them out with `modules_to_not_convert`",
                len(taken), ", ".join(f"`{name}`" for name in taken),
            )  # fmt: skip


def _holds(layer: TrainingLayer) -> bool:
    """Say if a layer holds its weight; one that is tied to another's does not."""
    return layer.tied_to is None
