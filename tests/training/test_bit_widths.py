"""Learned bit-widths: the gradient, the budget, the decision, and all of it in the real Trainer."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from models import build, inputs, logits
from test_distributed import torchrun
from test_trainer import arguments, data
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainerCallback

from cpq_hf import (
    CPQCallback,
    CPQConfig,
    CPQController,
    CPQError,
    bit_penalty,
    calibrate_model,
    pack_model,
    prepare_model,
    summarize,
)
from cpq_hf.model.inspection import quantizers
from cpq_hf.training.bit_widths import WidthLearner, assign, ties
from cpq_hf.training.schedule import learning_steps

LEARN = {"weight_bits": 5, "learn_bits": True, "target_bits": 3.0}


def learned(model):
    return {name: item for name, item in quantizers(model) if item.bit_logits is not None}


# --- the decision ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_assignment_keeps_within_the_budget_and_uses_it(seed):
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, 12, (1,), generator=generator))
    keep = [torch.rand(4, generator=generator).cumprod(0).tolist() for _ in range(count)]
    costs = (10 ** (3 * torch.rand(count, generator=generator))).tolist()  # some layers dominate
    costs = [cost / sum(costs) for cost in costs]
    budget = 2 + 4 * float(torch.rand(1, generator=generator))
    widths = assign(keep, [2] * count, costs, budget)
    mean = sum(cost * bits for cost, bits in zip(costs, widths, strict=True))
    assert all(2 <= bits <= 6 for bits in widths)
    assert mean <= budget + 1e-9
    room = budget - mean
    assert not [cost for cost, bits in zip(costs, widths, strict=True) if bits < 6 and cost < room - 1e-9]


def test_assignment_prefers_the_likely_bits():
    keep = [[0.9, 0.8], [0.7, 0.2], [0.6, 0.55]]
    assert assign(keep, [2, 2, 2], [1, 1, 1], None) == [4, 3, 4]
    assert assign(keep, [2, 2, 2], [1, 1, 1], 11) == [4, 3, 4]
    assert assign(keep, [2, 2, 2], [1, 1, 1], 9) == [4, 3, 2]
    assert assign(keep, [2, 2, 2], [1, 1, 1], 12) == [4, 4, 4]
    with pytest.raises(CPQError, match=r"cannot be met: the smallest widths cost 6.000 bits of a budget of 5.000"):
        assign(keep, [2, 2, 2], [1, 1, 1], 5)


def test_ties_follow_what_engines_fuse():
    names = ["a.q_proj", "a.k_proj", "a.o_proj", "b.q_proj", "a.v_proj", "m.experts.0.w1", "m.experts.7.w3", "m.w2"]
    assert ties(names) == [0, 0, 1, 2, 0, 3, 3, 4]
    assert ties(["attention.query", "attention.value", "mlp.gate_proj", "mlp.up_proj"]) == [0, 0, 1, 1]


# --- the gradient ----------------------------------------------------------------------------------------------------


def test_penalty_is_the_mean_of_expected_bits():
    model = prepare_model(build("llama"), CPQConfig(**LEARN))
    items = learned(model).values()
    weights = sum(item.spec.numel for item in items)
    for item in items:
        nn.init.normal_(item.bit_logits)
    want = sum(item.spec.numel * (2 + float(item.keep_probabilities().sum())) for item in items) / weights
    assert bit_penalty(model).item() == pytest.approx(want, rel=1e-6)
    controller = CPQController(model, torch.optim.SGD(model.parameters(), lr=0), 400)
    assert controller.metrics()["expected_bits"] == pytest.approx(want, rel=1e-6)
    with pytest.raises(CPQError, match="no quantized weights that train"):
        bit_penalty(build("llama"))


def penalty_gradient(model):
    items = learned(model)
    return dict(
        zip(items, torch.autograd.grad(bit_penalty(model), [q.bit_logits for q in items.values()]), strict=True)
    )


class Spy:
    """Before each optimizer step: what the logits hold, and after it what the controller made of it."""

    def __init__(self, model, optimizer):
        self.model, self.seen = model, []
        self.handle = optimizer.register_step_pre_hook(self.before)

    def before(self, *_):
        if not any(item.learning for item in learned(self.model).values()):
            return
        gradients = {name: item.bit_logits.grad.clone() for name, item in learned(self.model).items()}
        self.seen.append((gradients, penalty_gradient(self.model)))


def check_step(spy, controller, scale=1.0):
    """The last step's gradient was that of the loss plus multiplier times that of the penalty."""
    learner = controller._learners["weight"]
    gradients, penalties = spy.seen[-1]
    assert float(learner.multiplier) != 0
    for row, name in enumerate(gradients):
        want = gradients[name] / scale + learner.multiplier * penalties[name]
        assert torch.allclose(learner.gradient[row, : want.numel()], want, rtol=1e-4, atol=1e-12), name


