"""Write a packed model as one ONNX file: integers, scales and standard operators, for ONNX Runtime and its like.

The model is traced by `torch.onnx.export` with placeholders where its packed layers compute; `onnx_lowering.py` puts
operators in their place and has the table of which. The file is checked, run in ONNX Runtime and compared with the
model before it gets its name.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import CPQError
from ..nn import PackedConv1D, PackedEmbedding, PackedExpertWeight, PackedLayer, PackedLinear
from ..surgery import packed_layers, training_layers
from .onnx_lowering import DOMAIN, Lowering, opset

EXTERNAL_ABOVE = 2**31 - 2**24  # bytes of tensors; a protobuf file ends at 2 GiB
# Largest difference to the model's outputs, in parts of the largest output: float32 sums in another order; and where
# inputs are quantized, one such sum that falls on the other side of a level, and what follows from it.
TOLERANCE, TOLERANCE_WITH_ACTIVATIONS = 1e-4, 5e-2
DynamicShapes: TypeAlias = Mapping[str, Mapping[int, str]]


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Mapping[str, Any] | Tensor,
    dynamic_shapes: DynamicShapes | None = None,
    fused_matmul: bool = False,
) -> Path:
    """Write a packed model as an ONNX file that needs neither this package nor torch.

    The file is checked, run in ONNX Runtime with the example and with another batch and sequence size, and compared
    with the model before it gets its name. Weights stay integers of 2, 4 or 8 bits (3 bits are stored in 4, and 5 to 7
    in 8). Above 2 GB the tensors lie beside it, in `<path>.data`.

    Args:
        model (`nn.Module`): A packed model in float32 on the CPU. A decoder is exported without its cache.
        path (`str` or `PathLike`): File to write, as `model.onnx`.
        example_inputs (`dict` or `Tensor`): Model inputs: a dict is passed as keyword arguments, a tensor as the only
            argument. Anything in the dict that is no tensor is fixed in the file.
        dynamic_shapes (`dict`, *optional*): `{input: {dimension: name}}` of all sizes that may change. By default the
            first dimension of every input, `"batch"`, and the second of inputs of integers, `"sequence"`.
        fused_matmul (`bool`, defaults to False): Write linear layers in the form that ONNX Runtime fuses into
            `MatMulNBits`: many times faster, but inputs are rounded to 8 bits unless the session has the entry
            `session.qdq_matmulnbits_accuracy_level` set to `1` (under which the file is compared here).

    Returns:
        `Path`: The file.

    Raises:
        CPQError: If the model is not packed, has fused experts, is not float32 on the CPU, cannot be traced, or gives
            other outputs in ONNX Runtime; or a package is missing. Nothing is left behind then.

    Example:

    ```python
    >>> import tempfile, torch
    >>> from torch import nn
    >>> from cpq_hf import CPQConfig, export_onnx, pack_model, prepare_model
    >>> model = pack_model(prepare_model(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 2)), CPQConfig(weight_bits=3)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_onnx(model, f"{folder}/model.onnx", torch.randn(4, 16)).name
    'model.onnx'

    ```
    """
    _import_packages()
    path = Path(path)
    _check_model(model)
    if not path.parent.is_dir():
        raise CPQError(f"{path.parent}: no such folder; make it before exporting into it")
    inputs, by_name = _as_dict(example_inputs)
    shapes = _default_shapes(inputs) if dynamic_shapes is None else dynamic_shapes
    exported = _copy_of_structure(model)
    examples = [inputs, {name: _resized(value, shapes.get(name, {})) for name, value in inputs.items()}]
    expected = [_flat_outputs(_call(exported, example, by_name)) for example in examples]
    layers = dict(packed_layers(exported))
    with _silence():
        graph_model = _trace(exported, layers, inputs, by_name, shapes, list(expected[0]))
        Lowering(graph_model, layers, fused_matmul).run()
    tolerance = TOLERANCE_WITH_ACTIVATIONS if any(layer.spec.activation for layer in layers.values()) else TOLERANCE
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        written = _write(graph_model, Path(folder) / path.name)
        for example, outputs in zip(examples, expected, strict=True):
            _compare(written[0], example, outputs, tolerance, fused_matmul)
        for file in reversed(written):
            file.replace(path.parent / file.name)
    return path


# --- what can be exported --------------------------------------------------------------------------------------------


def _import_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnx_ir  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise CPQError(f"exporting to ONNX needs {error.name}: pip install 'cpq-hf[onnx]'") from error


def _check_model(model: nn.Module) -> None:
    if any(True for _ in training_layers(model)):
        raise CPQError("the model is not packed yet: call `cpq_hf.pack_model(model)`, then export it")
    layers = dict(packed_layers(model))
    if not layers:
        raise CPQError("the model has no packed layers; `torch.onnx.export` writes a float model")
    for name, layer in layers.items():
        if isinstance(layer, PackedExpertWeight):
            raise CPQError(
                f"`{name}` is a stacked weight of fused experts, which ONNX has no operator for: keep the packed "
                "checkpoint, or leave the experts in floating point through `modules_to_not_convert` and export that"
            )
        if layer.dtype != torch.float32:
            raise CPQError(f"`{name}` computes in {layer.dtype}; call `model.float()` before exporting to ONNX")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != "cpu":
            raise CPQError(f"`{name}` is on {tensor.device}; call `model.cpu()` before exporting to ONNX")
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise CPQError(f"`{name}` is {tensor.dtype}; call `model.float()` before exporting to ONNX")


def _as_dict(example_inputs: Mapping[str, Any] | Tensor) -> tuple[dict[str, Any], bool]:
    """Inputs by name, and whether they are passed by name."""
    if isinstance(example_inputs, Tensor):
        return {"input": example_inputs}, False
    if isinstance(example_inputs, Mapping) and any(isinstance(value, Tensor) for value in example_inputs.values()):
        return dict(example_inputs), True
    raise CPQError(
        f"`example_inputs` must be a tensor or a dict with tensors as the model takes them, got {example_inputs!r:.80}"
    )


def _default_shapes(inputs: Mapping[str, Any]) -> DynamicShapes:
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.dim()}
    whole = (torch.int64, torch.int32, torch.bool)
    return {
        name: {0: "batch", 1: "sequence"} if value.dim() > 1 and value.dtype in whole else {0: "batch"}
        for name, value in tensors.items()
    }


def _resized(value: Any, names: Mapping[int, str]) -> Any:
    """The input with one row more and one token less (or more, where there is only one)."""
    for dimension, name in names.items():
        if name == "batch" or (name == "sequence" and value.shape[dimension] == 1):
            value = torch.cat([value, value.narrow(dimension, 0, 1)], dimension)
        elif name == "sequence":
            value = value.narrow(dimension, 0, value.shape[dimension] - 1)
    return value


# --- trace -----------------------------------------------------------------------------------------------------------


def _copy_of_structure(model: nn.Module) -> Any:
    """A copy whose modules can be changed; it shares every tensor with the model."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, shared).eval()
    if hasattr(getattr(copied, "config", None), "use_cache"):
        copied.config.use_cache = False  # type: ignore[union-attr]  # a config of transformers
    return copied


