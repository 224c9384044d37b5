"""LeNet-5 and VGG-7 as plain modules, and the way to a float model of any experiment.

The layers are those that papers on low-bit networks mean by these names since Ternary Weight Networks (Li et al.,
2016): 32-C5, MP2, 64-C5, MP2, 512-FC for LeNet-5; 2x 128-C3, MP2, 2x 256-C3, MP2, 2x 512-C3, MP2, 1024-FC for VGG-7.
"""

from __future__ import annotations

import torch
from experiments import Experiment
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)
from transformers.modeling_outputs import ImageClassifierOutput


class Classifier(nn.Module):
    """Features and a head, called and answering as the image classifiers of transformers do."""

    def __init__(self, features: nn.Sequential, head: nn.Sequential) -> None:
        super().__init__()
        self.features = features
        self.head = head

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        # [batch, channels, height, width] -> [batch, features] -> [batch, classes]
        logits = self.head(self.features(pixel_values).flatten(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def lenet5(channels: int, classes: int) -> Classifier:
    """For images of 28x28: two unpadded convolutions of 5x5 and poolings leave 4x4."""
    features = nn.Sequential(
        nn.Conv2d(channels, 32, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5), nn.ReLU(), nn.MaxPool2d(2),
    )  # fmt: skip
    return Classifier(features, nn.Sequential(nn.Linear(64 * 4 * 4, 512), nn.ReLU(), nn.Linear(512, classes)))


def vgg7(channels: int, classes: int) -> Classifier:
    """For images of 32x32: three poolings leave 4x4."""
    layers: list[nn.Module] = []
    for width in (128, 256, 512):
        for _ in range(2):
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    head = nn.Sequential(
        nn.Linear(512 * 4 * 4, 1024, bias=False), nn.BatchNorm1d(1024), nn.ReLU(), nn.Linear(1024, classes)
    )
    return Classifier(nn.Sequential(*layers), head)


def resnet18(channels: int, classes: int) -> nn.Module:
    config = ResNetConfig(
        num_channels=channels,
        depths=[2, 2, 2, 2],
        hidden_sizes=[64, 128, 256, 512],
        layer_type="basic",
        num_labels=classes,
    )
    return ResNetForImageClassification(config)


def mobilenetv2(channels: int, classes: int) -> nn.Module:
    return MobileNetV2ForImageClassification(MobileNetV2Config(num_channels=channels, num_labels=classes))


RANDOM = {
    "lenet5": lenet5,
    "vgg7": vgg7,
    "microsoft/resnet-18": resnet18,
    "google/mobilenet_v2_1.0_224": mobilenetv2,
}


def random_model(experiment: Experiment, classes: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return RANDOM[experiment.model](experiment.channels, classes)


def pretrained_model(experiment: Experiment, classes: int, source: str) -> nn.Module:
    """From the Hub or a local folder, with as many classes as the data have.

    Raises:
        ValueError: If there is no such model, or it has other classes than the data.
    """
    try:
        model = AutoModelForImageClassification.from_pretrained(source, dtype=torch.float32)
    except OSError as error:
        raise ValueError(
            f"no model {source!r}: {str(error).splitlines()[0]} Give a folder with `--model`, or `--random_init`"
        ) from error
    if experiment.background_class and model.config.num_labels == classes + 1:
        drop_first_class(model)
    if model.config.num_labels != classes:
        raise ValueError(
            f"model {source!r} has {model.config.num_labels} classes, the data have {classes}; "
            "give another with `--model`, or start from random weights with `--random_init`"
        )
    return model


def drop_first_class(model: nn.Module) -> None:
    """Cut the row of class 0 out of the head: [classes + 1, features] -> [classes, features]."""
    old = model.classifier
    new = nn.Linear(old.in_features, old.out_features - 1)
    with torch.no_grad():
        new.weight.copy_(old.weight[1:])
        new.bias.copy_(old.bias[1:])
    model.classifier = new
    names = [model.config.id2label[number] for number in range(1, old.out_features)]
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: number for number, name in enumerate(names)}
    model.num_labels = len(names)
