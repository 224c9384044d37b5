"""One training: the Trainer of an experiment, and what is measured when it has run."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from data import Data
from experiments import Experiment
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalPrediction, get_last_checkpoint

import cpq_hf
from cpq_hf import CPQCallback, CPQOptimizer


def errors(prediction: EvalPrediction) -> dict[str, float]:
    """Top-1 and top-5 error in percent; `predictions` are the five best classes, [images, 5]."""
    right = prediction.predictions == prediction.label_ids[:, None]
    top1, top5 = right[:, 0].mean(), right.any(axis=1).mean()
    return {"top1_error": round(100 * float(1 - top1), 4), "top5_error": round(100 * float(1 - top5), 4)}


def best_five(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.topk(min(5, logits.shape[-1])).indices


def trainer_of(
    experiment: Experiment, model: nn.Module, data: Data, folder: Path, quantized: bool, seed: int, **more: Any
) -> Trainer:
    """`more` are training arguments that the command line decides."""
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    args = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=experiment.epochs if quantized else experiment.float_epochs,
        learning_rate=experiment.lr if quantized else experiment.float_lr,
        per_device_train_batch_size=experiment.batch_size // processes,
        per_device_eval_batch_size=experiment.batch_size,
        weight_decay=experiment.weight_decay,
        optim=experiment.optim,
        lr_scheduler_type="cosine",
        warmup_steps=experiment.warmup,
        logging_steps=100,
        save_strategy="epoch",
        save_total_limit=1,
        report_to="none",
        ddp_find_unused_parameters=False,
        use_cpu=not torch.accelerator.is_available(),  # several processes on CPU need to be told
        remove_unused_columns=False,  # images become `pixel_values` only when they are read
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=seed,
        **more,
    )
    return Trainer(
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.test,
        compute_metrics=errors,
        preprocess_logits_for_metrics=best_five,
        callbacks=[CPQCallback()] if quantized else None,
        optimizer_cls_and_kwargs=(CPQOptimizer, {"args": args}) if quantized else None,
    )


def measure(trainer: Trainer, train: bool = True) -> dict[str, Any]:
    """Train, from the last checkpoint if there is one, and evaluate."""
    folder, started = Path(trainer.args.output_dir), time.time()
    checkpoint = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if train:
        trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.time() - started
    metrics = trainer.evaluate()
    return {
        "top1_error": metrics["eval_top1_error"],
        "top5_error": metrics["eval_top5_error"],
        "loss": metrics["eval_loss"],
        "steps": trainer.state.global_step,
        "resumed": checkpoint is not None,
        "seconds": round(seconds, 1),  # of the last part, if resumed
        "processes": trainer.args.world_size,
        "device": trainer.args.device.type,
        "versions": {
            "cpq_hf": cpq_hf.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
