"""Prove an exported folder: loaded in a process without cpq_hf, it has the same weights and gives the same outputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...errors import CPQError
from ...private_apis import attention_implementation, experts_implementation
from . import plain

IMAGE_SIDE = 224  # where a config does not say


def default_inputs(model: Any) -> dict[str, Any]:
    """A small batch of ids or pixels; `CPQError` for models that take something else."""
    if model.main_input_name == "input_ids":
        return dict(model.dummy_inputs)
    if model.main_input_name == "pixel_values":
        side = getattr(model.config, "image_size", None) or IMAGE_SIDE
        height, width = side if isinstance(side, (list, tuple)) else (side, side)
        shape = (2, getattr(model.config, "num_channels", 3), height, width)
        return {"pixel_values": torch.randn(shape, generator=torch.Generator().manual_seed(0))}
    raise CPQError(
        f"`example_inputs` is needed for a {type(model).__name__}: a dict of inputs to compare outputs on, with "
        f"`{model.main_input_name}`"
    )


def placed(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs on the device of a model, floating-point ones in its dtype."""
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        if isinstance(value, Tensor)
        else value
        for name, value in inputs.items()
    }


def run(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Return the outputs of a model for the example; `CPQError` if it cannot take it."""
    try:
        found = plain.outputs(model, inputs)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        raise CPQError(
            f"the model cannot run on `example_inputs` ({', '.join(inputs)}): {error}. Give a dict of inputs that it "
            "takes"
        ) from error
    if not found:
        raise CPQError("the model gives no floating-point tensor for `example_inputs`, so nothing can be compared")
    return found


def difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Largest difference of two models' outputs, relative to the largest number of that output."""
    if found.keys() != expected.keys():
        return float("inf")
    worst = 0.0
    for name, value in expected.items():
        a, b = found[name].double(), value.double()
        if a.shape != b.shape:
            return float("inf")
        if a.numel():
            apart = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs()).nan_to_num(nan=float("inf"))
            largest = torch.where(b.isfinite(), b, 0.0).abs().max().clamp(min=1e-30)
            worst = max(worst, float(apart.max() / largest))
    return worst


def check_reload(
    model: Any,
    folder: Path,
    scratch: Path,
    inputs: dict[str, Any],
    expected: dict[str, Tensor],
    checksums: dict[str, int],
    tolerance: float,
) -> float:
    """Load `folder` in a process that cannot import cpq_hf and compare.

    Args:
        model: The model that was exported.
        folder: What was written.
        scratch: An empty folder for the exchange.
        inputs: The example.
        expected: Outputs that it must give, within `tolerance` of the largest number of each.
        checksums: CRC-32 of every tensor that the plain model must hold, by name.
        tolerance: Largest relative difference.

    Returns:
        `float`: The difference of the outputs.

    Raises:
        CPQError: If it does not load, or loads as another model.
    """
    config = model.config
    options = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "attn_implementation": attention_implementation(config),
    }
    if experts_implementation(config):
        options["experts_implementation"] = experts_implementation(config)
    request = {
        "class": type(model).__name__,
        "model": str(folder.resolve()),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "options": options,
        "inputs": {name: value for name, value in inputs.items() if not isinstance(value, Tensor)},
    }
    tensors = {name: value.cpu().contiguous().clone() for name, value in inputs.items() if isinstance(value, Tensor)}
    save_file(tensors, scratch / "inputs.safetensors")
    try:
        (scratch / "request.json").write_text(json.dumps(request), encoding="utf-8")
    except TypeError as error:
        raise CPQError(f"`example_inputs` may hold tensors, numbers, strings and flags: {error}") from error
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-P", str(Path(plain.__file__)), str(scratch)]  # -P: not this folder's files by name
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise CPQError(
            f"plain transformers cannot load a {type(model).__name__} from compressed-tensors, so nothing was kept: "
            f"{reason}. Use cpq's own format (`save_pretrained`) or `cpq_hf.export_onnx`"
        )
    answer = json.loads((scratch / "answer.json").read_text(encoding="utf-8"))
    for kind, names in answer["problems"].items():
        if names:
            raise CPQError(
                f"plain transformers reports {kind.replace('_', ' ')} in what was exported, so it was not kept: "
                f"{', '.join(names[:5])} ({len(names)} in all)"
            )
    in_files = model.state_dict().keys()
    for name, value in checksums.items():
        if answer["checksums"].get(name) != value:
            reason = f"plain transformers reads another `{name}` than was exported, so it was not kept"
            if name not in in_files and name in dict(model.named_buffers()):
                reason += (
                    ". No file holds it, and casting a model in hand changes it: load the packed model with "
                    "`from_pretrained(..., dtype=...)` instead"
                )
            raise CPQError(reason)
    apart = difference(load_file(scratch / "outputs.safetensors"), {k: v.cpu() for k, v in expected.items()})
    if not apart <= tolerance:
        raise CPQError(
            f"in plain transformers the outputs are off by {apart:.1e} of the largest, more than {tolerance:.0e}, so "
            "the export was not kept, although all weights are equal: the model in hand computes otherwise (a hook, "
            "a replaced `forward`, a kernel)"
        )
    return apart
