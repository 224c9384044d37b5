"""Fused kernels, one package per job and one file per device; each has torch operations to fall back on."""
