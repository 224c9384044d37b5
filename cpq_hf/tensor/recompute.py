"""Recompute quantized tensors in backward instead of keeping them: training takes hardly more memory than in float.

A layer multiplies its quantized input with its quantized weight. Autograd would keep both for backward, beside the
input and the weight themselves, which the quantizers keep for their own gradients: a second copy of the model and of
every input. Recomputing each is one pass over memory. A quantized tensor therefore carries a recipe, and while the
layer multiplies, hooks on what autograd saves (`torch.autograd.graph.saved_tensors_hooks`) keep the recipe instead.

Why not `torch.utils.checkpoint` around "quantize, multiply": in a first try it gave the same bits, and its early stop
recomputed no product, but it runs the quantizers a second time as a recorded graph, in Python. That costs 0.37 ms per
layer and step beside 0.40 ms for everything here (linear 16 x 16, one thread). A whole step took 1.11 (Llama, width
256), 1.24 (ViT, width 256; 1.16 with DropBits) and 1.15 (BERT-base with DropBits, 2 x 128 tokens) of the time with
recipes; the bound set for a replacement was 1.02 (steps of two processes in turn, 5 to 16 rounds, 2 cores of an AMD
EPYC, torch 2.13, float32, 2026-11-26; the seed was replayed, not the state of the generator, and layers below
`SMALLEST` were left out). On a GPU, where a step of small layers waits for Python, it would cost more. FSDP2 and
`torch.compile` were not tried after that. Under gradient checkpointing it would nest, and quantize three times instead
of two. Fused experts would recompute their first product too, because the checkpoint can only go around their whole
forward: a step of a Mixtral (width 256, 8 experts, 4 layers, 8 x 128 tokens, 12 rounds) took 1.16 of the time with
recipes, at a peak of 829 MB beside 893 MB; keeping the quantized weights took 1.03 and 941 MB. So experts keep recipes
as well.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ..torch_private import saved_tensors_are_watched
from .fake_quantize import quantize_again

SMALLEST = 1 << 14  # elements; below, the calls cost more than the memory is worth


@dataclass(frozen=True)
class Recipe:
    """Recipe to make a tensor again.

    Args:
        node (`torch.autograd.graph.Node`): What [`fake_quantize.quantize_again`] takes; it belongs to the same graph.
        dtype (`torch.dtype`): Of the tensor.
    """

    node: Any
    dtype: torch.dtype

    def make(self) -> Tensor:
        return quantize_again(self.node).to(self.dtype)


def remember(quantized: Tensor) -> Tensor:
    """Attach its recipe to the output of `fake_quantize`, where it has a gradient, and return it."""
    if not torch.compiler.is_compiling() and quantized.grad_fn is not None:
        _write(quantized, Recipe(quantized.grad_fn, quantized.dtype))
    return quantized


def passed_on(quantized: Tensor, view: Tensor) -> Tensor:
    """Return `view`, with the recipe of `quantized` if it has the same memory."""
    if torch.compiler.is_compiling():
        return view
    recipe = _read(quantized)
    if recipe is not None and _memory(view) == _memory(quantized):
        _write(view, recipe)
    return view


def dtype_of_product(x: Tensor) -> torch.dtype | None:
    """Return the dtype to which autocast casts the operands of a product with `x`, None where it leaves them alone."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # meta has none to ask for
        return None
    return torch.get_autocast_dtype(device)


def multiply(operation: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `operation(x, weight, bias)`, a product, saving recipes where `x` and `weight` carry them."""
    if torch.compiler.is_compiling():
        return operation(x, weight, bias)
    x, weight = _cast(x), _cast(weight)
    with kept_as_recipes(x, weight):
        return operation(x, weight, bias)


def kept_as_recipes(*tensors: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which autograd saves the recipes of these tensors, where they carry one.

    Where others watch what autograd keeps (gradient checkpointing, offloading) and under `torch.compile`, whose own
    compiler decides what is kept, nothing changes.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or saved_tensors_are_watched():
        return nullcontext()
    recipes = {
        _memory(tensor): recipe
        for tensor in tensors
        if (recipe := _read(tensor)) is not None and tensor.numel() >= SMALLEST
    }
    if not recipes:
        return nullcontext()

    def pack(tensor: Tensor) -> Any:
        recipe = recipes.get(_memory(tensor))
        return (recipe, tensor.shape, tensor.stride(), tensor.storage_offset()) if recipe else tensor

    return saved_tensors_hooks(pack, _unpack)


def _unpack(kept: Any) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    recipe, *layout = kept
    return recipe.make().as_strided(*layout)


def _cast(tensor: Tensor) -> Tensor:
    """Cast the operand of a product as autocast would, and keep its recipe."""
    recipe, dtype = _read(tensor), dtype_of_product(tensor)
    if recipe is None or tensor.dtype != torch.float32 or dtype is None:
        return tensor
    cast = tensor.to(dtype)
    _write(cast, replace(recipe, dtype=dtype))
    return cast


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _read(tensor: Tensor) -> Recipe | None:
    return getattr(tensor, "_cpq_recipe", None)


def _write(tensor: Tensor, recipe: Recipe) -> None:
    tensor._cpq_recipe = recipe  # type: ignore[attr-defined]  # tensors take attributes, their type does not say so
