"""`packed.c` on the CPU: weights from packed words, written out or multiplied on the spot.

Both functions are torch operators (`torch.ops.cpq_hf`), so that a compiled model calls them without a graph break. The
library is built by the first layer that runs (a few seconds, compiler.py). Without a C compiler, on other devices and
while a model is exported, torch operations do the same work.

A kernel for another device is one more function beside [`_multiply`], registered for that device type.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..packing import pack, unpack
from ..spec import level_bounds
from .compiler import load_library

SOURCE = Path(__file__).with_name("packed.c")
TOLERANCE = 2e-6  # of the sum of all |weight * input|: how far a product may lie from the exact path's, in float32
_FLAGS = ("-O3", "-ffp-contract=fast")
_DTYPES = (torch.float32, torch.bfloat16)
_WEIGHTS_PER_THREAD = 1 << 15


def dequantize(words: Tensor, scale: Tensor, bits: int, columns: int, offset: float, dtype: torch.dtype) -> Tensor:
    """The weights of packed rows.

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
    if words.device.type != "cpu" or torch.compiler.is_exporting():
        return _dequantize_eager(words, scale, bits, columns, offset, dtype)
    call = _dequantize_on_cpu if _is_plain(words) else _dequantize
    return call(words, scale, bits, columns, offset, dtype)


def multiply(x: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None, bits: int, offset: float) -> Tensor | None:
    """`x @ weight.T + bias` straight from packed words, or None if it cannot be done here.

    Args:
        x (`Tensor` of shape `[..., columns]`, float32 or bfloat16): Inputs. The result has their dtype.
        words, scale, bits, offset: As for [`dequantize`].
        bias (`Tensor` of shape `[rows]`, *optional*): Added in float32.
    """
    if x.device.type != "cpu" or words.device.type != "cpu" or torch.compiler.is_exporting():
        return None
    if torch.is_autocast_enabled("cpu"):
        x = x.to(torch.get_autocast_dtype("cpu"))
    if x.dtype not in _DTYPES:
        return None
    call = _multiply_on_cpu if _is_plain(x) and not torch.is_grad_enabled() else _multiply
    return call(x, words, scale, bias, bits, offset)


def has_kernel(device: torch.device, bits: int, group_size: int | None) -> bool:
    """Whether [`multiply`] has a kernel for weights there that passes its check."""
    return device.type == "cpu" and load() is not None and _fits(bits, group_size) and _is_right(bits, group_size)


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library, built if need be; None if that fails."""
    if (library := load_library(SOURCE, _FLAGS)) is None:
        return None
    pointer, size, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
    library.cpq_dequantize.argtypes = (*[pointer] * 3, *[size] * 3, number, real, number, number)
    library.cpq_linear.argtypes = (*[pointer] * 5, *[size] * 4, number, real, number, number)
    return library


def _fits(bits: int, group_size: int | None) -> bool:
    """Whether the kernel knows such groups: they must hold whole windows of 32 bits."""
    return group_size is None or group_size % (16 if bits == 2 else 8 if bits <= 4 else 4) == 0


@functools.cache
def _is_right(bits: int, group_size: int | None) -> bool:
    """Compare the kernel, as this machine's compiler made it, with the exact path in float64."""
    generator = torch.Generator().manual_seed(bits)
    columns = 3 * group_size if group_size else 301
    levels = torch.randint(*level_bounds(bits, True), (37, columns), generator=generator)
    scale = torch.rand(37, 3 if group_size else 1, generator=generator) + 0.5
    words, x = pack(levels, bits), torch.randn(7, columns, generator=generator)
    for offset in (0.0, 0.5) if bits == 2 else (0.0,):
        weight = _dequantize_eager(words, scale, bits, columns, offset, torch.float32).double()
        error = (_multiply_on_cpu(x, words, scale, None, bits, offset) - x.double() @ weight.T).abs()
        if not bool((error <= TOLERANCE * (x.double().abs() @ weight.T.abs())).all()):
            return False
    return True


