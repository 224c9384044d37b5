"""Run by torchrun in test_bit_widths.py: two processes on different data learn the same lengths."""

import os
import sys

import torch
import torch.distributed as dist
from models import build, inputs
from test_bit_widths import LEARN, Spy, check_step, learned

from cpq_hf import CPQConfig, CPQController, prepare_model, summarize


def train(check: bool, **fields) -> torch.Tensor:
    """The decided lengths and the gradients that led there."""
    rank = dist.get_rank()
    model = prepare_model(build("resnet"), CPQConfig(**LEARN, **fields))
    wrapped = torch.nn.parallel.DistributedDataParallel(model).train()
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-3)
    spy = Spy(model, optimizer) if check else None
    controller = CPQController(wrapped, optimizer, 12)
    for step in range(8):
        for micro in range(2):
            torch.manual_seed(100 * step + 10 * micro + rank)  # other masks on each process
            wrapped(**inputs("resnet", seed=100 * step + 10 * micro + rank)).loss.div(2).backward()
        optimizer.step()
        optimizer.zero_grad()
        if spy and controller.learning:
            check_step(spy, controller)
    assert not controller.learning
    assert summarize(model).mean_bits <= 3.0 or fields.get("budget") == "macs"
    states = [learner.state_dict() for learner in controller._learners.values()]
    gradients = [torch.tensor(state["first"]).flatten() for state in states]
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    return torch.cat([item.bit_logits.detach() for item in learned(model).values()] + gradients)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    weights = train(check=True)
    both = train(
        check=False, budget="macs", activation_bits=6, learn_activation_bits=True, target_activation_bits=4.0
    )  # fmt: skip
    for mine in (weights, both):
        everyone = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(everyone, mine)
        assert torch.equal(everyone[0], everyone[1]), everyone
    if dist.get_rank() == 0:
        sys.stdout.write("equal\n")
        sys.stdout.flush()
    dist.barrier()
    os._exit(0)  # see distributed_calibration.py


if __name__ == "__main__":
    main()
