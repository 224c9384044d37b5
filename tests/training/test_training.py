"""Ways of training that must not change what comes out, and precisions that have to work, in the real Trainer."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from datasets import Dataset
from models import build, inputs
from torch._dynamo.utils import counters
from transformers import Trainer, TrainingArguments

from cpq_hf import CPQCallback, CPQConfig, CPQController, CPQOptimizer, calibrate_model, prepare_model


def train(folder, name: str = "llama", config: dict | None = None, calibrated: bool = False, model=None, **fields):
    """Losses, and the parameters at the end, of six steps of four examples."""
    torch.manual_seed(0)
    fields = {"per_device_train_batch_size": 4} | fields
    args = TrainingArguments(
        output_dir=str(folder), max_steps=6, learning_rate=3e-3, logging_steps=1, save_strategy="no",
        report_to="none", use_cpu=True, dataloader_pin_memory=False, disable_tqdm=True, seed=3, **fields,
    )  # fmt: skip
    config = CPQConfig(**({"weight_bits": 3, "activation_bits": 8} | (config or {})))
    model = prepare_model(model if model is not None else build(name), config)
    if calibrated:
        calibrate_model(model, [inputs(name, seed=7)])
    rows = Dataset.from_dict({key: value.numpy() for key, value in inputs(name, 48).items()})
    factory = (CPQOptimizer, {"args": args})
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[CPQCallback()], optimizer_cls_and_kwargs=factory)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {key: value.detach().clone() for key, value in trainer.model.named_parameters()}


def recomputing(reentrant: bool) -> dict:
    """Training arguments, whose names have changed between versions of transformers."""
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": reentrant}}


def assert_equal(got, wanted):
    assert got[0] == wanted[0]
    for key, value in wanted[1].items():
        assert torch.equal(got[1][key], value), key


def assert_close(got, wanted, tolerance: float):
    assert got[0] == pytest.approx(wanted[0], abs=tolerance)
    for key, value in wanted[1].items():
        assert torch.allclose(got[1][key], value, atol=tolerance, rtol=0), key


@pytest.mark.shows("gradient checkpointing (reentrant or not) changes no bit", "Trainer")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("config", [{}, {"dropbits": 0.3}, {"weight_bits": 5, "learn_bits": True, "target_bits": 3.0}])
def test_gradient_checkpointing_changes_nothing(config, reentrant, tmp_path):
    """The masks of DropBits are drawn again as they were."""
    recomputed = recomputing(reentrant)
    plain = train(tmp_path, config=config, calibrated=True)
    assert_equal(train(tmp_path, config=config, calibrated=True, **recomputed), plain)


@pytest.mark.shows("calibration in the first step, under gradient checkpointing, changes no bit", "Trainer")
def test_calibration_under_gradient_checkpointing(tmp_path):
    """The first batch calibrates; the recomputation must see the grid that it made, or say so."""
    assert_equal(train(tmp_path, **recomputing(False)), train(tmp_path))


@pytest.mark.shows("accumulated gradients give the same weights, to 1e-4", "Trainer")
def test_accumulation_changes_nothing(tmp_path):
    plain = train(tmp_path, calibrated=True)
    assert_close(
        train(tmp_path, calibrated=True, per_device_train_batch_size=1, gradient_accumulation_steps=4), plain, 1e-4
    )


# torch's own tracer makes an instance of an autograd function, of which torch then warns
@pytest.mark.shows("torch.compile: one graph, the same weights to 1e-4", "Trainer")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", ["llama", "mixtral", "resnet"])
def test_compiling_changes_nothing_and_breaks_no_graph(name, tmp_path):
    """The first step calibrates uncompiled; what is compiled after it is one graph."""
    torch._dynamo.reset()
    counters.clear()
    compiled = train(tmp_path, name, torch_compile=True, torch_compile_backend="aot_eager")
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
    assert_close(compiled, train(tmp_path, name), 1e-4)


@pytest.mark.slow
@pytest.mark.shows("torch.compile with inductor, its default: one graph, the same weights to 1e-4", "Trainer")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # inductor defines some of these
@pytest.mark.parametrize(("name", "activation_bits"), [("llama", 8), ("resnet", None)])
def test_compiling_with_inductor_changes_nothing(name, activation_bits, tmp_path):
    """Compiled code adds in another order, so that inputs differ in the seventh digit; one that lay in the middle
    between two levels of the grid may then be rounded to the other. The inputs of this ResNet hold such values: with 8
    bits its weights come out up to 4e-3 apart, as they do without compiling when its images change by 1e-6."""
    torch._dynamo.reset()
    counters.clear()
    config = {"activation_bits": activation_bits}
    compiled = train(tmp_path, name, config, torch_compile=True)
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
    assert counters["inductor"]
    assert_close(compiled, train(tmp_path, name, config), 1e-4)


@pytest.mark.shows("precision: losses fall, every parameter moves, quantizers stay float32", "a loop")
@pytest.mark.parametrize("name", ["llama", "mixtral", "resnet", "t5"])
@pytest.mark.parametrize("precision", ["bf16 autocast", "bf16 model", "fp16 autocast, scaled"])
def test_precisions(name, precision):
    """Quantizers stay in float32, losses come down, every trained parameter has moved."""
    model = build(name)
    if precision == "bf16 model":
        model = model.bfloat16()
    model = prepare_model(model, CPQConfig(weight_bits=4, activation_bits=8)).train()
    before = {key: value.detach().clone() for key, value in model.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    controller = CPQController(model, optimizer, total_steps=8)
    scaler = torch.amp.GradScaler("cpu", enabled="scaled" in precision, init_scale=2.0**10)
    dtype = torch.float16 if "fp16" in precision else torch.bfloat16
    losses = []
    for _ in range(8):
        batch = inputs(name)
        if precision == "bf16 model":
            batch = {key: v.bfloat16() if v.is_floating_point() else v for key, v in batch.items()}
        with torch.autocast("cpu", dtype, enabled="autocast" in precision):
            loss = model(**batch).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert controller.step == 8
    assert losses[-1] < losses[0]
    for key, value in model.named_parameters():
        assert torch.isfinite(value).all(), key
        if "quantizer" in key:
            assert value.dtype == torch.float32, key
    assert not [key for key, value in model.named_parameters() if key in before and torch.equal(value, before[key])]
