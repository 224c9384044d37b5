"""Run by torchrun in test_distributed.py: what is said of, and refused for, a model that FSDP2 has sharded."""

import os
import sys

import pytest
import torch
import torch.distributed as dist
from models import build
from torch.distributed.fsdp import fully_shard

from cpq_hf import CPQConfig, CPQError, pack_model, prepare_model, summarize


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    whole = prepare_model(build("llama-tied"), CPQConfig(weight_bits=3, quantize_embeddings=True))
    expected = summarize(whole)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    sharded = prepare_model(build("llama-tied"), CPQConfig(weight_bits=3, quantize_embeddings=True))
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    found = summarize(sharded)
    assert abs(found.cluster_distance - expected.cluster_distance) < 1e-6
    assert found.to_dict().keys() == expected.to_dict().keys()
    assert str(found) == str(expected)
    with pytest.raises(CPQError, match=r"spread over processes \(FSDP\)"):
        pack_model(sharded)
    if dist.get_rank() == 0:
        sys.stdout.write("equal\n")
        sys.stdout.flush()
    dist.barrier()
    os._exit(0)  # see distributed_calibration.py


if __name__ == "__main__":
    main()
