"""Cluster-Promoting Quantization with DropBits for Hugging Face models: train at 2-8 bits, pack, deploy."""

from .errors import CPQError
from .export import export_compressed_tensors, export_onnx
from .hf import CPQCallback, CPQConfig, CPQOptimizer, pack_model, prepare_model, verify_checkpoint
from .model.conversion import calibrate_model
from .model.fast_inference import fast_inference
from .model.summary import summarize
from .training.bit_widths import bit_penalty
from .training.controller import CPQController
from .training.distillation import distill, distillation_loss
from .version import __version__ as __version__

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
    "export_compressed_tensors",
    "export_onnx",
    "fast_inference",
    "pack_model",
    "prepare_model",
    "summarize",
    "verify_checkpoint",
]
