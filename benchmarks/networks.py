"""Networks and candidates that the latency benchmarks share. Latency does not depend on the values of weights."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from rankopt.candidates import Group
from rankopt.decompositions import method
from rankopt.layer_spec import LayerSpec
from rankopt.layers import find_layers
from rankopt.plan import DENSE, LayerChoice

sys.path.insert(0, str(Path(__file__).parent.parent / "studies"))

METHODS = ("svd", "svd_in", "spatial_svd", "tucker2", "cp", "tensor_train")
KEEPS = tuple(np.linspace(0.1, 0.9, 9).round(3))


class Block(nn.Module):
    """A basic residual block."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        changes = stride > 1 or inputs != outputs
        self.shortcut = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            if changes
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, inputs, h, w) to (batch, outputs, h / stride, w / stride)."""
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (out + self.shortcut(x)).relu()


def resnet18(classes: int = 1000) -> nn.Module:
    """A ResNet-18 with random weights, in eval mode."""
    torch.manual_seed(0)
    blocks: list[nn.Module] = []
    inputs = 64
    for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        blocks += [Block(inputs, outputs, stride), Block(outputs, outputs, 1)]
        inputs = outputs
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes)).eval()


def network(name: str) -> tuple[nn.Module, Tensor]:
    """A network of the benchmarks and its example input: resnet20 (32×32), resnet18 (96×96)."""
    if name == "resnet20":
        import cifar10

        torch.manual_seed(0)
        return cifar10.ResNet(3).eval(), torch.randn(1, 3, 32, 32)
    return resnet18(), torch.randn(1, 3, 96, 96)


def ranks_at(layer: LayerSpec, name: str, keep: float) -> dict[str, int]:
    """The largest ranks, all the same share of their bounds, at which a method keeps at most `keep` of the MACs."""
    way = method(name)
    bounds = way.rank_bounds(layer)
    low, high = 0.0, 1.0
    for _ in range(24):
        share = (low + high) / 2
        ranks = {rank: max(1, round(share * bound)) for rank, bound in bounds.items()}
        low, high = (share, high) if way.macs(layer, ranks) <= keep * layer.macs else (low, share)
    return {rank: max(1, round(low * bound)) for rank, bound in bounds.items()}


def groups_of(
    model: nn.Module, example: Tensor, methods: Sequence[str] = METHODS, keeps: Sequence[float] = KEEPS
) -> tuple[list[LayerSpec], list[Group]]:
    """Layers, and candidates of each at these shares of its MACs; their loss is the share of energy that they lose."""
    layers = [layer for layer in find_layers(model, example) if layer.skip is None]
    groups = []
    for layer in layers:
        choices = [DENSE]
        for name in methods:
            if method(name).why_not(layer) is None:
                found = [LayerChoice(name, ranks_at(layer, name, keep)) for keep in keeps]
                choices += [c for c in dict.fromkeys(found) if method(name).macs(layer, c.ranks) < layer.macs]
        macs = [layer.macs if c == DENSE else method(c.method).macs(layer, c.ranks) for c in choices]
        params = [layer.params if c == DENSE else method(c.method).params(layer, c.ranks) for c in choices]
        losses = np.zeros(len(choices))
        groups.append(Group((layer,), tuple(choices), losses, np.array(macs, float), np.array(params, float)))
    return layers, groups
