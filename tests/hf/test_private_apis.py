"""What is borrowed from torch, transformers and accelerate: all in two files, and each name does what they say."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from models import auto_class, build, inputs
from safetensors import safe_open
from torch import nn
from transformers import AutoModel, FalconMambaConfig, FalconMambaModel, Trainer, TrainingArguments
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.quantizers.base import HfQuantizer

import cpq_hf
from cpq_hf import CPQConfig, private_apis, torch_private
from cpq_hf.private_apis import OVERRIDDEN
from cpq_hf.torch_private import EXTENSION_POINTS

# --- no other file uses any ------------------------------------------------------------------------------------------

PACKAGE = Path(cpq_hf.__file__).parent
HOMES = {"private_apis.py", "torch_private.py"}
OURS = {"_owner", "_holder"}  # written into `vars` of layers of ours, so that they are no children
WITHOUT_UNDERSCORE = {"NonDynamicallyQuantizableLinear"}


def is_private(name: str) -> bool:
    return re.fullmatch(r"_(?!_)\w+", name) is not None and not name.startswith("_cpq_")


def defined_names(tree: ast.AST) -> set[str]:
    """Private names that a file gives to its own functions, classes and objects; `self` is one of these."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names |= {node.attr} if isinstance(node.value, ast.Name) and node.value.id == "self" else set()
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def used_names(tree: ast.AST) -> set[str]:
    """Private names that are read, written or imported: as attributes, and as strings that stand for attributes."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
            *("getattr", "hasattr", "setattr", "delattr", "get", "pop", "setdefault"),
        ):
            names |= {item.value for item in node.args if isinstance(item, ast.Constant)}
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            names.add(node.slice.value)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported = {*(node.module or "").split("."), *(alias.name for alias in node.names)}
            names |= imported | {f"_{name}" for name in imported & WITHOUT_UNDERSCORE}
    return {name for name in names if isinstance(name, str) and is_private(name)}


def test_nothing_private_is_used_elsewhere():
    trees = {
        file.relative_to(PACKAGE).as_posix(): ast.parse(file.read_text(encoding="utf-8"))
        for file in PACKAGE.rglob("*.py")
    }
    own = set().union(*map(defined_names, trees.values())) | OURS
    allowed = own | EXTENSION_POINTS.keys() | OVERRIDDEN.keys()
    found = {name: used_names(tree) - allowed for name, tree in trees.items() if name not in HOMES}
    assert {name: names for name, names in found.items() if names} == {}


def test_the_search_finds_what_it_looks_for():
    for line in (
        "model._weight_conversions = []",
        "torch._dynamo.reset()",
        "getattr(model, '_hf_hook', None)",
        "vars(model).pop('_hf_hook', None)",
        "vars(model)['_hf_hook'] = 1",
        "from torch._dynamo import reset",
        "from transformers.x import _thing",
        "from torch.nn.modules.linear import NonDynamicallyQuantizableLinear",
    ):
        assert used_names(ast.parse(line)) - defined_names(ast.parse(line)), line
    assert not used_names(ast.parse("layer.__class__, tensor._cpq_recipe, name.endswith('_scale')"))


def test_methods_of_others_are_overridden_knowingly():
    """Names that our classes define and a foreign base class has too."""
    names = [m.name for m in pkgutil.walk_packages(cpq_hf.__path__, "cpq_hf.")]
    modules = [importlib.import_module(n) for n in names if not n.endswith(("triton_kernels", ".plain", ".__main__"))]
    classes = {item for module in modules for item in vars(module).values() if isinstance(item, type)}
    overridden = {
        name
        for cls in classes
        if cls.__module__.split(".")[0] == "cpq_hf"
        for name in filter(is_private, vars(cls))
        for base in cls.__mro__
        if base.__module__.split(".")[0] in ("torch", "transformers", "accelerate") and name in vars(base)
    }
    overridden -= {"_abc_impl", "_backward_cls"}  # put there by metaclasses
    assert overridden == {*OVERRIDDEN, "_apply", "_load_from_state_dict"} - {"_apply_gate"}


def test_each_name_has_a_test():
    for module in (private_apis, torch_private):
        functions = {
            name
            for name, item in vars(module).items()
            if inspect.isfunction(item) and item.__module__ == module.__name__
        }
        constants = {name for name in vars(module) if name.startswith(("foreach_", "OutProjection"))}
        for name in functions | constants:
            assert f"test_{name.lower()}" in globals(), name
        for name in functions:
            assert '"' in (getattr(module, name).__doc__ or "") or "[`" in getattr(module, name).__doc__, name
    for name in (*OVERRIDDEN, *EXTENSION_POINTS):
        assert f"test_{name.strip('_')}" in globals(), name


# --- transformers: the quantizer -------------------------------------------------------------------------------------


class Noting(HfQuantizer):
    """Notes which of its hooks are called."""

    def __init__(self):
        super().__init__(CPQConfig())
        self.called = []

    def _process_model_before_weight_loading(self, model, **kwargs):
        self.called.append("before")

    def _process_model_after_weight_loading(self, model, **kwargs):
        self.called.append("after")

    def _dequantize(self, model, dtype=None):
        self.called.append("dequantize")
        return model

    def is_serializable(self):
        return True

    is_trainable = True


def test_process_model_before_weight_loading():
    quantizer = Noting()
    quantizer.preprocess_model(build("bert"))
    assert quantizer.called == ["before"]


def test_process_model_after_weight_loading():
    quantizer = Noting()
    quantizer.postprocess_model(build("bert"))
    assert quantizer.called == ["after"]


def test_dequantize():
    quantizer = Noting()
    quantizer.dequantize(build("bert"))
    assert quantizer.called == ["dequantize"]


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_apply_gate(implementation, monkeypatch):
    model, called = build("mixtral"), []
    model.set_experts_implementation(implementation)
    original = MixtralExperts._apply_gate
    monkeypatch.setattr(MixtralExperts, "_apply_gate", lambda self, x: called.append(x.shape) or original(self, x))
    model(**inputs("mixtral"))
    assert [shape[-1] for shape in called] == [2 * 48] * 2  # once per layer, gate and up together


def test_has_gate():
    assert private_apis.has_gate(MixtralExperts)
    assert not private_apis.has_gate(nn.Linear)


# --- transformers: saving and loading --------------------------------------------------------------------------------

EXPERTS = "model.layers.0.mlp.experts.down_proj"


def test_save_under_own_names():
    model = build("mixtral")
    tensors = {EXPERTS: torch.zeros(4, 32, 48)}
    assert EXPERTS not in revert_weight_conversion(model, dict(tensors))
    private_apis.save_under_own_names(model)
    assert list(revert_weight_conversion(model, dict(tensors))) == [EXPERTS]


def test_names_of_the_hub():
    model = build("mixtral")
    private_apis.save_under_own_names(model)
    with private_apis.names_of_the_hub(model):
        assert len(revert_weight_conversion(model, {EXPERTS: torch.zeros(4, 32, 48)})) == 4
    assert list(revert_weight_conversion(model, {EXPERTS: torch.zeros(4, 32, 48)})) == [EXPERTS]


def loaded(path) -> list[str]:
    """Tensors that are reported missing when a float checkpoint is loaded to be trained on a grid."""
    _, info = auto_class("bert").from_pretrained(path, quantization_config=CPQConfig(), output_loading_info=True)
    return [name for name in info["missing_keys"] if "quantizer" in name]


def test_expect_missing(tmp_path, monkeypatch):
    build("bert").save_pretrained(tmp_path)
    assert not loaded(tmp_path)
    monkeypatch.setattr("cpq_hf.hf.quantizer.expect_missing", lambda *_: None)
    assert len(loaded(tmp_path)) == 13


def test_stop_expecting():
    model = build("bert")
    private_apis.expect_missing(model, "some")
    assert "some" in model._keys_to_ignore_on_load_missing
    private_apis.stop_expecting(model, "some")
    assert model._keys_to_ignore_on_load_missing == build("bert")._keys_to_ignore_on_load_missing


def test_names_not_saved(tmp_path):
    model = build("bert")
    assert not private_apis.names_not_saved(model)
    model._keys_to_ignore_on_save = {"classifier.bias"}
    assert private_apis.names_not_saved(model) == {"classifier.bias"}
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert set(model.state_dict()) - set(file.keys()) == {"classifier.bias"}


def test_mark_initialized():
    model = build("bert")
    kept, other, tensor = (
        model.bert.encoder.layer[0].attention.self.get_submodule(n) for n in ("query", "key", "value")
    )
    for layer in (kept, other, tensor):
        nn.init.constant_(layer.weight, 7.0)
        del layer._is_hf_initialized  # from the initialization of the model
    private_apis.mark_initialized(kept)
    private_apis.mark_initialized(tensor.weight)
    for layer in (kept, other, tensor):
        model._initialize_weights(layer)
    assert (kept.weight == 7).all()
    assert (tensor.weight == 7).all()
    assert not (other.weight == 7).any()


def test_was_loaded(tmp_path):
    build("bert").bert.save_pretrained(tmp_path)
    model = auto_class("bert").from_pretrained(tmp_path)
    assert private_apis.was_loaded(model.bert.pooler.dense.weight)
    assert not private_apis.was_loaded(nn.Parameter(torch.zeros(1)))


def test_initialize_module():
    model = build("bert")
    nn.init.constant_(model.bert.pooler.dense.weight, 7.0)
    private_apis.initialize_module(model, model.bert.pooler.dense)
    assert not (model.bert.pooler.dense.weight == 7).any()


# --- transformers: configs -------------------------------------------------------------------------------------------


def test_mark_quantized():
    """FalconMamba then calls a layer where it takes its weight otherwise."""
    config = FalconMambaConfig(vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=1, time_step_rank=4)
    model, called = FalconMambaModel(config).eval(), []
    model.layers[0].mixer.dt_proj.register_forward_hook(lambda *_: called.append(1))
    model(torch.ones(1, 3, dtype=torch.long))
    assert not called
    private_apis.mark_quantized(model.config)
    model(torch.ones(1, 3, dtype=torch.long))
    assert called


def test_attention_implementation():
    for name in ("eager", "sdpa"):
        model = AutoModel.from_config(build("bert").config, attn_implementation=name)
        assert private_apis.attention_implementation(model.config) == name


def test_experts_implementation():
    model = build("mixtral")
    for name in ("eager", "grouped_mm"):
        model.set_experts_implementation(name)
        assert private_apis.experts_implementation(model.config) == name
        assert private_apis.experts_implementation(model.model.layers[0].mlp.experts.config) == name
    assert private_apis.experts_implementation(None) is None


@pytest.mark.parametrize("name", ["bert", "llama", "vit", "wav2vec2"])
def test_auto_class_name(name):
    assert private_apis.auto_class_name(build(name)) == auto_class(name).__name__


# --- accelerate ------------------------------------------------------------------------------------------------------


def test_hook_of():
    layer, hook = nn.Linear(2, 2), ModelHook()
    add_hook_to_module(layer, hook)
    assert private_apis.hook_of(layer) is hook
    remove_hook_from_module(layer)
    assert private_apis.hook_of(layer) is None


# --- the model card of a Trainer -------------------------------------------------------------------------------------


@pytest.fixture
def trainer(tmp_path):
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    return Trainer(build("bert"), args)


def test_take_last_word(trainer, tmp_path):
    card = tmp_path / "README.md"
    card.write_text("# Before\n")
    private_apis.take_last_word(trainer.model, card, lambda: card.write_text("# Ours\n"))
    trainer.create_model_card(model_name="a")
    assert card.read_text() == "# Ours\n"
    trainer.create_model_card(model_name="a")
    assert "generated automatically according to the information the Trainer" in card.read_text()


def test_drop_last_word(trainer, tmp_path):
    card = tmp_path / "README.md"
    card.write_text("# Before\n")
    private_apis.take_last_word(trainer.model, card, lambda: card.write_text("# Ours\n"))
    assert "library_name: peft" in card.read_text()
    private_apis.drop_last_word(trainer.model)
    private_apis.drop_last_word(trainer.model)
    assert card.read_text() == "# Before\n"
    trainer.create_model_card(model_name="a")
    assert "# Ours" not in card.read_text()


# --- torch -----------------------------------------------------------------------------------------------------------


def test_parameters():
    layer = nn.Linear(2, 2)
    vars(layer)["_parameters"] = {**layer._parameters, "weight": torch.full((2, 2), 7.0)}
    assert (layer.weight == 7).all()
    assert layer(torch.zeros(1, 2)).shape == (1, 2)


def test_modules():
    model = nn.Sequential(nn.Linear(2, 2))
    model._modules["more"] = nn.Linear(2, 2)
    assert model.more is model.get_submodule("more")
    assert "more.weight" in model.state_dict()


def test_buffers():
    layer = nn.Linear(2, 2)
    layer.register_buffer("scale", torch.ones(1))
    layer._buffers["scale"] = torch.zeros(1)
    assert layer.scale is layer._buffers["scale"]
    assert layer.state_dict()["scale"] == 0


class Overriding(nn.Conv2d):
    """Notes which of the methods that the package overrides or calls are called."""

    def __init__(self):
        super().__init__(1, 1, 1)
        self.called = []

    def _apply(self, fn, recurse=True):
        self.called.append("apply")
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **kwargs):
        self.called.append("load")
        super()._load_from_state_dict(*args, **kwargs)

    def _conv_forward(self, input, weight, bias):
        self.called.append("forward")
        return super()._conv_forward(input, weight, bias)


@pytest.mark.parametrize("move", [lambda m: m.to(torch.float64), lambda m: m.bfloat16(), lambda m: m.to("meta")])
def test_apply(move):
    model = nn.Sequential(Overriding())
    move(model)
    assert model[0].called == ["apply"]


def test_load_from_state_dict():
    model = nn.Sequential(Overriding())
    model.load_state_dict(nn.Sequential(nn.Conv2d(1, 1, 1)).state_dict())
    assert model[0].called == ["load"]


def test_conv_forward():
    layer = Overriding()
    layer(torch.ones(1, 1, 1, 1))
    assert layer.called == ["forward"]


def test_outprojection():
    assert type(nn.MultiheadAttention(4, 2).out_proj) is torch_private.OutProjection


def test_has_one_projection():
    assert torch_private.has_one_projection(nn.MultiheadAttention(4, 2))
    assert not torch_private.has_one_projection(nn.MultiheadAttention(4, 2, kdim=6))


def tensors() -> list[torch.Tensor]:
    return [torch.ones(2), torch.full((3,), -2.0)]


def test_foreach_add_():
    torch_private.foreach_add_(found := tensors(), 0.5)
    assert [item.tolist() for item in found] == [[1.5] * 2, [-1.5] * 3]


def test_foreach_copy_():
    torch_private.foreach_copy_(found := tensors(), [torch.zeros(2), torch.full((3,), 4.0)])
    assert [item.tolist() for item in found] == [[0.0] * 2, [4.0] * 3]


def test_foreach_norm():
    assert [item.item() for item in torch_private.foreach_norm(tensors(), ord=torch.inf)] == [1.0, 2.0]


def test_foreach_zero_():
    torch_private.foreach_zero_(found := tensors())
    assert [item.tolist() for item in found] == [[0.0] * 2, [0.0] * 3]


def test_saved_tensors_are_watched():
    assert not torch_private.saved_tensors_are_watched()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        assert torch_private.saved_tensors_are_watched()
    seen = []
    torch.utils.checkpoint.checkpoint(
        lambda x: seen.append(torch_private.saved_tensors_are_watched()) or x.exp(),
        torch.ones(1, requires_grad=True),
        use_reentrant=False,
    )
    assert seen == [True]


def test_is_compiled():
    layer = nn.Linear(2, 2)
    assert not torch_private.is_compiled(layer)
    assert torch_private.is_compiled(torch.compile(layer, backend="eager"))
    assert not torch_private.is_compiled(layer)
    layer.compile(backend="eager")
    assert torch_private.is_compiled(layer)


def test_uncompiled():
    layer = nn.Linear(2, 2)
    assert torch_private.uncompiled(torch.compile(layer, backend="eager")) is layer
    assert torch_private.uncompiled(layer) is layer


def test_has_unsaved_buffers():
    layer = nn.Linear(2, 2)
    layer.register_buffer("saved", torch.ones(1))
    assert not torch_private.has_unsaved_buffers(layer)
    layer.register_buffer("unsaved", torch.ones(1), persistent=False)
    assert torch_private.has_unsaved_buffers(layer)
    assert "unsaved" not in layer.state_dict()


class Hook:
    def __init__(self):
        self.calls = 0

    def __call__(self, *_):
        self.calls += 1


def test_remove_forward_hooks():
    layer, ours = nn.Linear(2, 2), Hook()
    others = []
    layer.register_forward_pre_hook(ours, with_kwargs=True)
    layer.register_forward_hook(ours, always_call=True)
    layer.register_forward_hook(lambda *_: others.append(1))
    layer(torch.ones(2))
    assert (ours.calls, len(others)) == (2, 1)
    torch_private.remove_forward_hooks(layer, Hook)
    layer(torch.ones(2))
    assert (ours.calls, len(others)) == (2, 2)
    assert not layer._forward_hooks_always_called
    assert not layer._forward_pre_hooks_with_kwargs
