"""Move the schedules and bit-lengths on: one hook on the optimizer, called once per optimizer step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle

from . import lengths, oscillation, schedule
from .activation_quantizer import ActivationQuantizer
from .contents import plan_of, quantizers, training_layers
from .errors import CPQError
from .lengths import LengthLearner
from .nn import TrainingLayer
from .quantizer import WeightQuantizer

logger = logging.getLogger(__name__)


class CPQController:
    """Sets noise and DropBits of every quantizer of a model and learns bit-lengths, in step with an optimizer.

    Create it before `accelerator.prepare`; nothing else is needed in the loop. It registers a hook that runs right
    before each optimizer step, hence once however many batches are accumulated, and never for a step that a
    `GradScaler` skips. Noise and drop rate of step `t` are pure functions of `t / total_steps`.

    With `learn_bits`, the first quarter of the steps learns the widths and ends with a decision, the mean at or under
    `target_bits`; the rest trains at fixed widths, without DropBits in these layers. A bit less doubles the step size,
    so the decision moves no weight that had decided by itself. Where a run ends earlier, [`finish`] decides.

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
        self.plan = plan_of(model)
        self.total_steps = total_steps
        self.step = 0
        self.learning_steps = schedule.learning_steps(total_steps)
        self._layers = dict(training_layers(model))
        self._quantizers = [quantizer for _, quantizer in quantizers(model)]
        self._learners = self._make_learners()
        while hasattr(optimizer, "optimizer"):  # accelerate's wrapper; the hook has to sit on the innermost
            optimizer = optimizer.optimizer
        self._handles = [optimizer.register_step_pre_hook(self._before_step)]
        if self._learners:
            self._handles.append(optimizer.register_step_post_hook(self._after_step))
        self._put_back: list[Callable[[], None]] = []
        self._measuring: list[RemovableHandle] = []
        if self.learning:
            self._measure_costs()
            if self.learning_steps < lengths.LEAST_STEPS:
                logger.warning(
                    "bit-lengths are learned during the first %d of %d optimizer steps, too few to tell bits apart: "
                    "train at least %d steps, or set `learn_bits=False`",
                    self.learning_steps, total_steps, round(lengths.LEAST_STEPS / schedule.LENGTHS_END),
                )  # fmt: skip
        self._apply_schedule()

    @property
    def noise(self) -> float:
        """Noise scale of weights in the coming step, in grid steps."""
        return schedule.noise_scale(self.step / self.total_steps, self.plan.noise_start, self.plan.noise_end)

    @property
    def drop_rate(self) -> float:
        """DropBits rate of weights in the coming step."""
        return schedule.drop_rate(self.step / self.total_steps, self.plan.dropbits)

    @property
    def learning(self) -> bool:
        """Whether widths are still being learned."""
        return any(learner.active for learner in self._learners.values())

    def metrics(self) -> dict[str, float]:
        """What a log may want to know of learned widths, empty where there are none; waits for the device."""
        found = {}
        for kind, learner in self._learners.items():
            prefix = "" if kind == "weight" else "activation_"
            found[f"{prefix}expected_bits"] = learner.expected_bits()
            found[f"{prefix}multiplier"] = float(learner.multiplier)
        return found

    def finish(self) -> None:
        """Decide widths that are still being learned, the mean at or under the target."""
        if not self.learning:
            return
        logger.warning(
            "training ended at step %d, before the bit-lengths were to be decided at step %d of %d: they are decided "
            "now, and the model has not trained at them",
            self.step, self.learning_steps, self.total_steps,
        )  # fmt: skip
        self._decide()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: plain numbers, fit for JSON."""
        state: dict[str, Any] = {
            "step": self.step, "total_steps": self.total_steps, "settings": self.plan.lasting(),
        }  # fmt: skip
        learners = {kind: learner.state_dict() for kind, learner in self._learners.items()}
        return state | ({"lengths": learners} if learners else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken. The schedule follows this controller's own `total_steps`.

        Raises:
            CPQError: If it is not the state of a controller, or that of a model which was quantized otherwise.
        """
        step = state.get("step")
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise CPQError(f"not the state of a CPQController: `step` is {step!r}, expected a number of steps")
        self.plan.check_resumes(state.get("settings", {}))
        saved = state.get("lengths", {})
        for kind, learner in self._learners.items():
            if kind in saved:
                learner.load_state_dict(saved[kind])
                self._stop_measuring()
            elif learner.active:
                logger.warning("no saved state of the learned bit-lengths: their multiplier starts again from zero")
        self.step = step
        self._apply_schedule()

    def advance(self, optimizer: torch.optim.Optimizer) -> None:
        """Count one optimizer step, after its backward pass: for optimizers that call their hooks once a parameter
        group and not once a step, as under DeepSpeed. `detach` the controller from the optimizer then."""
        self._before_step(optimizer)

    def detach(self) -> None:
        """Remove the hook; the quantizers stay as they are."""
        self._stop_measuring()
        for handle in self._handles:
            handle.remove()

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # The forward and backward passes of this step are done, so what is set now holds for the next one.
        self.step += 1
        if self.step == 1:
            _warn_of_weights_taken(self._layers)
        self._take_costs()
        for learner in self._learners.values():
            learner.step(getattr(optimizer, "grad_scale", None))  # a fused optimizer unscales by itself, later
        if self.step >= self.learning_steps and self.learning:
            self._decide()
        if self.plan.freeze_oscillating and self.step > 1 and self.step % oscillation.INTERVAL == 0:
            held = [layer for layer in self._layers.values() if _holds(layer)]
            oscillation.freeze_oscillating(held, optimizer, schedule.indecision(self.step / self.total_steps))
        self._put_back = [learner.hold() for learner in self._learners.values()]
        self._apply_schedule()

    def _after_step(self, *_: Any) -> None:
        for put_back in self._put_back:
            put_back()

    def _decide(self) -> None:
        for learner in self._learners.values():
            learner.decide()

    def _apply_schedule(self) -> None:
        # weights gather on the grid as the noise falls; activations are no parameters, theirs stays as it began
        noises = [quantizer.noise for quantizer in self._quantizers if isinstance(quantizer, WeightQuantizer)]
        torch._foreach_zero_(noises)
        torch._foreach_add_(noises, self.noise)
        progress = self.step / self.total_steps
        for kind, most in (
            (WeightQuantizer, self.plan.dropbits),
            (ActivationQuantizer, self.plan.activation_dropbits),
        ):
            dropped = [quantizer for quantizer in self._quantizers if isinstance(quantizer, kind)]
            if not dropped:
                continue
            rate = schedule.drop_rate(progress, most)
            torch._foreach_zero_([quantizer.drop_rate for quantizer in dropped])
            torch._foreach_add_([quantizer.drop_rate for quantizer in dropped], rate)
            for quantizer in dropped:
                quantizer.dropping = rate > 0

    def _make_learners(self) -> dict[str, LengthLearner]:
        layers, plan = self._layers, self.plan
        tied = lengths.ties(list(layers)) if plan.tie_bits else list(range(len(layers)))
        held = [
            (layer.weight_quantizer, tie) for layer, tie in zip(layers.values(), tied, strict=True) if _holds(layer)
        ]
        weights = [item for item, _ in held]
        learners = {}
        if any(item.bit_logits is not None for item in weights):
            sizes = [item.spec.numel for item in weights]
            groups = [tie for _, tie in held]
            learners["weight"] = LengthLearner(weights, sizes, groups, plan.target_bits, self.learning_steps)
        inputs = [
            (layer.input_quantizer, tie)
            for layer, tie in zip(layers.values(), tied, strict=True)
            if layer.input_quantizer is not None
        ]
        if any(item.bit_logits is not None for item, _ in inputs):
            learners["activation"] = LengthLearner(
                [item for item, _ in inputs], [1.0] * len(inputs), [tie for _, tie in inputs],
                plan.target_activation_bits, self.learning_steps,
            )  # fmt: skip
        return learners

    # --- costs that only a batch can tell ---

    def _measure_costs(self) -> None:
        """Until the first optimizer step, count at how many positions each weight is used, and elements of inputs."""
        self._counts = torch.zeros(2, len(self._layers), dtype=torch.float64)
        if self.plan.budget == "weights" and "activation" not in self._learners:
            return
        for index, layer in enumerate(self._layers.values()):

            def note(module: Any, args: Any, kwargs: Any, output: Any, layer: Any = layer, index: int = index) -> None:
                if module.training:
                    counted = layer.count_uses((*args, *kwargs.values()), output)
                    self._counts[:, index] += torch.tensor(counted, dtype=torch.float64)

            self._measuring.append(layer.owner.register_forward_hook(note, with_kwargs=True))

    def _take_costs(self) -> None:
        if not self._measuring:
            return
        self._stop_measuring()
        counts = self._counts
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, counts)
            counts = torch.stack(everyone).mean(0)
        layers = list(self._layers.values())
        if self.plan.budget == "macs" and "weight" in self._learners:
            products: dict[Any, float] = {}  # layers that share a weight share its quantizer, so their products add up
            for layer, used in zip(layers, counts[0].tolist(), strict=True):
                item = layer.weight_quantizer
                products[item] = products.get(item, 0.0) + item.spec.numel * used
            self._learners["weight"].set_costs([products[layer.weight_quantizer] for layer in layers if _holds(layer)])
        if "activation" in self._learners:
            sizes = [float(s) for layer, s in zip(layers, counts[1], strict=True) if layer.input_quantizer is not None]
            self._learners["activation"].set_costs(sizes)

    def _stop_measuring(self) -> None:
        for handle in self._measuring:
            handle.remove()
        self._measuring.clear()


def _holds(layer: TrainingLayer) -> bool:
    """Whether a layer holds its weight; one that is tied to another's does not."""
    return layer.tied_to is None


def _warn_of_weights_taken(layers: Mapping[str, TrainingLayer]) -> None:
    """After a backward pass: warn of weights that have a gradient which did not come through their quantizer."""
    steps = {name: layer.weight_quantizer.log_alpha for name, layer in layers.items()}
    taken = [n for n, layer in layers.items() if layer.weight.grad is not None and steps[n].requires_grad]
    taken = [name for name in taken if steps[name].grad is None]
    if taken:
        logger.warning(
            "the model computes with the weight of %d layers without calling them, so these train in floating point, "
            "and change when they are packed: %s. Leave them out with `modules_to_not_convert`",
            len(taken), ", ".join(f"`{name}`" for name in taken),
        )  # fmt: skip
