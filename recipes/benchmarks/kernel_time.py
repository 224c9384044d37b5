"""What the quantizer of one weight costs, forward and backward: time against a copy and LSQ; and peak memory.

    python recipes/benchmarks/kernel_time.py
    python recipes/benchmarks/kernel_time.py --millions 1 10 --bits 2 4 8 --compiled  # LSQ compiled, too
    python recipes/benchmarks/kernel_time.py --device cuda --millions 64 256 --dropbits

All widths have their turns in the same rounds, so that a quantizer's time can be set against its own at the first
width. LSQ is `lsq.py`, in eager PyTorch, and with `--compiled` by torch's own compiler; "torch learnable" is the
fused fake quantization with a learned step that torch has. Forward reads the weight and writes one like it, backward
reads two and writes one: 2.5 copies, so that 2.5 / "of a copy" is the share of the copy's bandwidth that is reached.
On a GPU take weights large enough to hide what launching costs. (Not called kernels.py: transformers would take it
for the package of that name.)
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import platform
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from lsq import LSQ
from timing import paired, peak_during, ratio, resident
from torch import Tensor

from cpq_hf.tensor.fake_quantize import fake_quantize
from cpq_hf.tensor.kernels import fake_quantize as kernels
from cpq_hf.tensor.spec import Grid

COLUMNS = 1024
GRANULARITIES = ("tensor", "channel", "group")  # groups of 128


def quantizers(
    weight: Tensor, g: Tensor, granularity: str, bits: int, compiled: bool, dropbits: bool, textbook_too: bool
) -> dict[str, Callable[[], object]]:
    """`{name: function that quantizes one weight and takes its gradient}`."""
    device = weight.device
    weight = weight.detach().unflatten(1, (-1, 128) if granularity == "group" else (1, -1)).requires_grad_()
    g = g.view_as(weight)
    scales = {"tensor": 1, "channel": weight.shape[0], "group": weight.shape[:2].numel()}[granularity]
    shape = (*weight.shape[:2], 1) if granularity == "group" else (scales, 1, 1)
    alpha = torch.full(shape, 0.1 / 2 ** (bits - 1), device=device, requires_grad=True)
    noise = torch.tensor([0.2], device=device)

    def step(function: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def forward_and_backward() -> None:
            weight.grad = alpha.grad = None
            function(weight).backward(g)

        return forward_and_backward

    # Others get groups as rows of their own: the same memory, the same number of step sizes.
    flat, flat_g = weight.detach().flatten(0, 1).requires_grad_(), g.flatten(0, 1)

    def plain(function: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def forward_and_backward() -> None:
            flat.grad = None
            function(flat).backward(flat_g)

        return forward_and_backward

    per_tensor = granularity == "tensor"
    lsq = LSQ(bits, signed=True, channels=scales).to(device)
    steps = {"copy": lambda: weight.detach().clone(), "LSQ": plain(lsq)}
    if compiled:
        steps["LSQ compiled"] = plain(torch.compile(lsq))
    scale = alpha.detach().flatten().requires_grad_()
    zero, bounds = torch.zeros_like(scale), (*Grid(bits, True).bounds, 1.0)
    if per_tensor:
        steps["torch learnable"] = plain(
            lambda x: torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero, *bounds)
        )
    else:
        steps["torch learnable"] = plain(
            lambda x: torch._fake_quantize_learnable_per_channel_affine(x, scale, zero, 0, *bounds)
        )
    if importlib.util.find_spec("torchao") and not per_tensor:
        steps["torchao"] = plain(torchao_quantizer(bits))
    if importlib.util.find_spec("brevitas"):
        steps["Brevitas"] = plain(brevitas_quantizer(flat, bits, per_tensor))
    steps["CPQ"] = step(lambda x: fake_quantize(x, alpha, noise, Grid(bits, True)))
    if dropbits and bits > 2:
        keep = torch.full((bits - 2,), 0.9, device=device).cumprod(0)
        steps["CPQ, DropBits 0.1"] = step(lambda x: fake_quantize(x, alpha, noise, Grid(bits, True), keep_prob=keep))
    if textbook_too:
        steps["textbook"] = step(lambda x: textbook(x, alpha, noise, bits))
    return steps


def torchao_quantizer(bits: int) -> Callable[[Tensor], Tensor]:
    """The weights' of its quantization-aware training: a step size a row, found anew in each step."""
    from torchao.quantization import PerAxis
    from torchao.quantization.qat import IntxFakeQuantizeConfig
    from torchao.quantization.qat.fake_quantizer import IntxFakeQuantizer

    return IntxFakeQuantizer(IntxFakeQuantizeConfig(getattr(torch, f"int{bits}"), PerAxis(0), is_symmetric=True))


