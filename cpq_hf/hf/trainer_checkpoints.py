"""Handle checkpoints that a run left unfinished, and keep NaN out of new ones."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from accelerate.state import PartialState
from torch import nn
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import CPQError
from ..model import inspection

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"  # what Trainer writes last into a checkpoint


def set_incomplete_checkpoints_aside(output_dir: str) -> None:
    """Rename checkpoints whose saving was cut off, so that resuming takes the last whole one. Nothing is deleted."""
    if PartialState().is_main_process:
        for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            if folder.name.rpartition("-")[2].isdigit() and not _is_whole(folder):
                aside = folder.with_name(f"incomplete-{folder.name}")
                number = 1
                while aside.exists():
                    number += 1
                    aside = folder.with_name(f"incomplete-{folder.name}-{number}")
                folder.rename(aside)
                logger.warning("%s was cut off while it was saved; it is set aside as %s", folder, aside.name)
    PartialState().wait_for_everyone()


def _is_whole(folder: Path) -> bool:
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(state, dict) and "global_step" in state


def check_not_diverged(model: nn.Module, state: TrainerState) -> None:
    """Raise `CPQError` if a parameter is NaN or infinite."""
    name = inspection.first_not_finite(model)
    if name is not None:
        raise CPQError(
            f"training has diverged: at step {state.global_step} `{name}` holds NaN or infinite values. Nothing of it "
            "was saved: the last checkpoint is good. Go on from there with a lower learning rate, or with clipped "
            "gradients (`max_grad_norm`)"
        )
