"""Freezing of weights that oscillate: which, where, and that it survives a resume."""

from __future__ import annotations

import pytest
import torch
from models import build, inputs
from torch import nn

from cpq_hf import CPQConfig, CPQController, CPQError, prepare_model
from cpq_hf.nn import TrainingLayer
from cpq_hf.training.oscillation import DRIFT, INTERVAL, LEVEL, freeze_oscillating
from cpq_hf.training.schedule import indecision


def frozen_share(layers, optimizer) -> torch.Tensor | None:
    """Share of the weights that are frozen; None before the first look."""
    drifts = [state[DRIFT] for layer in layers if DRIFT in (state := optimizer.state.get(layer.weight, {}))]
    return torch.cat([drift.isinf().flatten() for drift in drifts]).double().mean() if drifts else None


def one_row(bits: int = 4, **fields):
    """A layer of three weights with a step size of 1, and its optimizer after a step."""
    layer = prepare_model(nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 1)), CPQConfig(weight_bits=bits, **fields))[0]
    layer.weight_quantizer.log_alpha.data.zero_()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.0)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return layer, optimizer


def look(layer, optimizer, values, limit: float = 0.05) -> list[float]:
    layer.weight.data.copy_(torch.tensor([values]))
    freeze_oscillating([layer], optimizer, limit)
    return layer.weight[0].tolist()


def test_what_goes_to_and_fro_is_frozen_where_it_mostly_is():
    layer, optimizer = one_row()
    look(layer, optimizer, [1.6, -6.0, 0.4])
    for n in range(40):
        to_and_fro = 1.4 if n % 4 == 3 else 1.6  # across the boundary at 1.5, mostly on level 2
        drifting = -6.0 + 0.3 * n
        found = look(layer, optimizer, [to_and_fro, drifting, 0.4])
    assert found == pytest.approx([2.0, drifting, 0.4])
    assert optimizer.state[layer.weight][DRIFT].isinf().flatten().tolist() == [True, False, False]
    assert frozen_share([layer], optimizer).item() == pytest.approx(1 / 3)


@pytest.mark.parametrize("speed", [0.05, 0.3, 1.0, 2.5])
def test_a_weight_that_drifts_is_left_alone(speed):
    layer, optimizer = one_row(bits=8)
    for n in range(60):
        value = -100 + speed * n
        assert look(layer, optimizer, [value, -value, 0.0]) == pytest.approx([value, -value, 0.0])
    assert frozen_share([layer], optimizer) == 0


def test_a_single_return_after_a_long_time_is_no_oscillation():
    layer, optimizer = one_row()
    for value in [0.4] * 20 + [0.6] * 40 + [0.4] * 20:
        assert look(layer, optimizer, [value, 0.0, 0.0])[0] == pytest.approx(value)


def test_a_frozen_weight_follows_the_step_size():
    layer, optimizer = one_row(bits=2)  # the centred grid: levels at half steps
    for n in range(20):
        look(layer, optimizer, [0.1 if n % 2 else -0.1, 0.0, 0.0])
    held = layer.weight[0, 0].item()
    assert abs(held) == pytest.approx(0.5)
    layer.weight_quantizer.log_alpha.data.fill_(0.5)
    found = look(layer, optimizer, [held + 0.1, 0.0, 0.0])
    assert found[0] == pytest.approx(held * torch.tensor(0.5).exp().item())


def test_more_readily_as_training_goes_on():
    assert indecision(0.0) == pytest.approx(0.4)
    assert indecision(0.5) < 0.3
    assert indecision(1.0) == pytest.approx(0.05)


def test_nothing_before_the_optimizer_has_made_its_state():
    layer, _ = one_row()
    optimizer = torch.optim.Adam(layer.parameters())
    freeze_oscillating([layer], optimizer, 0.05)
    assert not optimizer.state[layer.weight]
    assert frozen_share([layer], optimizer) is None
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()  # makes it, and does not stumble over ours


class Run:
    """Training of a small model at a rate at which weights oscillate."""

    def __init__(self, dtype: torch.dtype, **fields) -> None:
        model = build("llama").to(dtype)
        self.model = prepare_model(
            model, CPQConfig(**({"weight_bits": 2, "freeze_oscillating": True} | fields))
        ).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-2, weight_decay=0.0)
        self.controller = CPQController(self.model, self.optimizer, total_steps=80)

    def go_on(self, steps: int) -> None:
        for _ in range(steps):
            self.model(**inputs("llama", seed=self.controller.step % 3)).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    @property
    def frozen(self) -> float:
        layers = [layer for layer in self.model.modules() if isinstance(layer, TrainingLayer)]
        return frozen_share(layers, self.optimizer).item()


@pytest.mark.shows("frozen weights survive a resume, to the bit", "a loop")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resume_is_exact(dtype):
    straight = Run(dtype)
    straight.go_on(30)
    state = [part.state_dict() for part in (straight.model, straight.optimizer, straight.controller)]
    saved = torch.load(_stored(state), weights_only=True)
    straight.go_on(30)
    assert 0.01 < straight.frozen < 0.9
    resumed = Run(dtype)
    for part, values in zip((resumed.model, resumed.optimizer, resumed.controller), saved, strict=True):
        part.load_state_dict(values)
    resumed.go_on(30)
    assert resumed.frozen == straight.frozen
    for key, value in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], value), key


def _stored(state):
    import io

    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


def test_it_can_be_switched_off():
    run = Run(torch.float32, freeze_oscillating=False)
    run.go_on(2 * INTERVAL)
    assert not any(LEVEL in state for state in run.optimizer.state.values())
    with pytest.raises(CPQError, match="`freeze_oscillating` must be true or false, got 1"):
        CPQConfig(freeze_oscillating=1)


def test_learned_lengths_are_looked_at_once_they_are_decided():
    run = Run(torch.float32, learn_bits=True, min_bits=2, overrides={"*": {"weight_bits": 4}}, target_bits=3.0)
    run.go_on(run.controller.learning_steps - 1)
    assert not any(LEVEL in state for state in run.optimizer.state.values())
    run.go_on(2 * INTERVAL)
    assert any(LEVEL in state for state in run.optimizer.state.values())
