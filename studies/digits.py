"""Handwritten digits (scikit-learn's 8×8 images): a small convolutional network, trained in seconds on first use.

The 1,797 images are shuffled once and cut: 1,000 train the network (400 of them calibrate), 400 validate, 397 test.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

RUNS = Path(__file__).parent / "runs"
TRAIN, VALIDATION = 1000, 400


class SmallNet(nn.Module):
    """Three 3×3 convolutions with batch norm and a linear layer; 1.8 M MACs on an 8×8 image."""

    def __init__(self, width: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.conv3 = nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(2 * width)
        self.fc1 = nn.Linear(2 * width * 4, 2 * width)
        self.fc2 = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 1, 8, 8) to (batch, classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        x = F.max_pool2d(F.relu(self.bn3(self.conv3(x))), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


def model(width: int = 32, epochs: int = 12, seed: int = 0) -> nn.Module:
    """The trained network. Weights are kept in runs/, one file a way of training and version of torch."""
    return _kept(SmallNet(width), str(width), epochs, seed)


def mlp(width: int = 96, epochs: int = 12, seed: int = 0) -> nn.Module:
    """A trained stack of linear layers for the same images, flattened; kept in runs/ likewise."""
    sizes = [(64, width), (width, width), (width, width)]
    hidden = [part for pair in sizes for part in (nn.Linear(*pair), nn.ReLU())]
    return _kept(nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10)), f"mlp-{width}", epochs, seed)


def data() -> dict[str, Any]:
    """The splits; the network has seen the calibration and train images in training, the others not."""
    x, y = _images()
    end = TRAIN + VALIDATION
    return {
        "calibration": (x[:400], y[:400]),
        "validation": (x[TRAIN:end], y[TRAIN:end]),
        "test": (x[end:], y[end:]),
        "train": (x[:TRAIN], y[:TRAIN]),
    }


def _images() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    x = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    return x[order], torch.from_numpy(digits.target).long()[order]


def _kept(net: nn.Module, name: str, epochs: int, seed: int) -> nn.Module:
    """The net with trained weights: those in runs/, or trained now and kept there."""
    torch_version = torch.__version__.split("+")[0]
    path = RUNS / f"digits-weights-{name}-{epochs}-{seed}-torch{torch_version}.safetensors"
    if path.is_file():
        net.load_state_dict(load_file(path))
        return net.eval()
    _train(net, epochs, seed)
    RUNS.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    save_file(net.state_dict(), part)
    part.replace(path)  # complete or not there at all
    return net.eval()


def _train(net: nn.Module, epochs: int, seed: int) -> None:
    x, y = _images()
    x, y = x[:TRAIN], y[:TRAIN]
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        for module in net.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.05)
        batch, steps = 50, epochs * TRAIN // 50
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
        net.train()
        for _ in range(epochs):
            for index in torch.randperm(TRAIN).split(batch):
                # shifts by up to one pixel, so that 1,000 images suffice
                dx, dy = (int(n) for n in torch.randint(-1, 2, (2,)))
                loss = F.cross_entropy(net(torch.roll(x[index], (dx, dy), (2, 3))), y[index], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
