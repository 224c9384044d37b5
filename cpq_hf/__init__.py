"""Cluster-Promoting Quantization with DropBits for Hugging Face models: train at 2-8 bits, pack, deploy."""

from .controller import CPQController
from .distillation import distill, distillation_loss
from .errors import CPQError
from .export import export_compressed_tensors, export_onnx
from .hf import CPQCallback, CPQConfig, CPQOptimizer, pack_model, prepare_model, verify_checkpoint
from .inference import fast_inference
from .lengths import bit_penalty
from .summary import summarize
from .surgery import calibrate_model
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
