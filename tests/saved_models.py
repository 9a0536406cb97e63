"""Saved models for tests: one of every decomposition and kind of layer, and changes that keep the hashes right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankopt.artifact import save
from rankopt.decompositions import method, table
from rankopt.layers import fingerprint, static_layers
from rankopt.manifest import MANIFEST
from rankopt.plan import LayerChoice, Plan
from rankopt.surgery import apply
from rankopt.untrusted import size_and_digest

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(18, 16), (18,)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, padding=1), (6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), (6, 9, 8)),
    "grouped": (lambda: nn.Conv2d(8, 8, 3, groups=2, padding=1, padding_mode="reflect"), (8, 6, 6)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6, padding="same"), (6, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3, dilation=(1, 2, 1), padding=1), (4, 5, 6, 5)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(6, 8, 3, stride=2), (6, 5)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, output_padding=1), (6, 4, 5)),
}


class EveryLayer(nn.Module):
    """A layer of every kind for every method that fits it, side by side, each on the input of its kind."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleDict()
        for kind, (make, _) in LAYERS.items():
            (layer,) = static_layers(nn.Sequential(make()))
            for name, way in table().items():
                if way.why_not(layer) is None:
                    self.branches[f"{kind}_{name}"] = make()
        self.inputs = list(LAYERS)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.inputs, inputs, strict=True))
        return tuple(
            torch.relu(branch(given[max((k for k in given if name.startswith(k)), key=len)]))
            for name, branch in self.branches.items()
        )


def every_layer() -> tuple[nn.Module, nn.Module, Plan, tuple[Tensor, ...]]:
    """The dense model, the compressed one, its plan and an input of two samples."""
    torch.manual_seed(0)
    dense = EveryLayer().eval()
    choices = {}
    for layer in static_layers(dense):
        name = next(n for n in sorted(table(), key=len, reverse=True) if layer.name.endswith(f"_{n}"))
        bounds = method(name).rank_bounds(layer)
        choices[layer.name] = LayerChoice(name, {k: max(1, min(v, 2 + n)) for n, (k, v) in enumerate(bounds.items())})
    plan = Plan(choices, fingerprint(dense))
    inputs = tuple(torch.randn(2, *shape) for _, shape in LAYERS.values())
    return dense, apply(dense, plan), plan, inputs


class Net(nn.Module):
    """Convolutions with batch norms, one of them decomposed, and a head: for 3×8×8 inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 12, 3, padding=1), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


def net() -> tuple[nn.Module, nn.Module, Plan]:
    """Dense, compressed, plan."""
    torch.manual_seed(0)
    dense = Net()
    dense.train()(torch.randn(16, 3, 8, 8) * 2 + 1)
    dense.eval()
    plan = Plan(
        {"first": LayerChoice("spatial_svd", {"rank": 4}), "second": LayerChoice("svd", {"rank": 5})},
        fingerprint(dense),
    )
    return dense, apply(dense, plan), plan


def saved_net(directory: Path, exports: tuple[str, ...] = ("pt2",)) -> Path:
    """Saved, with measurements that are right."""
    from rankopt.cost import count

    dense, small, plan = net()
    example = ((torch.randn(2, 3, 8, 8),), {})
    measured = {
        name: {"macs": count(m, *example).macs, "params": count(m, *example).params}
        for name, m in (("dense", dense), ("compressed", small))
    }
    return save(
        directory, small, plan, measurements=measured, source=f"{Net.__module__}:Net", exports=exports, example=example
    )


def rehash(directory: Path) -> None:
    """Write the sizes and hashes of the files as they are now, so that deeper checks are reached."""
    path = directory / MANIFEST
    data = json.loads(path.read_text())
    for name in data["files"]:
        size, digest = size_and_digest(directory / name)
        data["files"][name] = {"bytes": size, "sha256": digest}
    path.write_text(json.dumps(data))


def edit(directory: Path, name: str, change: Any) -> None:
    """Change a JSON file in place."""
    data = json.loads((directory / name).read_text())
    changed = change(data)
    (directory / name).write_text(json.dumps(data if changed is None else changed))
