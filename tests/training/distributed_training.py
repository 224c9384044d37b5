"""Run by torchrun, or alone, in test_distributed.py: a training with the real Trainer, whose outcome is saved.

distributed_training.py OUTPUT --launcher {one,ddp,fsdp2} [--resume CHECKPOINT] [--steps N] ...
"""

import argparse
import os
import signal
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from models import build, inputs
from safetensors.torch import save_file
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from cpq_hf import CPQCallback, CPQConfig, CPQOptimizer, calibrate_model, prepare_model

GLOBAL_BATCH = 4


def pretend_gpus(training: TrainingArguments) -> None:
    """accelerate runs FSDP on CPU processes only if it believes that they have a GPU each."""
    assert training.device.type == "cpu"  # looking at it makes the state
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


class KilledAfter(TrainerCallback):
    """Ends the process so many seconds after training has begun, as a power cut would."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_begin(self, *_, **__) -> None:
        threading.Timer(self.seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--launcher", choices=["one", "ddp", "fsdp2", "zero2", "zero3"], default="one")
    parser.add_argument("--model", default="llama")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--resume")
    parser.add_argument("--learn", action="store_true")
    parser.add_argument("--save_steps", type=int, default=2)
    parser.add_argument("--resume_last", action="store_true")
    parser.add_argument("--kill_after", type=float)
    parser.add_argument("--fail_on_rank", type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    fields = {}
    if args.launcher == "fsdp2":
        layers = {"llama": "LlamaDecoderLayer", "llama-tied": "LlamaDecoderLayer", "mixtral": "MixtralDecoderLayer"}
        fields = {
            "fsdp": True,
            "fsdp_config": {
                "fsdp_version": 2,
                "transformer_layer_cls_to_wrap": [layers[args.model]],
                "reshard_after_forward": True,
                "state_dict_type": "FULL_STATE_DICT",
                "cpu_ram_efficient_loading": False,
            },
        }
    if args.launcher.startswith("zero"):
        fields = {
            "deepspeed": {
                "zero_optimization": {
                    "stage": int(args.launcher[-1]),
                    "stage3_gather_16bit_weights_on_model_save": True,
                },
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto",
                "gradient_clipping": "auto",
            }
        }
    tied = args.model == "llama-tied"
    learned = {"weight_bits": 5, "learn_bits": True, "target_bits": 3.0} if args.learn else {"weight_bits": 3}
    config = CPQConfig(activation_bits=8, quantize_embeddings=tied, **learned)
    # before the arguments: under ZeRO-3, models that are made after them are born in partitions
    model = prepare_model(build(args.model), config)
    calibrate_model(model, [inputs(args.model, seed=7)])
    training = TrainingArguments(
        output_dir=str(args.output / "checkpoints"),
        per_device_train_batch_size=GLOBAL_BATCH // processes // args.accumulation,
        gradient_accumulation_steps=args.accumulation,
        max_steps=args.steps,
        learning_rate=1e-2,
        weight_decay=0.1,
        logging_steps=1,
        save_steps=args.save_steps,
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        seed=3,
        **fields,
    )
    if args.launcher == "fsdp2":
        pretend_gpus(training)
    data = Dataset.from_dict({key: value.numpy() for key, value in inputs(args.model, 64).items()})
    trainer = Trainer(
        model,
        training,
        train_dataset=data,
        callbacks=[CPQCallback()],
        optimizer_cls_and_kwargs=(CPQOptimizer, {"args": training}),
    )
    if args.fail_on_rank is not None and training.process_index == args.fail_on_rank:
        model.register_forward_hook(lambda *_: 1 / 0)
    if args.kill_after is not None:
        trainer.add_callback(KilledAfter(args.kill_after))
    last = get_last_checkpoint(training.output_dir) if args.resume_last else None
    trainer.train(resume_from_checkpoint=args.resume or last)
    wrapped = trainer.model_wrapped if args.launcher == "zero3" else trainer.model  # the engine has to gather
    tensors = trainer.accelerator.get_state_dict(wrapped)
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        save_file(
            {name: value.contiguous().clone() for name, value in tensors.items()}
            | {"losses": torch.tensor(losses, dtype=torch.float64)},
            args.output / "outcome.safetensors",
        )
        sys.stdout.write("equal\n")
        sys.stdout.flush()
    if dist.is_initialized():
        dist.barrier()
    os._exit(0)  # see distributed_calibration.py


if __name__ == "__main__":
    main()
