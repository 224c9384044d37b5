"""From the trace of a packed model to standard ONNX operators on integers and scales.

`trace.py` traces a model with a placeholder wherever a packed layer computes. Here each is replaced. Weights go from
their packed words into the file one by one, when it is written; they never exist as floats:

| in the model             | in the file                                                                           |
|--------------------------|---------------------------------------------------------------------------------------|
| weight of `bits` bits    | `DequantizeLinear` of an initializer in the next container: INT2, INT4 or INT8        |
| centred weight of 2 bits | odd multiples of half a step, `(2n + 1) * (alpha / 2)`, which is exact, in INT4       |
| Linear, Conv1D           | `Gemm(x, DequantizeLinear([out, in]), transB=1)`                                      |
| Conv1d, Conv2d, Conv3d   | `Conv(x, DequantizeLinear([out, in, ...]))`                                           |
| Embedding                | `DequantizeLinear(Gather(INT8 rows), Gather(scales))`: only the rows looked up        |
| input of `bits` bits     | `Clip` below 8 bits, `QuantizeLinear` to INT8 or UINT8, `DequantizeLinear`            |

Why so, as measured with ONNX Runtime 1.32 on a CPU:

* A centred weight as INT2 and an `Add` would take half the bytes. But the `Add` stands in the way of fused kernels,
  and INT2 needs opset 25. Only the lopsided grid of 2 bits is INT2; the file has opset 25 if there is one, else 21.
* Inputs have 8-bit containers whatever their width: to go through UINT4 takes five times as long. Rounding (half to
  even, of the float32 quotient) and saturation are those of `grid.nearest_levels`, to the bit.
* `DequantizeLinear([in, out])` before `MatMul` or `Gemm` is what ONNX Runtime fuses into `MatMulNBits`, which by
  default rounds its input to 8 bits: an error of 0.5 to 1 % in each layer. `[out, in]` with `transB` is not fused, so
  the file means the same in every session; `fused_matmul` writes the other form.
* `Gather` takes no 4-bit integers, and behind the `DequantizeLinear` of a table every call dequantizes all its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...nn import PackedEmbedding, PackedLayer, weight_name
from ...tensor.packing import unpack
from ...tensor.spec import WeightSpec

DOMAIN = "cpq_hf"  # of the placeholders; none is left in the file
OPSET, OPSET_WITH_INT2, IR_WITH_INT2 = 21, 25, 13  # the first with INT4, the first with INT2


def opset(layers: Mapping[str, PackedLayer]) -> int:
    """The lowest version of the operators that serves these layers."""
    return OPSET_WITH_INT2 if any(container(layer) == 2 for layer in layers.values()) else OPSET


def container(layer: PackedLayer) -> int:
    """Bits of the integers that hold the levels."""
    weight = layer.holder.spec.weight
    bits = weight.bits + (weight.grid.offset > 0)  # odd multiples take one bit more
    return next(size for size in (2, 4, 8) if bits <= size)


class Lowering:
    """Puts standard operators in the place of the placeholders of one model."""

    def __init__(self, model: Any, layers: Mapping[str, PackedLayer], fused_matmul: bool) -> None:
        self.model, self.layers, self.fused_matmul = model, layers, fused_matmul
        self.names = {id(layer): name for name, layer in layers.items()}
        embeddings = [layer.holder for layer in layers.values() if isinstance(layer, PackedEmbedding)]
        self.looked_up = {id(layer) for layer in embeddings}
        self.initializers: dict[str, Any] = {}

    def run(self) -> None:
        """Replace every placeholder, and drop the exporter's notes on the code that it saw."""
        lower = {
            "Weight": self.weight,
            "Linear": self.linear,
            "Embedding": self.embedding,
            "Input": self.input,
        }
        graph = self.model.graph
        for noted in (self.model, graph, *graph.inputs, *graph.initializers.values()):
            noted.metadata_props.clear()
        for node in list(graph):
            for noted in (node, *node.outputs):
                noted.metadata_props.clear()
            if node.domain == DOMAIN:
                self.replace(node, lower[node.op_type])
        self.model.opset_imports.pop(DOMAIN, None)
        self.model.producer_name, self.model.producer_version = "cpq_hf", None
        if self.model.opset_imports[""] == OPSET_WITH_INT2:
            self.model.ir_version = IR_WITH_INT2

    def replace(self, node: Any, lower: Callable[[Any, PackedLayer, list[Any]], Any]) -> None:
        import onnx_ir as ir

        tape = ir.tape.Tape()
        layer = self.layers[node.attributes["layer"].as_string()]
        value = lower(tape.op, layer, [value for value in node.inputs if value is not None])
        old = node.outputs[0]
        for number, made in enumerate(tape.nodes):
            made.outputs[0].name = f"{old.name}_{made.op_type}_{number}"
        value.shape, value.type, value.name = old.shape, old.type, old.name
        ir.convenience.replace_nodes_and_values(self.model.graph, node, [node], tape.nodes, [old], [value])

    def linear(self, op: Any, layer: PackedLayer, inputs: list[Any]) -> Any:
        if self.fused_matmul and id(layer.holder) not in self.looked_up:
            return op("Gemm", [inputs[0], self.dequantized(op, layer, transposed=True), *inputs[1:]])
        return op("Gemm", [inputs[0], self.dequantized(op, layer), *inputs[1:]], {"transB": 1})

    def weight(self, op: Any, layer: PackedLayer, inputs: list[Any]) -> Any:
        weight, matrix = layer.spec.weight, self.dequantized(op, layer)
        if weight.transposed:
            return op("Transpose", [matrix], {"perm": [1, 0]})
        if weight.granularity == "group" and len(weight.shape) > 2:  # groups lie across the dimensions of a kernel
            shape = self.constant(f"{self.name(layer)}.weight_shape", torch.tensor(weight.shape))
            return op("Reshape", [matrix, shape])
        return matrix

    def embedding(self, op: Any, layer: PackedLayer, inputs: list[Any]) -> Any:
        weight, (levels, scale) = layer.spec.weight, self.weight_initializers(layer)
        scale = scale if weight.granularity == "tensor" else op("Gather", [scale, inputs[0]])
        return op("DequantizeLinear", [op("Gather", [levels, inputs[0]]), scale], _axis(weight))

    def input(self, op: Any, layer: PackedLayer, inputs: list[Any]) -> Any:
        activation, name = layer.spec.activation, self.name(layer)
        assert activation is not None  # else there is no placeholder
        dtype, kind = (torch.int8, "INT8") if activation.signed else (torch.uint8, "UINT8")
        alpha, x = layer.input_scale.reshape(()), inputs[0]
        if activation.bits < 8:
            ends = activation.grid.bounds
            lo, hi = (self.constant(f"{name}.input_level_{end}", alpha * end) for end in ends)
            x = op("Clip", [x, lo, hi])
        scale = self.constant(f"{name}.input_scale", alpha)
        zero = self.constant(f"zero_{kind}", torch.zeros((), dtype=dtype))
        return op("DequantizeLinear", [op("QuantizeLinear", [x, scale, zero]), scale, zero])

    def dequantized(self, op: Any, layer: PackedLayer, transposed: bool = False) -> Any:
        """The weight as `[out, in]` or `[out, in, h, w]`, or as `[in, out]`."""
        return op(
            "DequantizeLinear", self.weight_initializers(layer, transposed), _axis(layer.spec.weight, transposed)
        )

    def weight_initializers(self, layer: PackedLayer, transposed: bool = False) -> tuple[Any, Any]:
        """Levels and scales, once for all layers that share them."""
        import onnx_ir as ir

        holder = layer.holder
        weight, name = holder.spec.weight, weight_name(self.name(holder), holder) + ("_t" if transposed else "")
        size = 8 if id(holder) in self.looked_up else container(holder)
        matrix_only = weight.transposed or weight.granularity == "group"
        shape = (weight.rows, weight.columns) if matrix_only else (weight.rows, *weight.shape[1:])
        dtype = ir.DataType[f"INT{size}"]

        def read() -> Any:
            levels = unpack(holder.weight_packed, weight.bits, weight.columns).view(shape)
            levels = levels * 2 + 1 if weight.grid.offset else levels
            return ir.Tensor((levels.T if transposed else levels).contiguous().numpy().astype(dtype.numpy()), dtype)

        scale = holder.weight_scale / 2 if weight.grid.offset else holder.weight_scale
        scale = scale.reshape({"tensor": (), "channel": (-1,), "group": scale.shape}[weight.granularity])
        scale = scale.T.contiguous() if transposed and scale.dim() == 2 else scale
        if name not in self.initializers:
            lazy = ir.LazyTensor(read, dtype, ir.Shape(shape[::-1] if transposed else shape), name=name)
            self.register(name, lazy)
        return self.initializers[name], self.constant(f"{name}_scale", scale)

    def constant(self, name: str, tensor: Tensor) -> Any:
        import onnx_ir as ir

        if name not in self.initializers:
            self.register(name, ir.tensor(tensor.numpy(), name=name))
        return self.initializers[name]

    def register(self, name: str, tensor: Any) -> None:
        import onnx_ir as ir

        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.model.graph.register_initializer(value)
        self.initializers[name] = value

    def name(self, layer: PackedLayer) -> str:
        return self.names[id(layer)]


def _axis(weight: WeightSpec, transposed: bool = False) -> dict[str, int]:
    """Return how `DequantizeLinear` finds the scale of an element."""
    if weight.group_size is not None:
        return {"axis": 0 if transposed else 1, "block_size": weight.group_size}
    return {} if weight.granularity == "tensor" else {"axis": 1 if transposed else 0}
