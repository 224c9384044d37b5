"""The callback, the controller and the optimizer in the real Trainer."""

from __future__ import annotations

import copy
import functools
import logging
from typing import ClassVar

import pytest
import torch
from accelerate.utils import TorchDynamoPlugin as DynamoPlugin
from datasets import Dataset
from models import build, inputs, logits
from torch._dynamo.testing import CompileCounter
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from cpq_hf import (
    CPQCallback,
    CPQConfig,
    CPQController,
    CPQError,
    CPQOptimizer,
    calibrate_model,
    pack_model,
    prepare_model,
)
from cpq_hf.hf.callback import calibrate_uncompiled
from cpq_hf.tensor.quantizer import WeightQuantizer
from cpq_hf.training.schedule import drop_rate, noise_scale

CONFIG = {"weight_bits": 4, "activation_bits": 8, "dropbits": 0.3}
LAYER = "resnet.encoder.stages.0.layers.0.layer.0.convolution"


def data(count: int = 24) -> Dataset:
    return Dataset.from_dict({key: value.numpy() for key, value in inputs("resnet", count).items()})


def arguments(folder, **fields) -> TrainingArguments:
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }
    return TrainingArguments(output_dir=str(folder), **(defaults | fields))


class Recorder(TrainerCallback):
    """Notes what each forward pass of one layer saw: (optimizer steps done, noise, drop rate, dropping, training)."""

    def __init__(self, model):
        self.seen = []
        self.steps = 0
        layer = model.get_submodule(LAYER)
        layer.register_forward_pre_hook(self.note)

    def note(self, layer, _):
        quantizer = layer.weight_quantizer
        self.seen.append(
            (self.steps, quantizer.noise.item(), quantizer.drop_rate.item(), quantizer.dropping, layer.training)
        )

    def on_step_end(self, args, state, control, **kwargs):
        self.steps = state.global_step


@pytest.mark.parametrize("accumulation", [1, 3])
def test_schedule_moves_once_per_optimizer_step(accumulation, tmp_path):
    model = prepare_model(build("resnet"), CPQConfig(**CONFIG))
    recorder = Recorder(model)
    args = arguments(tmp_path, max_steps=4, gradient_accumulation_steps=accumulation)
    trainer = Trainer(model, args, train_dataset=data(48), callbacks=[CPQCallback(), recorder])
    trainer.train()
    steps = [step for step, *_ in recorder.seen]
    assert steps == [step for step in range(4) for _ in range(accumulation)]
    for step, noise, rate, dropping, training in recorder.seen:
        assert noise == pytest.approx(noise_scale(step / 4, 1 / 3, 0.1), rel=1e-6)
        assert rate == pytest.approx(drop_rate(step / 4, 0.3), rel=1e-6)
        assert dropping == (step < 3)
        assert training


def test_a_reporter_sees_the_metrics_if_the_callback_goes_before_it(tmp_path):
    """As docs/coverage.md says; a reporter is a callback that comes before those of the user."""

    class Reporter(TrainerCallback):
        seen: ClassVar[list] = []

        def on_log(self, args, state, control, logs, **kwargs):
            self.seen.append("cpq/noise" in logs)

    callbacks = [Reporter(), CPQCallback(CPQConfig(**CONFIG))]
    trainer = Trainer(build("resnet"), arguments(tmp_path, max_steps=2), train_dataset=data(), callbacks=callbacks)
    trainer.callback_handler.callbacks.insert(1, trainer.pop_callback(CPQCallback))
    trainer.train()
    assert Reporter.seen == [True, True, False]  # the last is Trainer's summary


def test_log_has_the_metrics(tmp_path):
    model = prepare_model(build("resnet"), CPQConfig(**CONFIG))
    args = arguments(tmp_path, logging_steps=2, max_steps=6, eval_strategy="steps", eval_steps=3)
    trainer = Trainer(model, args, train_dataset=data(), eval_dataset=data(8), callbacks=[CPQCallback()])
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in entries] == [2, 4, 6]
    for entry in entries:
        assert entry["cpq/noise"] == pytest.approx(noise_scale(entry["step"] / 6, 1 / 3, 0.1))
        assert entry["cpq/drop_rate"] == pytest.approx(drop_rate(entry["step"] / 6, 0.3))
        assert entry["cpq/mean_bits"] == 4
        assert 0.2 < entry["cpq/cluster_distance"] < 0.3
    others = [entry for entry in trainer.state.log_history if "loss" not in entry]
    assert not [key for entry in others for key in entry if key.startswith("cpq/")]


