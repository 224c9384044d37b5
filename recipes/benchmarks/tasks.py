"""Tasks on real data that need no network: two of images, two of text, and some for special questions.

Images are scikit-learn's handwritten digits. Text is source code and documentation of the Python standard library of
the interpreter that runs this: its version is part of every result. Every task has a train, a validation and a test
part; a seed decides the split of the digits, initial weights and data order. Text is split once, by the content of
blocks (classification) or of whole files (language model), and so is the tokenizer, trained on the training part.
"""

from __future__ import annotations

import functools
import hashlib
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

Batch = dict[str, Tensor]
VOCABULARY = 1024
PACKAGES = (
    "asyncio", "distutils", "email", "http", "idlelib", "importlib", "lib2to3", "logging", "multiprocessing",
    "tkinter", "urllib", "xml",
)  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """The same keys in each: model inputs, with `labels`."""

    train: Batch
    validation: Batch
    test: Batch


@dataclass(frozen=True)
class Task:
    """A model, its data and how long it trains. Metric: accuracy in percent, or perplexity for a language model."""

    name: str
    parts: Callable[[int], Parts]
    model: Callable[[], nn.Module]
    widths: tuple[tuple[int, int], ...]  # (weight bits, activation bits)
    float_steps: int
    steps: int
    batch_size: int
    float_lr: float
    metric: str = "accuracy"

    @property
    def is_language_model(self) -> bool:
        return self.metric == "perplexity"


def digits(scale: int, seed: int) -> Parts:
    """700 training, 300 validation and 797 test images, pixels in -1..1, each repeated `scale` x `scale` times."""
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images.reshape(-1, 1, 8, 8).repeat(scale, 2).repeat(scale, 3) / 8 - 1, dtype=torch.float32)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    parts = order[:700], order[700:1000], order[1000:]
    return Parts(*({"pixel_values": pixels[part], "labels": torch.tensor(labels)[part]} for part in parts))


def small_resnet() -> nn.Module:
    return ResNetForImageClassification(
        ResNetConfig(num_channels=1, embedding_size=4, hidden_sizes=[4, 8, 16], depths=[1, 1, 1], layer_type="basic",
                     num_labels=10)
    )  # fmt: skip


def small_vit() -> nn.Module:
    return ViTForImageClassification(
        ViTConfig(image_size=8, patch_size=2, num_channels=1, hidden_size=32, num_hidden_layers=2,
                  num_attention_heads=4, intermediate_size=64, num_labels=10, hidden_dropout_prob=0.0,
                  attention_probs_dropout_prob=0.0)
    )  # fmt: skip


def small_mobilenet() -> nn.Module:
    """Half of its layers are depthwise."""
    return MobileNetV2ForImageClassification(
        MobileNetV2Config(num_channels=1, image_size=32, depth_multiplier=0.15, min_depth=4, depth_divisible_by=4,
                          output_stride=8, classifier_dropout_prob=0.0, num_labels=10)
    )  # fmt: skip


def bert(width: int, layers: int) -> nn.Module:
    return BertForSequenceClassification(
        BertConfig(vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers,
                   num_attention_heads=width // 16, intermediate_size=2 * width, max_position_embeddings=48,
                   num_labels=len(PACKAGES), attention_probs_dropout_prob=0.0)
    )  # fmt: skip


def llama(width: int, layers: int) -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers,
                    num_attention_heads=width // 16, num_key_value_heads=width // 32, intermediate_size=2 * width,
                    max_position_embeddings=256, bos_token_id=0,
                    eos_token_id=0)
    )  # fmt: skip


def _source_files(tests: bool = False) -> dict[str, str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        left_out = ("site-packages/", "encodings/", "pydoc_data/", "lib-dynload", *(() if tests else ("test",)))
        if not any(part in name for part in left_out):
            texts[name] = path.read_text(encoding="utf-8", errors="replace")
    return texts


def _part(content: str) -> int:
    """0 (training, 80 %), 1 (validation) or 2 (test), from a hash of the content."""
    digest = hashlib.sha256(content.encode()).digest()[0]
    return 0 if digest < 205 else 1 + digest % 2


def _tokenizer(texts: list[str]) -> ByteLevelBPETokenizer:
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=VOCABULARY, min_frequency=2, show_progress=False)
    return tokenizer


