"""Make the optimizer of a Trainer: quantizer parameters get a learning rate of their own and no weight decay."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments

from ..errors import CPQError
from ..model import inspection


class CPQOptimizer:
    """Optimizer factory for `Trainer(optimizer_cls_and_kwargs=(CPQOptimizer, {"args": args}))`.

    The optimizer is the one that `args.optim` names, with three groups: parameters with weight decay, parameters
    without, and quantizer parameters, which never decay. The first group is the one whose rate the Trainer logs.

    Args (of the call that Trainer makes):
        model (`nn.Module`): A prepared model.
        args (`TrainingArguments`): Name, rate and decay of the optimizer.
        quantizer_lr (`float`, *optional*): Learning rate of quantizer parameters (the logarithms of the step sizes).
            Defaults to `args.learning_rate`.

    Raises:
        CPQError: If the model is not prepared, or `quantizer_lr` is not a number >= 0.

    Example:

    ```python
    factory = (CPQOptimizer, {"args": args, "quantizer_lr": 1e-3})
    trainer = Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=factory, callbacks=[CPQCallback()])
    ```
    """

    def __call__(
        self, model: nn.Module, args: TrainingArguments | None = None, quantizer_lr: float | None = None
    ) -> Optimizer:
        if args is None:
            raise CPQError("CPQOptimizer needs the training arguments: (CPQOptimizer, {'args': args})")
        rate = args.learning_rate if quantizer_lr is None else quantizer_lr
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or rate < 0:
            raise CPQError(f"`quantizer_lr` must be a number >= 0, got {rate!r}")
        inspection.settings_of(model)
        ours = inspection.quantizer_parameter_names(model)
        decayed = set(Trainer.get_decay_parameter_names(None, model)) - ours  # type: ignore[arg-type]
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        groups: list[dict[str, Any]] = [
            {"params": [p for n, p in trained.items() if n in decayed], "weight_decay": args.weight_decay},
            {"params": [p for n, p in trained.items() if n not in decayed | ours], "weight_decay": 0.0},
            {"params": [p for n, p in trained.items() if n in ours], "weight_decay": 0.0, "lr": rate},
        ]
        optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)  # type: ignore[arg-type]
        return optimizer_class(groups, **kwargs)