def brevitas_quantizer(weight: Tensor, bits: int, per_tensor: bool) -> Callable[[Tensor], Tensor]:
    """The weights' of its layers, step sizes found anew in each step, as its documentation has it."""
    import brevitas.nn as qnn
    from brevitas.quant import Int8WeightPerChannelFloat, Int8WeightPerTensorFloat

    chosen = Int8WeightPerTensorFloat if per_tensor else Int8WeightPerChannelFloat
    layer = qnn.QuantLinear(weight.shape[1], weight.shape[0], bias=False, weight_quant=chosen, weight_bit_width=bits)
    layer.to(weight.device)
    return lambda x: layer.weight_quant(x).value


def textbook(x: Tensor, alpha: Tensor, noise: Tensor, bits: int) -> Tensor:
    """The method with a grid dimension and autograd: what the closed form replaces."""
    levels = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), device=x.device)
    v = (x / alpha)[..., None]
    above, below = torch.sigmoid((levels + 0.5 - v) / noise), torch.sigmoid((levels - 0.5 - v) / noise)
    above, below = above.clone(), below.clone()
    above[..., -1], below[..., 0] = 1, 0
    probabilities = above - below
    one_hot = (levels == v.round().clamp(levels[0], levels[-1])).float()
    return alpha * ((one_hot + probabilities - probabilities.detach()) * levels).sum(-1)


def peak_of(form: str) -> float:
    """Peak memory in MB that forward and backward of one 768x3072 weight add, in a process of its own."""
    weight, g = torch.randn(768, 3072, requires_grad=True), torch.randn(768, 3072)
    alpha, noise, bits = torch.full((768, 1), 0.5, requires_grad=True), torch.tensor([0.2]), 4
    lsq = LSQ(bits, signed=True, channels=768)
    forms = {
        "LSQ": lambda x: lsq(x),
        "CPQ": lambda x: fake_quantize(x, alpha, noise, Grid(bits, True)),
        "textbook": lambda x: textbook(x, alpha, noise, bits),
    }
    small = torch.randn(768, 8, requires_grad=True)
    forms[form](small).sum().backward()  # what the libraries themselves allocate once
    before = resident("VmRSS")
    return peak_during(lambda: forms[form](weight).backward(g)) - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", nargs="+", type=float, default=[1, 10], help="2^20 elements")
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--granularities", nargs="+", choices=GRANULARITIES, default=["channel"])
    parser.add_argument("--compiled", action="store_true", help="LSQ by torch.compile, too")
    parser.add_argument("--dropbits", action="store_true", help="CPQ with DropBits, too")
    parser.add_argument("--textbook", action="store_true", help="the method with a grid dimension, too: slow")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    gpu = "" if args.device == "cpu" else f"{torch.cuda.get_device_name(args.device)}, "
    print(
        f"torch {torch.__version__}, {gpu}{platform.machine()}, {torch.get_num_threads()} threads of {os.cpu_count()} "
        f"cores, float32, {args.rounds} rounds, CPQ kernel: {kernels.kernel_name(torch.device(args.device).type)}\n\n"
        "| 2^20 elements | step a | bits | quantizer | ms | of a copy | of LSQ | of the first width |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    for millions in args.millions:
        torch.manual_seed(0)
        weight = torch.randn(round(millions * 2**20 / COLUMNS), COLUMNS, device=args.device) * 0.05
        g = torch.randn_like(weight)
        for granularity in args.granularities:
            torch._dynamo.reset()  # which after eight forms would compile no other
            steps = {
                (bits, name): step
                for bits in args.bits
                for name, step in quantizers(
                    weight, g, granularity, bits, args.compiled, args.dropbits, args.textbook
                ).items()
            }
            times = paired(steps, args.rounds)
            for (bits, name), values in times.items():
                to = [(bits, "copy"), (bits, "LSQ"), next(key for key in times if key[1] == name)]
                cells = [f"{millions:g}", granularity, str(bits), name, f"{median(values) * 1e3:.2f}"]
                cells += [f"{ratio(times, (bits, name), other):.2f}" for other in to]
                print(f"| {' | '.join(cells)} |", flush=True)
    if args.device == "cpu" and Path("/proc/self/clear_refs").exists():
        print("\nPeak memory that the quantizer of a 768x3072 weight (9.4 MB) adds at 4 bits, forward + backward")
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            for form in ("LSQ", "CPQ", "textbook"):
                print(f"{form:16}{pool.apply(peak_of, (form,)):9.1f} MB")


if __name__ == "__main__":
    main()