def _call(model: nn.Module, inputs: Mapping[str, Any], by_name: bool) -> Any:
    with torch.no_grad():
        return model(**inputs) if by_name else model(*inputs.values())


def _flat_outputs(outputs: Any, name: str = "output") -> dict[str, Tensor]:
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
    return {key: tensor for inner, value in named for key, tensor in _flat_outputs(value, inner).items()}


def _placeholder(kind: str, layer: str, inputs: tuple[Tensor | None, ...], shape: Any) -> Tensor:
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{kind}", inputs, {"layer": layer}, dtype=torch.float32, shape=shape, version=1
    )


def _put_placeholders(layer: Any, name: str) -> None:  # Any: methods are replaced, which mypy forbids
    """Make a layer of the copy leave placeholders in a trace where it computes with integers."""
    weight = layer.spec.weight

    def linear(x: Tensor) -> Tensor:
        rows = layer.quantized_input(x.reshape(-1, weight.columns))  # [..., in] -> [n, in]
        y = _placeholder("Linear", name, (rows, layer.bias), (rows.shape[0], weight.rows))
        return y.reshape(*x.shape[:-1], weight.rows)

    def embedding(input: Tensor) -> Tensor:
        rows = input.reshape(-1)
        return _placeholder("Embedding", name, (rows,), (rows.shape[0], weight.columns)).reshape(
            *input.shape, weight.columns
        )

    layer.quantized_weight = lambda: _placeholder("Weight", name, (), weight.shape)
    if layer.spec.activation is not None:
        layer.quantized_input = lambda x: _placeholder("Input", name, (x,), x.shape)
    if isinstance(layer, (PackedLinear, PackedConv1D)):
        layer.forward = linear
    elif isinstance(layer, PackedEmbedding):
        layer.forward = embedding


