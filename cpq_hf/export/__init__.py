"""Exporters, one subpackage per target format."""

from .compressed_tensors.reload import default_inputs
from .compressed_tensors.writer import export_compressed_tensors
from .onnx.writer import export_onnx

__all__ = ["default_inputs", "export_compressed_tensors", "export_onnx"]
