"""Find the layers whose weight a module takes without calling them, and put that weight on the grid.

Most modules call their layers. Some take a weight and compute with it themselves: Mamba `self.conv1d.weight`, WavLM
`self.q_proj.weight`, and a subclass of `nn.Linear` with its own `forward` takes `self.weight` (Falcon). The source of
`forward`, and of the methods that it calls, tells which. While such a module runs, the layer instance holds the
quantized weight under the name `weight`, which Python finds before the parameter. A packed layer gives it anyway.

Why the source is read, although packed layers do with a class-level property `weight`: that was tried for layers that
train (2026-11-26, torch 2.13, transformers 5.24), and 26 of 522 tests of layers, models and this file failed. `weight`
has to stay the parameter for everybody else: transformers refuses to load tied models ("`weight` is not an
nn.Parameter"; T5, Llama, GPT-2, Gemma, BERT), `layer.weight.grad` is empty, and `layer.weight.data.clamp_()` would
change a copy, without a word. Models that only look (T5 asks for `self.wo.weight.dtype` in every step) would quantize
the weight each time. And a property says at run time what has to be known before: that no input reaches the layer, so
that it gets no quantizer for one.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..torch_private import remove_forward_hooks
from .training import TrainingLayer

# what may be asked of a weight without computing with it
LOOKS = frozenset(("dtype", "device", "shape", "size", "dim", "ndim", "numel", "requires_grad", "is_meta"))


class Uses(NamedTuple):
    """Layers that a method of a class works with; paths from the module, `""` is the module itself."""

    read: frozenset[str]  # whose weight it takes
    called: frozenset[str]
    returns_several: bool


_USES: dict[tuple[type[nn.Module], str], Uses] = {}


def uses(cls: type[nn.Module], method: str = "forward") -> Uses:
    """Return how a method, and the methods that it calls, use the layers. Without source, no weight counts as read."""
    if (cls, method) not in _USES:
        _USES[cls, method] = _read_source(cls, method)
    return _USES[cls, method]


def _read_source(cls: type[nn.Module], start: str) -> Uses:
    read: set[str] = set()
    called: set[str] = set()
    several, seen, waiting = False, set(), [start]
    while waiting:
        method = waiting.pop()
        seen.add(method)
        for tree in _sources(cls, method):
            parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
            for node in ast.walk(tree):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "super().forward":
                    called.add("")
                elif isinstance(node, ast.Return):
                    several |= method == start and isinstance(node.value, ast.Tuple)
                path = _path(node)
                if path is None:
                    continue
                parent = parents[node]
                if isinstance(parent, ast.Call) and parent.func is node:
                    called.add(path)
                if path not in seen and callable(getattr(cls, path, None)):
                    waiting.append(path)
                owner, _, attribute = path.rpartition(".")
                if attribute == "weight" and not _only_looks(parent):
                    read.add(owner)
                elif isinstance(parent, ast.keyword) or (isinstance(parent, ast.Call) and node in parent.args):
                    read.add(path)  # handed to a function, which may take its weight or call it
                    called.add(path)
    return Uses(frozenset(read), frozenset(called), several)


def _sources(cls: type[nn.Module], method: str) -> Iterator[ast.Module]:
    """Yield the source of a method in the class and in its bases, except in torch's float layers and in ours."""
    for base in cls.__mro__:
        function = vars(base).get(method)
        known = base is Conv1D or base.__module__.partition(".")[0] in ("torch", "builtins", "cpq_hf")
        if function is None or known:
            continue
        try:
            yield ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, TypeError, SyntaxError):  # compiled, made at run time, or no function
            continue


def _path(node: ast.AST) -> str | None:
    """Return `a.0.b` for `self.a[0].b` where it is read; None for anything else."""
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        place: Any = node.attr
    elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        place = node.slice.value
    else:
        return None
    if isinstance(node.value, ast.Name):
        return str(place) if node.value.id == "self" else None
    inner = _path(node.value)
    return None if inner is None else f"{inner}.{place}"


def _only_looks(parent: ast.AST) -> bool:
    if isinstance(parent, ast.Call):
        return isinstance(parent.func, ast.Name) and parent.func.id == "isinstance"
    return isinstance(parent, ast.Attribute) and parent.attr in LOOKS


def weights_taken(module: nn.Module, method: str = "forward") -> dict[str, bool]:
    """Return the paths of the layers whose weight a method takes, and whether it calls them too.

    Methods of children that it calls are followed.
    """
    read, called, _ = uses(type(module), method)
    found = {path: not path or path in called for path in sorted(read)}
    for path in sorted(called):
        owner, _, name = path.rpartition(".")
        child = _child(module, owner)
        if child is not None and name not in child._modules and callable(getattr(type(child), name, None)):
            found |= {f"{owner}.{inner}".strip("."): calls for inner, calls in weights_taken(child, name).items()}
    return found


def _child(module: nn.Module, path: str) -> nn.Module | None:
    """Return the submodule at `path`, None where there is none."""
    child: nn.Module | None = module
    for part in path.split("."):
        child = None if child is None else child._modules.get(part)
    return child


class ShowWeights:
    """Pre-forward hook: shows quantized weights to the module that takes them, and quantizes its input if need be."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for path in self.paths:
            layer = module.get_submodule(path)
            if isinstance(layer, TrainingLayer):
                vars(layer)["weight"] = layer.quantized_weight()
        if "" not in self.paths or "" in uses(type(module)).called:
            return None
        if args:
            return (module.quantized_input(args[0]), *args[1:]), kwargs
        first = next(iter(kwargs))
        return args, kwargs | {first: module.quantized_input(kwargs[first])}


class HideWeights:
    """Forward hook, called after an error too: puts the parameters back."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __call__(self, module: nn.Module, *_: Any) -> None:
        for path in self.paths:
            vars(module.get_submodule(path)).pop("weight", None)


def show_weights(module: nn.Module, paths: list[str]) -> None:
    """Register the hooks that put on the grid what `module` takes of the layers at `paths`."""
    module.register_forward_pre_hook(ShowWeights(paths), with_kwargs=True)
    module.register_forward_hook(HideWeights(paths), always_call=True)


def hide_weights(module: nn.Module) -> None:
    """Remove the hooks of [`show_weights`]."""
    remove_forward_hooks(module, (ShowWeights, HideWeights))
