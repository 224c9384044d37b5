"""Everything of torch that the package uses without a promise that it stays.

One function or constant per borrowed name; its docstring names the line of torch that it relies on, and
tests/hf/test_private_apis.py has a test per name. Other files use no private attribute of torch, except those of
`EXTENSION_POINTS`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

# Names that subclasses and converters of `nn.Module` use everywhere in the field (torch.nn.utils.parametrize,
# torch.ao.quantization, accelerate, peft, bitsandbytes). A function around each would hide what a line does, and they
# stand in hot paths, so they are used under their own names.
EXTENSION_POINTS = {
    "_parameters": "`nn.Module.__getattr__` reads it; an entry is replaced where `setattr` would refuse a tensor",
    "_modules": "`nn.Module.add_module` writes it; read for children without the walk of `named_children`",
    "_buffers": "`nn.Module.register_buffer` writes it; read for the buffers of one layer",
    "_apply": "`nn.Module.to`, `.float` and `.cuda` call it: overridden to keep scales in float32",
    "_load_from_state_dict": "`nn.Module.load_state_dict` calls it per module: overridden to forget cached values",
    "_conv_forward": "`nn.Conv2d.forward` calls it with a weight and a bias: called with the quantized weight",
}

OutProjection = NonDynamicallyQuantizableLinear
"""The class of `out_proj`: "self.out_proj = NonDynamicallyQuantizableLinear(" in `nn.MultiheadAttention.__init__`."""

# Kernels over lists of tensors, which torch.optim uses ("torch._foreach_add_" in torch/optim/adam.py): one launch for
# all quantizers where a loop would have one per quantizer. No public name gives them.
foreach_add_ = torch._foreach_add_
foreach_copy_ = torch._foreach_copy_
foreach_norm = torch._foreach_norm
foreach_zero_ = torch._foreach_zero_


def saved_tensors_are_watched() -> bool:
    """Return whether default hooks on what autograd keeps are in place, which hooks of ours would hide.

    `torch.autograd.graph.saved_tensors_hooks.__enter__` calls "torch._C._autograd._push_saved_tensors_default_hooks(".
    """
    ask = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return ask is None or ask(True) is not None


def is_compiled(module: nn.Module) -> bool:
    """Return whether a module was compiled: `torch.compile(module)` wraps it, `module.compile()` works in place.

    "self._orig_mod = mod" in `torch._dynamo.eval_frame.OptimizedModule`, and "self._compiled_call_impl =" in
    `nn.Module.compile`.
    """
    return hasattr(module, "_orig_mod") or vars(module).get("_compiled_call_impl") is not None


def uncompiled(module: nn.Module) -> nn.Module:
    """Return the module inside of the wrapper that `torch.compile` made, or the module itself.

    "self._orig_mod = mod" in `torch._dynamo.eval_frame.OptimizedModule`.
    """
    inner = vars(module).get("_modules", {}).get("_orig_mod")
    return module if inner is None else inner


def has_unsaved_buffers(module: nn.Module) -> bool:
    """Return whether a module itself has buffers that its state dict leaves out.

    "self._non_persistent_buffers_set.add(name)" in `nn.Module.register_buffer`.
    """
    return bool(module._non_persistent_buffers_set)


def has_one_projection(attention: nn.Module) -> bool:
    """Return whether query, key and value of an attention are projected by one weight, `in_proj_weight`.

    "if not self._qkv_same_embed_dim:" in `nn.MultiheadAttention.forward`.
    """
    return bool(attention._qkv_same_embed_dim)


def remove_forward_hooks(module: nn.Module, kinds: type | tuple[type, ...]) -> None:
    """Remove the forward hooks and forward pre-hooks of these classes, whose handles are not at hand.

    "self._forward_hooks[handle.id] = hook" in `nn.Module.register_forward_hook`, and beside it
    `_forward_hooks_always_called`; the same for `_forward_pre_hooks` and `_forward_pre_hooks_with_kwargs`.
    """
    hooks: list[dict[int, Any]] = [module._forward_pre_hooks, module._forward_hooks]
    for registered in hooks:
        for key in [key for key, hook in registered.items() if isinstance(hook, kinds)]:
            del registered[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_always_called.pop(key, None)