def _dequantize_eager(
    words: Tensor, scale: Tensor, bits: int, columns: int, offset: float, dtype: torch.dtype
) -> Tensor:
    levels = unpack(words, bits, columns).float().add_(offset)
    if scale.dim() == 1:
        return levels.mul_(scale).to(dtype)
    return levels.unflatten(1, (scale.shape[1], -1)).mul_(scale.unsqueeze(-1)).flatten(1).to(dtype)


def _dequantize_on_cpu(
    words: Tensor, scale: Tensor, bits: int, columns: int, offset: float, dtype: torch.dtype
) -> Tensor:
    library = load()
    if library is None or words.numel() == 0:
        return _dequantize_eager(words, scale, bits, columns, offset, dtype)
    kernel_dtype = dtype if dtype in _DTYPES else torch.float32
    words, scale, rows = words.contiguous(), scale.contiguous(), words.shape[0]
    out = torch.empty(rows, columns, dtype=kernel_dtype)
    failed = library.cpq_dequantize(
        words.data_ptr(), scale.data_ptr(), out.data_ptr(), rows, columns, _groups(scale), bits, offset,
        kernel_dtype == torch.bfloat16, _threads(out.numel()),
    )  # fmt: skip
    return _dequantize_eager(words, scale, bits, columns, offset, dtype) if failed else out.to(dtype)


_dequantize = torch.library.custom_op("cpq_hf::dequantize", _dequantize_on_cpu, mutates_args=(), device_types="cpu")


@_dequantize.register_fake
def _(words: Tensor, scale: Tensor, bits: int, columns: int, offset: float, dtype: torch.dtype) -> Tensor:
    return words.new_empty(words.shape[0], columns, dtype=dtype)


def _multiply_on_cpu(x: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None, bits: int, offset: float) -> Tensor:
    library, rows, columns = load(), words.shape[0], x.shape[-1]
    inputs, words, scale = x.reshape(-1, columns).contiguous(), words.contiguous(), scale.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    out = x.new_empty(*x.shape[:-1], rows)
    failed = library is None or library.cpq_linear(
        inputs.data_ptr(), words.data_ptr(), scale.data_ptr(), None if bias is None else bias.data_ptr(),
        out.data_ptr(), inputs.shape[0], rows, columns, _groups(scale), bits, offset, x.dtype == torch.bfloat16,
        _threads(rows * columns),
    )  # fmt: skip
    if failed:
        weight = dequantize(words, scale, bits, columns, offset, x.dtype)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    return out


_multiply = torch.library.custom_op("cpq_hf::multiply", _multiply_on_cpu, mutates_args=(), device_types="cpu")


@_multiply.register_fake
def _(x: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None, bits: int, offset: float) -> Tensor:
    return x.new_empty(*x.shape[:-1], words.shape[0])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, words, scale, bias, ctx.bits, ctx.offset = inputs
    ctx.save_for_backward(words, scale)
    ctx.columns, ctx.bias_dtype = x.shape[-1], None if bias is None else bias.dtype


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    words, scale = ctx.saved_tensors
    needs_x, _, _, needs_bias, *_ = ctx.needs_input_grad
    weight = dequantize(words, scale, ctx.bits, ctx.columns, ctx.offset, g.dtype) if needs_x else None
    grad_bias = g.flatten(0, -2).sum(0).to(ctx.bias_dtype) if needs_bias else None
    return None if weight is None else g @ weight, None, None, grad_bias, None, None


_multiply.register_autograd(_backward, setup_context=_remember)


def _is_plain(tensor: Tensor) -> bool:
    """Whether a function may be called without torch's dispatcher, which would cost more than a small layer."""
    return type(tensor) is Tensor and not torch.compiler.is_compiling()


def _groups(scale: Tensor) -> int:
    """Scales of a row; 0 where one is for all rows."""
    return 0 if scale.dim() == 1 else scale.shape[1]


def _threads(weights: int) -> int:
    return max(1, min(torch.get_num_threads(), weights // _WEIGHTS_PER_THREAD))
