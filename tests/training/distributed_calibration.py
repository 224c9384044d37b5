"""Run by torchrun in test_distributed.py: calibration in training and by `calibrate_model`, on different data."""

import os
import sys

import torch
import torch.distributed as dist
from models import build, inputs

from cpq_hf import CPQConfig, calibrate_model, prepare_model


def grids(model) -> torch.Tensor:
    named = sorted((name, value) for name, value in model.named_parameters() if "input_quantizer" in name)
    return torch.cat([value.detach() for _, value in named])


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    batch = inputs("resnet", seed=rank)
    batch["pixel_values"] *= 1 + rank  # each process sees other ranges

    trained = prepare_model(build("resnet"), CPQConfig(weight_bits=4, activation_bits=4))
    wrapped = torch.nn.parallel.DistributedDataParallel(trained)
    wrapped.train()(**batch).loss.backward()

    calibrated = prepare_model(build("resnet"), CPQConfig(weight_bits=4, activation_bits=4))
    calibrate_model(calibrated, [batch, inputs("resnet", seed=10 + rank)][: 1 + rank])  # and other numbers of batches

    for model in (trained, calibrated):
        mine = grids(model)
        assert torch.isfinite(mine).all()
        everyone = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(everyone, mine)
        assert torch.equal(everyone[0], everyone[1]), everyone
    if rank == 0:
        sys.stdout.write("equal\n")
        sys.stdout.flush()
    dist.barrier()
    # Not the usual way out: in torch 2.13 gloo's destructor joins, with the GIL held, a thread that may be waiting for
    # the GIL to drop the tensors of the last collective. A program that goes on after calibration does not meet it.
    os._exit(0)


if __name__ == "__main__":
    main()
