"""`nn.MultiheadAttention`, and the encoder of torch that takes its weights past it.

torch keeps query's, key's and value's projections as parameters of the attention, and multiplies with these and with
the weight of `out_proj` in one function, or in evaluation in a fused one for the whole encoder layer. Here they are
called like any other layers, and between them is torch's `scaled_dot_product_attention`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CPQError
from ..tensor.recompute import multiply, passed_on
from ..torch_private import OutProjection, has_one_projection
from .packed import PackedLinear
from .parameter_weights import PackedParameterWeight, ParameterWeight, Refitted, grid_of
from .training import CPQLinear

SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")  # where key or value has another width than query
PROJECTIONS = ("in_proj_weight", *SEPARATE)


def is_covered(module: nn.Module) -> bool:
    """Return whether it is torch's attention and can be quantized: no learned tokens, no other `forward`."""
    return (
        isinstance(module, nn.MultiheadAttention)
        and getattr(type(module), "float_class", type(module)).forward is nn.MultiheadAttention.forward
        and module.bias_k is None
        and not module.add_zero_attn
    )


def attention_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """The projections of such a module by name; empty for any other."""
    if not is_covered(module):
        return {}
    own = {name: module._parameters.get(name) for name in PROJECTIONS}
    return {name: parameter for name, parameter in own.items() if parameter is not None}


class AttentionWeight(ParameterWeight):
    """The quantizers of one projection, or of all three in one weight, and of what goes in."""

    @property
    def has_input_grid(self) -> bool:
        return self.input_quantizer is not None

    def count_uses(self, inputs: tuple[Any, ...], output: Any) -> tuple[float, float]:
        """As for any layer; of three projections in one weight, each third meets a different input."""
        if self.attribute in SEPARATE:
            inputs = (inputs[SEPARATE.index(self.attribute)],)
        positions = [x.numel() / x.shape[-1] for x in inputs[:3]]
        different = {id(x): x.numel() for x in inputs[:3]}
        return sum(positions) / len(positions), sum(different.values())


class PackedAttentionWeight(PackedParameterWeight):
    """The same, packed."""

    @property
    def has_input_grid(self) -> bool:
        return self.spec.activation is not None


class CPQOutProjection(CPQLinear, OutProjection):
    """`out_proj` of an attention, on the grid: a separate row, because others take its weight without a call."""


class PackedOutProjection(PackedLinear, OutProjection):
    """The same, packed."""


class Attention(Refitted):
    """`nn.MultiheadAttention` with weights on the grid, in training and packed."""

    embed_dim: int
    num_heads: int
    batch_first: bool
    dropout: float
    in_proj_bias: Tensor | None
    out_proj: nn.Linear

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Arguments and results are those of `nn.MultiheadAttention`; `is_causal` says what `attn_mask` shows."""
        if is_causal and attn_mask is None:
            raise CPQError("`is_causal` says that `attn_mask` is causal, but there is no `attn_mask`; give both")
        batched = query.dim() == 3
        q = self._rows_first(query, batched)
        k = q if key is query else self._rows_first(key, batched)
        v = k if value is key else self._rows_first(value, batched)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in self._projected(q, k, v))
        mask, weights = _mask(attn_mask, key_padding_mask, q, k), None
        if need_weights:
            scores = (q * math.sqrt(1 / q.shape[-1])) @ k.transpose(-2, -1)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), self.dropout, self.training)
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        out = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if not batched:
            return out[0], None if weights is None else weights[0]
        return out if self.batch_first else out.transpose(0, 1), weights

    def _rows_first(self, x: Tensor, batched: bool) -> Tensor:
        """-> `[batch, length, width]`"""
        if not batched:
            return x[None]
        return x if self.batch_first else x.transpose(0, 1)

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        """Query, key and value on the grid, multiplied with their projections on theirs."""
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if has_one_projection(self):
            weight, grid = self._weight("in_proj_weight")
            query, key, value = _on_one_grid(grid, query, key, value)
            if query is key and key is value:
                return multiply(F.linear, query, weight, self.in_proj_bias).chunk(3, -1)
            weights = [passed_on(weight, third) for third in weight.chunk(3)]
            inputs = [query, key, value]
        else:
            weights, inputs = [], []
            for name, x in zip(SEPARATE, (query, key, value), strict=True):
                weight, grid = self._weight(name)
                weights.append(weight)
                inputs.append(x if grid is None else grid.quantized_input(x))
        return [multiply(F.linear, *terms) for terms in zip(inputs, weights, biases, strict=True)]

    def _weight(self, name: str) -> tuple[Tensor, Any]:
        """A projection, and what put it on the grid if anything did."""
        grid = grid_of(self, name)
        return (getattr(self, name), None) if grid is None else (grid.quantized_weight(), grid)


def _on_one_grid(grid: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Inputs of a weight that holds all three projections. It has one step size for them, found from all of them."""
    if grid is None or not grid.has_input_grid:
        return query, key, value
    if query is key and key is value:
        return (grid.quantized_input(query),) * 3
    different = [query, key] if value is key else [query, key, value]
    together = grid.quantized_input(torch.cat(different, 1))
    parts = [passed_on(together, part) for part in together.split([x.shape[1] for x in different], 1)]
    return parts[0], parts[1], parts[-1]


def _mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Return what is added to the scores; it broadcasts against `[batch, heads, length of q, length of k]`."""
    masks = []
    if attn_mask is not None:
        heads = attn_mask.dim() == 3  # [batch * heads, length of q, length of k]
        masks.append(attn_mask.view(*q.shape[:2], *attn_mask.shape[1:]) if heads else attn_mask)
    if key_padding_mask is not None:
        masks.append(key_padding_mask.view(q.shape[0], 1, 1, k.shape[2]))
    added = [
        torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, -math.inf) if mask.dtype == torch.bool else mask
        for mask in masks
    ]
    return sum(added[1:], added[0]) if added else None


class EncoderLayer(Refitted):
    """`nn.TransformerEncoderLayer` that calls its layers, in evaluation too."""

    @property
    def activation_relu_or_gelu(self) -> int:
        """0 tells torch that its fused function, which takes weights past the layers, does not fit."""
        return 0


class Encoder(Refitted):
    """`nn.TransformerEncoder` that hands on tensors which such layers take."""

    @property
    def use_nested_tensor(self) -> bool:
        return False
