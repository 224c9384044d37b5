"""Read a prepared or packed model and report: bits, coverage, sizes and cluster distance by layer."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import kernels
from .contents import (
    layer_kind,
    packed_layers,
    quantized_parameter_names,
    quantizer_parameter_names,
    quantizers,
    training_layers,
)
from .errors import CPQError
from .nn import TrainingLayer
from .packing import words_per_row
from .spec import MAX_BITS, LayerSpec


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer. `cluster_distance` is None once packed (and would be 0).

    A layer whose weight is tied to another's counts nothing of it.
    """

    name: str
    kind: str
    spec: LayerSpec
    cluster_distance: float | None

    @property
    def numel(self) -> int:
        """Weights that this layer holds."""
        return 0 if self.spec.tied_to else self.spec.weight.numel

    @property
    def packed_bytes(self) -> int:
        """Bytes of words and scales."""
        if self.spec.tied_to:
            return 0
        weight = self.spec.weight
        scales = torch.Size(weight.scale_shape).numel()
        return 4 * (weight.rows * words_per_row(weight.columns, weight.bits) + scales)

    def to_dict(self) -> dict[str, Any]:
        weight, activation = self.spec.weight, self.spec.activation
        return {
            "kind": self.kind,
            "bits": weight.bits,
            "activation_bits": None if activation is None else activation.bits,
            "granularity": weight.granularity,
            "group_size": weight.group_size,
            "shape": list(weight.shape),
            "cluster_distance": self.cluster_distance,
            "tied_to": self.spec.tied_to,
        }


@dataclass(frozen=True)
class Summary:
    """What [`summarize`] found: prints as a table, `.to_dict()` for programs, `.plot(path)` for eyes."""

    layers: tuple[LayerReport, ...]
    float_parameters: dict[str, tuple[int, int]]  # parameters left in floating point: name -> (elements, bytes each)
    float_layers: dict[str, str]  # layers that hold a matrix and are left in floating point: name -> class
    device_type: str  # where the quantized weights are

    @property
    def quantized_elements(self) -> int:
        return sum(layer.numel for layer in self.layers)

    @property
    def all_elements(self) -> int:
        return self.quantized_elements + sum(count for count, _ in self.float_parameters.values())

    @property
    def mean_bits(self) -> float:
        """Mean bit-width of the quantized weights."""
        bits = sum(layer.numel * layer.spec.weight.bits for layer in self.layers)
        return bits / max(1, self.quantized_elements)

    @property
    def mean_bits_all(self) -> float:
        """Mean bit-width of all parameters, those in floating point included."""
        rest = sum(8 * count * size for count, size in self.float_parameters.values())
        return (self.mean_bits * self.quantized_elements + rest) / max(1, self.all_elements)

    @property
    def cluster_distance(self) -> float | None:
        """Mean over all quantized weights of the distance to the grid, in steps; None once packed."""
        pairs = [(layer.cluster_distance, layer.numel) for layer in self.layers]
        if not pairs or any(distance is None for distance, _ in pairs):
            return None
        return sum((distance or 0.0) * count for distance, count in pairs) / self.quantized_elements

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed model: words, scales and what stays in floating point."""
        rest = sum(count * size for count, size in self.float_parameters.values())
        return rest + sum(layer.packed_bytes for layer in self.layers)

    @property
    def float_bytes(self) -> int:
        """Bytes of the model in float32."""
        return 4 * self.all_elements

    def to_dict(self) -> dict[str, Any]:
        return {
            "mean_bits": self.mean_bits,
            "mean_bits_all": self.mean_bits_all,
            "coverage": self.quantized_elements / max(1, self.all_elements),
            "quantized_elements": self.quantized_elements,
            "all_elements": self.all_elements,
            "cluster_distance": self.cluster_distance,
            "packed_bytes": self.packed_bytes,
            "float_bytes": self.float_bytes,
            "layers": {layer.name: layer.to_dict() for layer in self.layers},
            "not_quantized": dict(self.float_layers),
            "kernel": kernels.name(self.device_type),
        }

    def __str__(self) -> str:
        rows = [("layer", "kind", "bits", "act", "granularity", "shape", "distance")]
        for layer in self.layers:
            cells = layer.to_dict()
            group = f" {cells['group_size']}" if cells["group_size"] else ""
            distance = layer.cluster_distance
            rows.append(
                (
                    layer.name,
                    layer.kind,
                    str(cells["bits"]),
                    str(cells["activation_bits"] or "-"),
                    cells["granularity"] + group,
                    f"= {cells['tied_to']}" if cells["tied_to"] else "x".join(map(str, cells["shape"])),
                    "-" if distance is None else f"{distance:.3f}",
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        lines.append(
            f"{self.quantized_elements:,} of {self.all_elements:,} weights quantized "
            f"({self.quantized_elements / max(1, self.all_elements):.1%}), mean {self.mean_bits:.2f} bits "
            f"({self.mean_bits_all:.2f} over all), packed {readable_size(self.packed_bytes)} "
            f"of {readable_size(self.float_bytes)}"
        )
        if self.float_layers:
            lines.append(
                "in floating point: " + ", ".join(f"{name} ({kind})" for name, kind in self.float_layers.items())
            )
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw bits by layer, bars as tall as the bit-width, and write the picture to `path`.

        Raises:
            CPQError: If matplotlib is not installed, or there is nothing to draw.
        """
        if not self.layers:
            raise CPQError("the model has no quantized layers to plot")
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise CPQError("plotting needs matplotlib: pip install matplotlib") from error
        count = len(self.layers)
        longest = max(len(layer.name) for layer in self.layers)
        size = (max(6.0, min(40.0, 0.28 * count + 2)), max(4.5, 2.5 + 0.06 * longest))  # inches; 0.06 for a letter
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.bar(range(count), [layer.spec.weight.bits for layer in self.layers], color="#3465a4")
        axes.axhline(self.mean_bits, color="#cc0000", linewidth=1)
        axes.set_title(f"Bits by layer: mean {self.mean_bits:.2f} over the quantized weights (red)", fontsize=10)
        axes.set_ylim(0, MAX_BITS + 0.5)
        axes.set_yticks(range(MAX_BITS + 1))
        axes.set_xticks(range(count), [layer.name for layer in self.layers], rotation=90, fontsize=7)
        axes.set_ylabel("bits")
        figure.savefig(path, dpi=150)
        return Path(path)


