"""Everything that speaks transformers. Importing it registers the method `"cpq"`: the package's only side effect."""

from __future__ import annotations

from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)

from .callback import CPQCallback
from .checkpoint import verify_checkpoint
from .config import QUANT_METHOD, CPQConfig
from .model import pack_model, prepare_model
from .optimizer import CPQOptimizer
from .quantizer import CPQHfQuantizer

if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(QUANT_METHOD)(CPQConfig)
    register_quantizer(QUANT_METHOD)(CPQHfQuantizer)

__all__ = [
    "CPQCallback",
    "CPQConfig",
    "CPQHfQuantizer",
    "CPQOptimizer",
    "pack_model",
    "prepare_model",
    "verify_checkpoint",
]
