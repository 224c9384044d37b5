"""Ways out of the plugin: one file a foreign format."""

from .compressed_tensors import export_compressed_tensors
from .onnx import export_onnx

__all__ = ["export_compressed_tensors", "export_onnx"]
