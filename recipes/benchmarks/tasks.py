"""Four small tasks on real data that need no network: two of images, two of text.

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


def small_bert() -> nn.Module:
    return BertForSequenceClassification(
        BertConfig(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                   intermediate_size=128, max_position_embeddings=48, num_labels=len(PACKAGES),
                   attention_probs_dropout_prob=0.0)
    )  # fmt: skip


def small_llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, intermediate_size=128, max_position_embeddings=64, bos_token_id=0,
                    eos_token_id=0)
    )  # fmt: skip


def _source_files() -> dict[str, str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not any(part in name for part in ("site-packages/", "test", "encodings/", "pydoc_data/", "lib-dynload")):
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
def package_blocks(length: int = 48, block: int = 200) -> Parts:
    """Blocks of `block` characters, cut to `length` tokens; the label is the package. At most 2,000 a package."""
    rows: list[tuple[int, str, int]] = []
    for label, package in enumerate(PACKAGES):
        files = [text for name, text in _source_files().items() if name.startswith(f"{package}/")]
        blocks = [text[i : i + block] for text in files for i in range(0, len(text) - block // 2, block)]
        blocks.sort(key=lambda text: hashlib.sha256(text.encode()).digest())
        rows += [(_part(text), text, label) for text in blocks[:2000]]
    tokenizer = _tokenizer([text for part, text, _ in rows if part == 0])
    parts = []
    for wanted in range(3):
        chosen = [(tokenizer.encode(text).ids[:length], label) for part, text, label in rows if part == wanted]
        ids = torch.tensor([row + [0] * (length - len(row)) for row, _ in chosen])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row, _ in chosen])
        labels = torch.tensor([label for _, label in chosen])
        parts.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return Parts(*parts)


@functools.cache
def library_text(length: int = 64, test_rows: int = 600) -> Parts:
    """Rows of `length` tokens; files of the test and validation part are never trained on."""
    files = _source_files()
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
        Task("bert", lambda seed: package_blocks(), small_bert, ((4, 8), (3, 4), (2, 4)), 6000, 400, 16, 1e-3),
        Task("llama", lambda seed: library_text(), small_llama, ((4, 8), (3, 8), (2, 8)), 3000, 400, 16, 4e-3,
             "perplexity"),
    )
}  # fmt: skip
