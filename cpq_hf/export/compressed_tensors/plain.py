"""The other side of an export's check: a program that loads a folder as someone without cpq_hf does.

Run by path, with a folder that holds `request.json` (the class, where the model is, how to run it) and
`inputs.safetensors`; leaves `outputs.safetensors` there, and `answer.json` with the CRC-32 of every tensor it loaded.
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor


def checksum(tensor: Tensor) -> int:
    """CRC-32 of the bytes of a tensor."""
    data = tensor.detach().cpu().contiguous().flatten()
    return zlib.crc32(data.view(torch.uint8).numpy().data) if data.numel() else 0


def outputs(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Every tensor of floating-point numbers that a model gives back by name."""
    with torch.no_grad():
        found = model(**inputs)
    return {
        name: value.cpu().contiguous().clone()
        for name, value in found.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }


def checksums(model: Any) -> dict[str, int]:
    """CRC-32 of all parameters and buffers, those included that no file holds."""
    return {name: checksum(tensor) for name, tensor in (model.state_dict() | dict(model.named_buffers())).items()}


def main(folder: Path) -> None:
    sys.modules["cpq_hf"] = None  # type: ignore[assignment]  # importing it is an ImportError from here on
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    torch.set_num_threads(request["threads"])
    torch.set_float32_matmul_precision(request["matmul_precision"])
    model_class = getattr(transformers, request["class"])
    model, info = model_class.from_pretrained(request["model"], output_loading_info=True, **request["options"])
    model.to(request["device"]).eval()
    tensors = load_file(folder / "inputs.safetensors", device=request["device"])
    save_file(outputs(model, tensors | request["inputs"]), folder / "outputs.safetensors")
    answer = {
        "problems": {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys")},
        "checksums": checksums(model),
    }
    (folder / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
