"""Trace a packed model for ONNX, with a placeholder wherever one of its packed layers computes.

Everything happens on a copy of the modules that shares the model's tensors: the model itself is never touched.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ...errors import CPQError
from ...model.inspection import packed_layers
from ...nn import PackedConv1D, PackedEmbedding, PackedLayer, PackedLinear
from .lowering import DOMAIN, opset

SUM_ERROR = 3e-7  # of a float32 sum, in parts of the largest
DynamicShapes: TypeAlias = Mapping[str, Mapping[int, str]]


def copy_of_structure(model: nn.Module) -> Any:
    """A copy whose modules can be changed; it shares every tensor with the model."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, shared).eval()
    if hasattr(getattr(copied, "config", None), "use_cache"):
        copied.config.use_cache = False  # type: ignore[union-attr]  # a config of transformers
    return copied


def disturbed_copy(model: nn.Module) -> Any:
    """A copy that disturbs each input before it is quantized, as much as float32 sums in another order would."""
    copied, generator = copy_of_structure(model), torch.Generator().manual_seed(0)

    def disturb(layer: PackedLayer) -> None:
        quantized_input = layer.quantized_input

        def disturbed(x: Tensor) -> Tensor:
            return quantized_input(x + SUM_ERROR * x.abs().max() * torch.randn(x.shape, generator=generator))

        vars(layer)["quantized_input"] = disturbed

    for _, layer in packed_layers(copied):
        if layer.spec.activation is not None:
            disturb(layer)
    return copied


def call(model: nn.Module, inputs: Mapping[str, Any], by_name: bool) -> Any:
    with torch.no_grad():
        return model(**inputs) if by_name else model(*inputs.values())


def flat_outputs(outputs: Any, name: str = "output") -> dict[str, Tensor]:
    """Every tensor of a model's output by its name: key of a dict, or `output` and its place in a tuple."""
    if isinstance(outputs, Tensor):
        return {name: outputs}
    if isinstance(outputs, Mapping):
        named = [(key if name == "output" else f"{name}_{key}", value) for key, value in outputs.items()]
    elif isinstance(outputs, (tuple, list)):
        named = [(f"{name}_{place}", value) for place, value in enumerate(outputs)]
    elif outputs is None:
        return {}
    else:
        raise CPQError(f"`{name}` of the model is a {type(outputs).__name__}, not a tensor, and has no place in ONNX")
    return {key: tensor for inner, value in named for key, tensor in flat_outputs(value, inner).items()}


def _placeholder(kind: str, layer: str, inputs: tuple[Any, ...], shape: Any) -> Tensor:
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{kind}", inputs, {"layer": layer}, dtype=torch.float32, shape=shape, version=1
    )


def _put_placeholders(layer: PackedLayer, name: str) -> None:
    """Make a layer of the copy leave placeholders in a trace where it computes with integers."""
    weight, methods = layer.spec.weight, vars(layer)  # what an instance has goes before what its class has

    def linear(x: Tensor) -> Tensor:
        rows = layer.quantized_input(x.reshape(-1, weight.columns))  # [..., in] -> [n, in]
        y = _placeholder("Linear", name, (rows, layer.bias), (rows.shape[0], weight.rows))
        return y.reshape(*x.shape[:-1], weight.rows)

    def embedding(input: Tensor) -> Tensor:
        rows = input.reshape(-1)
        y = _placeholder("Embedding", name, (rows,), (rows.shape[0], weight.columns))
        return y.reshape(*input.shape, weight.columns)

    methods["quantized_weight"] = lambda: _placeholder("Weight", name, (), weight.shape)
    if layer.spec.activation is not None:
        methods["quantized_input"] = lambda x: _placeholder("Input", name, (x,), x.shape)
    if type(layer) in (PackedLinear, PackedConv1D):  # a subclass has a forward of its own, which takes the weight
        methods["forward"] = linear
    elif type(layer) is PackedEmbedding:
        methods["forward"] = embedding


def _not_one(value: Any, names: Mapping[int, str]) -> Any:
    """The input with dimensions that may change repeated where they are 1, which a trace takes for a constant."""
    for dimension in names:
        if value.shape[dimension] == 1:
            value = torch.cat([value, value], dimension)
    return value


class _Caller(nn.Module):
    """Calls the model with inputs by their place, whatever its `forward` calls them or swallows in its `**kwargs`."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any], by_name: bool) -> None:
        super().__init__()
        self.model, self.inputs, self.by_name = model, dict(inputs), by_name

    def forward(self, *tensors: Tensor) -> Any:
        places = iter(tensors)
        inputs = {name: next(places) if isinstance(x, Tensor) else x for name, x in self.inputs.items()}
        return call(self.model, inputs, self.by_name)


def trace(
    model: nn.Module,
    layers: Mapping[str, PackedLayer],
    inputs: Mapping[str, Any],
    by_name: bool,
    shapes: DynamicShapes,
    output_names: list[str],
) -> Any:
    """The graph of a model, of which `layers` are the packed ones, as an `onnx_ir.Model`."""
    for name, layer in layers.items():
        _put_placeholders(layer, name)
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    caller = _Caller(model, inputs, by_name).eval()
    try:
        program: Any = torch.onnx.export(
            caller,
            tuple(_not_one(value, shapes.get(name, {})) for name, value in tensors.items()),
            dynamic_shapes=(tuple(dict(shapes.get(name, {})) for name in tensors),),
            input_names=list(tensors),
            output_names=output_names,
            opset_version=opset(layers),
            dynamo=True,
            verbose=False,
        )
    except Exception as error:  # torch.onnx wraps whatever the model's own code raised
        cause = error.__cause__ or error
        raise CPQError(
            f"torch cannot trace this model for ONNX: {first_line(cause)}. "
            "A size that the model fixes must not be in `dynamic_shapes`; what depends on values of tensors needs "
            "another form, or the packed checkpoint itself"
        ) from error
    for value in list(program.model.graph.initializers.values()):
        value.name = value.name.removeprefix("model.")  # what `_Caller` added
    return program.model


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep the notes of the exporters, which are for people who write exporters, off the user's screen."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def first_line(error: BaseException) -> str:
    """Return what an error says, in one line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
