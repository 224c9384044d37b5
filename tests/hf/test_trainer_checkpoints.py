"""Power cuts, NaN and full disks: what was saved before stays whole, and training goes on from there exactly."""

from __future__ import annotations

import json
import logging
import random
import signal
import sys

import pytest
import torch
from models import build
from safetensors.torch import load_file
from test_distributed import HERE, run, train
from test_trainer import arguments, data
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from cpq_hf import CPQCallback, CPQConfig, CPQError, prepare_model
from cpq_hf.hf.trainer_checkpoints import STATE_FILE, _is_whole

KILLS = 20


@pytest.mark.shows("killed at random points, it resumes to the same bits", "Trainer")
@pytest.mark.slow
def test_killed_at_random_points_it_resumes_to_the_same_bits(tmp_path):
    """While lengths are learned, while they are decided, after that, and while a checkpoint is written."""
    options = ("--learn", "--steps", "24", "--save_steps", "1")
    straight = train(tmp_path / "straight", "one", *options)
    dice, kills, aside = random.Random(0), 0, 0
    while kills < KILLS:  # several runs, each killed again and again until it comes through
        folder = tmp_path / f"killed-{kills}"
        folder.mkdir()
        last = folder / "checkpoints" / "checkpoint-24"
        command = [sys.executable, str(HERE / "distributed_training.py"), str(folder), *options, "--resume_last"]
        while (done := run([*command, "--kill_after", str(dice.uniform(0.0, 0.5))])).returncode != 0:
            assert done.returncode == -signal.SIGKILL, done.stderr
            kills += 1
            if _is_whole(last):
                break  # killed when all was trained: resumed there, Trainer would make one step more
        aside += len(list((folder / "checkpoints").glob("incomplete-*")))
        history = json.loads((last / STATE_FILE).read_text())["log_history"]
        losses = torch.tensor([entry["loss"] for entry in history if "loss" in entry], dtype=torch.float64)
        saved = load_file(last / "model.safetensors") | {"losses": losses}
        for outcome in (saved, load_file(folder / "outcome.safetensors") if done.returncode == 0 else saved):
            for name, value in straight.items():
                assert torch.equal(outcome[name], value), name
    sys.stdout.write(f"{kills} kills, {aside} of them while a checkpoint was written\n")


@pytest.mark.shows("a half-saved checkpoint is set aside", "Trainer")
def test_a_checkpoint_whose_saving_was_cut_off_is_set_aside(tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="cpq_hf")
    for number in (2, 4, 6, 8):
        (tmp_path / f"checkpoint-{number}").mkdir()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text(json.dumps({"global_step": 2}))
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text('{"global_st')
    (tmp_path / "checkpoint-6" / "trainer_state.json").write_text("[]")
    (tmp_path / "checkpoint-8" / "model.safetensors").write_text("half of it")
    (tmp_path / "checkpoint-mine").mkdir()
    Trainer(build("resnet"), arguments(tmp_path), callbacks=[CPQCallback(CPQConfig())])
    names = sorted(folder.name for folder in tmp_path.iterdir())
    assert names == ["checkpoint-2", "checkpoint-mine", *(f"incomplete-checkpoint-{n}" for n in (4, 6, 8))]
    assert (tmp_path / "incomplete-checkpoint-8" / "model.safetensors").read_text() == "half of it"
    assert caplog.text.count("was cut off while it was saved") == 3
    (tmp_path / "checkpoint-8").mkdir()
    Trainer(build("resnet"), arguments(tmp_path), callbacks=[CPQCallback(CPQConfig())])
    assert (tmp_path / "incomplete-checkpoint-8-2").is_dir()


@pytest.mark.parametrize("left", [0, 1], ids=["whole epochs", "within an epoch"])
def test_resuming_what_was_complete_warns_where_it_trains_on(left, tmp_path, caplog):
    def trainer(**fields) -> Trainer:
        model = prepare_model(build("resnet"), CPQConfig())
        return Trainer(model, arguments(tmp_path, **fields), train_dataset=data(), callbacks=[CPQCallback()])

    steps = len(trainer().get_train_dataloader()) - left
    trainer(max_steps=steps, save_strategy="steps", save_steps=steps).train()
    caplog.set_level(logging.WARNING, logger="cpq_hf")
    resumed = trainer(max_steps=steps)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{steps}"))
    assert resumed.state.global_step == steps + left  # Trainer's; were it mended there, nobody need be warned
    assert caplog.text.count("Load the model from the checkpoint instead") == left


class Spoil(TrainerCallback):
    """Makes the gradient of one weight infinite at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, *, model, **kwargs):
        if state.global_step == self.step - 1:
            model.resnet.encoder.stages[1].layers[0].layer[0].convolution.weight.grad.fill_(torch.inf)


@pytest.mark.shows("a diverged model is named and not saved", "Trainer")
def test_a_diverged_model_is_named_and_never_saved(tmp_path):
    model = prepare_model(build("resnet"), CPQConfig())
    args = arguments(tmp_path, max_steps=8, save_strategy="steps", save_steps=2, logging_steps=100, max_grad_norm=0.0)
    trainer = Trainer(model, args, train_dataset=data(), callbacks=[CPQCallback(), Spoil(4)])
    layer = "resnet.encoder.stages.1.layers.0.layer.0.convolution"
    with pytest.raises(CPQError, match=rf"diverged: at step 4 `{layer}\.\w+.* lower learning rate"):
        trainer.train()
    last = get_last_checkpoint(str(tmp_path))
    assert last.endswith("checkpoint-2")
    saved = type(model).from_pretrained(last)
    assert all(bool(torch.isfinite(value).all()) for value in saved.parameters())


@pytest.mark.shows("a full disk leaves the last checkpoint whole", "Trainer")
def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch):
    """Saving fails half-way; the checkpoint before it resumes, the half one is set aside."""

    def trainer():
        model = prepare_model(build("resnet"), CPQConfig())
        args = arguments(tmp_path, max_steps=6, save_strategy="steps", save_steps=2)
        return Trainer(model, args, train_dataset=data(), callbacks=[CPQCallback()])

    broken = trainer()
    whole_save = broken._save_optimizer_and_scheduler

    def full_disk(folder):
        if folder.endswith("checkpoint-4"):
            raise OSError(28, "No space left on device")
        whole_save(folder)

    monkeypatch.setattr(broken, "_save_optimizer_and_scheduler", full_disk)
    with pytest.raises(OSError, match="No space left"):
        broken.train()
    resumed = trainer()
    assert get_last_checkpoint(str(tmp_path)).endswith("checkpoint-2")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert load_file(tmp_path / "checkpoint-6" / "model.safetensors")
