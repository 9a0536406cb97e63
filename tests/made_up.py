"""`MadeUp`: a device whose times follow from a module's layers by a formula, and which counts what it is asked for.

Besides a small net, and candidates of its layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import PrivateAttr
from torch import nn

from rankopt.candidates import Group
from rankopt.cost import COUNTED
from rankopt.decompositions import method
from rankopt.errors import InputError
from rankopt.layer_spec import LayerSpec
from rankopt.measurement import Measurement
from rankopt.plan import DENSE, LayerChoice
from rankopt.targets.target import Subject, Target
from rankopt.timing import Effort

LAYERS = COUNTED


class MadeUp(Target):
    """Times are the sum over all calls of layers, of whatever size.

    Attributes:
        mac: ms for a million multiply-accumulates.
        call: ms for every call of a layer.
        weight: ms for a million weights, in whole models only: a layer alone finds its weights in the cache.
        odd: factor for the time of kernels like 3×1, in whole models only.
        extra: ms of everything else in a whole model.
        slower: factor for a plan that was built, against its structure with random weights.
        tail: the 95th percentile as a multiple of the median, for what is not dense.
        threads: stands in the conditions.
    """

    name: ClassVar[str] = "made-up"
    mac: float = 1.0
    call: float = 0.0
    weight: float = 0.0
    odd: float = 1.0
    extra: float = 0.0
    slower: float = 1.0
    tail: float = 1.0
    threads: int = 1
    _asked: list[str] = PrivateAttr(default_factory=list)
    _formula: Callable[[float, str], float] | None = PrivateAttr(None)
    _dies_after: int | None = PrivateAttr(None)
    _refuses: bool = PrivateAttr(False)  # every whole model but dense

    def conditions(self) -> dict[str, str]:
        return {"target": self.called, "threads": str(self.threads), "runtime": "none"}

    def measure(self, subjects: Sequence[Subject], effort: Effort = Effort()) -> list[Measurement]:
        if self._dies_after is not None and len(self._asked) >= self._dies_after:
            raise KeyboardInterrupt
        if self._refuses and any(s.key.startswith("plan") and "dense" not in s.key for s in subjects):
            raise InputError(f"target {self.called}: can't run it")
        self._asked.extend(s.key for s in subjects)
        times = [self.time(s) for s in subjects]
        return [self.told(time, times[0], n > 0) for n, time in enumerate(times)]

    def told(self, time: float, first: float, other: bool) -> Measurement:
        """A measurement of these ms beside those."""
        kept, tail = time / first, self.tail if other and time != first else 1.0
        p95 = time * tail
        return Measurement(
            time, "ms", 9, time, time, p95, 0.0, self.conditions(), kept, kept, kept, 0.0, kept * tail
        )  # fmt: skip

    def peak_memory(self, subject: Subject) -> Measurement:
        """Ten MiB and four bytes a weight."""
        self._asked.append(f"memory: {subject.key}")
        size = 10 + 4 * sum(p.numel() for p in subject.module.parameters()) / 2**20
        return Measurement(size, "MiB", 3, size, size, size, 0.0, self.conditions())

    def time(self, subject: Subject) -> float:
        """Milliseconds of a subject."""
        whole = subject.key.startswith("plan")
        total, names = self.extra * whole, dict(subject.module.named_modules())

        def called(module: Any, args: Any, output: torch.Tensor) -> None:
            nonlocal total
            positions = output.numel() / output.shape[1 if output.dim() > 2 else -1]
            if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d):
                positions = args[0].numel() / args[0].shape[1]
            mmacs = positions * module.weight.numel() / 1e6
            if self._formula is not None and not whole:
                total += self._formula(mmacs, subject.key)
                return
            kernel = getattr(module, "kernel_size", ())
            total += self.call + self.mac * mmacs * (self.odd if whole and len(set(kernel)) > 1 else 1)
            total += whole * self.weight * module.weight.numel() / 1e6

        hooks = [m.register_forward_hook(called) for m in names.values() if isinstance(m, LAYERS)]
        try:
            with torch.no_grad():
                subject.module(*subject.args, **subject.kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        # The layers of a plan's mere structure need no gradients, those of a built plan do as those of the model.
        built = whole and "dense" not in subject.key and all(p.requires_grad for p in subject.module.parameters())
        return max(total, 1e-9) * (self.slower if built else 1)

    @property
    def asked(self) -> list[str]:
        """The keys of all subjects so far."""
        return self._asked

    def counted(self, start: str = "") -> int:
        """How many different subjects with such a key were measured."""
        return len({key for key in self._asked if key.startswith(start)})


def stepped(step: float) -> Callable[[float, str], float]:
    """A device that computes in blocks of so many million multiply-accumulates."""
    return lambda mmacs, key: step * math.ceil(mmacs / step - 1e-9) + 1e-6


class Small(nn.Module):
    """Five convolutions, two of one shape, and a linear layer; for 3×16×16 inputs."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, width, 3, padding=1)
        self.b = nn.Conv2d(width, width, 3, padding=1)
        self.c = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.d = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.e = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.fc = nn.Linear(2 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.a, self.b, self.c, self.d, self.e):
            x = torch.relu(layer(x))
        return self.fc(x.mean((2, 3)))


def groups_of(
    layers: Sequence[LayerSpec], methods: Sequence[str] = ("svd", "svd_in", "spatial_svd"), levels: int = 8
) -> list[Group]:
    """Candidates of every layer, some ranks of every method that fits; their losses are made up too."""
    out = []
    for layer in layers:
        choices = [DENSE]
        for name in methods:
            if method(name).why_not(layer) is None:
                top = method(name).rank_bounds(layer)["rank"]
                ranks = sorted({max(1, round(top * (n + 1) / (levels + 1))) for n in range(levels)})
                choices += [LayerChoice(name, {"rank": rank}) for rank in ranks]
        macs = [layer.macs if c == DENSE else float(method(c.method).macs(layer, c.ranks)) for c in choices]
        params = [layer.params if c == DENSE else float(method(c.method).params(layer, c.ranks)) for c in choices]
        losses = [0.0 if c == DENSE else (1 - m / (2 * layer.macs)) ** 2 for c, m in zip(choices, macs, strict=True)]
        out.append(Group((layer,), tuple(choices), np.array(losses), np.array(macs, float), np.array(params, float)))
    return out
