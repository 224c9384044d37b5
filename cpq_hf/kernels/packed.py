"""Weights from packed words, written out or multiplied on the spot: `packed.c` on the CPU, Triton on CUDA devices.

Both functions are torch operators (`torch.ops.cpq_hf`), so that a compiled model calls them without a graph break. The
C library is built by the first layer that runs (a few seconds, compiler.py), each of Triton's kernels by the first
layer that needs it (packed_gpu.py). Without a C compiler or Triton, on other devices and while a model is exported,
torch operations do the same work. Before it is used, a kernel is compared with them, but for the C that writes weights
out.
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
from ..spec import Grid
from . import packed_gpu
from .compiler import load_library

SOURCE = Path(__file__).with_name("packed.c")
TOLERANCE = 2e-6  # of the sum of all |weight * input|: how far a product may lie from the exact path's, in float32
_FLAGS = ("-O3", "-ffp-contract=fast")
_DTYPES = (torch.float32, torch.bfloat16)
_GPUS = {"cuda"}  # the types of device that Triton's kernels are for
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
    if words.device.type not in {"cpu"} | _GPUS or torch.compiler.is_exporting():
        return _dequantize_eager(words, scale, bits, columns, offset, dtype)
    call = _dequantize_here if _is_plain(words) else _dequantize
    return call(words, scale, bits, columns, offset, dtype)


def multiply(x: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None, bits: int, offset: float) -> Tensor | None:
    """`x @ weight.T + bias` straight from packed words, or None if it cannot be done here.

    Args:
        x (`Tensor` of shape `[..., columns]`, float32, bfloat16 or, on a GPU, float16): Inputs. The result has their
            dtype.
        words, scale, bits, offset: As for [`dequantize`].
        bias (`Tensor` of shape `[rows]`, *optional*): Added in float32.
    """
    device = x.device.type
    if device not in {"cpu"} | _GPUS or words.device.type != device or torch.compiler.is_exporting():
        return None
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    if x.dtype not in (packed_gpu.DTYPES if device in _GPUS else _DTYPES):
        return None
    call = _multiply_here if _is_plain(x) and not torch.is_grad_enabled() else _multiply
    return call(x, words, scale, bias, bits, offset)


def has_kernel(device: torch.device, bits: int, group_size: int | None) -> bool:
    """Whether [`multiply`] has a kernel for weights there that passes its check."""
    if device.type in _GPUS:
        there = packed_gpu.kernels() is not None and packed_gpu.fits(bits, group_size)
    else:
        there = device.type == "cpu" and load() is not None and _fits(bits, group_size)
    return there and _is_right(bits, group_size, device)


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
def _is_right(bits: int, group_size: int | None, device: torch.device) -> bool:
    """Compare the kernel, as this machine's compiler made it, with the exact path in float64."""
    columns = 3 * group_size if group_size else 301
    words, scale, x = _example(bits, columns, 3 if group_size else 1, device)
    for offset in (0.0, 0.5) if bits == 2 else (0.0,):
        weight = _dequantize_eager(words, scale, bits, columns, offset, torch.float32).double()
        for inputs in (x, x[:1]):  # a GPU has kernels of their own for them
            product = _multiply_here(inputs, words, scale, None, bits, offset)
            error = (product - inputs.double() @ weight.T).abs()
            if not bool((error <= TOLERANCE * (inputs.double().abs() @ weight.T.abs())).all()):
                return False
    return True


@functools.cache
def _is_exact(bits: int, device: torch.device) -> bool:
    """Compare the weights that a GPU's kernel writes out with the exact ones: all bits must be the same."""
    words, scale, _ = _example(bits, 304, 2, device)
    cases = [(groups, offset) for groups in (scale, scale[:, :1]) for offset in (0.0, 0.5)]
    exact = [_dequantize_eager(words, groups, bits, 304, offset, torch.float32) for groups, offset in cases]
    ours = [packed_gpu.dequantize(words, groups, bits, 304, offset, torch.float32) for groups, offset in cases]
    return all(torch.equal(one, other) for one, other in zip(ours, exact, strict=True))


def _example(bits: int, columns: int, groups: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Words and scales of 37 rows, and 7 inputs."""
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


def _dequantize_here(
    words: Tensor, scale: Tensor, bits: int, columns: int, offset: float, dtype: torch.dtype
) -> Tensor:
    if words.device.type == "cpu" and "cpu" not in _GPUS:
        return _dequantize_on_cpu(words, scale, bits, columns, offset, dtype)
    there = words.numel() > 0 and packed_gpu.kernels() is not None and _is_exact(bits, words.device)
    write = packed_gpu.dequantize if there else _dequantize_eager
    return write(words, scale, bits, columns, offset, dtype)


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


_dequantize = torch.library.custom_op("cpq_hf::dequantize", _dequantize_here, mutates_args=())


@_dequantize.register_fake
def _(words: Tensor, scale: Tensor, bits: int, columns: int, offset: float, dtype: torch.dtype) -> Tensor:
    return words.new_empty(words.shape[0], columns, dtype=dtype)


def _multiply_here(x: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None, bits: int, offset: float) -> Tensor:
    if x.device.type == "cpu" and "cpu" not in _GPUS:
        return _multiply_on_cpu(x, words, scale, bias, bits, offset)
    product = None if packed_gpu.kernels() is None else packed_gpu.multiply(x, words, scale, bias, bits, offset)
    return _multiply_by_torch(x, words, scale, bias, bits, offset) if product is None else product


def _multiply_by_torch(
    x: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None, bits: int, offset: float
) -> Tensor:
    weight = dequantize(words, scale, bits, x.shape[-1], offset, x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


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
    return _multiply_by_torch(x, words, scale, bias, bits, offset) if failed else out


_multiply = torch.library.custom_op("cpq_hf::multiply", _multiply_here, mutates_args=())


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
