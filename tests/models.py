"""Small models of real architectures, built from configs, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    ConvNextConfig,
    GPT2Config,
    LlamaConfig,
    MobileNetV2Config,
    PreTrainedModel,
    ResNetConfig,
    ViTConfig,
)

BATCH, TOKENS, SIDE, CLASSES, VOCABULARY = 4, 6, 32, 3, 40

CONFIGS: dict[str, tuple[type, Callable[[], Any]]] = {
    "bert": (
        AutoModelForSequenceClassification,
        lambda: BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            max_position_embeddings=16,
            num_labels=CLASSES,
        ),
    ),
    "gpt2": (
        AutoModelForCausalLM,
        lambda: GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
        ),
    ),
    "llama": (AutoModelForCausalLM, lambda: _llama(tie=False)),
    "llama-tied": (AutoModelForCausalLM, lambda: _llama(tie=True)),
    "vit": (
        AutoModelForImageClassification,
        lambda: ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            image_size=SIDE,
            patch_size=8,
            num_labels=CLASSES,
        ),
    ),
    "resnet": (
        AutoModelForImageClassification,
        lambda: ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=CLASSES
        ),
    ),
    "mobilenet-v2": (
        AutoModelForImageClassification,
        lambda: MobileNetV2Config(depth_multiplier=0.25, image_size=SIDE, num_labels=CLASSES),
    ),
    "convnext": (
        AutoModelForImageClassification,
        lambda: ConvNextConfig(hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], num_labels=CLASSES),
    ),
}
NAMES = list(CONFIGS)


def _llama(tie: bool) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=tie,
        bos_token_id=0,
        eos_token_id=0,
    )


def auto_class(name: str) -> Any:
    return CONFIGS[name][0]


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """A float model with random weights, in evaluation mode."""
    torch.manual_seed(seed)
    cls, config = CONFIGS[name]
    return cls.from_config(config()).eval()


def inputs(name: str, batch: int = BATCH, seed: int = 1) -> dict[str, torch.Tensor]:
    """A batch of inputs, with labels."""
    generator = torch.Generator().manual_seed(seed)
    if CONFIGS[name][0] is AutoModelForImageClassification:
        pixels = torch.randn(batch, 3, SIDE, SIDE, generator=generator)
        return {"pixel_values": pixels, "labels": torch.randint(CLASSES, (batch,), generator=generator)}
    ids = torch.randint(1, VOCABULARY, (batch, TOKENS), generator=generator)
    if name == "bert":
        return {"input_ids": ids, "labels": torch.randint(CLASSES, (batch,), generator=generator)}
    return {"input_ids": ids, "labels": ids}


def logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits in evaluation mode, without gradients."""
    model.eval()
    with torch.no_grad():
        return model(**{key: value for key, value in batch.items() if key != "labels"}).logits