@functools.cache
def package_blocks(length: int = 48, block: int = 200, step: int = 50, region: int = 1600, rows: int = 2000) -> Parts:
    """Blocks of `block` characters, cut to `length` tokens; the label is the package.

    Files are cut into regions of `region` characters, each of which belongs to one part. Blocks to train on start
    every `step` characters, so that they overlap; `rows` blocks that do not overlap validate and test.
    """
    found: list[list[tuple[str, int]]] = [[], [], []]
    for label, package in enumerate(PACKAGES):
        texts = [text for name, text in _source_files().items() if name.startswith(f"{package}/")]
        for content in (text[i : i + region] for text in texts for i in range(0, len(text) - block // 2, region)):
            part = _part(content)
            starts = range(0, max(1, len(content) - block + 1), block if part else step)
            found[part] += [(content[start : start + block], label) for start in starts]
    order = np.random.default_rng(0)
    found[1:] = [[blocks[i] for i in order.permutation(len(blocks))[:rows]] for blocks in found[1:]]
    tokenizer = _tokenizer([text for text, _ in found[0][:: block // step]])
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    parts = []
    for blocks in found:
        encodings = tokenizer.encode_batch([text for text, _ in blocks])
        parts.append({
            "input_ids": torch.tensor([encoding.ids for encoding in encodings]),
            "attention_mask": torch.tensor([encoding.attention_mask for encoding in encodings]),
            "labels": torch.tensor([label for _, label in blocks]),
        })  # fmt: skip
    return Parts(*parts)


@functools.cache
def library_text(length: int = 64, test_rows: int = 600, tests: bool = False) -> Parts:
    """Rows of `length` tokens; files of the test and validation part are never trained on."""
    files = _source_files(tests)
    by_part: list[list[str]] = [[], [], []]
    for text in files.values():
        by_part[_part(text)].append(text)
    tokenizer = _tokenizer(by_part[0])
    parts = []
    for number, texts in enumerate(by_part):
        ids = np.concatenate([np.asarray(encoding.ids, dtype=np.int64) for encoding in tokenizer.encode_batch(texts)])
        rows = torch.from_numpy(ids[: len(ids) // length * length].reshape(-1, length))
        if number:
            rows = rows[torch.linspace(0, len(rows) - 1, test_rows).long()]
        parts.append({"input_ids": rows, "labels": rows})
    return Parts(*parts)


TASKS = {
    task.name: task
    for task in (
        Task("resnet", functools.partial(digits, 2), small_resnet, ((4, 4), (3, 3), (2, 2)), 600, 500, 32, 1e-2),
        Task("vit", functools.partial(digits, 1), small_vit, ((4, 4), (3, 3), (2, 2)), 1000, 500, 32, 2e-3),
        Task("bert", lambda seed: package_blocks(), functools.partial(bert, 64, 2), ((4, 8), (3, 4), (2, 4)),
             6000, 400, 16, 1e-3),
        Task("llama", lambda seed: library_text(), functools.partial(llama, 64, 2), ((4, 8), (3, 8), (2, 8), (2, 4)),
             3000, 400, 16, 4e-3, "perplexity"),
        Task("mobilenet", functools.partial(digits, 4), small_mobilenet, ((4, 4), (3, 3)), 800, 300, 32, 5e-3),
        Task("bert-large", lambda seed: package_blocks(), functools.partial(bert, 512, 15), ((4, 8), (3, 4), (2, 4)),
             6000, 1000, 64, 2e-4),
        Task("llama-large", lambda seed: library_text(256, tests=True), functools.partial(llama, 512, 13),
             ((4, 8), (3, 8), (2, 8), (2, 4)), 6000, 1500, 32, 1e-3, "perplexity"),
    )
}  # fmt: skip