class SpyCallback(TrainerCallback):
    """Has to come before CPQCallback, whose hook takes the gradients away."""

    def __init__(self, callback, scale=1.0):
        self.callback, self.scale, self.spy, self.steps = callback, scale, None, 0

    def on_train_begin(self, args, state, control, *, model, optimizer, **kwargs):
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        self.spy = Spy(model, optimizer)

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.callback.controller.learning:
            check_step(self.spy, self.callback.controller)
            self.steps += 1


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"gradient_accumulation_steps": 3},
        {"gradient_accumulation_steps": 4},  # 18 batches: the last window has 2
        {"label_smoothing_factor": 0.1},
        {"max_grad_norm": 1e-3},
        {"weight_decay": 0.5, "optim": "sgd"},
    ],
    ids=str,
)
def test_one_gradient_a_step_whatever_the_trainer_does(fields, tmp_path):
    model = prepare_model(build("resnet"), CPQConfig(**LEARN))
    callback = CPQCallback()
    spy = SpyCallback(callback)
    batches = 18
    epoch = math.ceil(batches / fields.get("gradient_accumulation_steps", 1))
    assert learning_steps(5 * epoch) > epoch  # so that lengths still learn in the last window of an epoch
    steps = 5 * epoch
    args = arguments(tmp_path, max_steps=-1, num_train_epochs=5, **fields)
    Trainer(model, args, train_dataset=data(4 * batches), callbacks=[spy, callback]).train()
    assert spy.steps == learning_steps(steps) - 1  # the last of them ends with the decision
    assert spy.spy.seen
    assert summarize(model).mean_bits <= 3.0


@pytest.mark.parametrize("fused", [False, True])
def test_scaled_gradients_are_unscaled(fused):
    """A fused optimizer gets scaled gradients together with `grad_scale`; any other gets them unscaled."""
    model = prepare_model(build("resnet"), CPQConfig(**LEARN)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    spy = Spy(model, optimizer)
    controller = CPQController(model, optimizer, 400)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(2):
        scaler.scale(model(**inputs("resnet")).loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        check_step(spy, controller, 1024.0 if fused else 1.0)


def test_a_step_with_an_overflow_moves_no_length():
    model = prepare_model(build("resnet"), CPQConfig(**LEARN)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0)
    controller = CPQController(model, optimizer, 400)
    for loss_factor in (1.0, math.inf):
        before = {name: item.bit_logits.detach().clone() for name, item in learned(model).items()}
        state = controller._learners["weight"].state_dict()
        (model(**inputs("resnet")).loss * loss_factor).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(item.bit_logits, before[name]) for name, item in learned(model).items())
    assert controller._learners["weight"].state_dict() == state


def test_optimizers_leave_lengths_alone():
    """Neither their rate nor weight decay reaches the logits, before the decision and after it."""
    runs = []
    for optimizer_class, rate, decay in ((torch.optim.SGD, 0.0, 0.0), (torch.optim.AdamW, 0.1, 5.0)):
        model = prepare_model(build("resnet"), CPQConfig(**LEARN)).train()
        logits = {id(item.bit_logits) for item in learned(model).values()}
        others = [parameter for parameter in model.parameters() if id(parameter) not in logits]
        own = [parameter for parameter in model.parameters() if id(parameter) in logits]
        groups = [{"params": others, "lr": 0.0}, {"params": own, "lr": rate, "weight_decay": decay}]
        optimizer = optimizer_class(groups, lr=0.0)
        CPQController(model, optimizer, 10)
        torch.manual_seed(0)
        for _ in range(8):
            model(**inputs("resnet")).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append({name: item.bit_logits.detach().clone() for name, item in learned(model).items()})
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())
    assert all(abs(value).min() == 1e4 for value in runs[0].values())


