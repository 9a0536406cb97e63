"""Batch norm recalibration: running statistics estimated again on the compressed model's own activations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rankopt.batches import Batch, concatenate


def has_batch_norm(model: nn.Module) -> bool:
    """Whether there are running statistics to recalibrate."""
    return bool(_norms(model))


def recalibrate(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Set the running mean and variance to their average over `batches`, in place; all else stays in eval mode.

    Batches of one sample, in which a variance may not be defined, are left out, or taken together if there are no
    others.
    """
    usable = [batch for batch in batches if len(batch) > 1]
    if not usable:
        whole = concatenate(batches)
        if whole is None or len(whole) < 2:
            return
        usable = [whole]
    norms = _norms(model)
    before = {norm: (norm.momentum, norm.training) for norm in norms}
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average of all batches
        norm.training = True
    try:
        with torch.no_grad():
            for batch in usable:
                model(*batch.args, **batch.kwargs)
    finally:
        for norm, (momentum, training) in before.items():
            norm.momentum, norm.training = momentum, training


def _norms(model: nn.Module) -> list[_BatchNorm]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