def summarize(model: nn.Module) -> Summary:
    """Report what is quantized in a prepared or packed model, and what is not.

    Args:
        model (`nn.Module`): Any model; a float one gives an empty report.

    Returns:
        `Summary`: Prints as a table. `.to_dict()` has `mean_bits`, `mean_bits_all`, `coverage`, `layers`,
        `packed_bytes`, `float_bytes` and more; `.plot(path)` draws bits by layer (matplotlib).

    Example:

    ```python
    >>> from torch import nn
    >>> from cpq_hf import CPQConfig, prepare_model, summarize
    >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> summarize(prepare_model(model, CPQConfig(weight_bits=2))).to_dict()["mean_bits"]
    2.0

    ```
    """
    trained = dict(training_layers(model))
    quantized = trained | dict(packed_layers(model))
    reports = tuple(
        LayerReport(name, layer_kind(layer), layer.layer_spec(), _distance(layer)) for name, layer in quantized.items()
    )
    ours = quantizer_parameter_names(model) | quantized_parameter_names(model)
    parameters = {
        name: (parameter.numel(), parameter.element_size())
        for name, parameter in model.named_parameters()
        if name not in ours
    }
    of_quantizers = {name for name, _ in quantizers(model)}
    floats = {
        name: type(module).__name__
        for name, module in model.named_modules()
        if name not in quantized
        and name not in of_quantizers
        and any(p.dim() >= 2 and f"{name}.{key}" not in ours for key, p in module.named_parameters(recurse=False))
    }
    tensors = (
        tensor for module in (*quantized.values(), model) for tensor in (*module.parameters(), *module.buffers())
    )
    device_type = next((tensor.device.type for tensor in tensors), "cpu")
    return Summary(reports, parameters, floats, device_type)


def _distance(layer: nn.Module) -> float | None:
    if not isinstance(layer, TrainingLayer):
        return None
    return float(layer.weight_quantizer.cluster_distance(layer.weight))


def readable_size(count: int) -> str:
    """Bytes in a unit that leaves few digits."""
    value = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.1f} {unit}" if unit != "B" else f"{count} B"
