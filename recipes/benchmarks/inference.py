"""What it costs to run, load and pack a packed model, beside float32, bfloat16 and two peers.

    python recipes/benchmarks/inference.py                 # a few minutes on two cores; --device cuda on a GPU

Models have the shapes of known ones and random weights: speed does not depend on values. All methods take turns within
a round; the table has medians of times, and medians of ratios to float32 and bfloat16 within a round. Peers that are
not installed are left out with a line that says so. Peers run in bfloat16, for which they are made; CPQ runs in
float32 on a CPU and in bfloat16 on a GPU. There every method is timed once more as a CUDA graph, which leaves out
Python and its launches, and the layer is a stack of 16, whose weights do not fit into the GPU's cache. The part `load`
is about the CPU.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from statistics import median

import torch
import transformers
from timing import paired, ratio, resident
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    BertConfig,
    BertModel,
    DynamicCache,
    HfArgumentParser,
    LlamaConfig,
    ResNetConfig,
)

from cpq_hf import CPQConfig, fast_inference, pack_model, prepare_model, summarize


@dataclass
class Arguments:
    bits: int = field(default=4, metadata={"help": "bit-width of CPQ's weights; the peers have 4"})
    granularity: str = field(default="channel", metadata={"help": "tensor, channel or group (of 128)"})
    rounds: int = field(default=15, metadata={"help": "timed rounds, after two that are not counted"})
    loads: int = field(default=5, metadata={"help": "times that a model is loaded, in processes of their own"})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda"})
    layers: int = field(default=4, metadata={"help": "decoder layers, each of the shape of TinyLlama 1.1B's"})
    parts: list[str] = field(default_factory=lambda: ["layer", "llama", "bert", "resnet", "load"])


Step = Callable[[], object]
GRAPH = ", CUDA graph"
LLAMA = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}


def llama(layers: int) -> nn.Module:
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=32000, num_hidden_layers=layers, **LLAMA))


def bert() -> nn.Module:
    return BertModel(BertConfig(num_hidden_layers=4), add_pooling_layer=False)


def resnet() -> nn.Module:
    config = ResNetConfig(hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic")
    return AutoModelForImageClassification.from_config(config)


def seeded(build: Callable[[], nn.Module], device: str) -> nn.Module:
    torch.manual_seed(0)
    return build().eval().to(device)


def captured(step: Step) -> Step:
    """The same step as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles and allocates what cannot be captured
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def cpq(model: nn.Module, args: Arguments) -> nn.Module:
    return prepare_model(model, CPQConfig(args.bits, granularity=args.granularity, modules_to_not_convert=[]))


def torchao_int4(model: nn.Module, device: str) -> nn.Module:
    torchao = import_module("torchao.quantization")
    if device == "cpu":  # 4 bits on a CPU are to be had from there only
        prototype = import_module("torchao.prototype.quantization.int4.inference_workflow")
        config = prototype.PrototypeInt4WeightOnlyConfig(group_size=128, set_inductor_config=False)
    else:
        config = torchao.Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d")
    torchao.quantize_(model.bfloat16(), config)
    return model


def quanto_int4(model: nn.Module, device: str) -> nn.Module:
    quanto = import_module("optimum.quanto")
    quanto.quantize(model.bfloat16(), weights=quanto.qint4)
    quanto.freeze(model)
    return model


PEERS = {"torchao int4": ("torchao", torchao_int4), "optimum-quanto int4": ("optimum-quanto", quanto_int4)}


def installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        print(f"{distribution} is not installed: left out")
        return False
    return True


def models(build: Callable[[], nn.Module], args: Arguments, skip: tuple[str, ...] = ()) -> dict[str, nn.Module]:
    """`{method: model}`, all of the same weights; CPQ's two are one model, see [`timed`]."""
    found = {"float32": seeded(build, args.device), "bfloat16": seeded(build, args.device).bfloat16()}
    packed = pack_model(cpq(seeded(build, args.device), args))
    packed = packed if args.device == "cpu" else packed.bfloat16()
    found |= {"CPQ exact": packed, "CPQ fast": packed}
    for name, (distribution, quantize) in PEERS.items():
        if name not in skip and installed(distribution):
            found[name] = quantize(seeded(build, args.device), args.device)
    return found


@torch.inference_mode()
def timed(title: str, steps: dict[str, Step], models: dict[str, nn.Module], items: int, args: Arguments) -> None:
    """Times of all steps in turns, as a table; `items` a step makes items a second."""

    def switch(name: str) -> None:
        if name.startswith("CPQ"):
            fast_inference(models["CPQ fast"], name.startswith("CPQ fast"))

    print(f"\n| {title} | ms | a second | speed of float32 | of bfloat16 |\n|---|---|---|---|---|")
    graphs: dict[str, Step] = {}
    for name, step in steps.items() if args.device != "cpu" else ():
        switch(name)
        try:
            graphs[name + GRAPH] = captured(step)
        except RuntimeError as error:
            print(f"{name} as a CUDA graph: {error}")
    times = paired(steps | graphs, args.rounds, warmup=2, before=switch)
    for name, values in times.items():
        rivals = [rival + GRAPH if name in graphs else rival for rival in ("float32", "bfloat16")]
        speeds = [f"{1 / ratio(times, name, rival):.2f}" if rival in times else "" for rival in rivals]
        cells = [name, f"{median(values) * 1e3:.3f}", f"{items / median(values):.1f}", *speeds]
        print(f"| {' | '.join(cells)} |", flush=True)