# --- the step --------------------------------------------------------------------------------------------------------


def reference(phi, kept, gradients, shares, tied, target, steps):
    """Logits and multiplier after these gradients, in float64, by the formulas of bit_widths.py and of Adam's paper.

    `phi`, `kept` and the gradients are `[widths, most bits]`, `kept` zero where a width has fewer bits.
    """
    phi, first, second = phi.double(), torch.zeros_like(phi).double(), torch.zeros_like(phi).double()
    multiplier, integral, scale, count = 0.0, 0.0, 0.0, 0
    for gradient in gradients:
        if not gradient.isfinite().all():
            continue
        leaf = phi.clone().requires_grad_()
        mean = (shares * (2 + (leaf.sigmoid().cumprod(1) * kept).sum(1))).sum()
        (penalty,) = torch.autograd.grad(mean, leaf)
        scale = (
            gradient.norm() / penalty.norm() if count == 0 else 0.99 * scale + 0.01 * gradient.norm() / penalty.norm()
        )
        if target is not None:
            integral = integral + 10 / steps * scale * (mean.detach() - target)
            multiplier = integral + 2 * scale * (mean.detach() - target)
        total = tied.double() @ (gradient + multiplier * penalty)
        count += 1
        first, second = 0.9 * first + 0.1 * total, 0.99 * second + 0.01 * total**2
        move = first / (1 - 0.9**count) / ((second / (1 - 0.99**count)).sqrt() + 1e-20)
        phi = (phi - 15 / steps * move).clamp(-5, 5)
    return phi, multiplier


@pytest.mark.parametrize("target", [None, 2.5, 4.0])
@pytest.mark.parametrize("scale", [1.0, 1e-9], ids=["a small model", "a mean over a huge one"])
def test_logits_follow_adam_in_float64(target, scale):
    """Rows of different length, two of them tied, gradients that overflow now and then, until the logits' bounds."""
    names = {"q_proj": 8, "k_proj": 4, "other": 16}
    model = nn.ModuleDict({name: nn.Linear(8, size) for name, size in names.items()})
    prepare_model(
        model,
        CPQConfig(
            modules_to_not_convert=[], **LEARN | {"target_bits": target}, overrides={"other": {"weight_bits": 7}}
        ),
    )
    items = [model[name].weight_quantizer for name in names]
    learner = WidthLearner(items, [item.spec.numel for item in items], [0, 0, 1], target, steps=60)
    kept = torch.tensor([[1.0, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    tied = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]])
    drift = torch.linspace(-0.6, 1.2, 15).view(3, 5)
    torch.manual_seed(0)
    gradients = [scale * kept * (torch.randn(3, 5) + drift) for _ in range(60)]
    gradients[0][2, 0], gradients[7][0, 1], gradients[21][1, 2] = math.inf, math.nan, -math.inf
    for gradient in gradients:
        before, state = [item.bit_logits.tolist() for item in items], copy.deepcopy(learner.state_dict())
        for item, row in zip(items, gradient, strict=True):
            item.bit_logits.grad = row[: item.bit_logits.numel()].clone()
        learner.step()
        if not gradient.isfinite().all():
            assert (before, state) == ([item.bit_logits.tolist() for item in items], learner.state_dict())
    shares = torch.tensor([8.0, 4, 16], dtype=torch.float64) / 28
    phi, multiplier = reference(2 * kept, kept, [g.double() for g in gradients], shares, tied, target, 60)
    assert (phi.abs() == 5).any()
    assert phi.min() < 0
    # 60 steps of rounding, relative to logits and sizes of about 1
    for item, want in zip(items, phi, strict=True):
        assert torch.allclose(item.bit_logits.double(), want[: item.bit_logits.numel()], rtol=0, atol=2e-5)
    assert float(learner.multiplier) == pytest.approx(float(multiplier), rel=1e-4)


