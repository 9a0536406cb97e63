"""`TrainingLoss`: what a compressed model is trained towards: labels, the dense model's outputs, its inner outputs.

    (1 - distill) · task  +  distill · distillation  +  features · inner error  +  orthogonality · cosines

For logits the task is cross entropy and the distillation T²·KL(dense/T ‖ model/T); for real-valued outputs both are
half the squared error relative to the variance of the dense outputs, against labels and against the dense model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankopt.batches import Batch
from rankopt.chains import Chain
from rankopt.divergence import Divergence, pick
from rankopt.errors import DataError, InputError
from rankopt.layers import inference, plain_attention
from rankopt.nest import mapped, tensors
from rankopt.recovery_options import RecoveryOptions


@dataclass
class TrainingLoss:
    """The loss of a batch.

    Attributes:
        options: weights of the parts.
        dense: the teacher; None: labels alone.
        divergence: what outputs are.
        layers: names of the modules whose outputs are compared, when `options.features` is not 0.
        chains: the decomposed layers whose components are kept apart, when `options.orthogonality` is not 0.
    """

    options: RecoveryOptions
    dense: nn.Module | None
    divergence: Divergence
    layers: Sequence[str] = ()
    chains: Sequence[Chain] = ()

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss, with a graph; `model` runs in the mode that it is in, the dense one in eval mode."""
        options, other, share = self.options, batch.labels, 1.0
        if options.mixup > 0 and len(batch) > 1:
            batch, other, share = mixed(batch, options.mixup)
        weight = self._distill(batch)
        inner, wanted_inner = _Outputs(), _Outputs()
        watched = self.layers if options.features > 0 and self.dense is not None else ()
        fused = plain_attention() if watched else nullcontext()
        wanted: Tensor | None = None
        with fused:
            if self.dense is not None and (weight > 0 or watched):
                with inference(self.dense), wanted_inner.of(self.dense, watched):
                    wanted = pick(self.dense(*batch.args, **batch.kwargs))
            with inner.of(model, watched):
                output = pick(model(*batch.args, **batch.kwargs))
        total = output.new_zeros((), dtype=torch.float32)
        if weight < 1:
            task = self.task(output, batch.labels)
            if share < 1:
                task = share * task + (1 - share) * self.task(output, other)
            total = total + (1 - weight) * task
        if weight > 0:
            assert wanted is not None
            total = total + weight * self.distillation(wanted, output)
        if watched:
            total = total + options.features * inner_error(wanted_inner.found, inner.found)
        if options.orthogonality > 0 and self.chains:
            total = total + options.orthogonality * cosines(self.chains)
        return total

    def _distill(self, batch: Batch) -> float:
        if self.dense is None:
            if batch.labels is None:
                raise DataError("train: without a dense model to learn from, every batch needs labels")
            return 0.0
        return 1.0 if batch.labels is None else self.options.distill

    def task(self, output: Tensor, labels: Any) -> Tensor:
        """Cross entropy with smoothed labels (negative ones are left out), or half the relative squared error."""
        if not isinstance(labels, Tensor):
            raise DataError("train: needs labels as a tensor in every batch; set distill: 1 to train without them")
        output = output.float()
        if self.divergence.kind == "regression":
            if labels.numel() != output.numel():
                raise self._unlike(output, labels)
            return (output - labels.reshape(output.shape).float()).square().mean() / (2 * self.divergence.variance)
        logits = output.movedim(self.divergence.class_dim, -1)
        smoothing = self.options.label_smoothing
        if labels.is_floating_point() and labels.shape == output.shape:  # a distribution a sample
            soft = labels.movedim(self.divergence.class_dim, -1).float()
            soft = (1 - smoothing) * soft + smoothing / logits.shape[-1]
            return -(soft * logits.log_softmax(-1)).sum(-1).mean()
        if labels.is_floating_point() or labels.shape != logits.shape[:-1]:
            raise self._unlike(output, labels)
        valid = labels >= 0
        if not bool(valid.any()):
            return logits.sum() * 0
        chosen = torch.where(valid, labels, -100).long().flatten()
        return F.cross_entropy(logits.flatten(0, -2), chosen, ignore_index=-100, label_smoothing=smoothing)

    def distillation(self, wanted: Tensor, output: Tensor) -> Tensor:
        """Mean divergence from the dense outputs; of logits at the temperature, times its square."""
        if self.divergence.kind == "regression":
            return self.divergence.between(wanted, output).mean()
        t = self.options.temperature
        return t * t * self.divergence.between(wanted.float() / t, output.float() / t).mean()

    def _unlike(self, output: Tensor, labels: Tensor) -> DataError:
        return DataError(
            f"train: outputs have shape {tuple(output.shape)}, labels {tuple(labels.shape)} of {labels.dtype}, which do"
            " not fit; set distill: 1 to train without labels, or output.class_dim"
        )


