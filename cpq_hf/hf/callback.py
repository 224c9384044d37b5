"""The Trainer's callback: prepares if needed, owns a controller, logs, resumes, packs at the end if asked."""

from __future__ import annotations

import logging
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..distributed import is_sharded
from ..errors import CPQError
from ..model import inspection
from ..model.settings import QuantizationSettings
from ..model.summary import summarize
from ..torch_private import uncompiled
from ..training.controller import CPQController
from .card import announce_push, note_training, training_of
from .config import CPQConfig
from .model import pack_model, prepare_model
from .trainer_checkpoints import check_not_diverged, set_incomplete_checkpoints_aside

logger = logging.getLogger(__name__)


class CPQCallback(TrainerCallback, ExportableState):
    """Runs CPQ in a `Trainer`: noise and DropBits follow the progress of training, metrics go to the log.

    Logged with the Trainer's own metrics: `cpq/noise` (in grid steps), `cpq/drop_rate`, `cpq/mean_bits` and
    `cpq/cluster_distance` (in grid steps; 0.25 means evenly spread); with learned bit-widths `cpq/expected_bits` and
    the multiplier of the budget, `cpq/multiplier`, too (with `activation_` before for those of activations).
    Widths that are not fixed when training ends are fixed then. Checkpoints whose saving was cut off are set
    aside when the Trainer is made, so that it resumes from the last whole one; a model with NaN is not saved.

    A packed model pushed at the end, or by `trainer.push_to_hub()`, goes with a model card that tells how it was made.

    Args:
        config (`CPQConfig`, *optional*): Given, it prepares the Trainer's float model when the Trainer is made. Leave
            it out for a model that was loaded with `quantization_config` or prepared.
        pack (`bool`, defaults to False): Pack the model when training has ended, after the best checkpoint was
            loaded if the Trainer was told to.
        push (`str` or `dict`, *optional*): Repository to push the packed model to when training has ended, or
            arguments of `push_to_hub`: `{"repo_id": ..., "private": True, "revision": ..., "commit_message": ...}`.
            Packs the model. It is saved in `args.output_dir`, with the Trainer's tokenizer or processor, and pushed
            from there, by one process.

    Raises:
        CPQError: From the Trainer's constructor or the start of training: a model that is not prepared, or is packed,
            or spread over several GPUs by `DataParallel`. Before a log entry or a checkpoint: a parameter that has
            become NaN or infinite. At the end: a push that is refused, with the command that goes on.

    Example:

    ```python
    trainer = Trainer(model, args, train_dataset=data, callbacks=[CPQCallback(CPQConfig(weight_bits=3))])
    ```
    """

    def __init__(
        self, config: CPQConfig | None = None, pack: bool = False, push: str | dict[str, Any] | None = None
    ) -> None:
        self.config = config
        self.pack = pack or push is not None
        self.push = push
        self.controller: CPQController | None = None
        self._counts_by_hand = False  # DeepSpeed steps one parameter group after the other

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _refuse_data_parallel(args)
        set_incomplete_checkpoints_aside(str(args.output_dir))
        if self.config is not None:
            prepare_model(kwargs["model"], self.config)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        _refuse_data_parallel(args)
        self._detach()
        _refuse_to_pack_shards(self.pack, model)
        _refuse_fullgraph(args, model)
        _warn_about_decay(model, optimizer)
        if args.deepspeed:
            _refuse_under_deepspeed(inspection.settings_of(model))
        self.controller = CPQController(model, optimizer, state.max_steps)
        self._counts_by_hand = bool(args.deepspeed)
        if self._counts_by_hand:
            self.controller.detach()
        if state.global_step >= state.max_steps and (state.epoch or 0) % 1:
            logger.warning(
                "the checkpoint is of the last step, %d, within an epoch: Trainer makes one step more before it looks "
                "at `max_steps`. Load the model from the checkpoint instead of resuming",
                state.global_step,
            )
        if state.global_step > 0:  # resumed; without a saved state (another callback's run), steps are all we know
            callbacks: Any = state.stateful_callbacks or {}
            saved = callbacks.get(type(self).__name__, {}).get("attributes", {}).get("controller_state")
            self.controller.load_state_dict(saved or {"step": state.global_step})
        if not inspection.is_calibrated(model):
            calibrate_uncompiled(model)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._counts_by_hand and self.controller is not None:
            self.controller.advance(kwargs["optimizer"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_log or control.should_save:
            check_not_diverged(kwargs["model"], state)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs: dict[str, float] = kwargs["logs"]
        if self.controller is None or "loss" not in logs:  # metrics of an evaluation, or the last summary
            return
        report = summarize(kwargs["model"])
        values: dict[str, Any] = {
            "cpq/noise": self.controller.noise,
            "cpq/drop_rate": self.controller.drop_rate,
            "cpq/mean_bits": report.mean_bits,
            "cpq/cluster_distance": report.cluster_distance,
        }
        values |= {f"cpq/{name}": value for name, value in self.controller.metrics().items()}
        logs.update(values)
        state.log_history[-1].update(values)  # Trainer appended its copy before it called us

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        metrics = _last_metrics(args, state)
        if self.controller is not None:
            metrics = {} if self.controller.learning else metrics  # widths change now, they were of other ones
            self.controller.finish()
        self._detach()
        note_training(kwargs["model"], training_of(args, state, metrics, _data(kwargs)))
        if self.pack:
            pack_model(kwargs["model"])
        if self.push is not None and state.is_world_process_zero:
            options = {"repo_id": self.push} if isinstance(self.push, str) else self.push
            if kwargs.get("processing_class") is not None:
                kwargs["processing_class"].save_pretrained(args.output_dir)
            kwargs["model"].save_pretrained(args.output_dir, push_to_hub=True, **options)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.controller is None and state.global_step > 0:  # after training
            note_training(kwargs["model"], training_of(args, state, kwargs.get("metrics"), _data(kwargs)))

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and any(True for _ in inspection.packed_layers(kwargs["model"])):
            place = args.hub_model_id or Path(str(args.output_dir)).name
            announce_push(kwargs["model"], Path(str(args.output_dir)), place)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint of the Trainer keeps of this callback; a token stays out of files."""
        push = self.push
        if isinstance(push, dict):
            push = {name: value for name, value in push.items() if name != "token"}
        controller_state = None if self.controller is None else self.controller.state_dict()
        return {"args": {"pack": self.pack, "push": push}, "attributes": {"controller_state": controller_state}}

    def _detach(self) -> None:
        if self.controller is not None:
            self.controller.detach()
            self.controller = None


def calibrate_uncompiled(model: nn.Module) -> None:
    """Have the next forward pass in training run without `torch.compile`, because it calibrates activations.

    Choosing a grid from data cannot be compiled. A compiled model calls the `forward` that the module itself has, so
    the module is given one that lasts until that pass. A stance of the compiler for the whole process would stay if
    something was raised before; this one leaves nothing switched off for others, whatever is raised.
    """
    module = uncompiled(model)
    if "cpq_forward" not in vars(module):
        reason = "the first forward pass calibrates activations; `cpq_hf.calibrate_model` does it before"
        vars(module)["cpq_forward"] = vars(module).get("forward")  # accelerate puts one there for mixed precision
        # a bound method, so that a copy of the model gets one that is bound to the copy
        vars(module)["forward"] = MethodType(torch.compiler.disable(_forward_uncompiled, reason=reason), module)


def _forward_uncompiled(module: Any, *args: Any, **kwargs: Any) -> Any:
    forward = vars(module)["cpq_forward"]
    if module.training:
        del module.forward, module.cpq_forward
        if forward is not None:
            module.forward = forward
    with torch.compiler.set_stance("force_eager"):  # for parts inside that are compiled each on their own
        return type(module).forward(module, *args, **kwargs) if forward is None else forward(*args, **kwargs)


def _refuse_fullgraph(args: TrainingArguments, model: nn.Module) -> None:
    if not args.torch_compile or inspection.is_calibrated(model):
        return
    plugin = AcceleratorState().dynamo_plugin
    if plugin.fullgraph and not plugin.use_regional_compilation:
        raise CPQError(
            "the first forward pass calibrates activations, which `torch.compile` cannot have in one graph, and "
            "ACCELERATE_DYNAMO_USE_FULLGRAPH is set. Call `cpq_hf.calibrate_model(model, batches)` before training"
        )


def _last_metrics(args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
    """Metrics of the weights that the model has at the end: the last ones or, if they were loaded, the best ones."""
    step = state.best_global_step if args.load_best_model_at_end else state.global_step
    entries = [entry for entry in state.log_history if entry.get("step") == step]
    return {key: value for entry in entries for key, value in entry.items() if key.startswith("eval_")}


def _data(kwargs: dict[str, Any]) -> Any:
    return getattr(kwargs.get("eval_dataloader"), "dataset", None)


def _refuse_data_parallel(args: TrainingArguments) -> None:
    if args.n_gpu > 1:
        raise CPQError(
            f"the Trainer would spread the model over {args.n_gpu} GPUs with DataParallel, which copies layers "
            "without their quantizers. Launch one process per GPU with "
            f"`torchrun --nproc_per_node {args.n_gpu} ...`, or make one GPU visible with CUDA_VISIBLE_DEVICES"
        )


def _refuse_under_deepspeed(settings: QuantizationSettings) -> None:
    learns = (
        settings.learn_bits
        or settings.learn_activation_bits
        or any(o.get("learn_bits") for o in settings.overrides.values())
    )
    if learns or settings.freeze_oscillating:
        field = "learn_bits=False" if learns else "freeze_oscillating=False"
        raise CPQError(
            "DeepSpeed takes its step on flat partitions of the parameters, where learned bit-widths get no gradient "
            f"and oscillating weights cannot be told: set `{field}`, or train with FSDP "
            "(recipes/accelerate/fsdp2.yaml)"
        )


def _refuse_to_pack_shards(pack: bool, model: nn.Module) -> None:
    if pack and any(is_sharded(parameter) for parameter in model.parameters()):
        raise CPQError(
            "`CPQCallback(pack=True)` cannot pack a model that FSDP spreads over processes: leave `pack` out, save it "
            "with `trainer.save_model(folder)`, then load the folder in one process and call `cpq_hf.pack_model`"
        )


def _warn_about_decay(model: nn.Module, optimizer: Any) -> None:
    ours = {id(p) for _, quantizer in inspection.quantizers(model) for p in quantizer.parameters(recurse=False)}
    decayed = any(
        group.get("weight_decay", 0) > 0 and any(id(parameter) in ours for parameter in group["params"])
        for group in optimizer.param_groups
    )
    if decayed:
        logger.warning(
            "weight decay is applied to quantizer parameters, which pulls their step sizes towards 1; pass "
            "optimizer_cls_and_kwargs=(cpq_hf.CPQOptimizer, {'args': args}) to the Trainer to keep them out of it"
        )
