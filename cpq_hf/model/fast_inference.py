"""Switch packed models between exact evaluation and fast inference."""

from __future__ import annotations

import logging
from typing import TypeVar

from torch import nn

from ..errors import CPQError
from ..nn import PackedConv1D, PackedLinear
from ..tensor.kernels import packed as kernel
from .inspection import packed_layers

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)


def fast_inference(model: M, enabled: bool = True) -> M:
    """Multiply straight from the packed words, in place: as fast as memory allows, without a float weight anywhere.

    A packed model is exact by default: `pack_model` promises outputs bit-identical to training's. Here the sums of a
    layer are added up in another order, so its outputs differ from the exact ones by float32 rounding: by at most
    2e-6 of the sum of all `|weight * input|` in float32. A bfloat16 model's weights are not rounded to bfloat16 before
    they are multiplied, its outputs differ by about one unit of bfloat16. On a CPU the output for one input depends
    neither on the other inputs of the batch nor on the number of threads; on a GPU it repeats bit by bit, but may
    depend on how many inputs there are. With more than 16 of them a GPU does what it does in exact evaluation.

    Applies to Linear and transformers' Conv1D layers, on the CPU in float32 and bfloat16, on CUDA devices with Triton
    in float16 too (never run on one yet, see docs/deploy.md); before it is used, the kernel is checked against the
    exact path. Other layers (and these in other dtypes, on other devices, without a C compiler or Triton, and in
    groups that the kernel does not take) stay exact; what could not be switched is logged. The setting is not saved
    with the model, and is to be made on the device that the model is to run on.

    Args:
        model (`nn.Module`): A packed model, from `pack_model` or `from_pretrained`.
        enabled (`bool`, defaults to `True`): `False` goes back to exact evaluation.

    Returns:
        `nn.Module`: The same model.

    Raises:
        CPQError: If the model has no packed layers.

    Example:

    ```python
    >>> import torch
    >>> from torch import nn
    >>> from cpq_hf import CPQConfig, fast_inference, pack_model, prepare_model
    >>> model = nn.Sequential(nn.Linear(256, 64), nn.Linear(64, 2))
    >>> model = pack_model(prepare_model(model, CPQConfig(weight_bits=3)))
    >>> x = torch.randn(4, 256)
    >>> exact = model(x)
    >>> torch.allclose(fast_inference(model)(x), exact, atol=1e-5)
    True

    ```
    """
    layers = dict(packed_layers(model))
    if not layers:
        raise CPQError("the model has no packed layers; pack it first: `cpq_hf.pack_model(model)`")
    left = []
    for name, layer in layers.items():
        if isinstance(layer, (PackedLinear, PackedConv1D)):
            weight = layer.spec.weight
            layer.fast = enabled and kernel.has_kernel(
                layer.holder.weight_packed.device, weight.bits, weight.group_size
            )
            left += [name] if enabled and not layer.fast else []
    if left:
        logger.warning("%d layers stay exact, there is no fast kernel for them here: %s", len(left), ", ".join(left))
    return model
