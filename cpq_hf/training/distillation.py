"""Distillation: let the float model teach the quantized one, by a term that its loss gains in training."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import CPQError

IGNORED = -100  # label of positions that count in no loss, as in transformers


def distill(model: nn.Module, teacher: nn.Module, weight: float = 0.9, temperature: float = 1.0) -> RemovableHandle:
    """Add a distillation term to the loss that `model` returns in training.

    The loss becomes `(1 - weight) * loss + weight * distillation loss`.

    Nothing else changes, in a `Trainer` or in a loop: `model(**batch).loss` holds the sum. The teacher sees the same
    inputs in evaluation mode without gradients; it is no part of the model, so it is not saved with it. In evaluation
    the loss is that of the model alone. Accumulation and several processes are weighted as the model weights its own
    loss (`num_items_in_batch`).

    Args:
        model (`nn.Module`): A transformers model whose output has `logits` and, given `labels`, `loss`. Prepare it
            first.
        teacher (`nn.Module`): The float model, or any with the same classes or vocabulary. It is frozen, and moved to
            the device of the logits.
        weight (`float`, defaults to 0.9): Share of the distillation loss, above 0 to 1.
        temperature (`float`, defaults to 1.0): Softens both distributions, above 0; see [`distillation_loss`].

    Returns:
        `RemovableHandle`: `.remove()` ends it.

    Raises:
        CPQError: On a number out of range, a teacher that is the model itself, or, in a training step, inputs without
            `labels` (label smoothing and `compute_loss_func` of Trainer take them away) or unequal logits.

    Example:

    ```python
    teacher = AutoModelForCausalLM.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=CPQConfig(weight_bits=2))
    cpq_hf.distill(model, teacher)
    Trainer(model, args, train_dataset=data, callbacks=[CPQCallback()]).train()
    ```
    """
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight <= 1:
        raise CPQError(f"`weight` must be a number above 0, at most 1, got {weight!r}")
    _check_temperature(temperature)
    if teacher is model:
        raise CPQError("`teacher` is the model itself; give the float model, for example a copy made before preparing")
    teacher.requires_grad_(False).eval()

    def add_to_loss(_: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
        if not (model.training and torch.is_grad_enabled()):
            return output
        loss, logits = getattr(output, "loss", None), getattr(output, "logits", None)
        if loss is None or logits is None:
            raise CPQError(
                "distillation adds to the `loss` that the model returns with its `logits`, but the output has no "
                f"{'loss: pass `labels` to the model' if loss is None else 'logits'}. (Trainer keeps labels from the "
                "model with `label_smoothing_factor` or `compute_loss_func`: leave these out, or use "
                "`cpq_hf.distillation_loss` in a loss of your own)"
            )
        asked = {key: value for key, value in keywords.items() if key not in ("labels", "num_items_in_batch")}
        with torch.no_grad():
            taught = teacher.to(logits.device)(*inputs, **asked).logits
        labels = keywords.get("labels")
        if labels is not None and _predicts_next(model, logits):
            logits, taught, labels = logits[:, :-1], taught[:, :-1], labels[:, 1:]
        term = distillation_loss(logits, taught, labels, temperature, keywords.get("num_items_in_batch"))
        output.loss = (1 - weight) * loss + weight * term
        return output

    return model.register_forward_hook(add_to_loss, with_kwargs=True)


def distillation_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Return the distillation loss (Hinton et al. 2015, arXiv 1503.02531).

    It is `T^2 * KL(teacher || student)` of the softmax at temperature `T`.

    Args:
        logits (`Tensor` of shape `[..., classes]`): Of the student.
        teacher_logits (`Tensor`, same shape): Of the teacher.
        labels (`Tensor`, *optional*): Where they have the shape `[...]`, positions labelled -100 are left out.
        temperature (`float`, defaults to 1.0): `T`, above 0.
        num_items_in_batch (`int`, *optional*): Divide the sum over positions by this, not by their number: under
            accumulation, the positions of all micro-batches.

    Returns:
        `Tensor`: One number, float32.
    """
    _check_temperature(temperature)
    if logits.shape != teacher_logits.shape:
        raise CPQError(
            f"the logits of the teacher have shape {list(teacher_logits.shape)}, those of the model "
            f"{list(logits.shape)}; distillation needs the same classes or vocabulary"
        )
    student = F.log_softmax(logits.float() / temperature, -1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, -1)
    divergence = (teacher.exp() * (teacher - student)).sum(-1)
    if labels is not None and labels.shape == divergence.shape:
        counted = labels != IGNORED
        divergence, count = divergence * counted, counted.sum()
    else:
        count = torch.tensor(divergence.numel(), device=logits.device)
    return temperature**2 * divergence.sum() / (count if num_items_in_batch is None else num_items_in_batch)


def _predicts_next(model: nn.Module, logits: Tensor) -> bool:
    """Return whether position `t` of the logits is trained on label `t + 1`: decoders with a language-model head."""
    if logits.dim() != 3 or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    loss_type = getattr(model, "loss_type", None)
    return loss_type in ("ForCausalLM", "ForConditionalGeneration") or type(model).__name__.endswith("LMHeadModel")


def _check_temperature(temperature: object) -> None:
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or temperature <= 0:
        raise CPQError(f"`temperature` must be a number above 0, got {temperature!r}")
