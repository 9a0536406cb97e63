"""Capsule networks on MNIST and on scikit-learn's 8×8 digits: the net of Sabour et al. (2017) and two small ones.

`python studies/capsnet.py small` (or reference, digits) trains one and keeps its weights in runs/; the functions that
studies name do so on first use. MNIST is the file mnist/mnist.npz in the folder ``root``, else RANKOPT_DATA, else
``../shared/data`` beside the repository: train_x (60000, 28, 28) and test_x as bytes, train_y, test_y.

The last 5,000 training images are never trained on: they are the validation split.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rankopt.errors import DataError
from rankopt.nn.capsules import CapsuleLayer, PrimaryCapsules, lengths, log_odds, margin_loss

RUNS = Path(__file__).parent / "runs"
HELD_BACK = 5000


class CapsNet(nn.Module):
    """A convolution, primary capsules, and one capsule a class found by routing.

    Args:
        size: side of the image, one channel.
        channels, kernel, stride: of the first convolution.
        types, dim: of the primary capsules, found by a convolution of `primary_kernel` and `primary_stride`.
        classes, out_dim: of the capsules above.
        iterations: of the routing.
        decoder: also the three layers that draw the image again from the capsule of its class; only training needs it.
    """

    def __init__(
        self,
        size: int = 28,
        channels: int = 256,
        kernel: int = 9,
        stride: int = 1,
        types: int = 32,
        dim: int = 8,
        primary_kernel: int = 9,
        primary_stride: int = 2,
        classes: int = 10,
        out_dim: int = 16,
        iterations: int = 3,
        decoder: bool = False,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, channels, kernel, stride)
        self.primary = PrimaryCapsules(channels, types, dim, primary_kernel, primary_stride)
        side = ((size - kernel) // stride + 1 - primary_kernel) // primary_stride + 1
        self.digits = CapsuleLayer(types * side * side, classes, out_dim, dim, iterations, types)
        self.decoder: nn.Sequential | None = None
        if decoder:
            self.decoder = nn.Sequential(
                nn.Linear(classes * out_dim, 512),
                nn.ReLU(),
                nn.Linear(512, 1024),
                nn.ReLU(),
                nn.Linear(1024, size * size),
                nn.Sigmoid(),
            )

    def capsules(self, x: Tensor) -> Tensor:
        """(n, 1, size, size) to (n, classes, out_dim)."""
        return self.digits(self.primary(F.relu(self.conv(x))))

    def forward(self, x: Tensor) -> Tensor:
        """(n, 1, size, size) to (n, classes): the log-odds of the capsules' lengths."""
        return log_odds(lengths(self.capsules(x)))

    def loss(self, x: Tensor, labels: Tensor, decoded: float = 0.0005) -> Tensor:
        """The margin loss, and where there is a decoder the squared error of the image times `decoded`."""
        capsules = self.capsules(x)
        total = margin_loss(lengths(capsules), labels)
        if self.decoder is not None:
            only = capsules * F.one_hot(labels, capsules.shape[1]).to(capsules).unsqueeze(2)
            total = total + decoded * (self.decoder(only.flatten(1)) - x.flatten(1)).square().sum(1).mean()
        return total


@dataclass(frozen=True)
class Training:
    """How a net is trained: its sizes, the images, and steps of Adam."""

    net: dict[str, Any]
    data: str
    steps: int
    batch: int
    rate: float
    shift: int
    bfloat16: bool = False


TRAININGS = {
    # 8.2 M parameters with the decoder, 202 M multiply-accumulates; as in the paper but for the number of steps.
    "reference": Training({"decoder": True}, "mnist", 1000, 32, 1e-3, 2, bfloat16=True),
    "small": Training(
        {"channels": 32, "kernel": 5, "stride": 2, "types": 16, "primary_kernel": 5}, "mnist", 400, 100, 3e-3, 2
    ),
    "digits": Training(
        {
            "size": 8,
            "channels": 24,
            "kernel": 3,
            "types": 8,
            "dim": 4,
            "primary_kernel": 3,
            "primary_stride": 1,
            "out_dim": 8,
        },
        "digits",
        600,
        50,
        4e-3,
        1,
    ),
}


def reference(root: str | None = None, steps: int | None = None) -> nn.Module:
    """The net of the paper, without its decoder."""
    return _trained("reference", root, steps)


def small(root: str | None = None, steps: int | None = None) -> nn.Module:
    """256 primary capsules; 2.3 M multiply-accumulates, three quarters of its parameters are votes."""
    return _trained("small", root, steps)


def digits(steps: int | None = None) -> nn.Module:
    """128 primary capsules of 4 dimensions on 8×8 images; trained in well under a minute."""
    return _trained("digits", None, steps)


def data(
    root: str | None = None, calibration: int = 1000, validation: int = 2000, test: int = 10000, batch: int = 100
) -> dict[str, Callable[[], Any]]:
    """MNIST: calibration images are the first of those trained on, validation images were not trained on."""
    if not 0 < validation <= HELD_BACK:
        raise DataError(f"data: needs 0 < validation <= {HELD_BACK}, got {validation}")
    return {
        "calibration": lambda: mnist("train", root, 0, calibration),
        "validation": lambda: mnist("train", root, 60000 - HELD_BACK, 60000 - HELD_BACK + validation),
        "test": lambda: mnist("test", root, 0, test),
        "train": lambda: Shifted(*mnist("train", root, 0, 60000 - HELD_BACK), batch, 2),
    }


