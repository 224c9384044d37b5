"""ONNX: from integers, ONNX Runtime computes what the packed model does, in a session as anyone opens it."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from models import build, inputs, logits
from torch import Tensor, nn

import cpq_hf.export.onnx.writer as writer
from cpq_hf import CPQConfig, CPQError, calibrate_model, export_onnx, pack_model, prepare_model

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
INTEGERS = ("INT2", "INT4", "INT8")


def run(path: Path, inputs: dict[str, Tensor], ops: list | None = None, **entries: str) -> list[Tensor]:
    """Outputs in a session with default settings, and its operators after optimization."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns that the optimized graph is for this machine
    if ops is not None:
        options.optimized_model_filepath = str(path.with_suffix(".optimized"))
    for key, value in entries.items():
        options.add_session_config_entry(f"session.{key}", value)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    if ops is not None:
        ops += [node.op_type for node in onnx.load(path.with_suffix(".optimized")).graph.node]
    return [torch.from_numpy(output) for output in session.run(None, {k: v.numpy() for k, v in inputs.items()})]


def containers(path: Path) -> dict[str, str]:
    """Type of every initializer with more than one dimension."""
    kinds = {item.name: item for item in onnx.load(path, load_external_data=False).graph.initializer}
    return {name: onnx.TensorProto.DataType.Name(i.data_type) for name, i in kinds.items() if len(i.dims) > 1}


def packed(model: nn.Module, batch, **settings) -> nn.Module:
    model = prepare_model(model, CPQConfig(**settings))
    calibrate_model(model, [batch])
    return pack_model(model)


def assert_close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    """float32 sums in another order."""
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * want.abs().max()


def assert_close_in_most(got: Tensor, want: Tensor) -> None:
    """As above; but of inputs a sum may have fallen on the other side of a level, which shows in that sample."""
    assert_close(got, want, 5e-2)
    assert (got - want).abs().median() <= 1e-5 * want.abs().max()


SETTINGS = {
    "bert": {"weight_bits": 3, "quantize_embeddings": True},
    "resnet": {"weight_bits": 2, "activation_bits": 4},
    "llama-tied": {"weight_bits": 4, "granularity": "group", "group_size": 16, "quantize_embeddings": True},
}
SLOW_SETTINGS = {
    "bert-mlm": {"weight_bits": 5, "activation_bits": 8, "quantize_embeddings": True},
    "gpt2": {"weight_bits": 4, "activation_bits": 3, "quantize_embeddings": True},
    "llama": {"weight_bits": 2, "granularity": "group", "group_size": 16, "activation_bits": 8},
    "vit": {"weight_bits": 4, "granularity": "tensor", "activation_bits": 6},
    "mobilenet-v2": {"weight_bits": 8, "activation_bits": 8},
    "convnext": {"weight_bits": 2, "centered": False, "activation_bits": 2},
}


@pytest.mark.parametrize("name", [*SETTINGS, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW_SETTINGS)])
def test_models(name, tmp_path):
    model, batch, settings = build(name), inputs(name), (SETTINGS | SLOW_SETTINGS)[name]
    del batch["labels"]
    if name == "mobilenet-v2":  # so deep that without statistics nothing is left of its input
        model.train()(**batch)
    model = packed(model.eval(), batch, **settings)
    if name == "bert":  # in another order than in `forward`, and with something that is no tensor
        mask = torch.ones_like(batch["input_ids"])
        mask[0, 4:] = 0
        batch = {"attention_mask": mask, "input_ids": batch["input_ids"], "return_dict": True}
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    attributes = [sorted(vars(module)) for module in model.modules()]
    before = logits(model, batch)

    path = export_onnx(model, tmp_path / "model.onnx", batch)

    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert attributes == [sorted(vars(module)) for module in model.modules()]
    assert torch.equal(logits(model, batch), before)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())

    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
    close = assert_close_in_most if "activation_bits" in settings else assert_close
    close(run(path, tensors)[0], before)
    shorter = {k: v[:3, :4] if v.dtype == torch.int64 else v[:3] for k, v in tensors.items()}
    close(run(path, shorter)[0], logits(model, shorter))

    stored = containers(path)
    layers = {key.removesuffix("_packed") for key in state if key.endswith("weight_packed")}
    assert {key for key in stored if stored[key] in INTEGERS and key.endswith(".weight")} == layers
    assert b"pkg.torch" not in path.read_bytes()  # notes of the exporter on the code it saw


