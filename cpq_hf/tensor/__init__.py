"""One tensor on one grid: how it is described, the arithmetic with its gradients, kernels, packing."""
