"""Handwritten digits (scikit-learn's 8×8 images) by a small image transformer, trained in half a minute on first use.

Every 2×2 pixels are a token, so the tokens are the points of a 4×4 grid; there is no class token, the mean of all
tokens is classified. The splits are those of ``digits.py``: 1,000 images train the network (400 of them calibrate), 400
validate, 397 test.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from digits import data
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

__all__ = ["data", "model"]

RUNS = Path(__file__).parent / "runs"


class ImageTransformer(nn.Module):
    """Pre-norm transformer layers of PyTorch over the 16 patches of an image."""

    def __init__(self, width: int = 48, heads: int = 4, depth: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.positions = nn.Parameter(torch.zeros(16, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        nn.init.normal_(self.positions, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 1, 8, 8) to (batch, classes)."""
        x = self.embed(F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


def model(epochs: int = 80, seed: int = 0) -> nn.Module:
    """The trained network. Weights are kept in runs/, one file a way of training and version of torch."""
    version = torch.__version__.split("+")[0]
    path = RUNS / f"digits-transformer-{epochs}-{seed}-torch{version}.safetensors"
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        net = ImageTransformer()
        if not path.is_file():
            _train(net, epochs)
            RUNS.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}")
            save_file(net.state_dict(), part)
            part.replace(path)  # complete or not there at all
    net.load_state_dict(load_file(path))
    return net.eval()


def _train(net: nn.Module, epochs: int) -> None:
    x, y = data()["train"]
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    batch, steps = 50, epochs * len(x) // 50
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    net.train()
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(batch):
            dx, dy = (int(n) for n in torch.randint(-1, 2, (2,)))  # shifts, so that 1,000 images suffice
            loss = F.cross_entropy(net(torch.roll(x[index], (dx, dy), (2, 3))), y[index], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
