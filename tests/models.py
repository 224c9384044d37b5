"""Small models of real architectures, built from configs, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    BertConfig,
    CLIPConfig,
    ConvNextConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    MobileNetV2Config,
    PreTrainedModel,
    Qwen3MoeConfig,
    ResNetConfig,
    SiglipConfig,
    T5Config,
    ViTConfig,
    Wav2Vec2Config,
    WavLMConfig,
    WhisperConfig,
)

BATCH, TOKENS, SIDE, CLASSES, VOCABULARY = 4, 6, 32, 3, 40

CONFIGS: dict[str, tuple[type, Callable[[], Any]]] = {
    "bert": (AutoModelForSequenceClassification, lambda: _bert()),
    "bert-mlm": (AutoModelForMaskedLM, lambda: _bert()),
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
    "mixtral": (
        AutoModelForCausalLM,
        lambda: MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            max_position_embeddings=16,
            bos_token_id=0,
            eos_token_id=0,
        ),
    ),
    "gpt-oss": (  # experts stored [experts, in, out], with biases
        AutoModelForCausalLM,
        lambda: GptOssConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_local_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=16,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            sliding_window=8,
            pad_token_id=0,
            eos_token_id=0,
        ),
    ),
    "t5": (
        AutoModelForSeq2SeqLM,
        lambda: T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=0,
        ),
    ),
    "clip": (
        AutoModel,
        lambda: CLIPConfig(
            text_config={
                "vocab_size": VOCABULARY,
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 48,
                "max_position_embeddings": 16,
                "projection_dim": 16,
                "bos_token_id": 1,
                "eos_token_id": 0,
            },
            vision_config={
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 48,
                "image_size": SIDE,
                "patch_size": 8,
                "projection_dim": 16,
            },
            projection_dim=16,
        ),
    ),
    "siglip": (  # pools with nn.MultiheadAttention
        AutoModel,
        lambda: SiglipConfig(
            text_config={
                "vocab_size": VOCABULARY,
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 48,
                "max_position_embeddings": 16,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 0,
            },
            vision_config={
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 48,
                "image_size": SIDE,
                "patch_size": 8,
            },
        ),
    ),
    "wav2vec2": (AutoModelForAudioClassification, lambda: _audio(Wav2Vec2Config)),
    "wavlm": (AutoModelForAudioClassification, lambda: _audio(WavLMConfig)),  # takes the weights of attention
    "falcon": (  # its linear layers are a subclass that takes its own weight
        AutoModelForCausalLM,
        lambda: FalconConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=0,
            eos_token_id=0,
        ),
    ),
    "gemma3": (  # its embedding is a subclass
        AutoModelForCausalLM,
        lambda: Gemma3TextConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=16,
            sliding_window=8,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
        ),
    ),
    "mamba": (  # takes the weights of two layers in each block
        AutoModelForCausalLM,
        lambda: MambaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            state_size=8,
            num_hidden_layers=2,
            time_step_rank=4,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
        ),
    ),
    "qwen3-moe": (
        AutoModelForCausalLM,
        lambda: Qwen3MoeConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            moe_intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=16,
            bos_token_id=0,
            eos_token_id=0,
        ),
    ),
    "whisper": (
        AutoModelForSpeechSeq2Seq,
        lambda: WhisperConfig(
            vocab_size=VOCABULARY,
            num_mel_bins=8,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_source_positions=10,
            max_target_positions=16,
            decoder_start_token_id=1,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
        ),
    ),
}
NAMES = list(CONFIGS)


def _bert() -> BertConfig:
    return BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=16,
        num_labels=CLASSES,
    )


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


def _audio(config: type) -> Any:
    return config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        conv_dim=(8, 8),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=16,
        num_labels=CLASSES,
        apply_spec_augment=False,
    )


def auto_class(name: str) -> Any:
    return CONFIGS[name][0]


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """A float model with random weights, in evaluation mode."""
    torch.manual_seed(seed)
    cls, config = CONFIGS[name]
    model = cls.from_config(config())
    if name == "mobilenet-v2":  # with the statistics of an untrained model its outputs vanish, layer by layer
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        with torch.no_grad():
            model.train()(**inputs(name))
    return model.eval()


def inputs(name: str, batch: int = BATCH, seed: int = 1) -> dict[str, torch.Tensor]:
    """A batch of inputs that gives a loss."""
    generator = torch.Generator().manual_seed(seed)
    cls = auto_class(name)
    classes = {"labels": torch.randint(CLASSES, (batch,), generator=generator)}
    pixels = {"pixel_values": torch.randn(batch, 3, SIDE, SIDE, generator=generator)}
    if cls is AutoModelForImageClassification:
        return pixels | classes
    if cls is AutoModelForAudioClassification:
        return {"input_values": torch.randn(batch, 400, generator=generator)} | classes
    ids = torch.randint(1, VOCABULARY, (batch, TOKENS), generator=generator)
    if cls is AutoModelForSpeechSeq2Seq:
        return {"input_features": torch.randn(batch, 8, 20, generator=generator), "labels": ids}
    if cls is AutoModelForSequenceClassification:
        return {"input_ids": ids} | classes
    if cls is AutoModel:
        return {"input_ids": ids, "return_loss": True} | pixels  # type: ignore[dict-item]
    return {"input_ids": ids, "labels": ids}


def logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits in evaluation mode, without gradients."""
    model.eval()
    with torch.no_grad():
        output = model(**batch)
    return output.logits if "logits" in output else output.logits_per_image
