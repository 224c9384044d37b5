"""Writers of foreign formats, one file each."""

from .onnx import export_onnx

__all__ = ["export_onnx"]
