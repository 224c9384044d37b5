"""The experiments of the paper as a table: model, data, training; and the variants that each of them is run in.

Model, data, widths and variants are those of the paper. Epochs, rates, optimizer and augmentation are ours, customary
for these tasks: the paper's own settings could not be verified (see README.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Experiment:
    """One model on one data set. A model with a "/" in its name is loaded from the Hub, pretrained."""

    model: str
    data: str
    channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    float_epochs: float  # of a model that starts from random weights
    epochs: float  # of every quantized model
    float_lr: float
    lr: float
    batch_size: int  # over all processes
    weight_decay: float
    optim: str = "adamw_torch"
    warmup: float = 0.05  # share of the steps; then a cosine to zero
    crop_padding: int = 0  # training: pad by so many pixels and crop back
    random_resized_crop: bool = False  # training: a random part of the image, 8 to 100 % of its area
    flip: bool = False  # training: left and right swapped, every second time
    resize: int | None = None  # evaluation: scale the shorter edge to this, then crop the middle
    background_class: bool = False  # the pretrained head has a class 0 that the data lack


IMAGENET = {"data": "ILSVRC/imagenet-1k", "channels": 3, "image_size": 224, "resize": 256, "random_resized_crop": True}

EXPERIMENTS = {
    "lenet5-mnist": Experiment(
        model="lenet5", data="ylecun/mnist", channels=1, image_size=28, mean=(0.5,), std=(0.5,),
        float_epochs=20, epochs=40, float_lr=1e-3, lr=2e-3, batch_size=128, weight_decay=1e-4,
    ),
    "vgg7-cifar10": Experiment(
        model="vgg7", data="uoft-cs/cifar10", channels=3, image_size=32,
        mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), crop_padding=4, flip=True,
        float_epochs=150, epochs=150, float_lr=1e-3, lr=1e-3, batch_size=128, weight_decay=5e-4,
    ),
    "resnet18-imagenet": Experiment(
        model="microsoft/resnet-18", **IMAGENET, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), flip=True,
        float_epochs=90, epochs=60, float_lr=1e-3, lr=5e-4, batch_size=256, weight_decay=1e-4,
    ),
    "mobilenetv2-imagenet": Experiment(
        model="google/mobilenet_v2_1.0_224", **IMAGENET, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), flip=True,
        float_epochs=150, epochs=60, float_lr=1e-3, lr=5e-4, batch_size=256, weight_decay=4e-5, background_class=True,
    ),
}  # fmt: skip

BITS = (4, 3, 2)
MIN_BITS = 2  # what DropBits and learned lengths never go below
HEADROOM = 2  # a learned length may exceed the mean that it has to meet by so much


@dataclass(frozen=True)
class Variant:
    options: dict[str, Any]
    needs_bits_to_drop: bool = True  # at `MIN_BITS` it would be the plain variant


VARIANTS = {
    "plain": Variant({}, needs_bits_to_drop=False),
    "dropbits": Variant({"dropbits": 0.1}),
    "learned": Variant({"learn_bits": True}),
    "learned-fixed": Variant({}),
}


def quantization(variant: str, bits: int, lengths: dict[str, int] | None = None) -> dict[str, Any]:
    """Fields of the `CPQConfig` of one run; `lengths` (layer name -> bits) are what the learned run ended with."""
    fields = {"weight_bits": bits, "activation_bits": bits, "min_bits": MIN_BITS, "modules_to_not_convert": []}
    fields |= VARIANTS[variant].options
    if fields.get("learn_bits"):
        fields |= {"weight_bits": bits + HEADROOM, "target_bits": float(bits)}
    if lengths is not None:
        fields["overrides"] = {layer: {"weight_bits": width} for layer, width in lengths.items()}
    return fields