def test_attention_of_torch(tmp_path):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, norm_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = nn.Linear(16, 3)

        def forward(self, x):
            return self.head(self.encoder(x))

    x = torch.randn(3, 5, 16)
    model = packed(Encoder(), x, weight_bits=4, activation_bits=8)
    path = export_onnx(model, tmp_path / "model.onnx", {"x": x})
    assert_close_in_most(run(path, {"x": x})[0], model(x))
    stored = containers(path)
    names = [
        f"encoder.layers.{i}.self_attn.{name}" for i in range(2) for name in ("in_proj_weight", "out_proj.weight")
    ]
    assert {stored[name] for name in names} == {"INT4"}


def test_shared_weight_is_stored_once(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(40, 32), nn.Linear(32, 40, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids):
            return self.head(self.embedding(ids))

    ids = torch.randint(40, (2, 5))
    model = packed(Tied(), {"ids": ids}, weight_bits=4, quantize_embeddings=True, modules_to_not_convert=[])
    path = export_onnx(model, tmp_path / "tied.onnx", {"ids": ids})
    assert containers(path) == {"embedding.weight": "INT8"}
    assert_close(run(path, {"ids": ids})[0], model(ids))


class Widths(nn.Module):
    """Layers of every kind and width beside each other."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.ModuleDict({f"bits{bits}": nn.Linear(32, 16) for bits in range(2, 9)})
        self.conv = nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect", groups=2)

    def forward(self, input: Tensor) -> Tensor:
        x = self.conv(input.view(-1, 4, 2, 4)).flatten(1)[:, :32]
        return torch.cat([layer(x) for layer in self.linear.values()], -1)


@pytest.mark.parametrize("centered", [True, False], ids=["centered", "lopsided"])
@pytest.mark.parametrize("granularity", ["channel", "tensor", "group"])
def test_widths(granularity, centered, tmp_path):
    overrides = {f"linear.bits{bits}": {"weight_bits": bits} for bits in range(2, 9)}
    overrides |= {"conv": {"weight_bits": 2, "group_size": 9}}
    x = torch.randn(3, 32)
    settings = {"granularity": granularity, "group_size": 16, "centered": centered}
    model = packed(Widths(), x, overrides=overrides, modules_to_not_convert=[], **settings)
    path = export_onnx(model, tmp_path / "widths.onnx", x)
    y = torch.randn(7, 32)
    assert_close(run(path, {"input": y})[0], model(y), 1e-6)

    stored, narrow = containers(path), "INT4" if centered else "INT2"
    got = [stored[f"linear.bits{bits}.weight"] for bits in range(2, 9)]
    assert got == [narrow, "INT4", "INT4", "INT8", "INT8", "INT8", "INT8"]
    assert stored["conv.weight"] == narrow
    opset = {item.domain: item.version for item in onnx.load(path).opset_import}
    assert opset == {"": 21 if centered else 25}


class Inputs(nn.Module):
    """`x * 1` behind a quantizer of every width, signed and not."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(14))

    def forward(self, input: Tensor) -> Tensor:
        return torch.cat([layer(input) for layer in self.layers], -1)


def test_rounding_of_inputs_is_ours(tmp_path):
    overrides = {f"layers.{place}": {"activation_bits": 2 + place // 2} for place in range(14)}
    model = packed(Inputs(), torch.rand(64, 1), overrides=overrides, activation_bits=8, modules_to_not_convert=[])
    for place, layer in enumerate(model.layers):
        object.__setattr__(layer.spec.activation, "signed", place % 2 == 0)
        layer.input_scale.fill_([0.1, 1.0, 0.037][place % 3])
    steps = torch.arange(-300, 300).float()
    ties = torch.cat([(steps + 0.5) * layer.input_scale for layer in model.layers[:3]])
    beside = [torch.nextafter(ties, torch.tensor(end)) for end in (-torch.inf, torch.inf)]
    ends = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 3e38, -3e38, 1e-40])
    x = torch.cat([ties, *beside, ends, torch.randn(10000) * 9])[:, None]
    path = export_onnx(model, tmp_path / "inputs.onnx", torch.rand(4, 1))
    assert torch.equal(run(path, {"input": x})[0], model(x))


def test_session_of_anyone_is_exact_and_the_fused_one_where_asked(tmp_path):
    x = torch.randn(4, 256)
    model = packed(nn.Sequential(nn.Linear(256, 64)), x, weight_bits=4, modules_to_not_convert=[])
    want, ops, level = model(x), [], {"qdq_matmulnbits_accuracy_level": "1"}
    plain = export_onnx(model, tmp_path / "plain.onnx", x)
    assert_close(run(plain, {"input": x}, ops)[0], want)
    assert "MatMulNBits" not in ops
    ops.clear()
    assert_close(run(plain, {"input": x}, ops, disable_quant_qdq="1")[0], want)
    assert "DequantizeLinear" not in ops  # weights became floats when the session was opened
    fused = export_onnx(model, tmp_path / "fused.onnx", x, fused_matmul=True)
    ops.clear()
    assert_close(run(fused, {"input": x}, ops, **level)[0], want)
    assert "MatMulNBits" in ops
    rounded = run(fused, {"input": x})[0]
    assert 1e-3 < (rounded - want).abs().max() / want.abs().max() < 5e-2  # why it is not the default


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{"granularity": "group", "group_size": 16}, {"weight_bits": 2}, {"weight_bits": 6}]
)
def test_fused_models(settings, tmp_path):
    batch = {"input_ids": inputs("llama")["input_ids"]}
    model = packed(build("llama-tied"), batch, quantize_embeddings=True, **settings)
    path, ops = export_onnx(model, tmp_path / "fused.onnx", batch, fused_matmul=True), []
    assert_close(run(path, batch, ops, qdq_matmulnbits_accuracy_level="1")[0], logits(model, batch))
    assert Counter(ops)["MatMulNBits"] >= 14


