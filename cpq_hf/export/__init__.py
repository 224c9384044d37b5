"""Ways out of the plugin: one file a foreign format."""

from .compressed_tensors import export_compressed_tensors

__all__ = ["export_compressed_tensors"]
