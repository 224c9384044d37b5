"""Ways out of the plugin: one file a foreign format."""

from .compressed_tensors import export_compressed_tensors
from .onnx import export_onnx
from .reload import default_inputs

__all__ = ["default_inputs", "export_compressed_tensors", "export_onnx"]