def mixed(batch: Batch, alpha: float) -> tuple[Batch, Any, float]:
    """Every input mixed with another one of the batch; returns it, the others' labels, and the share of the own."""
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    other = batch.take(torch.randperm(len(batch)))

    def mix(one: Any, two: Any) -> Any:
        partners = iter(tensors(two))
        return mapped(one, lambda t: _mix(t, next(partners), share))

    return Batch(mix(batch.args, other.args), mix(batch.kwargs, other.kwargs), batch.labels), other.labels, share


def inner_error(wanted: Sequence[Tensor], given: Sequence[Tensor]) -> Tensor:
    """Mean over outputs of the squared error relative to the wanted output's square."""
    errors = [
        (g.float() - w.float()).square().sum() / w.float().square().sum().clamp_min(1e-12)
        for w, g in zip(wanted, given, strict=True)
    ]
    return torch.stack(errors).mean()


def cosines(chains: Sequence[Chain]) -> Tensor:
    """Mean over stages of the mean squared cosine between different rank components; 0 when all are orthogonal."""
    found = []
    for rows in [rows for chain in chains for rows in chain.components()]:
        rank = rows.shape[1]
        if rank > 1:
            with torch.autocast(rows.device.type, enabled=False):
                unit = F.normalize(rows.float(), dim=2)
                gram = unit @ unit.mT
            off = gram.square().sum((1, 2)) - gram.diagonal(dim1=1, dim2=2).square().sum(1)
            found.append((off / (rank * (rank - 1))).mean())
    return torch.stack(found).mean() if found else torch.zeros(())


def watched_layers(model: nn.Module, dense: nn.Module, patterns: Sequence[str], replaced: Sequence[str]) -> list[str]:
    """Names of the modules whose outputs are compared: those that match, which both models must have.

    Raises:
        InputError: a pattern matches nothing that both have, or there is nothing to compare.
    """
    common = [n for n in dict(model.named_modules()) if n in dict(dense.named_modules()) and n]
    found = list(replaced)
    if patterns:
        found = []
        for pattern in patterns:
            names = [n for n in common if fnmatchcase(n, pattern)]
            if not names:
                raise InputError(f"recovery.feature_layers: {pattern!r} matches no module that both models have")
            found += [n for n in names if n not in found]
    if not found:
        raise InputError("recovery.features: no layer is decomposed; name modules in feature_layers")
    return found


class _Outputs:
    """Outputs of some modules in the order of their calls."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    @contextmanager
    def of(self, model: nn.Module, names: Sequence[str]) -> Iterator[None]:
        modules = dict(model.named_modules()) if names else {}

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self.found.append(pick(output))

        handles = [modules[name].register_forward_hook(keep) for name in names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _mix(one: Tensor, two: Tensor, share: float) -> Tensor:
    return share * one + (1 - share) * two if one.is_floating_point() and one.dim() > 0 else one
