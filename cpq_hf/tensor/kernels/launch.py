"""Load Triton kernels where they can be launched, and choose the device."""

from __future__ import annotations

import contextlib
import importlib
import logging
import subprocess
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def load_kernels(module: str) -> ModuleType | None:
    """Import a module of kernels by its full name, if Triton is there and has what it needs to launch them."""
    try:
        import triton

        kernels = importlib.import_module(module)
        if any(isinstance(value, triton.JITFunction) for value in vars(kernels).values()):  # else: interpreted
            triton.runtime.driver.active.get_current_target()
    except (ImportError, RuntimeError, OSError, AssertionError, subprocess.SubprocessError) as error:
        logger.info("the Triton kernels are not available, torch operations do their work: %s", error)
        return None
    return kernels


def on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which a model over several has not set."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()