def decoder_step(model: nn.Module, batch: int, context: int = 32) -> Step:
    """One token more for each of `batch` sequences, over a cache that is then as before."""
    device, cache = next(model.parameters()).device, DynamicCache(config=model.config)
    tokens = torch.randint(32000, (batch, context + 1), device=device)
    with torch.inference_mode():
        model(tokens[:, :context], past_key_values=cache)
    before = [(layer.keys, layer.values) for layer in cache.layers]

    def step() -> None:
        model(tokens[:, context:], past_key_values=cache)
        for layer, (keys, values) in zip(cache.layers, before, strict=True):
            layer.keys, layer.values = keys, values

    return step


def one_layer(args: Arguments) -> None:
    count = 1 if args.device == "cpu" else 16
    found = models(lambda: nn.Sequential(*(nn.Linear(4096, 4096, bias=False) for _ in range(count))), args)
    for batch in (1, 4, 16):
        x = torch.randn(batch, 4096, device=args.device)
        in_float32 = ("float32",) if args.device != "cpu" else ("float32", "CPQ exact", "CPQ fast")
        inputs = {name: x if name in in_float32 else x.bfloat16() for name in found}
        steps = {name: partial(model, inputs[name]) for name, model in found.items()}
        timed(f"{count} x Linear 4096 -> 4096, batch {batch}", steps, found, batch, args)


def whole_models(args: Arguments) -> None:
    if "llama" in args.parts:
        found = models(partial(llama, args.layers), args)
        for batch in (1, 4, 16):
            steps = {name: decoder_step(model, batch) for name, model in found.items()}
            timed(f"Llama, {args.layers} layers and head, step of batch {batch}: tokens", steps, found, batch, args)
    if "bert" in args.parts:
        found, tokens = models(bert, args), torch.randint(1000, (8, 64), device=args.device)
        steps = {name: partial(model, tokens) for name, model in found.items()}
        timed("BERT base, 4 layers, batch of 8 x 64 tokens: sequences", steps, found, 8, args)
    if "resnet" in args.parts:
        print("\ntorchao has no 4-bit convolution, optimum-quanto refuses 1000 rows (no multiple of 16): left out")
        found = models(resnet, args, skip=tuple(PEERS))
        images = torch.randn(4, 3, 224, 224, device=args.device)
        inputs = {name: images.to(next(m.parameters()).dtype) for name, m in found.items()}
        steps = {name: partial(model, inputs[name]) for name, model in found.items()}
        timed("ResNet-18, 4 images of 224 x 224: images", steps, found, 4, args)


@torch.inference_mode()
def load(folder: str, fast: bool, cold: bool) -> tuple[float, float, float, float, float]:
    """In a process of its own: seconds to load, to the first token; MB of weights, resident, and at the peak."""
    transformers.utils.logging.disable_progress_bar()
    for file in Path(folder).iterdir():
        with file.open("rb") as handle:
            if cold:  # out of the page cache: the disk is read
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while not cold and handle.read(1 << 24):
                pass
    small = LlamaConfig(vocab_size=8, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    AutoModelForCausalLM.from_config(small)(torch.tensor([[1]]))  # what the libraries themselves load and allocate
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder)
    loaded = time.perf_counter() - start
    if fast:
        fast_inference(model)
    model(torch.tensor([[1]]))
    first = time.perf_counter() - start
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) / 2**20
    return loaded, first, weights, resident("VmRSS") - before, resident("VmHWM") - before


def loading(args: Arguments) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = llama(args.layers)
        model.save_pretrained(f"{folder}/float")
        cpq(model, args)
        size = sum(4 * layer.numel for layer in summarize(model).layers) / 1e6
        start = time.perf_counter()
        pack_model(model)
        seconds = time.perf_counter() - start
        model.save_pretrained(f"{folder}/packed")
        os.sync()
        print(f"\nPacking: {size:.0f} MB of float weights in {seconds:.2f} s, {size / seconds:.0f} MB/s\n")
        print("| Llama | from | file MB | load s | first token s | weights MB | resident MB | peak MB |")
        print("|---|---|---|---|---|---|---|---|")
        kinds = {"float32": "float", "CPQ exact": "packed", "CPQ fast": "packed"}
        cases = [(name, source) for source in ("disk", "page cache") for name in kinds]
        results: dict[tuple[str, str], list[tuple[float, ...]]] = {case: [] for case in cases}
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            for _ in range(args.loads):
                for name, source in cases:
                    call = (f"{folder}/{kinds[name]}", name == "CPQ fast", source == "disk")
                    results[name, source].append(pool.apply(load, call))
        for name, source in cases:
            file = sum(path.stat().st_size for path in Path(folder, kinds[name]).glob("*.safetensors")) / 2**20
            loaded, first, *sizes = (median(values) for values in zip(*results[name, source], strict=True))
            cells = " | ".join(f"{value:.0f}" for value in sizes)
            print(f"| {name} | {source} | {file:.0f} | {loaded:.2f} | {first:.2f} | {cells} |")


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    transformers.utils.logging.disable_progress_bar()
    device = args.device if args.device == "cpu" else torch.cuda.get_device_name(args.device)
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}, {device}, "
        f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, CPQ {args.bits} bits per {args.granularity}, "
        f"{args.rounds} rounds"
    )
    if "layer" in args.parts:
        one_layer(args)
    whole_models(args)
    if "load" in args.parts and Path("/proc/self/clear_refs").exists():
        loading(args)


if __name__ == "__main__":
    main()