def test_evaluation_in_mid_training_uses_the_full_grid(tmp_path):
    model = prepare_model(build("resnet"), CPQConfig(weight_bits=4, dropbits=0.9))
    seen = []

    class Check(TrainerCallback):
        def on_evaluate(self, args, state, control, *, model, metrics, **kwargs):
            if state.global_step > 2:
                return
            weights = [module for module in model.modules() if isinstance(module, WeightQuantizer)]
            assert all(quantizer.dropping and quantizer.drop_rate > 0.2 for quantizer in weights)
            for quantizer in weights:
                quantizer.dropping = False
            plain = [model(**{k: v[None] for k, v in row.items()}).loss for row in data(8).with_format("torch")]
            for quantizer in weights:
                quantizer.dropping = True
            seen.append((metrics["eval_loss"], torch.stack(plain).mean().item()))

    args = arguments(tmp_path, max_steps=4, eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=1)
    Trainer(model, args, train_dataset=data(), eval_dataset=data(8), callbacks=[CPQCallback(), Check()]).train()
    ((in_trainer, by_hand),) = seen
    assert in_trainer == pytest.approx(by_hand, rel=1e-5)


def run(folder, resume=None, config=None, **fields):
    """A whole training from a fresh float model; the model after it."""
    model = build("resnet")
    args = arguments(
        folder, save_strategy="steps", save_steps=2, weight_decay=0.1, gradient_accumulation_steps=2, seed=3, **fields
    )
    factory = (CPQOptimizer, {"args": args, "quantizer_lr": 3e-3})
    trainer = Trainer(
        model,
        args,
        train_dataset=data(),
        callbacks=[CPQCallback(CPQConfig(**(CONFIG | (config or {}))))],
        optimizer_cls_and_kwargs=factory,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


OTHER_CONFIGS = {
    "weight_bits": (5, "saved with `weight_bits=4`, this run has `weight_bits=5`"),
    "min_bits": (3, "saved with `min_bits=2`"),
    "overrides": ({"classifier": {"weight_bits": 8}}, r"lacks `classifier.1.input_quantizer`.*\(2 quantizers"),
    "activation_bits": (None, "has `.*input_quantizer`, which this model lacks"),
    "granularity": ("tensor", r"the shape \[\d+, 1\] in the state to load and \[1\] in this model"),
}


@pytest.mark.shows("a checkpoint of another config is refused", "Trainer")
@pytest.mark.parametrize("name", OTHER_CONFIGS)
def test_a_checkpoint_of_another_config_is_refused(name, tmp_path):
    value, said = OTHER_CONFIGS[name]
    run(tmp_path / "one", max_steps=2)
    with pytest.raises(CPQError, match=said):
        run(tmp_path / "two", str(tmp_path / "one" / "checkpoint-2"), config={name: value})


@pytest.mark.shows("resumed with accumulation: the same bits", "Trainer")
@pytest.mark.parametrize("restore_callbacks", [False, True])
@pytest.mark.parametrize("stop", [2, 4])
def test_resume_is_bit_identical(stop, restore_callbacks, tmp_path):
    straight = run(tmp_path / "straight")
    checkpoint = str(tmp_path / "straight" / f"checkpoint-{stop}")
    resumed = run(tmp_path / "resumed", resume=checkpoint, restore_callback_states_from_checkpoint=restore_callbacks)
    want, got = straight.model.state_dict(), resumed.model.state_dict()
    assert want.keys() == got.keys()
    for key, value in want.items():
        assert torch.equal(got[key], value), key
    losses = [
        [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in (straight, resumed)
    ]
    assert losses[0] == losses[1]


def test_the_callback_counts_the_steps_that_were_taken(tmp_path):
    """A step that a GradScaler skips does not move the schedule; the count survives a resume."""
    trainer = run(tmp_path, max_steps=2)
    saved = trainer.state.stateful_callbacks["CPQCallback"]["attributes"]["controller_state"]
    assert (saved["step"], saved["total_steps"]) == (2, 2)


@pytest.mark.shows("load_best_model_at_end, then packed", "Trainer")
def test_best_model_is_loaded_and_packed(tmp_path):
    model = prepare_model(build("resnet"), CPQConfig(**CONFIG))
    args = arguments(
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        learning_rate=0.3,
    )
    trainer = Trainer(model, args, train_dataset=data(), eval_dataset=data(8), callbacks=[CPQCallback(pack=True)])
    trainer.train()
    best = type(model).from_pretrained(trainer.state.best_model_checkpoint)
    batch = inputs("resnet")
    assert torch.equal(logits(model, batch), logits(best, batch))
    trainer.save_model(str(tmp_path / "final"))
    again = type(model).from_pretrained(tmp_path / "final")
    assert torch.equal(logits(again, batch), logits(best, batch))
    evaluated = Trainer(again, arguments(tmp_path), eval_dataset=data(8)).evaluate()
    assert evaluated["eval_loss"] > 0
    with pytest.raises(CPQError, match="packed: its weights are integers and cannot be trained"):
        Trainer(again, arguments(tmp_path), train_dataset=data(), callbacks=[CPQCallback()]).train()
    with pytest.raises(CPQError, match="packed: its weights are integers and cannot be trained"):
        Trainer(again, arguments(tmp_path), train_dataset=data()).train()


def test_callback_without_a_prepared_model(tmp_path):
    with pytest.raises(CPQError, match="the model is not prepared for training"):
        Trainer(build("resnet"), arguments(tmp_path), train_dataset=data(), callbacks=[CPQCallback()]).train()


def test_data_parallel_is_refused(tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(CPQError, match=r"2 GPUs with DataParallel.*torchrun --nproc_per_node 2"):
        CPQCallback(CPQConfig()).on_init_end(args, None, None, model=build("resnet"))


class Failing(Exception):
    pass


def fail(*_, **__):
    raise Failing


def fails_in_the_loss(trainer, model):
    trainer.compute_loss = fail


def fails_in_a_layer(trainer, model):
    model.get_submodule(LAYER).register_forward_pre_hook(fail)


def fails_in_the_data(trainer, model):
    trainer.data_collator = fail


def fails_in_backward(trainer, model):
    model.get_submodule(LAYER).weight.register_hook(fail)


@pytest.mark.parametrize("how", [fails_in_the_loss, fails_in_a_layer, fails_in_the_data, fails_in_backward])
def test_a_first_step_that_fails_does_not_switch_compiling_off(how, tmp_path):
    model = prepare_model(build("resnet"), CPQConfig(**CONFIG))
    args = arguments(tmp_path, torch_compile=True, torch_compile_backend="eager")
    trainer = Trainer(model, args, train_dataset=data(), callbacks=[CPQCallback()])
    how(trainer, model)
    with pytest.raises(Failing):
        trainer.train()
    counter = CompileCounter()
    x = torch.ones(2)
    assert torch.equal(torch.compile(lambda x: x + 1, backend=counter)(x), x + 1)
    assert counter.frame_count == 1


# torch's own tracer makes an instance of an autograd function, of which torch then warns
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:activation quantizers are not calibrated yet")
@pytest.mark.parametrize("eval_on_start", [False, True])
def test_only_the_calibrating_pass_is_uncompiled(eval_on_start, tmp_path, monkeypatch):
    """The first in training; what comes after it is compiled once, for training and for evaluation."""
    model, seen = prepare_model(build("resnet"), CPQConfig(activation_bits=8)), []
    torch._dynamo.reset()
    counter = CompileCounter()
    layer = model.get_submodule(LAYER)
    layer.register_forward_pre_hook(lambda m, _: None if torch.compiler.is_compiling() else seen.append(m.training))
    monkeypatch.setattr("torch.compile", functools.partial(torch.compile, backend=counter))
    monkeypatch.setattr(DynamoPlugin, "to_kwargs", lambda self: {})
    args = arguments(tmp_path, torch_compile=True, eval_on_start=eval_on_start, gradient_accumulation_steps=2)
    trainer = Trainer(model, args, train_dataset=data(48), eval_dataset=data(4), callbacks=[CPQCallback()])
    trainer.train()
    assert seen == [False] * eval_on_start + [True]
    assert counter.frame_count == 1
    assert "forward" not in vars(model)


def test_a_copy_of_a_model_that_waits_for_calibration():
    """A callback for averaged weights may make one before the first step."""
    model, batch = prepare_model(build("resnet"), CPQConfig(**CONFIG)).train(), inputs("resnet")
    calibrate_uncompiled(model)
    calibrate_uncompiled(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert not copied(**batch).logits.any()
    assert "forward" not in vars(copied)
    assert "forward" in vars(model)
    assert model(**batch).logits.any()
    assert not {"forward", "cpq_forward"} & vars(model).keys()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_one_graph_needs_a_calibrated_model(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_FULLGRAPH", "1")
    model = prepare_model(build("resnet"), CPQConfig(**CONFIG))
    args = arguments(tmp_path, torch_compile=True, torch_compile_backend="eager", max_steps=1)
    trainer = Trainer(model, args, train_dataset=data(), callbacks=[CPQCallback()])
    with pytest.raises(CPQError, match=r"ACCELERATE_DYNAMO_USE_FULLGRAPH is set. Call `cpq_hf.calibrate_model"):
        trainer.train()
    calibrate_model(model, [inputs("resnet")])
    trainer.train()


def test_optimizer_groups(tmp_path):
    model = prepare_model(build("bert"), CPQConfig(activation_bits=8))
    args = arguments(tmp_path, weight_decay=0.1, learning_rate=1e-3)
    trainer = Trainer(model, args, optimizer_cls_and_kwargs=(CPQOptimizer, {"args": args, "quantizer_lr": 5e-4}))
    groups = trainer.create_optimizer().param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, plain, ours = ([names[id(p)] for p in group["params"]] for group in groups)
    assert [(group["weight_decay"], group["lr"]) for group in groups] == [(0.1, 1e-3), (0, 1e-3), (0, 5e-4)]
    assert all(name.endswith((".log_alpha",)) for name in ours)
    assert sum(name.endswith("log_alpha") for name in names.values()) == len(ours)
    assert not [name for name in decayed + plain if "quantizer" in name]
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(decayed + plain + ours) == trainable
    assert "bert.pooler.dense.weight" in decayed
    assert "bert.pooler.dense.bias" in plain


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({}, "needs the training arguments"), ({"quantizer_lr": -1}, "`quantizer_lr` must be a number >= 0, got -1")],
)
def test_optimizer_arguments(kwargs, message, tmp_path):
    model = prepare_model(build("resnet"), CPQConfig())
    kwargs = kwargs if not kwargs else {"args": arguments(tmp_path)} | kwargs
    with pytest.raises(CPQError, match=message):
        CPQOptimizer()(model, **kwargs)


def test_decay_of_quantizer_parameters_is_warned_about(tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="cpq_hf")
    for decay in (0.0, 0.1):
        model = prepare_model(build("resnet"), CPQConfig())
        args = arguments(tmp_path, max_steps=1, weight_decay=decay)
        Trainer(model, args, train_dataset=data(), callbacks=[CPQCallback()]).train()
        assert ("optimizer_cls_and_kwargs=(cpq_hf.CPQOptimizer" in caplog.text) == (decay > 0)


def test_uncalibrated_activations_pass_in_evaluation_and_say_so():
    model, batch = build("resnet"), inputs("resnet")
    wanted = logits(model, batch)
    prepare_model(model, CPQConfig(weight_bits=8, activation_bits=2))
    with pytest.warns(UserWarning, match="activation quantizers are not calibrated yet"):
        close = logits(model, batch)
    assert torch.allclose(close, wanted, rtol=0.1, atol=0.1)
    calibrate_model(model, [batch])
    assert not torch.allclose(logits(model, batch), wanted, rtol=0.1, atol=0.1)


def test_calibration_finds_signs_and_leaves_mode_and_random_numbers_alone():
    model, batch = prepare_model(build("resnet"), CPQConfig(activation_bits=4)), inputs("resnet")
    statistics = model.resnet.embedder.embedder.normalization.running_mean.clone()
    model.train()
    state = torch.get_rng_state()
    calibrate_model(model, [batch, inputs("resnet", seed=5)])
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert torch.equal(model.resnet.embedder.embedder.normalization.running_mean, statistics)
    assert model.resnet.embedder.embedder.convolution.input_quantizer.resolved_spec().signed is True
    assert model.get_submodule(LAYER).input_quantizer.resolved_spec().signed is False  # behind a ReLU


def test_loading_a_state_brings_the_sign_of_activations():
    signed, unsigned = (prepare_model(build("resnet"), CPQConfig(activation_bits=4)) for _ in range(2))
    batch, positive = inputs("resnet"), inputs("resnet")
    positive["pixel_values"] = positive["pixel_values"].abs()
    calibrate_model(signed, [batch])
    calibrate_model(unsigned, [positive])
    assert not torch.equal(logits(unsigned, batch), logits(signed, batch))
    unsigned.load_state_dict(signed.state_dict())
    assert torch.equal(logits(unsigned, batch), logits(signed, batch))


def test_calibration_input():
    with pytest.raises(CPQError, match="not prepared for training"):
        calibrate_model(build("resnet"), [inputs("resnet")])
    model = prepare_model(build("resnet"), CPQConfig(activation_bits=4))
    with pytest.raises(CPQError, match="`batches` is empty"):
        calibrate_model(model, [])
    broken = inputs("resnet")
    broken["pixel_values"][0, 0, 0, 0] = torch.nan
    with pytest.raises(CPQError, match=r"input of `resnet.embedder.embedder.convolution` is NaN or infinite"):
        calibrate_model(model, [broken])
    calibrate_model(model, [inputs("resnet")])


@pytest.mark.parametrize("steps", [0, -1, 1.5, None, True])
def test_controller_needs_a_number_of_steps(steps):
    model = prepare_model(build("resnet"), CPQConfig())
    with pytest.raises(CPQError, match="`total_steps` must be a positive number of optimizer steps"):
        CPQController(model, torch.optim.SGD(model.parameters(), lr=0.1), steps)


def test_controller_state():
    model = prepare_model(build("resnet"), CPQConfig())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    controller = CPQController(model, optimizer, 4)
    for _ in range(3):
        optimizer.step()
    state = controller.state_dict()
    assert state == {"step": 3, "total_steps": 4, "settings": controller.settings.checkpoint_fields()}
    controller.detach()
    optimizer.step()
    assert controller.step == 3
    other = CPQController(model, optimizer, 4)
    other.load_state_dict(state)
    assert (other.noise, other.drop_rate) == (controller.noise, controller.drop_rate)
    with pytest.raises(CPQError, match="not the state of a CPQController"):
        other.load_state_dict({"step": "three"})


def test_controller_refuses_a_packed_model():
    model = pack_model(prepare_model(build("resnet"), CPQConfig()))
    with pytest.raises(CPQError, match="packed"):
        CPQController(model, torch.optim.SGD(model.parameters(), lr=0.1), 3)


@pytest.mark.shows("schedule under accumulation", "accelerate loop")
def test_accelerate_loop(tmp_path):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = prepare_model(build("resnet"), CPQConfig(**CONFIG))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    controller = CPQController(model, optimizer, total_steps=3)
    loader = torch.utils.data.DataLoader(data().with_format("torch"), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    assert controller.step == 3
    assert controller.noise == pytest.approx(0.1)


def test_what_deepspeed_has_partitioned_is_not_prepared():
    model = build("resnet")
    model.classifier[1].weight.ds_id = 0
    with pytest.raises(CPQError, match=r"`classifier.1` is partitioned by DeepSpeed: prepare the model before"):
        prepare_model(model, CPQConfig(modules_to_not_convert=[]))


@pytest.mark.parametrize("fields", [{"learn_bits": True, "target_bits": 3.0}, {"freeze_oscillating": True}])
def test_what_needs_whole_parameters_is_refused_under_deepspeed(fields, tmp_path):
    model = prepare_model(build("resnet"), CPQConfig(**fields))
    args = arguments(tmp_path)
    args.deepspeed = "zero3.json"
    state = TrainerState(max_steps=400)
    optimizer = torch.optim.AdamW(model.parameters())
    callback = CPQCallback()
    with pytest.raises(CPQError, match="DeepSpeed takes its step on flat partitions"):
        callback.on_train_begin(args, state, None, model=model, optimizer=optimizer)
    assert callback.controller is None
    plain = prepare_model(build("resnet"), CPQConfig())
    callback.on_train_begin(args, state, None, model=plain, optimizer=torch.optim.AdamW(plain.parameters()))


def test_a_token_stays_out_of_checkpoints():
    callback = CPQCallback(push={"repo_id": "me/model", "token": "hf_secret", "private": True})
    state = callback.state()
    assert state["args"]["push"] == {"repo_id": "me/model", "private": True}
    assert callback.push["token"] == "hf_secret"
