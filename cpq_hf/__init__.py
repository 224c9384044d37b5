"""Cluster-Promoting Quantization with DropBits for Hugging Face models: train at 2-8 bits, pack, deploy."""

from .controller import CPQController
from .distillation import distill, distillation_loss
from .errors import CPQError
from .export import export_onnx
from .hf import CPQCallback, CPQConfig, CPQOptimizer, pack_model, prepare_model, verify_checkpoint
from .lengths import bit_penalty
from .summary import summarize
from .surgery import calibrate_model

__version__ = "0.1.0"

__all__ = [
    "CPQCallback",
    "CPQConfig",
    "CPQController",
    "CPQError",
    "CPQOptimizer",
    "bit_penalty",
    "calibrate_model",
    "distill",
    "distillation_loss",
    "export_onnx",
    "pack_model",
    "prepare_model",
    "summarize",
    "verify_checkpoint",
]