def digits_data() -> dict[str, Any]:
    """scikit-learn's digits: 1,000 train the net (400 of them calibrate), 400 validate, 397 test."""
    x, y = _digits()
    return {
        "calibration": (x[:400], y[:400]),
        "validation": (x[1000:1400], y[1000:1400]),
        "test": (x[1400:], y[1400:]),
        "train": (x[:1000], y[:1000]),
    }


class Shifted:
    """Batches of all images in a new order in every pass, each image shifted by up to `shift` pixels."""

    def __init__(self, x: Tensor, y: Tensor, batch: int, shift: int) -> None:
        self.x, self.y, self.batch, self.shift = x, y, batch, shift

    def __len__(self) -> int:
        return len(self.x) // self.batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        side, reach = self.x.shape[-1], 2 * self.shift + 1
        for index in torch.randperm(len(self.x)).split(self.batch)[: len(self)]:
            padded = F.pad(self.x[index], (self.shift,) * 4)
            corners = torch.randint(0, reach, (len(index), 2))
            rows = corners[:, :1] + torch.arange(side)
            columns = corners[:, 1:] + torch.arange(side)
            which = torch.arange(len(index))[:, None, None]
            yield padded[which, 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1), self.y[index]


def mnist(part: str, root: str | None, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Images (n, 1, 28, 28) between 0 and 1, and labels."""
    repository = Path(__file__).resolve().parent.parent
    folder = Path(root or os.environ.get("RANKOPT_DATA") or repository.parent / "shared" / "data")
    path = folder / "mnist" / "mnist.npz"
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; set RANKOPT_DATA to the folder that holds mnist/")
    with np.load(path) as file:
        x, y = file[f"{part}_x"][start:stop], file[f"{part}_y"][start:stop]
    return torch.from_numpy(x).unsqueeze(1).float() / 255, torch.from_numpy(y.astype(np.int64))


def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    x = torch.from_numpy(found.images).float().unsqueeze(1) / 16
    return x[order], torch.from_numpy(found.target).long()[order]


def _trained(name: str, root: str | None, steps: int | None) -> nn.Module:
    """The net with the weights in runs/, which are made where there are none."""
    training = TRAININGS[name]
    steps = training.steps if steps is None else steps
    path = RUNS / f"capsnet-{name}-{steps}-torch{torch.__version__.split('+')[0]}.safetensors"
    if not path.is_file():
        net = _train(training, root, steps)
        RUNS.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        save_file(net.state_dict(), part)
        part.replace(path)  # complete or not there at all
    net = CapsNet(**(training.net | {"decoder": False}))
    state = {key: value for key, value in load_file(path).items() if not key.startswith("decoder.")}
    net.load_state_dict(state)
    return net.eval()


def _train(training: Training, root: str | None, steps: int, seed: int = 0) -> CapsNet:
    """Adam with a rate that rises for a tenth of the steps and then falls to 0."""
    x, y = mnist("train", root, 0, 60000 - HELD_BACK) if training.data == "mnist" else _digits()
    if training.data == "digits":
        x, y = x[:1000], y[:1000]
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        net = CapsNet(**training.net)
        optimizer = torch.optim.Adam(net.parameters(), lr=training.rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, training.rate, max(steps, 2), pct_start=0.1)
        batches, started, done = Shifted(x, y, training.batch, training.shift), time.perf_counter(), 0
        while done < steps:
            for images, labels in batches:
                with torch.autocast("cpu", torch.bfloat16, enabled=training.bfloat16):
                    loss = net.loss(images, labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                done += 1
                if done % 50 == 0:
                    took = time.perf_counter() - started
                    print(f"step {done}/{steps} · loss {loss.item():.4f} · {took:.0f} s", flush=True)
                if done >= steps:
                    break
    return net


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """In percent."""
    with torch.no_grad():
        right = sum(int((net(a).argmax(1) == b).sum()) for a, b in zip(x.split(200), y.split(200), strict=True))
    return 100 * right / len(x)


def main() -> None:
    """Train, and say what came of it."""
    parser = argparse.ArgumentParser(description="Train a capsule network and keep its weights in studies/runs/.")
    parser.add_argument("net", choices=sorted(TRAININGS))
    parser.add_argument("--steps", type=int, help="in place of what the net is trained for by default")
    parser.add_argument("--root", help="the folder that holds mnist/")
    options = parser.parse_args()
    net = _trained(options.net, options.root, options.steps)
    splits: Any = digits_data() if options.net == "digits" else data(options.root)
    for split in ("validation", "test"):
        found = splits[split]() if callable(splits[split]) else splits[split]
        print(f"{options.net}: {split} accuracy {accuracy(net, *found):.2f}")


if __name__ == "__main__":
    main()
