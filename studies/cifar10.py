"""CIFAR-10 with pretrained ResNets (16/32/64 channels, option-A shortcuts).

The folder of data is the argument ``root``, else the environment variable RANKOPT_DATA, else ``../shared/data`` beside
the repository. It holds ``cifar10/``: train_0.npz, train_1.npz, test.npz (lossless WebP tiles of 500 images and labels)
and resnet20.safetensors, resnet56.safetensors. Calibration and validation come from the training images, disjoint.
Recovery trains on all training images but those of the validation split, shifted and flipped anew in every epoch.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from rankopt.errors import DataError

TILE = 500
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """Two 3×3 convolutions; the shortcut drops every second pixel and fills the new channels with zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.extra = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """(batch, inputs, h, w) to (batch, outputs, h / stride, w / stride)."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.extra:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra // 2, self.extra // 2))
        return F.relu(out + x)


class ResNet(nn.Module):
    """The CIFAR ResNet of 6 × `depth` + 2 layers."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, depth, 1)
        self.layer2 = self._stage(16, 32, depth, 2)
        self.layer3 = self._stage(32, 64, depth, 2)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _stage(inputs: int, outputs: int, depth: int, stride: int) -> nn.Sequential:
        rest = [Block(outputs, outputs, 1) for _ in range(depth - 1)]
        return nn.Sequential(Block(inputs, outputs, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, 32, 32) to (batch, 10)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def resnet20(root: str | None = None) -> nn.Module:
    """Pretrained, 91.7 % on the test images."""
    return _pretrained(3, "resnet20", root)


def resnet56(root: str | None = None) -> nn.Module:
    """Pretrained, 93.4 % on the test images."""
    return _pretrained(9, "resnet56", root)


def data(
    root: str | None = None,
    calibration: int = 2000,
    validation: int = 2000,
    augment: bool = True,
    seed: int = 0,
    batch: int = 128,
) -> dict[str, Callable[[], Any]]:
    """The splits, each decoded when it is asked for.

    Calibration images are the first of train_0, validation images the first of train_1. The networks know both by
    heart, so both are shifted and flipped (`augment`) as in training: closer to images never seen. It matters much:
    calibrated on plain training images, plans at half the MACs lost 3 points more.
    """

    def train() -> Augmented:
        parts = [pixels("train_0", None, root), tuple(t[validation:] for t in pixels("train_1", None, root))]
        return Augmented(torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]), batch)

    def training(name: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
        x, y = images(name, count, root)
        return (_augmented(x, torch.Generator().manual_seed(seed)) if augment else x), y

    return {
        "calibration": lambda: training("train_0", calibration, seed),
        "validation": lambda: training("train_1", validation, seed + 1),
        "test": lambda: images("test", None, root),
        "train": train,
    }


class Augmented:
    """Batches of all images in a new order in every pass, shifted and flipped; the incomplete one is left out."""

    def __init__(self, pixels: Tensor, labels: Tensor, batch: int) -> None:
        self.pixels, self.labels, self.batch = pixels, labels, batch

    def __len__(self) -> int:
        return len(self.pixels) // self.batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.pixels)).split(self.batch)
        for index in order[: len(self)]:
            yield _augmented(_normalized(self.pixels[index])), self.labels[index]


def images(name: str, first: int | None = None, root: str | None = None) -> tuple[Tensor, Tensor]:
    """The first images of a file, normalized, (n, 3, 32, 32), and their labels."""
    x, y = pixels(name, first, root)
    return _normalized(x), y


def pixels(name: str, first: int | None = None, root: str | None = None) -> tuple[Tensor, Tensor]:
    """The first images of a file as bytes, (n, 3, 32, 32), and their labels."""
    from PIL import Image

    path = _file(f"{name}.npz", root)
    try:
        with np.load(path) as file:
            blob, offset, label = file["data"], file["offset"], file["label"]
        n = len(label) if first is None else first
        if not 0 < n <= len(label):
            raise DataError(f"{path}: holds {len(label)} images, {first} were asked for")
        tiles = [
            np.asarray(Image.open(io.BytesIO(blob[offset[t] : offset[t + 1]].tobytes())).convert("RGB"))
            for t in range(-(-n // TILE))
        ]
    except (OSError, KeyError, ValueError) as error:
        raise error if isinstance(error, DataError) else DataError(f"{path}: can't be read: {error}") from None
    found: NDArray[np.uint8] = np.concatenate([tile.reshape(-1, 32, 32, 3) for tile in tiles])[:n]
    x = torch.from_numpy(found).permute(0, 3, 1, 2).contiguous()
    return x, torch.from_numpy(label[:n].astype(np.int64))


def _normalized(x: Tensor) -> Tensor:
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return ((x.float().div_(255) - mean) / std).contiguous()


def _augmented(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Random flips and crops after padding by 4, one draw an image, from the generator or the global one."""
    n = len(x)
    flip = torch.rand(n, generator=generator) < 0.5
    x = torch.where(flip.view(n, 1, 1, 1), x.flip(3), x)
    # black frame, as when images are padded before they are normalized
    black = (-torch.tensor(MEAN) / torch.tensor(STD)).view(1, 3, 1, 1)
    padded = F.pad(x - black, (4, 4, 4, 4)) + black
    shifts = torch.randint(0, 9, (n, 2), generator=generator).tolist()
    return torch.stack([image[:, i : i + 32, j : j + 32] for image, (i, j) in zip(padded, shifts, strict=True)])


def _pretrained(depth: int, name: str, root: str | None) -> nn.Module:
    net = ResNet(depth)
    net.load_state_dict(load_file(_file(f"{name}.safetensors", root)))
    return net.eval()


def _file(name: str, root: str | None) -> Path:
    repository = Path(__file__).resolve().parent.parent
    folder = Path(root or os.environ.get("RANKOPT_DATA") or repository.parent / "shared" / "data")
    path = folder / "cifar10" / name
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; set RANKOPT_DATA to the folder that holds cifar10/")
    return path