def test_a_state_saved_before_torchs_adam_goes_on():
    """Checkpoints hold what the learner saved when it had an Adam written by hand; numbers are of such a run."""
    state = {
        "multiplier": [3.2361412048339844], "integral": [0.2993151843547821], "scale": [3.863145589828491],
        "count": [2.0], "costs": [16, 8],
        "first": [[0.15595625340938568, 0.0626877173781395], [-0.06599912792444229, 0.0]],
        "second": [[0.013738961890339851, 0.0045729889534413815], [0.008183704689145088, 0.0]],
    }  # fmt: skip
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    fields = {"weight_bits": 4, "learn_bits": True, "target_bits": 3.0, "modules_to_not_convert": []}
    prepare_model(model, CPQConfig(**fields, overrides={"1": {"weight_bits": 3}}))
    controller = CPQController(model, torch.optim.SGD(model.parameters(), lr=0.0), 400)
    settings = controller.settings.checkpoint_fields()
    controller.load_state_dict({"step": 2, "total_steps": 400, "settings": settings, "lengths": {"weight": state}})
    assert controller.state_dict()["lengths"]["weight"] == state
    logits, gradients = ([1.7018201351165771, 2.046760320663452], [1.931250810623169]), ([-0.5, 0.75], [0.25])
    items = [layer.weight_quantizer for layer in model]
    for item, values, gradient in zip(items, logits, gradients, strict=True):
        item.bit_logits.data.copy_(torch.tensor(values))
        item.bit_logits.grad = torch.tensor(gradient)
    controller._learners["weight"].step()
    assert items[0].bit_logits.tolist() == pytest.approx([1.5852248668670654, 1.9225988388061523], rel=1e-6)
    assert items[1].bit_logits.tolist() == pytest.approx([1.9534863233566284], rel=1e-6)
    after = controller.state_dict()["lengths"]["weight"]
    assert after["multiplier"] == pytest.approx([3.184342861175537], rel=1e-6)
    assert after["count"] == [3.0]


class NothingReadBack(TorchDispatchMode):
    """Fails where an operation gives Python a number of a tensor, for which a GPU would have to be waited for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(function), "a number was read back"
        return function(*args, **(kwargs or {}))


def test_a_step_reads_nothing_back(monkeypatch):
    """Nothing in the hooks waits for the device, with overflows, both learners and oscillating weights."""
    config = CPQConfig(
        **LEARN, activation_bits=6, learn_activation_bits=True, freeze_oscillating=True,
        overrides={"classifier": {"learn_bits": False}}, modules_to_not_convert=[],
    )  # fmt: skip
    model = prepare_model(build("resnet"), config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    controller = CPQController(model, optimizer, 400)
    for factor in (1.0, 1.0, math.inf, 1.0):
        (model(**inputs("resnet")).loss * factor).backward()
        optimizer.step()  # its own reads do not count: `step` of an Adam that is not fused is on the CPU
        optimizer.zero_grad()
    controller.detach()
    optimizer.grad_scale = torch.tensor(1024.0)
    for item in learned(model).values():
        item.bit_logits.grad = torch.ones_like(item.bit_logits)
    for name in ("tolist", "numpy", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("a tensor was read back"))
    before = [item.bit_logits.clone() for item in learned(model).values()]
    with NothingReadBack():
        for _ in range(4):  # one of which looks at oscillating weights
            controller.advance(optimizer)
            controller._put_logits_back()
    assert not any(torch.equal(a, b.bit_logits) for a, b in zip(before, learned(model).values(), strict=True))


def test_two_processes_learn_the_same_lengths():
    torchrun("distributed_lengths.py")


# --- what a user sees ------------------------------------------------------------------------------------------------


def toy(**fields):
    """A model of which one layer needs precision and one has most of the weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4))
    return prepare_model(model, CPQConfig(modules_to_not_convert=[], **(LEARN | fields)))


