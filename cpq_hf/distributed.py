"""Work in several processes: their ranks, and the parameters that FSDP2 shards over them (DTensors).

Every process has to take part to read a full one.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .torch_private import foreach_copy_

try:
    from torch.distributed.tensor import DTensor, distribute_tensor
except ImportError:  # a build of torch without distributed
    DTensor = None  # type: ignore[assignment,misc]


def process_rank() -> int:
    """Return the rank of this process; 0 if it is alone."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is sharded over processes."""  # type checkers cannot follow it: see below
    return DTensor is not None and isinstance(tensor, DTensor)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor, on every process."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local_shard(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that lies in this process."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


@torch.no_grad()
def copy_full_tensors(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    """Copy full tensors, the same on every process, into parameters."""
    for parameter, value in zip(parameters, values, strict=True):
        if is_sharded(parameter):
            mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
            parameter.copy_(distribute_tensor(value, mesh, placements, src_data_rank=None))
    plain = [(p.data, value) for p, value in zip(parameters, values, strict=True) if not is_sharded(p)]
    if plain:
        foreach_copy_([own for own, _ in plain], [value for _, value in plain])
