"""What a training step costs: float against LSQ, CPQ and the other packages, in one run, paired; time and peak memory.

    python recipes/benchmarks/step_time.py                               # small models, minutes on two cores
    python recipes/benchmarks/step_time.py --size large --device cuda    # ResNet-18, ViT-S, BERT-base, a Llama of 100M
    python recipes/benchmarks/step_time.py --size large --models bert --texts 8 128 --precisions float32

A step is forward, backward, AdamW and, for CPQ, its controller. Each round times one step of every method, in an order
that rotates; printed are medians over the rounds and medians of the ratios within a round. Peak memory is that of a
whole process (weights, gradients, optimizer, activations) above what it had before the model was built, with an
allocator that gives back at once what is freed; on a GPU, what was allocated there. LSQ is `lsq.py`; the other
packages come with `pip install .[peers]` and are left out where they are not installed, or where they fail, which is
then said.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from methods import PREPARE, covers
from timing import paired, peak_during, ratio, resident
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from cpq_hf import CPQController
from cpq_hf.tensor.kernels import fake_quantize as kernels

METHODS: dict[str, tuple[str, dict[str, Any]]] = {  # row -> method of methods.py, options
    "float": ("float", {}),
    "LSQ": ("lsq", {}),
    "CPQ": ("cpq", {}),
    "CPQ, DropBits 0.1": ("cpq", {"dropbits": 0.1}),
    "CPQ, oscillating frozen": ("cpq", {"freeze_oscillating": True}),
    "torchao": ("torchao", {}),
    "Brevitas": ("brevitas", {}),
    "optimum-quanto": ("quanto", {}),
}
PACKAGES = {"torchao": "torchao", "brevitas": "brevitas", "quanto": "optimum"}
FREED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # of glibc, in bytes
PRECISIONS = ("float32", "bfloat16 autocast", "bfloat16")
BITS = {"resnet": (4, 4), "vit": (4, 4), "bert": (4, 8), "llama": (4, 8)}


def build(model: str, large: bool, depth: int = 4) -> nn.Module:
    """`depth` is the number of layers of a small transformer."""
    if model == "resnet":
        sizes = {} if large else {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 128]}
        depths = [2, 2, 2, 2] if large else [1, 1, 1, 1]
        sizes = sizes or {"embedding_size": 64, "hidden_sizes": [64, 128, 256, 512]}
        return ResNetForImageClassification(ResNetConfig(depths=depths, layer_type="basic", **sizes))
    width, layers, heads = {"vit": (384, 12, 6), "bert": (768, 12, 12), "llama": (768, 12, 12)}[model]
    if not large:
        width, layers, heads = 256, depth, 4
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    if model == "vit":
        return ViTForImageClassification(
            ViTConfig(
                image_size=224 if large else 64, patch_size=16 if large else 8, intermediate_size=4 * width, **sizes
            )
        )
    if model == "bert":
        return BertForSequenceClassification(BertConfig(intermediate_size=4 * width, vocab_size=8192, **sizes))
    return LlamaForCausalLM(
        LlamaConfig(intermediate_size=8 * width // 3, vocab_size=8192, bos_token_id=0, eos_token_id=0, **sizes)
    )


def batch_for(model: str, large: bool, texts: tuple[int, int] | None) -> dict[str, Tensor]:
    size, length = texts or ((16, 512) if large else (8, 128))
    if model in ("resnet", "vit"):
        side = 224 if large else 64
        return {"pixel_values": torch.randn(size, 3, side, side), "labels": torch.randint(2, (size,))}
    ids = torch.randint(8192, (size, length))
    return {"input_ids": ids, "labels": torch.randint(2, (size,)) if model == "bert" else ids}


def step_of(
    name: str,
    model: str,
    precision: str,
    large: bool,
    device: str,
    texts: tuple[int, int] | None = None,
    compiled: bool = False,
) -> Callable[[], None]:
    """A function that makes one training step."""
    torch.manual_seed(0)
    net = build(model, large).to(device)
    batch = {key: value.to(device) for key, value in batch_for(model, large, texts).items()}
    if precision == "bfloat16":
        net.bfloat16()
        batch = {key: value.bfloat16() if value.is_floating_point() else value for key, value in batch.items()}
    method, options = METHODS[name]
    if method != "float":
        net = PREPARE[method](net, BITS[model], batch, **options)
    net.train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    if method == "cpq":
        CPQController(net, optimizer, total_steps=10**6)  # so that noise and drop rate stay as at the start
    forward = torch.compile(net) if compiled else net

    def autocast() -> AbstractContextManager:
        return torch.autocast(device.split(":")[0], torch.bfloat16) if "autocast" in precision else nullcontext()

    def step() -> None:
        with autocast():
            loss = forward(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def available(model: str) -> list[str]:
    return [
        name
        for name, (method, _) in METHODS.items()
        if importlib.util.find_spec(PACKAGES.get(method, "torch")) and covers(method, model, BITS[model])
    ]


def peak_of(name: str, *setting: Any) -> float:
    """Peak memory of the third step in MB, in a process of its own."""
    before = resident("VmRSS")
    step = step_of(name, *setting)
    step()
    step()
    peak = peak_during(step)
    return peak if torch.cuda.is_initialized() else peak - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=BITS, default=list(BITS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--size", choices=["small", "large"], default="small")
    parser.add_argument("--texts", nargs=2, type=int, metavar=("ROWS", "TOKENS"), help="else 8 128; 16 512 if large")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="models by torch.compile")
    parser.add_argument("--no_memory", action="store_true", help="leave peak memory out")
    args = parser.parse_args()
    large = args.size == "large"
    gpu = torch.cuda.get_device_name(args.device) if args.device != "cpu" else ""
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()} {gpu}, "
        f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, {args.rounds} rounds, CPQ kernel: "
        f"{kernels.kernel_name(torch.device(args.device).type)}"
    )
    torch._dynamo.config.recompile_limit = 1000  # the models of all methods share their code
    weigh = not args.no_memory and (args.device != "cpu" or Path("/proc/self/clear_refs").exists())
    for model in args.models:
        for precision in args.precisions:
            setting, steps = (model, precision, large, args.device, args.texts, args.compile), {}
            for name in available(model):
                try:
                    steps[name] = step_of(name, *setting)
                    steps[name]()
                except Exception as error:  # of another package, whose limits are theirs
                    steps.pop(name, None)
                    print(f"{name} fails on {model} in {precision}: {str(error).splitlines()[0][:100]}")
            times = paired(steps, args.rounds)
            del steps
            print(f"\n**{args.size} {model}, W{BITS[model][0]}A{BITS[model][1]}, {precision}**\n")
            print("| method | ms | of float | of LSQ | peak MB |\n|---|---|---|---|---|")
            os.environ.update(FREED_AT_ONCE)  # for the processes that are weighed
            with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
                for name, values in times.items():
                    of_lsq = f"{ratio(times, name, 'LSQ'):.2f}" if "LSQ" in times else "-"
                    peak = f"{pool.apply(peak_of, (name, *setting)):.0f}" if weigh else "-"
                    print(
                        f"| {name} | {median(values) * 1e3:.1f} | {ratio(times, name, 'float'):.2f} | "
                        f"{of_lsq} | {peak} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