def fit(model, steps, total=None):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    controller = CPQController(model, optimizer, total or steps)
    torch.manual_seed(0)
    teacher, model = torch.randn(16, 4), model.train()
    for _ in range(steps):
        x = torch.randn(32, 16)
        nn.functional.cross_entropy(model(x), (x @ teacher).argmax(1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return controller


@pytest.mark.parametrize("budget", ["weights", "macs"])
@pytest.mark.parametrize("target", [2.0, 2.5, 3.9, 5.0])
def test_target_is_met_at_or_under(target, budget):
    model = toy(target_bits=target, budget=budget)
    assert fit(model, 200).learning is False
    report = summarize(model)
    assert report.mean_bits <= target + 1e-9  # every weight of a Linear is used once an example: both budgets agree
    assert report.mean_bits > target - 1  # the layer of 256 x 256 has 93 % of the weights: it may not fit
    assert all(2 <= layer.spec.weight.bits <= 5 for layer in report.layers)


def test_layers_of_fixed_width_count_and_stay():
    model = toy(target_bits=2.6, overrides={"4": {"weight_bits": 8, "learn_bits": False}})
    fit(model, 200)
    report = summarize(model)
    assert report.to_dict()["layers"]["4"]["bits"] == 8
    assert report.mean_bits <= 2.6
    with pytest.raises(CPQError, match=r"`target_bits` \(=2.5\) cannot be met: .* the mean is still 7.5\d"):
        toy(target_bits=2.5, overrides={"2": {"weight_bits": 8, "learn_bits": False}})


def test_multiply_accumulates_weigh_convolutions_by_their_positions():
    model = prepare_model(build("resnet"), CPQConfig(**LEARN, budget="macs")).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    controller = CPQController(model, optimizer, 400)
    model(**inputs("resnet")).loss.backward()
    optimizer.step()
    costs = dict(zip(controller._layers, controller._learners["weight"].costs, strict=True))
    stem = "resnet.embedder.embedder.convolution"
    assert costs[stem] == 4 * 16 * 16 * 8 * 3 * 49  # 4 images of 32 x 32 pixels, stride 2
    assert controller.state_dict()["lengths"]["weight"]["costs"] == list(costs.values())


def test_tied_layers_get_one_width():
    model = prepare_model(build("llama"), CPQConfig(weight_bits=6, learn_bits=True, target_bits=3.7, tie_bits=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    controller = CPQController(model.train(), optimizer, 60)
    for step in range(40):
        model(**inputs("llama", seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not controller.learning
    bits = {name: layer["bits"] for name, layer in summarize(model).to_dict()["layers"].items()}
    assert len(set(bits.values())) > 1
    for number in range(2):
        attention = f"model.layers.{number}.self_attn."
        assert len({bits[f"{attention}{part}_proj"] for part in "qkv"}) == 1
        assert bits[f"model.layers.{number}.mlp.gate_proj"] == bits[f"model.layers.{number}.mlp.up_proj"]


def test_layers_with_another_range_are_not_tied():
    """Value projections that may have 3 bits at most keep to that, whatever width query and key agree on."""
    config = CPQConfig(**LEARN, tie_bits=True, overrides={"v_proj": {"weight_bits": 3}})
    model = prepare_model(build("llama"), config).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    controller = CPQController(model, optimizer, 4)
    with torch.no_grad():
        for name, item in learned(model).items():
            item.bit_logits.fill_(5.0 if "q_proj" in name or "k_proj" in name else -5.0)
    controller.finish()
    for name, layer in summarize(model).to_dict()["layers"].items():
        if name.endswith(("q_proj", "k_proj")):
            assert layer["bits"] == 5
        elif name.endswith("v_proj"):
            assert layer["bits"] <= 3


def test_activations_learn_lengths_signed_and_unsigned():
    model = toy(activation_bits=6, learn_activation_bits=True, target_activation_bits=4.0)
    controller = fit(model, 200)
    layers = summarize(model).layers
    assert [layer.spec.activation.bits for layer in layers] != [6, 6, 6]
    signs = [item.resolved_spec().signed for name, item in quantizers(model) if name.endswith("input_quantizer")]
    assert signs == [True, False, False]
    sizes = controller._learners["activation"].costs
    assert sizes == [32 * 16, 32 * 256, 32 * 256]
    mean = sum(size * layer.spec.activation.bits for size, layer in zip(sizes, layers, strict=True)) / sum(sizes)
    assert mean <= 4.0
    x = torch.randn(8, 16)
    trained = model.eval()(x)
    assert torch.equal(pack_model(model)(x), trained)


def test_activation_dropbits_change_training_only():
    model = prepare_model(build("resnet"), CPQConfig(activation_bits=4, dropbits=0.0, activation_dropbits=0.5))
    batch = inputs("resnet")
    calibrate_model(model, [batch])
    plain = logits(model, batch)
    CPQController(model, torch.optim.SGD(model.parameters(), lr=0), 10)
    assert torch.equal(logits(model, batch), plain)
    model.train()
    for item in model.modules():
        if isinstance(item, nn.BatchNorm2d):
            item.eval()
    assert not torch.equal(model(**batch).logits, plain)


def test_deciding_moves_no_output_where_no_width_changes():
    """Half the bits, twice the step: the grid of a decided width is the one that was evaluated before."""
    model = toy(target_bits=None)
    controller = fit(model, 40, total=400)
    x = torch.randn(8, 16)
    before = model.eval()(x)
    assert torch.equal(before, model(x))
    controller.finish()
    assert torch.equal(model(x), before)
    assert torch.equal(pack_model(model)(x), before)


def test_training_that_ends_early_is_decided_and_told(caplog):
    model = toy(target_bits=2.6)
    controller = fit(model, 10, total=400)
    with pytest.raises(CPQError, match=r"bit-widths of `0` are still being learned: call `CPQController.finish\(\)`"):
        pack_model(model)
    caplog.set_level(logging.WARNING, logger="cpq_hf")
    controller.finish()
    assert "training ended at step 10, before the bit-widths were to be fixed at step 100 of 400" in caplog.text
    assert summarize(model).mean_bits <= 2.6
    pack_model(model)


def test_too_few_steps_are_warned_about(caplog):
    caplog.set_level(logging.WARNING, logger="cpq_hf")
    fit(toy(), 0, total=400)
    assert not caplog.text
    fit(toy(), 0, total=20)
    assert "bit-widths are learned during the first 5 of 20 optimizer steps, too few" in caplog.text
    assert "train at least 400 steps" in caplog.text


def run(folder, resume=None, **fields):
    model = build("resnet")
    args = arguments(folder, save_strategy="steps", save_steps=1, max_steps=12, seed=3, **fields)
    config = CPQConfig(
        **LEARN, activation_bits=6, learn_activation_bits=True, target_activation_bits=4.0, budget="macs"
    )
    trainer = Trainer(model, args, train_dataset=data(), callbacks=[CPQCallback(config)])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_resume_is_bit_identical_in_every_phase(tmp_path):
    straight = run(tmp_path / "straight")
    want = straight.model.state_dict()
    for stop in (2, 3, 6):  # while learning, right after the decision, later
        got = run(tmp_path / "resumed", str(tmp_path / "straight" / f"checkpoint-{stop}")).model.state_dict()
        assert want.keys() == got.keys()
        for key, value in want.items():
            assert torch.equal(got[key], value), (stop, key)


def test_the_log_and_the_checkpoints(tmp_path):
    trainer = run(tmp_path)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    expected = [entry["cpq/expected_bits"] for entry in entries]
    assert 2 < expected[0] < 5
    assert expected[0] % 1 > 0.01
    assert expected[-1] <= 3.0 + 1e-6
    assert {"cpq/multiplier", "cpq/activation_expected_bits", "cpq/activation_multiplier"} <= entries[0].keys()
    batch = inputs("resnet")
    for step, learning in ((2, True), (12, False)):
        loaded = type(trainer.model).from_pretrained(tmp_path / f"checkpoint-{step}")
        assert all(item.learning is learning for item in learned(loaded).values())
    assert torch.equal(logits(loaded, batch), logits(trainer.model, batch))
    bits = [layer.spec.weight.bits for layer in summarize(loaded).layers]
    assert bits == [layer.spec.weight.bits for layer in summarize(trainer.model).layers]
    pack_model(loaded)
    loaded.save_pretrained(tmp_path / "packed")
    again = type(loaded).from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(again, batch), logits(trainer.model, batch))
    assert bits == [layer.spec.weight.bits for layer in summarize(again).layers]


def test_best_checkpoint_from_before_the_decision_is_decided(tmp_path, caplog):
    model = prepare_model(build("resnet"), CPQConfig(**LEARN))
    args = arguments(
        tmp_path, max_steps=12, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, metric_for_best_model="cpq_first", greater_is_better=False,
    )  # fmt: skip
    trainer = Trainer(
        model, args, train_dataset=data(), eval_dataset=data(8), callbacks=[CPQCallback(pack=True)],
        compute_metrics=lambda _: {"cpq_first": len(trainer.state.log_history)},
    )  # fmt: skip
    caplog.set_level(logging.WARNING, logger="cpq_hf")
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert "they are fixed now" in caplog.text
    assert summarize(model).mean_bits <= 3.0


def test_wrong_saved_state():
    controller = fit(toy(), 0, total=400)
    with pytest.raises(CPQError, match="saved state of the learned bit-widths does not fit this model"):
        controller.load_state_dict({"step": 1, "lengths": {"weight": {"multiplier": [0.0]}}})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_bits": 3}, r"`target_bits` \(=3\) goes with `learn_bits=True`"),
        ({"learn_bits": True, "target_bits": 1.5}, r"`target_bits` must be a number from 2 to 4 \(`min_bits` to"),
        ({"learn_bits": True, "target_bits": 4.5}, r"`target_bits` must be a number from 2 to 4 .*, got 4.5"),
        ({"learn_bits": True, "target_bits": "3"}, "`target_bits` must be a number from 2 to 4"),
        ({"learn_bits": 1}, "`learn_bits` must be true or false, got 1"),
        ({"tie_bits": None}, "`tie_bits` must be true or false, got None"),
        ({"budget": "flops"}, "`budget` must be one of 'weights', 'macs', got 'flops'"),
        ({"learn_activation_bits": True}, "`learn_activation_bits` needs `activation_bits`"),
        ({"target_activation_bits": 3}, "`target_activation_bits` needs `activation_bits`"),
        ({"activation_bits": 4, "target_activation_bits": 3}, "goes with `learn_activation_bits=True`"),
        ({"activation_dropbits": 2}, "`activation_dropbits` must be a number from 0 to 0.9, got 2"),
        ({"overrides": {"a": {"learn_bits": "no"}}}, r"in `overrides\['a'\]`: `learn_bits` must be true or false"),
    ],
)
def test_config_fields(fields, message):
    with pytest.raises(CPQError, match=message):
        CPQConfig(**fields)


def test_a_budget_of_multiply_accumulates_needs_some():
    model = prepare_model(
        nn.Sequential(nn.Embedding(8, 16), nn.Linear(16, 2)),
        CPQConfig(**LEARN, budget="macs", quantize_embeddings=True, modules_to_not_convert=["1"]),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    CPQController(model.train(), optimizer, 400)
    model(torch.arange(8)).sum().backward()
    with pytest.raises(CPQError, match="no multiply-accumulates or inputs to count; use `budget='weights'`"):
        optimizer.step()
