"""Export to compressed-tensors, which plain transformers and vLLM load."""
