"""Layers that transformers cannot load packed, because their weights are initialized by name.

After loading, `from_pretrained` calls `_init_weights` for every module; what was loaded is left alone.
Most models have Linear layers initialized as modules of their own, where a weight that is not there is passed over.
Some reach for `child.weight` from a parent (T5 for all of its layers, Wav2Vec2 for one), which a packed child lacks,
or for that of the layer itself without looking whether it is there (SigLIP).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from ...private_apis import initialize_module


@torch.no_grad()
def initialized_by_name(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """Those of the Linear layers `names` without whose weight `_init_weights` fails, of them or of a parent."""
    with torch.device("meta"):
        skeleton = type(model)(copy.deepcopy(model.config))
    return {name for name in names if _fails_without(skeleton, name)}


def _fails_without(skeleton: PreTrainedModel, name: str) -> bool:
    layer = skeleton.get_submodule(name)
    weight = layer.weight
    del layer.weight
    parts = name.split(".")
    around = [skeleton.get_submodule(".".join(parts[:count])) for count in range(len(parts) + 1)]
    try:
        return any(_needs_a_weight(around[: count + 1]) for count in range(len(around)))
    finally:
        layer.weight = weight


def _needs_a_weight(around: list[nn.Module]) -> bool:
    """Return whether the last of these nested modules is initialized by a weight that is not there."""
    model = next(module for module in reversed(around) if isinstance(module, PreTrainedModel))
    try:
        initialize_module(model, around[-1])
    except AttributeError as error:
        return "'weight'" in str(error)
    except RuntimeError:  # what needs values, which a skeleton lacks, is left to the check of the whole export
        return False
    return False
