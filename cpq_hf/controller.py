"""Move the schedules on: one hook on the optimizer, called once per optimizer step whatever the accumulation."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from . import schedule
from .errors import CPQError
from .quantizer import WeightQuantizer
from .surgery import plan_of, quantizers


class CPQController:
    """Sets noise and DropBits of every quantizer of a model, in step with an optimizer.

    Create it before `accelerator.prepare`; nothing else is needed in the loop. It registers a hook that runs right
    before each optimizer step, hence once however many batches are accumulated, and never for a step that a
    `GradScaler` skips. What holds during step `t` is a pure function of `t / total_steps`.

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
        self._quantizers = [quantizer for _, quantizer in quantizers(model)]
        self._weight_quantizers = [item for item in self._quantizers if isinstance(item, WeightQuantizer)]
        while hasattr(optimizer, "optimizer"):  # accelerate's wrapper; the hook has to sit on the innermost
            optimizer = optimizer.optimizer
        self._handle = optimizer.register_step_pre_hook(self._before_step)
        self._apply_schedule()

    @property
    def noise(self) -> float:
        """Noise scale of the coming step, in grid steps."""
        return schedule.noise_scale(self.step / self.total_steps, self.plan.noise_start, self.plan.noise_end)

    @property
    def drop_rate(self) -> float:
        """DropBits rate of the coming step."""
        return schedule.drop_rate(self.step / self.total_steps, self.plan.dropbits)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: plain numbers, fit for JSON."""
        return {"step": self.step, "total_steps": self.total_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken. The schedule follows this controller's own `total_steps`."""
        step = state.get("step")
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise CPQError(f"not the state of a CPQController: `step` is {step!r}, expected a number of steps")
        self.step = step
        self._apply_schedule()

    def detach(self) -> None:
        """Remove the hook; the quantizers stay as they are."""
        self._handle.remove()

    def _before_step(self, *_: Any) -> None:
        # The forward and backward passes of this step are done, so what is set now holds for the next one.
        self.step += 1
        self._apply_schedule()

    def _apply_schedule(self) -> None:
        torch._foreach_zero_([quantizer.noise for quantizer in self._quantizers])
        torch._foreach_add_([quantizer.noise for quantizer in self._quantizers], self.noise)
        rate = self.drop_rate
        rates = [quantizer.drop_rate for quantizer in self._weight_quantizers]
        torch._foreach_zero_(rates)
        torch._foreach_add_(rates, rate)
        for quantizer in self._weight_quantizers:
            quantizer.dropping = rate > 0