def _trace(
    model: nn.Module,
    layers: Mapping[str, PackedLayer],
    inputs: Mapping[str, Any],
    by_name: bool,
    shapes: DynamicShapes,
    output_names: list[str],
) -> Any:
    for name, layer in layers.items():
        _put_placeholders(layer, name)
    # a size of 1 would be taken for a constant
    inputs = {
        name: value.repeat(
            [2 if size == 1 and place in shapes.get(name, {}) else 1 for place, size in enumerate(value.shape)]
        )
        if isinstance(value, Tensor)
        else value
        for name, value in inputs.items()
    }
    named = {name: dict(shapes.get(name, {})) or None for name in inputs}
    try:
        return torch.onnx.export(
            model,
            () if by_name else tuple(inputs.values()),
            kwargs=dict(inputs) if by_name else None,
            dynamic_shapes=named if by_name else tuple(named.values()),
            output_names=output_names,
            opset_version=opset(layers),
            dynamo=True,
            verbose=False,
        ).model
    except Exception as error:  # torch.onnx wraps whatever the model's own code raised
        cause = error.__cause__ or error
        raise CPQError(
            f"torch cannot trace this model for ONNX: {type(cause).__name__}: {str(cause).strip().splitlines()[0]}. "
            "A size that the model fixes must not be in `dynamic_shapes`; what depends on values of tensors needs "
            "another form, or the packed checkpoint itself"
        ) from error


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep the notes of the exporters, which are for people who write exporters, off the user's screen."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# --- write and compare -----------------------------------------------------------------------------------------------


def _write(model: Any, path: Path) -> list[Path]:
    """Write and check; the file, and that of its tensors where they need one."""
    import onnx
    import onnx_ir as ir

    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    data = f"{path.name}.data" if size > EXTERNAL_ABOVE else None
    ir.save(model, path, external_data=data)
    onnx.checker.check_model(path, full_check=True)
    return [path] if data is None else [path, path.with_name(data)]


def _compare(
    file: Path, inputs: Mapping[str, Any], expected: Mapping[str, Tensor], tolerance: float, fused_matmul: bool
) -> None:
    """Raise unless ONNX Runtime gives the outputs of the model."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if fused_matmul:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
    feeds = {item.name: tensor.numpy() for item, tensor in zip(session.get_inputs(), tensors, strict=True)}
    outputs = session.run(list(expected), feeds)
    for (name, want), output in zip(expected.items(), outputs, strict=True):
        difference = (torch.from_numpy(output).double() - want.double()).abs().max() / want.abs().max().clamp(min=1e-6)
        if not difference <= tolerance:
            shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors)
            raise CPQError(
                f"for inputs of shape {shapes} the output `{name}` in ONNX Runtime differs from the model's by "
                f"{difference:.1e} of its largest value, more than {tolerance:.0e}: the model computes something that "
                "its trace fixed (give `dynamic_shapes` with the sizes that may change), or the runtime has a fault"
            )
