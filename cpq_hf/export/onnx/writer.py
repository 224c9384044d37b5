"""Write a packed model as one ONNX file: integers, scales and standard operators, for ONNX Runtime and its like.

The model is traced by `torch.onnx.export` with placeholders where its packed layers compute; `lowering.py` puts
operators in their place and has the table of which. The file is checked, run in ONNX Runtime and compared with the
model before it gets its name.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CPQError
from ...model.inspection import packed_layers, training_layers
from ...nn import PackedExpertWeight
from ...version import how_to_install
from .lowering import Lowering
from .trace import DynamicShapes, call, copy_of_structure, disturbed_copy, first_line, flat_outputs, silence, trace

EXTERNAL_ABOVE = 2**31 - 2**24  # bytes of tensors; a protobuf file ends at 2 GiB
# Largest difference to the model's outputs, in parts of the largest output. Sums of float32 in another order give the
# first. Where inputs are quantized, such a sum now and then falls on the other side of a level. What follows from that
# depends on the model: it may be the second, or so many times what the model's own inputs, disturbed as by other sums,
# make of its outputs.
TOLERANCE, TOLERANCE_OF_LEVELS, TIMES_DISTURBED = 1e-4, 5e-2, 4.0
SMALLEST = 1e-6  # outputs below are zero


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
            first dimension of every input, `"batch"`, and the second of inputs of integers, `"sequence"`. A tensor
            by itself is called `"input"`.
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
    if unknown := sorted(set(shapes) - set(inputs)):
        raise CPQError(f"`dynamic_shapes` names {unknown[0]!r}, which is no input; there are {', '.join(inputs)}")
    exported = copy_of_structure(model)
    examples = [inputs, {name: _resized(value, shapes.get(name, {})) for name, value in inputs.items()}]
    expected = [flat_outputs(call(exported, example, by_name)) for example in examples]
    tolerance = _tolerance(model, inputs, by_name, expected[0])
    layers = dict(packed_layers(exported))
    with silence():
        graph_model = trace(exported, layers, inputs, by_name, shapes, list(expected[0]))
        Lowering(graph_model, layers, fused_matmul).run()
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
        raise CPQError(f"exporting to ONNX needs {error.name}: {how_to_install('onnx')}") from error


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


# --- write and compare -----------------------------------------------------------------------------------------------


def _write(model: Any, path: Path) -> list[Path]:
    """Write and check; the file, and that of its tensors where they need one."""
    import onnx
    import onnx_ir as ir

    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    data = f"{path.name}.data" if size > EXTERNAL_ABOVE else None
    ir.save(model, path, external_data=data)
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise CPQError(
            f"the trace of this model is not valid ONNX: {first_line(error)}. Packed layers inside of control flow "
            "(`torch.cond`) are not supported; the packed checkpoint is"
        ) from error
    return [path] if data is None else [path, path.with_name(data)]


def _tolerance(model: nn.Module, inputs: Mapping[str, Any], by_name: bool, expected: Mapping[str, Tensor]) -> float:
    """Return how far the outputs of the file may be from the model's."""
    if not any(layer.spec.activation for _, layer in packed_layers(model)):
        return TOLERANCE
    outputs = flat_outputs(call(disturbed_copy(model), inputs, by_name))
    return max(
        TOLERANCE_OF_LEVELS, *(TIMES_DISTURBED * _difference(outputs[name], expected[name]) for name in expected)
    )


def _difference(got: Tensor, want: Tensor) -> float:
    largest = want.double().abs().max().clamp(min=SMALLEST)
    return float((got.double() - want.double()).abs().max() / largest)


def _compare(
    file: Path, inputs: Mapping[str, Any], expected: Mapping[str, Tensor], tolerance: float, fused_matmul: bool
) -> None:
    """Raise unless ONNX Runtime gives the outputs of the model."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if fused_matmul:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    tensors = {name: value.numpy() for name, value in inputs.items() if isinstance(value, Tensor)}
    try:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        outputs = session.run(list(expected), tensors)
    except Exception as error:  # the runtime has an exception for each of its states, with no base of their own
        raise CPQError(
            f"onnxruntime {onnxruntime.__version__} does not run the exported model: {first_line(error)}"
        ) from error
    for (name, want), output in zip(expected.items(), outputs, strict=True):
        shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors.values())
        where = f"for inputs of shape {shapes} the output `{name}` in ONNX Runtime"
        if output.shape != tuple(want.shape):
            raise CPQError(f"{where} has shape {list(output.shape)}, the model's {list(want.shape)}; {_FIXED}")
        difference = _difference(torch.from_numpy(output), want)
        if not difference <= tolerance:
            raise CPQError(
                f"{where} differs from the model's by {difference:.1e} of its largest value, more than "
                f"{tolerance:.0e}; {_FIXED}"
            )


_FIXED = "a trace fixes what depends on sizes or values in Python: export with inputs like those it will get"
