"""Distillation: the term, and the loss that a Trainer and a loop see."""

from __future__ import annotations

import copy

import pytest
import torch
from models import build, inputs
from test_trainer import arguments, data
from torch.nn import functional as F
from transformers import Trainer

from cpq_hf import CPQCallback, CPQConfig, CPQError, distill, distillation_loss, prepare_model


def test_the_term_is_the_divergence_of_softened_distributions():
    student, teacher = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    want = 4 * F.kl_div((student / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="none").sum(-1)
    assert torch.allclose(distillation_loss(student, teacher, temperature=2.0), want.mean(), rtol=1e-5)
    labels = torch.randint(7, (3, 5))
    labels[0, 2:] = labels[2, 0] = -100
    counted = want[labels != -100]
    assert torch.allclose(distillation_loss(student, teacher, labels, 2.0), counted.mean(), rtol=1e-5)
    by_items = distillation_loss(student, teacher, labels, 2.0, num_items_in_batch=40)
    assert torch.allclose(by_items, counted.sum() / 40, rtol=1e-5)
    assert distillation_loss(student, student).abs() < 1e-6
    assert torch.allclose(
        distillation_loss(student[:, 0], teacher[:, 0], torch.zeros(3), 2.0), want[:, 0].mean(), rtol=1e-5
    )


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit", "resnet"])
def test_the_loss_in_training_is_the_mixture(name):
    teacher, batch = build(name), inputs(name)
    model = prepare_model(copy.deepcopy(teacher), CPQConfig(weight_bits=2, dropbits=0.0)).train()
    for module in model.modules():  # the same statistics and no dropout, to compare
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    plain = model(**batch)
    handle = distill(model, teacher, weight=0.3, temperature=3.0)
    got = model(**batch)
    with torch.no_grad():
        taught = teacher(**{key: value for key, value in batch.items() if key != "labels"}).logits
    student = plain.logits
    if name in ("gpt2", "llama"):  # the last position predicts nothing that has a label
        student, taught = student[:, :-1], taught[:, :-1]
    want = 0.7 * plain.loss + 0.3 * distillation_loss(student, taught, temperature=3.0)
    assert torch.allclose(got.loss, want, rtol=1e-5)
    got.loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not teacher.training
    assert not [key for key in model.state_dict() if "teacher" in key]
    model.eval()
    assert model(**batch).loss.item() == pytest.approx(plain.loss.item(), rel=1e-5)
    handle.remove()
    assert model.train()(**batch).loss is not None


def test_positions_without_a_label_are_left_out():
    teacher, batch = build("llama"), inputs("llama")
    model = prepare_model(build("llama", seed=1), CPQConfig(dropbits=0.0)).train()
    distill(model, teacher, weight=1.0)
    batch["labels"] = batch["labels"].clone()
    batch["labels"][:, 3:] = -100
    loss = model(**batch).loss
    logits, taught = model(**batch).logits[:, :2], teacher(input_ids=batch["input_ids"]).logits[:, :2]
    assert torch.allclose(loss, distillation_loss(logits, taught), rtol=1e-5)


@pytest.mark.parametrize("name", ["resnet", "llama"])
def test_accumulation_changes_nothing(name, tmp_path):
    """4 batches of 2 in one step, or one of 8: the same weights after it."""
    weights = []
    for accumulation in (1, 4):
        teacher = build("llama", seed=1) if name == "llama" else build("resnet", seed=1)
        model = prepare_model(build(name), CPQConfig(dropbits=0.0))
        model.accepts_loss_kwargs = name == "llama"
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 0.0  # statistics of a batch are no business of this test:
                module.train = lambda mode=True, module=module: module  # they stay those of evaluation
                module.training = False
        distill(model, teacher)
        args = arguments(
            tmp_path, per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation,
            max_steps=1, optim="sgd", max_grad_norm=0.0,
        )  # fmt: skip
        rows = data(8) if name == "resnet" else [
            {key: value[index] for key, value in inputs("llama", 8).items()} for index in range(8)
        ]  # fmt: skip
        Trainer(model, args, train_dataset=rows, callbacks=[CPQCallback()]).train()
        weights.append({key: value.clone() for key, value in model.state_dict().items()})
    for key, value in weights[0].items():
        assert torch.allclose(value, weights[1][key], rtol=1e-4, atol=1e-6), key


def test_label_smoothing_is_refused_with_the_way_out(tmp_path):
    model = prepare_model(build("llama"), CPQConfig())
    distill(model, build("llama", seed=1))
    rows = [{key: value[0] for key, value in inputs("llama").items()}] * 4
    args = arguments(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(CPQError, match=r"the output has no loss: .*label_smoothing_factor.*cpq_hf.distillation_loss"):
        Trainer(model, args, train_dataset=rows, callbacks=[CPQCallback()]).train()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight": 0}, "`weight` must be a number above 0, at most 1, got 0"),
        ({"weight": 1.5}, "`weight` must be a number above 0, at most 1, got 1.5"),
        ({"temperature": 0}, "`temperature` must be a number above 0, got 0"),
        ({"temperature": "hot"}, "`temperature` must be a number above 0, got 'hot'"),
    ],
)
def test_arguments(fields, message):
    with pytest.raises(CPQError, match=message):
        distill(build("resnet"), build("resnet"), **fields)


def test_wrong_teachers():
    model = build("resnet")
    with pytest.raises(CPQError, match="`teacher` is the model itself"):
        distill(model, model)
    with pytest.raises(CPQError, match=r"teacher have shape \[4, 5\], those of the model \[4, 3\]"):
        distillation_loss(torch.zeros(4, 3), torch.zeros(4, 5))
