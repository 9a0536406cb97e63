"""MobileNetV2 for ImageNet, and DeepLabv3 on it for Pascal VOC, both pretrained, written out and loaded from arrays.

The folder of data is the argument ``root``, else RANKOPT_DATA, else ``../shared/data`` beside the repository. It holds
``imagenet/`` (mobilenet_v2.npz, val1300.npz) and ``voc/`` (deeplabv3_mobilenet_v2.npz, images/ID.jpg, masks/ID.png).
A data set of your own takes its place by the argument ``folder``: for ImageNet a folder with one subfolder a class, in
the order of their names; for VOC the official VOC2012 folder (JPEGImages, SegmentationClass, ImageSets).

Weights: NAME.q times NAME.s (a scale an output channel) and NAME.b, batch norm folded in.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankopt.errors import DataError

# Expansion, output channels, repetitions, first stride (Sandler et al., "MobileNetV2", 2018, table 2).
BLOCKS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
IGNORED = -1
PICTURES = (".jpg", ".jpeg", ".png", ".webp")


def same(x: Tensor, stride: int, dilation: int = 1) -> Tensor:
    """Zeros around, as a 3×3 kernel needs for an output as large as the input over the stride; an odd one right."""
    sides: list[int] = []
    for d in (3, 2):
        total = max((-(-x.shape[d] // stride) - 1) * stride + 2 * dilation + 1 - x.shape[d], 0)
        sides += [total // 2, total - total // 2]
    return F.pad(x, sides) if any(sides) else x


class Block(nn.Module):
    """Expand, filter depthwise, project; the input is added where it fits."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int, dilation: int = 1) -> None:
        super().__init__()
        inner = inputs * expansion
        self.expand = nn.Conv2d(inputs, inner, 1) if expansion > 1 else None
        self.dw = nn.Conv2d(inner, inner, 3, stride, dilation=dilation, groups=inner)
        self.project = nn.Conv2d(inner, outputs, 1)
        self.stride, self.dilation = stride, dilation
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) to (n, outputs, h / stride, w / stride)."""
        y = F.relu6(self.expand(x)) if self.expand is not None else x
        y = self.project(F.relu6(self.dw(same(y, self.stride, self.dilation))))
        return x + y if self.residual else y


class Body(nn.Module):
    """The stem and the seventeen blocks. With `dilated` the last stride is 1 and what follows is dilated instead."""

    def __init__(self, dilated: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 2)
        inputs, number = 32, 0
        for expansion, outputs, repeats, first in BLOCKS:
            for n in range(repeats):
                stride = first if n == 0 else 1
                late = dilated and number >= 13
                block = Block(inputs, outputs, expansion, 1 if late else stride, 2 if late and number > 13 else 1)
                self.add_module(f"block{number:02d}", block)
                inputs, number = outputs, number + 1

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) to (n, 320, h / 32, w / 32), or h / 16 where dilated."""
        x = F.relu6(self.stem(same(x, 2)))
        for name, block in self.named_children():
            x = block(x) if name != "stem" else x
        return x


class MobileNetV2(Body):
    """Classifies."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.head, self.fc = nn.Conv2d(320, 1280, 1), nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, 224, 224) to (n, classes)."""
        x = F.relu6(self.stem(same(x, 2)))
        for name, block in self.named_children():
            x = block(x) if name.startswith("block") else x
        return self.fc(F.relu6(self.head(x)).mean((2, 3)))


class Aspp(nn.Module):
    """What every pixel sees beside what the whole picture is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.project = nn.Conv2d(320, 256, 1), nn.Conv2d(320, 256, 1), nn.Conv2d(512, 256, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 320, h, w) to (n, 256, h, w)."""
        whole = F.relu(self.pool(x.mean((2, 3), keepdim=True))).expand(-1, -1, *x.shape[2:])
        return F.relu(self.project(torch.cat([whole, F.relu(self.conv(x))], 1)))


