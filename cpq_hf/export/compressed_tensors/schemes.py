"""The config of an export: which layers have which scheme, as compressed-tensors describes it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ...model.inspection import layer_type_name
from ...nn import PackedLayer
from ...tensor.spec import ActivationSpec
from .containers import Container

FORMAT = "pack-quantized"
EXPERT_TARGET = r"re:.*\.experts\.\d+\.\w+$"  # under any name: vLLM asks for its own, transformers for the word


def quantization_config(
    layers: Mapping[str, PackedLayer], containers: Mapping[str, Container], prefix: str, floats: Iterable[str]
) -> dict[str, Any]:
    """Return what config.json says of the quantization.

    Args:
        layers: Name -> layer of those that are stored packed.
        containers: Their containers.
        prefix: `base_model_prefix` of the model.
        floats: Names of the layers that are stored in floating point.
    """
    schemes: dict[tuple[bool, Container, ActivationSpec | None], list[str]] = {}
    for name, layer in layers.items():
        schemes.setdefault((layer_type_name(layer) == "experts", containers[name], layer.spec.activation), []).append(
            name
        )
    groups: dict[str, Any] = {}
    # experts first: transformers takes the first group with a target that has "experts" in it ("shared_experts" has)
    for (of_experts, container, activation), names in sorted(schemes.items(), key=lambda item: not item[0][0]):
        targets = [EXPERT_TARGET] if of_experts else _targets(names, prefix)
        groups[f"group_{len(groups)}"] = {
            "format": FORMAT,
            "targets": targets,
            "weights": _arguments(container.bits, "channel", container.group_size),
            "input_activations": activation and _arguments(activation.bits, "tensor", None, bool(activation.signed)),
            "output_activations": None,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(set(floats)),
    }


def _arguments(bits: int, strategy: str, group_size: int | None, symmetric: bool = True) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": strategy if group_size is None else "group",
        "group_size": group_size,
        "dynamic": False,
    }


def _targets(names: list[str], prefix: str) -> list[str]:
    """Regular expressions for these layers, in the whole model as in its base model; few, since all are tried."""
    places: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        head, number, tail = re.fullmatch(r"(.*?)(\d*)((?<=\d)\..*|)", name).groups()  # type: ignore[union-attr]
        places.setdefault((head, tail), []).append(number)
    targets = []
    for (head, tail), numbers in places.items():
        start, head = (rf"({re.escape(prefix)}\.)?", head.removeprefix(f"{prefix}.")) if prefix else ("", head)
        choice = f"({'|'.join(numbers)})" if len(numbers) > 1 else numbers[0]
        targets.append(f"re:{start}{re.escape(head)}{choice}{re.escape(tail)}$")
    return targets
