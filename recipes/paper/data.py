"""Images of an experiment: from the Hub or a local folder, augmented and normalised as its entry in the table says."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets.exceptions import DatasetNotFoundError
from experiments import Experiment
from PIL import Image
from torch import Tensor

BILINEAR = Image.Resampling.BILINEAR
FORMAT = "a folder needs `train/<class>/*.png` and `test/<class>/*.png` (or `validation/`)"


@dataclass(frozen=True)
class Data:
    name: str  # of the folder alone, so that results do not tell where it was
    train: datasets.Dataset
    test: datasets.Dataset
    classes: int


def load(experiment: Experiment, source: str) -> Data:
    """Read `source`, a name on the Hub or a folder in the "imagefolder" format.

    Raises:
        ValueError: If it cannot be read, or has not the parts and columns of an image classification.
    """
    folder = Path(source)
    try:
        parts = (
            datasets.load_dataset("imagefolder", data_dir=source) if folder.is_dir() else datasets.load_dataset(source)
        )
    except (DatasetNotFoundError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"no data set {source!r}: {reason}. Give `--data` a name on the Hub (for a gated one accept its terms "
            f"there and run `hf auth login`), or the path of a folder; {FORMAT}"
        ) from error
    test = next((name for name in ("validation", "test") if name in parts), None)
    if "train" not in parts or test is None:
        raise ValueError(f"data set {source!r} has the parts {sorted(parts)}; {FORMAT}")
    features = parts["train"].features
    image = next((name for name, kind in features.items() if isinstance(kind, datasets.Image)), None)
    label = next((name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)), None)
    # images right under `train` have that for their class
    if image is None or label is None or set(features[label].names) <= set(parts):
        raise ValueError(f"data set {source!r} has the columns {sorted(features)}, no image with its class; {FORMAT}")
    if parts[test].features[label] != features[label]:
        raise ValueError(f"the parts 'train' and {test!r} of data set {source!r} have different classes")

    def prepared(part: str, prepare: Callable[[Image.Image, Experiment], Tensor]) -> datasets.Dataset:
        def rows(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            images = [row.convert("L" if experiment.channels == 1 else "RGB") for row in batch[image]]
            return {"pixel_values": [prepare(row, experiment) for row in images], "labels": batch[label]}

        return parts[part].select_columns([image, label]).with_transform(rows)

    name = folder.name if folder.is_dir() else source
    return Data(name, prepared("train", training), prepared(test, evaluation), features[label].num_classes)


def training(image: Image.Image, experiment: Experiment) -> Tensor:
    """One image as the model trains on it: float32 [channels, size, size]."""
    size, padding = experiment.image_size, experiment.crop_padding
    if experiment.random_resized_crop:
        pixels = tensor(image.resize((size, size), BILINEAR, box=random_box(*image.size)), experiment)
    else:
        pixels = tensor(image.resize((size, size), BILINEAR), experiment)
    if padding:
        left, top = (draw(2 * padding + 1) for _ in range(2))
        pixels = torch.nn.functional.pad(pixels, (padding,) * 4)[:, top : top + size, left : left + size]
    return pixels.flip(-1) if experiment.flip and draw(2) else pixels


def evaluation(image: Image.Image, experiment: Experiment) -> Tensor:
    """One image as the model is measured on it: float32 [channels, size, size]."""
    size, shorter = experiment.image_size, experiment.resize
    if shorter is None:
        return tensor(image.resize((size, size), BILINEAR), experiment)
    scale = shorter / min(image.size)
    width, height = (max(shorter, round(edge * scale)) for edge in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    return tensor(image.resize((width, height), BILINEAR).crop((left, top, left + size, top + size)), experiment)


def draw(count: int) -> int:
    """A number below `count` from torch's generator, which `Trainer` seeds and restores."""
    return int(torch.randint(count, ()))


def random_box(width: int, height: int) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a part with 8 to 100 % of the area and an aspect of 3:4 to 4:3, in the image."""
    area, stretch, x, y = torch.rand(4).tolist()
    share = 0.08 + 0.92 * area
    aspect = math.exp((2 * stretch - 1) * math.log(4 / 3))
    box_width = min(width, math.sqrt(width * height * share * aspect))
    box_height = min(height, math.sqrt(width * height * share / aspect))
    left, top = x * (width - box_width), y * (height - box_height)
    return left, top, left + box_width, top + box_height


def tensor(image: Image.Image, experiment: Experiment) -> Tensor:
    """Values of 0 to 255 -> normalised by channel."""
    values = np.array(image, dtype=np.float32) / 255
    # [height, width] or [height, width, channels] -> [channels, height, width]
    pixels = torch.from_numpy(values.reshape(*values.shape[:2], experiment.channels)).permute(2, 0, 1)
    mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (experiment.mean, experiment.std))
    return (pixels - mean) / std
