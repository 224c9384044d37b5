"""Count the costs of layers that only a batch can tell: multiply-accumulates of weights, elements of inputs.

How often a layer uses its weight depends on the data: the positions of a convolution on the size of the image, those
of a linear layer on the tokens, those of an expert on the router. So hooks count in the forward passes before the
first optimizer step: one batch, or all that are accumulated. Processes see different data, and have to agree on the
costs, so their counts are averaged.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.hooks import RemovableHandle

from ..nn import TrainingLayer


class CostCounter:
    """Counts uses of weights and elements of inputs in the training passes between `start` and `stop`.

    Args:
        layers (`Iterable[TrainingLayer]`): Layers to count, in an order that is the same on all processes.
    """

    def __init__(self, layers: Iterable[TrainingLayer]) -> None:
        self._layers = list(layers)
        self._counts = torch.zeros(2, len(self._layers), dtype=torch.float64)  # uses, elements; on the CPU
        self._handles: list[RemovableHandle] = []

    @property
    def counting(self) -> bool:
        """Say if the hooks are in place."""
        return bool(self._handles)

    def start(self) -> None:
        """Put a hook on every layer."""
        for index, layer in enumerate(self._layers):

            def note(module: Any, args: Any, kwargs: Any, output: Any, layer: Any = layer, index: int = index) -> None:
                if module.training:  # an evaluation before the first step is not what training costs
                    counted = layer.count_uses((*args, *kwargs.values()), output)
                    self._counts[:, index] += torch.tensor(counted, dtype=torch.float64)

            # not on the layer itself, which may be a parameter of its owner, with no forward pass
            self._handles.append(layer.owner.register_forward_hook(note, with_kwargs=True))

    def stop(self) -> None:
        """Remove the hooks; the counts stay."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def gather(self) -> None:
        """Replace the counts by their mean over all processes, each of which has to call this."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, self._counts)  # as an object, because NCCL gathers no CPU tensors
            self._counts = torch.stack(everyone).mean(0)

    def multiply_accumulates(self) -> list[float]:
        """Return the multiply-accumulates of each weight, in the order of the layers that hold theirs."""
        # layers that share a weight share its quantizer, so their products add up
        products: dict[Any, float] = {}
        for layer, used in zip(self._layers, self._counts[0].tolist(), strict=True):
            item = layer.weight_quantizer
            products[item] = products.get(item, 0.0) + item.spec.numel * used
        return [products[layer.weight_quantizer] for layer in self._layers if layer.tied_to is None]

    def input_elements(self) -> list[float]:
        """Return the elements of the inputs, in the order of the layers that quantize theirs."""
        counted = zip(self._layers, self._counts[1].tolist(), strict=True)
        return [elements for layer, elements in counted if layer.input_quantizer is not None]
