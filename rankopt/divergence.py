"""`Divergence`: how far a compressed model's outputs are from the dense model's, and samples of its gradient.

For logits it is the Kullback-Leibler divergence of the predicted distributions, averaged over positions where there are
several (tokens, pixels). For real-valued outputs it is that of two Gaussians whose variance is that of the dense
outputs: half the relative squared error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rankopt.errors import DataError


@dataclass(frozen=True)
class Divergence:
    """kind: "logits" or "regression"; `class_dim`: the dimension of the classes; `variance`: of regression outputs."""

    kind: str = "logits"
    class_dim: int = -1
    variance: float = 1.0

    @classmethod
    def of(cls, output: Any, kind: str = "auto", class_dim: int | None = None) -> Divergence:
        """Choose from a dense output: one column or class means regression; classes stand last, in images second."""
        tensor = pick(output)
        if kind not in ("auto", "logits", "regression"):
            raise DataError(f"output: kind must be auto, logits or regression, got {kind!r}")
        if class_dim is None:
            class_dim = 1 if tensor.dim() >= 4 else -1
        if not -tensor.dim() <= class_dim < tensor.dim():
            raise DataError(f"output: class_dim {class_dim} does not fit an output of shape {tuple(tensor.shape)}")
        if kind == "auto":
            kind = "logits" if tensor.dim() >= 2 and tensor.shape[class_dim] > 1 else "regression"
        variance = float(tensor.float().var(correction=0)) if kind == "regression" else 1.0
        return cls(kind, class_dim, max(variance, 1e-12))

    def between(self, dense: Tensor, other: Tensor) -> Tensor:
        """Divergence of every sample, (n,), in nats; both arguments are outputs that `pick` returned."""
        dense, other = dense.float(), other.float()
        if self.kind == "regression":
            return (
                ((dense - other) ** 2).flatten(1).mean(1) / (2 * self.variance)
                if dense.dim() > 1
                else ((dense - other) ** 2 / (2 * self.variance))
            )
        p, q = F.log_softmax(dense, self.class_dim), F.log_softmax(other, self.class_dim)
        per_position = (p.exp() * (p - q)).sum(self.class_dim)
        return per_position.flatten(1).mean(1) if per_position.dim() > 1 else per_position

    def score(
        self, output: Tensor, generator: torch.Generator, temperature: float = 1.0, draw: int = 0, draws: int = 1
    ) -> Tensor:
        """Sum over samples of log p(y | output), y drawn from the output's own distribution; backpropagate it.

        Scaled so that the square of ⟨gradient, change⟩, as a mean over `draws` calls with ``draw`` = 0, 1, …, is
        expected to be twice the divergence per position. A temperature above 1 takes the distribution of logits /
        temperature, which still has a gradient where the prediction is saturated.

        With several draws the first one takes the likeliest label and the others draw among the rest, each weighted
        with its share of the probability (stratified sampling, see Cochran, Sampling Techniques, 1977, chapter 5):
        where a prediction is sure, labels drawn from the whole would rarely show what else it might have been. Signs
        are random, so that what several positions of a sample add to each other's squares has mean zero.
        """
        output = output.float()
        if self.kind == "regression":
            noise = torch.randn(output.shape, generator=generator).to(output) / self.variance**0.5
            return (noise * output).sum() / max(output[0].numel(), 1) ** 0.5
        logits = output.movedim(self.class_dim, -1) / temperature
        rows = logits.reshape(-1, logits.shape[-1])
        shares = rows.detach().softmax(-1).cpu()
        drawn, weight = _label(shares, generator, draw, draws)
        positions = max(rows.shape[0] // max(output.shape[0], 1), 1)
        chosen = rows.log_softmax(-1).gather(1, drawn.to(rows.device))
        return (weight.to(rows.device) * chosen).sum() / positions**0.5


def _label(shares: Tensor, generator: torch.Generator, draw: int, draws: int) -> tuple[Tensor, Tensor]:
    """A label for every row of probabilities (n, classes), and what its gradient is multiplied with, both (n, 1).

    The probabilities may be overwritten: there may be many.
    """
    if draws == 1:
        return torch.multinomial(shares, 1, generator=generator), shares.new_ones(len(shares), 1)
    share, likeliest = shares.max(1, keepdim=True)
    if draw == 0:
        drawn, weight = likeliest, share * draws
    else:
        rest = shares.scatter_(1, likeliest, 0.0)
        weight = rest.sum(1, keepdim=True) * (draws / (draws - 1))
        rest.clamp_min_(1e-30)  # all of it may be 0, and so is the weight
        drawn = torch.multinomial(rest, 1, generator=generator)
    sign = torch.randint(2, weight.shape, generator=generator) * 2 - 1
    return drawn, weight.sqrt() * sign


def pick(output: Any) -> Tensor:
    """The tensor that is judged: the output itself, its ``logits``, or the first tensor of a tuple or mapping."""
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    values = list(output.values()) if isinstance(output, Mapping) else output
    if isinstance(values, list | tuple):
        for value in values:
            if isinstance(value, Tensor) and value.is_floating_point():
                return value
    raise DataError(f"output: the model returns {type(output).__name__}, in which no floating-point tensor was found")
