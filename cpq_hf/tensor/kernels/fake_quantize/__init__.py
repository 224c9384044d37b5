"""The functions of `fake_quantize.py`, fused: one file per backend."""

from . import cpu, gpu

BACKENDS = {"cpu": cpu, "cuda": gpu}  # by type of device


def kernel_name(device_type: str) -> str:
    """Return what quantizers on a device run on: `"c"`, `"triton"` or `"eager"`, which is torch operations."""
    return BACKENDS[device_type].name() if device_type in BACKENDS else "eager"
