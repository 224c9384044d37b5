"""Export to ONNX, for ONNX Runtime."""