def test_tensors_beside_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "EXTERNAL_ABOVE", 1000)
    x = torch.randn(1, 64)  # one row: no constant of the trace
    model = packed(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 32)), x, weight_bits=3, modules_to_not_convert=[])
    export_onnx(model, tmp_path / "model.onnx", x)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    (tmp_path / "elsewhere").mkdir()
    for file in tmp_path.glob("model.*"):
        file.rename(tmp_path / "elsewhere" / file.name)
    assert_close(run(tmp_path / "elsewhere" / "model.onnx", {"input": x.repeat(5, 1)})[0], model(x.repeat(5, 1)))
    assert (tmp_path / "elsewhere" / "model.onnx.data").stat().st_size >= 3 * 32 * 32 // 2


class Branch(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if input.sum() > 0 else input


def small(**settings) -> nn.Module:
    return packed(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)), torch.randn(2, 8), **settings)


def test_refusals(tmp_path, monkeypatch):
    x, path = torch.randn(2, 8), tmp_path / "model.onnx"

    def refuse(model: nn.Module, example, message: str, **options) -> None:
        with pytest.raises(CPQError, match=message):
            export_onnx(model, path, example, **options)
        assert list(tmp_path.iterdir()) == []

    refuse(nn.Sequential(nn.Linear(8, 4)), x, "has no packed layers; `torch.onnx.export` writes a float model")
    training = prepare_model(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)), CPQConfig())
    refuse(training, x, r"not packed yet: call `cpq_hf.pack_model\(model\)`")
    refuse(small().bfloat16(), x, r"`0` computes in torch.bfloat16; call `model.float\(\)`")
    refuse(small(), [x], "`example_inputs` must be a tensor or a dict with tensors")
    refuse(
        small(), x, "`dynamic_shapes` names 'x', which is no input; there are input", dynamic_shapes={"x": {0: "n"}}
    )
    branch = nn.Sequential(small(), nn.Sequential(Branch(2, 2)))
    refuse(branch, x, "torch cannot trace this model for ONNX: .*the packed checkpoint itself")
    refuse(packed(build("mixtral"), inputs("mixtral")), inputs("mixtral"), r"experts.*` is a stacked weight of fused")
    with pytest.raises(CPQError, match="no such folder; make it before"):
        export_onnx(small(), tmp_path / "missing" / "model.onnx", x)
    monkeypatch.setattr(writer, "TOLERANCE", -1.0)
    refuse(small(), x, r"for inputs of shape \[2, 8\] the output `output` in ONNX Runtime differs from the model's by")
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    refuse(small(), x, r"exporting to ONNX needs onnx_ir: pip install '.\[onnx\]' in a clone of cpq-hf")


def test_fixed_sizes_if_asked(tmp_path):
    x, model = torch.randn(2, 8), small()
    path = export_onnx(model, tmp_path / "model.onnx", x, dynamic_shapes={})
    assert_close(run(path, {"input": x})[0], model(x))
    (shape,) = [item.type.tensor_type.shape for item in onnx.load(path).graph.input]
    assert [dim.dim_value for dim in shape.dim] == [2, 8]
