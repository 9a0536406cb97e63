"""The studies on pretrained networks: the networks are what they are said to be, the files are read, the YAML is sound.

Tests that need the shared data are skipped where it is not there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rankopt.batches import as_batches
from rankopt.cost import count
from rankopt.errors import DataError
from rankopt.study_file import load_study

STUDIES = Path(__file__).parent.parent / "studies"
ROOT = Path(os.environ.get("RANKOPT_DATA") or STUDIES.parent.parent / "shared" / "data")
sys.path.insert(0, str(STUDIES))

import capsnet  # noqa: E402
import mobilenet_v2  # noqa: E402


def _needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not (ROOT / name).exists(), reason=f"{ROOT / name} is not there")


@pytest.mark.parametrize("name", sorted(path.stem for path in STUDIES.glob("*.yaml")))
def test_study_files_are_sound(name: str) -> None:
    study = load_study(STUDIES / f"{name}.yaml")
    assert study.limits or name == "cifar10_compare"
    assert study.load_space().methods
    for spec in (study.model, study.data):
        assert spec is not None
        assert (STUDIES / spec.call.partition(":")[0]).is_file()


def test_splits_share_no_image_and_training_is_optional() -> None:
    def part(start: int, count: int) -> range:
        return range(start, start + count)

    found = {name: load() for name, load in mobilenet_v2._splits(part, 4, 3, 2, 5).items()}
    assert [(name, len(numbers)) for name, numbers in found.items()] == [
        ("calibration", 4), ("validation", 3), ("test", 2), ("train", 5),
    ]  # fmt: skip
    assert sorted(n for numbers in found.values() for n in numbers) == list(range(14))
    assert "train" not in mobilenet_v2._splits(part, 4, 3, 2, 0)


def test_data_that_are_not_there_are_named(tmp_path: Path) -> None:
    for load in (
        lambda: mobilenet_v2.mobilenet_v2(str(tmp_path)),
        lambda: mobilenet_v2.segments(str(tmp_path))["test"](),
        lambda: mobilenet_v2.segments(folder=str(tmp_path))["test"](),
        lambda: capsnet.data(str(tmp_path))["calibration"](),
    ):
        with pytest.raises(DataError, match=str(tmp_path)):
            load()


def test_the_reference_capsule_network_has_the_sizes_of_the_paper() -> None:
    with torch.device("meta"):
        net = capsnet.CapsNet(decoder=True)
    assert tuple(net.digits.votes.weight.shape) == (1152, 10, 16, 8)
    assert sum(p.numel() for p in net.parameters()) == 8_215_568  # "8.2M" in section 4


def test_shifted_images_are_whole_rows_of_the_padded_ones() -> None:
    x = torch.arange(2.0 * 16).reshape(2, 1, 4, 4) + 1
    torch.manual_seed(0)
    for images, labels in capsnet.Shifted(x, torch.tensor([0, 1]), 2, 1):
        assert images.shape == x.shape
        for image, label in zip(images, labels, strict=True):
            own = x[int(label), 0]
            where = image[0][image[0] > 0]
            assert set(where.tolist()) <= set(own.flatten().tolist())
            assert len(where) in (9, 12, 16)


def test_a_folder_of_classes_stands_for_imagenet(tmp_path: Path) -> None:
    image_module = pytest.importorskip("PIL.Image")
    for label, color in enumerate([(255, 0, 0), (0, 0, 255)]):
        folder = tmp_path / f"class{label}"
        folder.mkdir()
        for n in range(2):
            image_module.new("RGB", (300 + 50 * n, 400), color).save(folder / f"{n}.png")
    x, y = mobilenet_v2.images(folder=str(tmp_path), calibration=3)["calibration"]()
    assert x.shape == (3, 3, 224, 224)
    assert all((image[0].mean() > 0) == (label == 0) for image, label in zip(x, y, strict=True))
    with pytest.raises(DataError, match="holds 4 pictures"):
        mobilenet_v2.images(folder=str(tmp_path), calibration=5)["calibration"]()


def test_the_official_folder_of_voc_is_read(tmp_path: Path) -> None:
    image_module = pytest.importorskip("PIL.Image")
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("a\n")
    image_module.new("RGB", (20, 10), (0, 0, 0)).save(tmp_path / "JPEGImages/a.jpg")
    mask = np.full((10, 20), 7, dtype=np.uint8)
    mask[0] = 255
    palette = image_module.fromarray(mask)
    palette.putpalette([n for n in range(256) for _ in range(3)])
    palette.save(tmp_path / "SegmentationClass/a.png")
    x, y = mobilenet_v2.segments(folder=str(tmp_path), side=16, calibration=1)["calibration"]()
    assert x.shape == (1, 3, 16, 16)
    assert set(y[0, :8].unique().tolist()) == {-1, 7}
    assert (y[0, 8:] == -1).all()
    assert (x[0, :, 8:] == 0).all()


def test_mean_iou_counts_classes_that_occur() -> None:
    class Fixed(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    wanted = torch.tensor([[[0, 0, 1, -1]]])
    found = torch.nn.functional.one_hot(torch.tensor([[[0, 1, 1, 2]]]), 21).movedim(3, 1).float()
    batches = as_batches([(found, wanted)])
    assert mobilenet_v2.mean_iou(Fixed(), batches) == pytest.approx(100 * (1 / 2 + 1 / 2) / 2)


@_needs("imagenet/mobilenet_v2.npz")
def test_mobilenet_is_that_of_the_files() -> None:
    net = mobilenet_v2.mobilenet_v2(str(ROOT))
    x, y = mobilenet_v2.images(str(ROOT), calibration=16)["calibration"]()
    cost = count(net, x[:1])
    assert (cost.macs, cost.params) == (300_774_272, 3_487_816)
    with torch.no_grad():
        assert int((net(x).argmax(1) == y).sum()) >= 11


@_needs("voc/deeplabv3_mobilenet_v2.npz")
def test_deeplab_segments_pictures() -> None:
    net = mobilenet_v2.deeplab(str(ROOT))
    assert sum(p.numel() for p in net.parameters()) == 2_097_013
    found = mobilenet_v2.segments(str(ROOT), side=257, calibration=2)["calibration"]()
    assert mobilenet_v2.mean_iou(net, as_batches([found])) > 70