class DeepLab(nn.Module):
    """Labels pixels."""

    def __init__(self, classes: int = 21) -> None:
        super().__init__()
        self.body, self.aspp, self.logits = Body(dilated=True), Aspp(), nn.Conv2d(256, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) to (n, classes, h, w)."""
        small = self.logits(self.aspp(self.body(x)))
        return F.interpolate(small, size=x.shape[2:], mode="bilinear", align_corners=True)


def mobilenet_v2(root: str | None = None) -> nn.Module:
    """3.5 M parameters; 79.1 % of the 1,300 images, which are easier than the whole validation set."""
    return _loaded(MobileNetV2(), _file("imagenet/mobilenet_v2.npz", root), "")


def deeplab(root: str | None = None) -> nn.Module:
    """2.1 M parameters, output stride 16."""
    return _loaded(DeepLab(), _file("voc/deeplabv3_mobilenet_v2.npz", root), "body.")


def images(
    root: str | None = None,
    folder: str | None = None,
    calibration: int = 64,
    validation: int = 200,
    test: int = 300,
    train: int = 0,
) -> dict[str, Callable[[], Any]]:
    """ImageNet images, split in the order in which they come: (n, 3, 224, 224), labels (n,).

    Args:
        root: holds imagenet/val1300.npz.
        folder: pictures of your own, one subfolder a class, sorted as the classes are; drawn in a fixed random order.
        calibration, validation, test, train: how many. Without any of the last, recovery trains on the first.
    """

    def part(start: int, count: int) -> tuple[Tensor, Tensor]:
        read = _from_folder(folder) if folder else _from_blob(_file("imagenet/val1300.npz", root))
        found = [read(n) for n in range(start, start + count)]
        return torch.stack([x for x, _ in found]), torch.tensor([y for _, y in found])

    return _splits(part, calibration, validation, test, train)


def segments(
    root: str | None = None,
    folder: str | None = None,
    side: int = 513,
    calibration: int = 16,
    validation: int = 32,
    test: int = 64,
    train: int = 0,
) -> dict[str, Callable[[], Any]]:
    """Pascal VOC pictures (n, 3, side, side) and masks (n, side, side), -1 where a pixel does not count.

    A picture larger than `side` is made smaller; it stands in the top left corner, the rest is grey.
    """

    def part(start: int, count: int) -> tuple[Tensor, Tensor]:
        pairs = _official(Path(folder)) if folder else _pairs(_file("voc/images", root).parent)
        if start + count > len(pairs):
            raise DataError(f"segments: {start + count} pairs were asked for, there are {len(pairs)}")
        found = [_framed(image, mask, side) for image, mask in pairs[start : start + count]]
        return torch.stack([x for x, _ in found]), torch.stack([y for _, y in found])

    return _splits(part, calibration, validation, test, train)


def mean_iou(module: nn.Module, batches: Sequence[Any], classes: int = 21) -> float:
    """Intersection over union, averaged over the classes that occur in the masks, in percent."""
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    with torch.no_grad():
        for batch in batches:
            found, wanted = module(*batch.args, **batch.kwargs).argmax(1), batch.labels
            valid = wanted != IGNORED
            pairs = wanted[valid] * classes + found[valid]
            counts += torch.bincount(pairs, minlength=classes**2).reshape(classes, classes)
    both, present = counts.diagonal(), counts.sum(1) > 0
    union = counts.sum(0) + counts.sum(1) - both
    return float(100 * (both[present] / union[present]).mean())


def _splits(
    part: Callable[[int, int], Any], calibration: int, validation: int, test: int, train: int
) -> dict[str, Callable[[], Any]]:
    """One after the other, each read when it is needed."""
    sizes = {"calibration": calibration, "validation": validation, "test": test} | ({"train": train} if train else {})
    starts = dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False))
    return {name: partial(part, starts[name], size) for name, size in sizes.items()}


def _loaded(net: nn.Module, path: Path, prefix: str) -> nn.Module:
    """Fill every layer from the arrays of its name, less `prefix`."""
    with np.load(path) as file, torch.no_grad():
        for name, module in net.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                key = name.removeprefix(prefix)
                weight = file[f"{key}.q"] * file[f"{key}.s"][:, None, None, None]
                module.weight.copy_(torch.from_numpy(weight.astype(np.float32)).reshape(module.weight.shape))
                module.bias.copy_(torch.from_numpy(file[f"{key}.b"]))
    return net.eval()


def _from_blob(path: Path) -> Callable[[int], tuple[Tensor, int]]:
    from PIL import Image

    with np.load(path) as file:
        blob, offset, label = file["data"], file["offset"], file["label"]

    def read(n: int) -> tuple[Tensor, int]:
        if n >= len(label):
            raise DataError(f"{path}: holds {len(label)} images, number {n} was asked for")
        return _cropped(Image.open(io.BytesIO(blob[offset[n] : offset[n + 1]].tobytes()))), int(label[n])

    return read


def _from_folder(folder: str) -> Callable[[int], tuple[Tensor, int]]:
    from PIL import Image

    classes = sorted(path for path in Path(folder).expanduser().iterdir() if path.is_dir())
    found = [(p, n) for n, c in enumerate(classes) for p in sorted(c.iterdir()) if p.suffix.lower() in PICTURES]
    if not found:
        raise DataError(f"{folder}: needs one subfolder a class, with pictures in it")
    order = np.random.default_rng(0).permutation(len(found))

    def read(n: int) -> tuple[Tensor, int]:
        if n >= len(found):
            raise DataError(f"{folder}: holds {len(found)} pictures, number {n} was asked for")
        path, label = found[order[n]]
        return _cropped(Image.open(path)), label

    return read


def _cropped(image: Any, side: int = 224, short: int = 256) -> Tensor:
    """The middle, between -1 and 1; a picture with a short side below 224 or above 256 is first scaled to 256."""
    image = image.convert("RGB")
    least = min(image.size)
    if not side <= least <= short:
        image = image.resize(tuple(max(round(n * short / least), short) for n in image.size))
    left, top = (image.width - side) // 2, (image.height - side) // 2
    pixels = np.asarray(image.crop((left, top, left + side, top + side)), dtype=np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous() / 127.5 - 1


def _pairs(folder: Path) -> list[tuple[Path, Path]]:
    names = sorted(path.stem for path in (folder / "masks").glob("*.png"))
    return [(folder / "images" / f"{name}.jpg", folder / "masks" / f"{name}.png") for name in names]


def _official(folder: Path) -> list[tuple[Path, Path]]:
    listed = folder.expanduser() / "ImageSets" / "Segmentation" / "val.txt"
    if not listed.is_file():
        raise DataError(f"{listed}: there is no such file; folder is that of VOC2012, with JPEGImages in it")
    names = listed.read_text().split()
    return [
        (folder.expanduser() / "JPEGImages" / f"{n}.jpg", folder.expanduser() / "SegmentationClass" / f"{n}.png")
        for n in names
    ]


def _framed(image_path: Path, mask_path: Path, side: int) -> tuple[Tensor, Tensor]:
    from PIL import Image

    image, mask = Image.open(image_path).convert("RGB"), Image.open(mask_path)
    largest = max(image.size)
    if largest > side:
        size = tuple(max(1, round(n * side / largest)) for n in image.size)
        image, mask = image.resize(size), mask.resize(size, Image.Resampling.NEAREST)
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1)
    x = torch.full((3, side, side), 128.0)
    x[:, : pixels.shape[1], : pixels.shape[2]] = pixels
    labels = torch.from_numpy(np.asarray(mask).astype(np.int64))
    y = torch.full((side, side), IGNORED, dtype=torch.int64)
    y[: labels.shape[0], : labels.shape[1]] = torch.where(labels == 255, IGNORED, labels)
    return (x - 128) / 128, y


def _file(name: str, root: str | None) -> Path:
    repository = Path(__file__).resolve().parent.parent
    folder = Path(root or os.environ.get("RANKOPT_DATA") or repository.parent / "shared" / "data")
    path = folder / name
    if not path.exists():
        raise DataError(f"{path}: there is no such file; set RANKOPT_DATA to the folder that holds {name}")
    return path
