"""`distill`: one block is trained alone to give what the block that it stands for gives on the same inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

_HELD = 0.25  # the share of samples that the error is measured on


class Example(NamedTuple):
    """Samples of one shape: `x`, `y` (batch, tokens, channels), `keep` (batch, tokens), False at padding, or None."""

    x: Tensor
    y: Tensor
    keep: Tensor | None = None


@dataclass(frozen=True)
class DistillOptions:
    """How a block is trained.

    Attributes:
        steps: optimizer steps (0: not at all).
        batch: samples a step.
        lr: Adam's largest rate; it rises over a tenth of the steps and falls along a cosine.
        seed: for the order of the samples.
    """

    steps: int = 150
    batch: int = 16
    lr: float = 3e-3
    seed: int = 0


def distill(block: nn.Module, examples: Sequence[Example], options: DistillOptions = DistillOptions()) -> float:
    """Train a block in place on all but the last quarter of the samples; its relative squared error on that quarter.

    The weights that did best on the quarter so far are kept, those it began with among them, so training never leaves
    it worse. Runs on one processor give the same weights for the same seed.

    Args:
        block: called as ``block(x, keep)``; in float32 or float64.
        examples: what it is given and what it should give.
        options: see `DistillOptions`.

    Returns:
        Σ (y − block(x))² / Σ (y − mean)² over kept tokens, the mean being that of the training quarters.
    """
    training, held = _cut(examples)
    mean, variance = _moments(training)
    best = block_error(block, held, mean)
    kept = {k: v.clone() for k, v in block.state_dict().items()}
    if options.steps == 0 or not training:
        return best
    generator = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.Adam(block.parameters(), lr=options.lr)
    sizes = torch.tensor([float(len(e.x)) for e in training])
    with torch.enable_grad():
        for step in range(options.steps):
            for group in optimizer.param_groups:
                group["lr"] = options.lr * _rate((step + 1) / options.steps)
            example = training[int(torch.multinomial(sizes, 1, generator=generator))]
            part = torch.randint(len(example.x), (min(options.batch, len(example.x)),), generator=generator)
            keep = None if example.keep is None else example.keep[part]
            left = block(example.x[part], keep) - example.y[part]
            loss = (left if keep is None else left[keep]).square().mean() / variance
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(block.parameters(), 1.0)
            optimizer.step()
            if (step + 1) % max(options.steps // 4, 1) == 0 and (error := block_error(block, held, mean)) < best:
                best, kept = error, {k: v.clone() for k, v in block.state_dict().items()}
    block.load_state_dict(kept)
    return best


def block_error(block: nn.Module, examples: Sequence[Example], mean: Tensor | None = None) -> float:
    """Relative squared error, as `distill` returns it; infinite where the block's output is not finite."""
    mean = _moments(examples)[0] if mean is None else mean
    left = whole = 0.0
    with torch.no_grad():
        for x, y, keep in examples:
            difference, spread = block(x, keep) - y, y - mean
            if keep is not None:
                difference, spread = difference[keep], spread[keep]
            left += float(difference.double().square().sum())
            whole += float(spread.double().square().sum())
    return left / max(whole, 1e-300) if math.isfinite(left) else float("inf")


def _cut(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Training samples and the last quarter; where there is a single sample it is both."""
    total = sum(len(e.x) for e in examples)
    border = total - max(1, round(_HELD * total))
    parts: tuple[list[Example], list[Example]] = ([], [])
    start = 0
    for example in examples:
        cut = min(max(border - start, 0), len(example.x))
        for part, piece in zip(parts, (slice(0, cut), slice(cut, None)), strict=True):
            taken = Example(example.x[piece], example.y[piece], None if example.keep is None else example.keep[piece])
            if len(taken.x):
                part.append(taken)
        start += len(example.x)
    return parts if parts[0] else (parts[1], parts[1])


def _moments(examples: Sequence[Example]) -> tuple[Tensor, float]:
    """Mean of y over kept tokens, (channels,), and the mean squared distance from it."""
    rows = torch.cat([(e.y if e.keep is None else e.y[e.keep]).reshape(-1, e.y.shape[-1]) for e in examples])
    mean = rows.mean(0)
    return mean, max(float((rows - mean).square().mean()), 1e-30)


def _rate(done: float) -> float:
    return done / 0.1 if done < 0.1 else 0.5 * (1 + math.cos(math.pi * (done - 0.1) / 0.9))
