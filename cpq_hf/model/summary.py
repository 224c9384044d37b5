"""Summary of a prepared or packed model: bit-widths, coverage, sizes and cluster distance, per layer."""

from __future__ import annotations

import os
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CPQError
from ..nn import TrainingLayer
from ..tensor.kernels.fake_quantize import kernel_name
from ..tensor.packing import words_per_row
from ..tensor.spec import MAX_BITS, LayerSpec
from .inspection import (
    layer_type_name,
    packed_layers,
    quantized_parameter_names,
    quantizer_parameter_names,
    quantizers,
    training_layers,
)


@dataclass(frozen=True)
class LayerReport:
    """Holds what is known of one quantized layer.

    `cluster_distance` is the mean distance of its weights to the grid, in step sizes; None once packed, when it would
    be 0. A layer whose weight is tied to another's counts no weights and no bytes.
    """

    name: str
    kind: str
    spec: LayerSpec
    cluster_distance: float | None

    @property
    def numel(self) -> int:
        """Return the number of weights that this layer holds."""
        return 0 if self.spec.tied_to else self.spec.weight.numel

    @property
    def packed_bytes(self) -> int:
        """Return the bytes of words and scales."""
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
    """Holds what [`summarize`] found: prints as a table, `.to_dict()` for programs, `.plot(path)` for a picture."""

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
        """Return the mean bit-width of the quantized weights."""
        bits = sum(layer.numel * layer.spec.weight.bits for layer in self.layers)
        return bits / max(1, self.quantized_elements)

    @property
    def mean_bits_all(self) -> float:
        """Return the mean bit-width of all parameters, those in floating point included."""
        rest = sum(8 * count * size for count, size in self.float_parameters.values())
        return (self.mean_bits * self.quantized_elements + rest) / max(1, self.all_elements)

    @property
    def cluster_distance(self) -> float | None:
        """Return the mean distance of all quantized weights to the grid, in step sizes; None once packed."""
        pairs = [(layer.cluster_distance, layer.numel) for layer in self.layers]
        if not pairs or any(distance is None for distance, _ in pairs):
            return None
        return sum((distance or 0.0) * count for distance, count in pairs) / self.quantized_elements

    @property
    def packed_bytes(self) -> int:
        """Return the bytes of the packed model: words, scales and what stays in floating point."""
        rest = sum(count * size for count, size in self.float_parameters.values())
        return rest + sum(layer.packed_bytes for layer in self.layers)

    @property
    def float_bytes(self) -> int:
        """Return the bytes of the model in float32."""
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
            "kernel": kernel_name(self.device_type),
        }

    def __str__(self) -> str:
        return self.table()

    def table(self, width: int | None = None) -> str:
        """Lay out the layers as a table, one line per layer, with the totals below it.

        Args:
            width (`int`, *optional*): Columns of a terminal, about 60 at least. Long names and shapes then lose their
                beginning, which layers have in common, and the totals are wrapped. None for lines of any length.
        """
        columns = self._columns()
        sizes = _column_widths(columns, width)
        header, *rows = zip(*(columns[name] for name in sizes), strict=True)
        lines = [
            "  ".join(_cut(cell, size).ljust(size) for cell, size in zip(row, sizes.values(), strict=True)).rstrip()
            for row in (header, *rows)
        ]
        return "\n".join([*lines, "", *(_wrap(line, width) for line in self._totals())])

    def _columns(self) -> dict[str, list[str]]:
        """Return the cells of the table, per column from its header down."""
        columns: dict[str, list[str]] = {
            name: [name] for name in ("layer", "kind", "bits", "act", "granularity", "shape", "distance")
        }
        for layer in self.layers:
            weight, activation, distance = layer.spec.weight, layer.spec.activation, layer.cluster_distance
            columns["layer"].append(layer.name)
            columns["kind"].append(layer.kind)
            columns["bits"].append(str(weight.bits))
            columns["act"].append("-" if activation is None else str(activation.bits))
            columns["granularity"].append(weight.granularity + (f" {weight.group_size}" if weight.group_size else ""))
            columns["shape"].append(
                f"= {layer.spec.tied_to}" if layer.spec.tied_to else "x".join(map(str, weight.shape))
            )
            columns["distance"].append("-" if distance is None else f"{distance:.3f}")
        if all(layer.cluster_distance is None for layer in self.layers):  # packed, or no layers at all
            del columns["distance"]
        return columns

    def _totals(self) -> list[str]:
        share = self.quantized_elements / max(1, self.all_elements)
        totals = [
            f"{self.quantized_elements:,} of {self.all_elements:,} weights quantized ({share:.1%}), "
            f"mean {self.mean_bits:.2f} bits ({self.mean_bits_all:.2f} over all), "
            f"packed {readable_size(self.packed_bytes)} of {readable_size(self.float_bytes)}"
        ]
        if self.float_layers:
            names = ", ".join(f"{name} ({kind})" for name, kind in self.float_layers.items())
            totals.append(f"in floating point: {names}")
        return totals

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw a bar per layer, as tall as its bit-width, and write the picture to `path`.

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
        axes.set_title(f"Bits per layer: mean {self.mean_bits:.2f} over the quantized weights (red)", fontsize=10)
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
        `packed_bytes`, `float_bytes` and more; `.plot(path)` draws bits per layer (matplotlib).

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
        LayerReport(name, layer_type_name(layer), layer.layer_spec(), _distance(layer))
        for name, layer in quantized.items()
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


def _column_widths(columns: dict[str, list[str]], width: int | None) -> dict[str, int]:
    """Return the width of each column that is shown, in characters: its longest cell, or less to fit into `width`."""
    sizes = {name: max(map(len, cells)) for name, cells in columns.items()}

    def excess() -> int:
        return sum(sizes.values()) + 2 * (len(sizes) - 1) - (width or 0)

    if width is None or excess() <= 0:
        return sizes
    sizes["shape"] = min(sizes["shape"], 13)  # as long as 2048x1024x3x3; the name that a tied layer shows is longer
    if excess() > sizes["layer"] - 16:  # on a narrow terminal the names matter more than the distance to the grid
        sizes.pop("distance", None)
    sizes["layer"] = max(8, min(sizes["layer"], sizes["layer"] - excess()))
    return sizes


def _cut(text: str, size: int) -> str:
    return text if len(text) <= size else "…" + text[len(text) - size + 1 :]


def _wrap(text: str, width: int | None) -> str:
    return text if width is None else textwrap.fill(text, max(20, width))


def readable_size(count: int) -> str:
    """Return a number of bytes as text, in a unit that leaves few digits."""
    value = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.1f} {unit}" if unit != "B" else f"{count} B"
