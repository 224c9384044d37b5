"""Write weights out from packed words, or multiply with them straight from the words.

Kernels are `packed.c` on the CPU (cpu.py) and Triton on CUDA devices (gpu.py). Without a C compiler or
Triton, on other devices and while a model is exported, torch operations do the same work. Before its first use, each
kernel is compared with them on a small example.

Both functions are torch operators (`torch.ops.cpq_hf`), registered for the devices that have kernels, so that a
compiled model calls them without a graph break. Outside of a compiler they are called directly: torch's dispatcher
adds 13 us per call, more than a whole layer of 64 x 64 takes (3 us; one thread of an AMD EPYC, torch 2.13).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...packing import pack, unpack
from ...spec import Grid
from . import cpu, gpu

BACKENDS: dict[str, Any] = {"cpu": cpu, "cuda": gpu}  # by type of device
TOLERANCE = 2e-6  # of the sum of all |weight * input|: how far a product may lie from the exact path's, in float32


def dequantize(words: Tensor, scale: Tensor, bits: int, columns: int, offset: float, dtype: torch.dtype) -> Tensor:
    """Return the weights of packed rows.

    Args:
        words (`Tensor` of shape `[rows, ceil(columns*bits/32)]`, int32): Packed rows.
        scale (`Tensor` of shape `[1]` or `[rows, groups]`, float32): Step sizes.
        bits (`int`): Bit-width, 2 to 8.
        columns (`int`): Values per row.
        offset (`float`): Added to a level before it is scaled.
        dtype (`torch.dtype`): Of the result; the arithmetic is float32.

    Returns:
        `Tensor` of shape `[rows, columns]`.
    """
    if words.device.type not in BACKENDS or torch.compiler.is_exporting():
        return _dequantize_eager(words, scale, bits, columns, offset, dtype)
    call = _dequantize if _is_plain(words) else torch.ops.cpq_hf.dequantize
    weight: Tensor = call(words, scale, bits, columns, offset, dtype)
    return weight


def multiply(x: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None, bits: int, offset: float) -> Tensor | None:
    """Return `x @ weight.T + bias` straight from packed words, or None if it cannot be done here.

    Args:
        x (`Tensor` of shape `[..., columns]`, float32, bfloat16 or, on a GPU, float16): Inputs. The result has their
            dtype.
        words, scale, bits, offset: As for [`dequantize`].
        bias (`Tensor` of shape `[rows]`, *optional*): Added in float32.
    """
    device = x.device.type
    if device not in BACKENDS or words.device.type != device or torch.compiler.is_exporting():
        return None
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    if x.dtype not in BACKENDS[device].DTYPES:
        return None
    # the direct call has no gradient; the operator has one
    call = _multiply if _is_plain(x) and not torch.is_grad_enabled() else torch.ops.cpq_hf.multiply
    product: Tensor = call(x, words, scale, bias, bits, offset)
    return product


def has_kernel(device: torch.device, bits: int, group_size: int | None) -> bool:
    """Return whether [`multiply`] has a kernel for such weights there that passes its check."""
    backend = BACKENDS.get(device.type)
    return (
        backend is not None
        and backend.is_available()
        and backend.fits(bits, group_size)
        and _is_right(bits, group_size, device)
    )


@functools.cache
def _is_right(bits: int, group_size: int | None, device: torch.device) -> bool:
    """Compare products, as this machine's compiler made the kernel, with the exact path in float64."""
    columns = 3 * group_size if group_size else 301
    words, scale, x = _example(bits, columns, 3 if group_size else 1, device)
    for offset in (0.0, 0.5) if bits == 2 else (0.0,):
        weight = _dequantize_eager(words, scale, bits, columns, offset, torch.float32).double()
        for inputs in (x, x[:1]):  # a GPU has different kernels for many inputs and for one
            product = _multiply(inputs, words, scale, None, bits, offset)
            error = (product - inputs.double() @ weight.T).abs()
            if not bool((error <= TOLERANCE * (inputs.double().abs() @ weight.T.abs())).all()):
                return False
    return True


