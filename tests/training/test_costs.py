"""What a batch tells of the costs of layers; those of convolutions, experts and tied weights are in other files."""

from __future__ import annotations

import torch
from torch import nn

from cpq_hf import CPQConfig, prepare_model
from cpq_hf.model.inspection import training_layers
from cpq_hf.training.costs import CostCounter


def test_training_passes_between_start_and_stop_count():
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
    fields = {"activation_bits": 8, "overrides": {"1": {"activation_bits": None}}, "modules_to_not_convert": []}
    prepare_model(model, CPQConfig(**fields))
    counter = CostCounter(layer for _, layer in training_layers(model))
    model.train()(torch.randn(5, 8))  # not yet
    counter.start()
    assert counter.counting
    model(torch.randn(3, 8))
    model(torch.randn(2, 7, 8))  # another batch that is accumulated
    model.eval()(torch.randn(5, 8))  # an evaluation in between
    counter.stop()
    assert not counter.counting
    model.train()(torch.randn(5, 8))  # no more
    uses = 3 + 2 * 7
    counter.gather()  # one process: nothing to do
    assert counter.multiply_accumulates() == [uses * 8 * 4, uses * 4 * 2]
    assert counter.input_elements() == [uses * 8]
    assert not model[0]._forward_hooks