@functools.cache
def _is_exact(bits: int, device: torch.device) -> bool:
    """Compare the weights that a kernel writes out with the exact ones: all bits must be the same."""
    backend = BACKENDS[device.type]
    words, scale, _ = _example(bits, 304, 2, device)
    cases = [(groups, offset) for groups in (scale, scale[:, :1]) for offset in (0.0, 0.5)]
    for groups, offset in cases:
        written = backend.dequantize(words, groups, bits, 304, offset, torch.float32)
        exact = _dequantize_eager(words, groups, bits, 304, offset, torch.float32)
        if written is None or not torch.equal(written, exact):
            return False
    return True


def _example(bits: int, columns: int, groups: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return words `[37, ...]`, scales `[37, groups]` and inputs `[7, columns]`."""
    generator = torch.Generator().manual_seed(bits)
    levels = torch.randint(*Grid(bits, True).bounds, (37, columns), generator=generator)
    scale = torch.rand(37, groups, generator=generator) + 0.5
    x = torch.randn(7, columns, generator=generator)
    return pack(levels, bits).to(device), scale.to(device), x.to(device)


def _dequantize_eager(
    words: Tensor, scale: Tensor, bits: int, columns: int, offset: float, dtype: torch.dtype
) -> Tensor:
    levels = unpack(words, bits, columns).float().add_(offset)
    if scale.dim() == 1:
        return levels.mul_(scale).to(dtype)
    return levels.unflatten(1, (scale.shape[1], -1)).mul_(scale.unsqueeze(-1)).flatten(1).to(dtype)


def _dequantize(words: Tensor, scale: Tensor, bits: int, columns: int, offset: float, dtype: torch.dtype) -> Tensor:
    backend, arguments = BACKENDS[words.device.type], (words, scale, bits, columns, offset, dtype)
    if words.numel() > 0 and backend.is_available() and _is_exact(bits, words.device):
        weight: Tensor | None = backend.dequantize(*arguments)
        if weight is not None:
            return weight
    return _dequantize_eager(*arguments)


def _multiply(x: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None, bits: int, offset: float) -> Tensor:
    backend = BACKENDS[x.device.type]
    if backend.is_available():
        product: Tensor | None = backend.multiply(x, words, scale, bias, bits, offset)
        if product is not None:
            return product
    weight = _dequantize(words, scale, bits, x.shape[-1], offset, x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


# --- torch operators: what a compiler sees ---------------------------------------------------------------------------

_DEVICES = tuple(BACKENDS)
_dequantize_operator = torch.library.custom_op(
    "cpq_hf::dequantize", _dequantize, mutates_args=(), device_types=_DEVICES
)
_multiply_operator = torch.library.custom_op("cpq_hf::multiply", _multiply, mutates_args=(), device_types=_DEVICES)


@_dequantize_operator.register_fake
def _(words: Tensor, scale: Tensor, bits: int, columns: int, offset: float, dtype: torch.dtype) -> Tensor:
    return words.new_empty(words.shape[0], columns, dtype=dtype)


@_multiply_operator.register_fake
def _(x: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None, bits: int, offset: float) -> Tensor:
    return x.new_empty(*x.shape[:-1], words.shape[0])


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, words, scale, bias, ctx.bits, ctx.offset = inputs
    ctx.save_for_backward(words, scale)
    ctx.columns, ctx.bias_dtype = x.shape[-1], None if bias is None else bias.dtype


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    words, scale = ctx.saved_tensors
    needs_x, _, _, needs_bias, *_ = ctx.needs_input_grad
    weight = dequantize(words, scale, ctx.bits, ctx.columns, ctx.offset, g.dtype) if needs_x else None
    grad_bias = g.flatten(0, -2).sum(0).to(ctx.bias_dtype) if needs_bias else None
    return None if weight is None else g @ weight, None, None, grad_bias, None, None


_multiply_operator.register_autograd(_backward, setup_context=_save_for_backward)


def _is_plain(tensor: Tensor) -> bool:
    """Return whether a function may be called without torch's dispatcher: no subclass, no compiler is watching."""
    return type(tensor) is Tensor and not torch.compiler.is_compiling()
