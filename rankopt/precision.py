"""`Precision`: how trials run models: float32 as it is, channels-last, or bfloat16 by autocast where that is faster.

A trial asks how good a plan is, and that needs fewer digits than what is handed over. Where the processor multiplies
bfloat16 natively a pass takes a fraction of the time, and the divergence comes out within about a percent. What a study
ends with is measured again in float32.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankopt.batches import Batch
from rankopt.divergence import Divergence, pick
from rankopt.errors import InputError
from rankopt.layers import inference
from rankopt.nest import mapped, tensors

PRECISIONS = ("auto", "float32", "bfloat16")
_FASTER = 1.25  # how much faster bfloat16 has to be
_PREFERRED = 0.85  # channels-last is taken unless it is this much slower: what is chosen should not hang on noise
_OFF = 1e-3  # nats that the dense model may be off in it, at most
_SAMPLES = 128


@dataclass(frozen=True)
class Precision:
    """How a model is run in a trial.

    Attributes:
        bfloat16: under autocast.
        channels_last: images and convolutions in that memory format.
    """

    bfloat16: bool = False
    channels_last: bool = False

    @contextmanager
    def on(self, device: str) -> Iterator[None]:
        """Run models like that inside."""
        with torch.autocast(device, torch.bfloat16, enabled=self.bfloat16):
            yield

    def batches(self, batches: Sequence[Batch]) -> list[Batch]:
        """The same batches, images in the memory format."""
        if not self.channels_last:
            return list(batches)
        return [Batch(mapped(b.args, _last), mapped(b.kwargs, _last), b.labels) for b in batches]

    def module_(self, module: nn.Module) -> nn.Module:
        """Bring a module's weights into the memory format, in place."""
        return module.to(memory_format=torch.channels_last) if self.channels_last else module  # type: ignore[call-overload]


EXACT = Precision()


def device_of(model: nn.Module) -> str:
    """ "cpu", "cuda", ...: where its first parameter is."""
    return next((p.device.type for p in model.parameters()), "cpu")


def chosen(wanted: str, model: nn.Module, batch: Batch, divergence: Divergence) -> Precision:
    """The fastest way to run trials of a model, by timing it on a few samples.

    Args:
        wanted: auto; or float32 or bfloat16, where only the memory format is chosen.
        model: the dense model.
        batch: samples of its data.
        divergence: bfloat16 is refused by ``auto`` where the dense model itself comes out different.

    Raises:
        InputError: `wanted` is no such word.
    """
    if wanted not in PRECISIONS:
        raise InputError(f"precision: must be one of {', '.join(PRECISIONS)}, got {wanted!r}")
    few = batch.take(slice(0, _SAMPLES))
    images = _is_images(model, few)
    plain = [Precision(b, last) for b in (False, True) for last in ((False, True) if images else (False,))]
    allowed = [p for p in plain if wanted == "auto" or p.bfloat16 == (wanted == "bfloat16")]
    if len(allowed) == 1:
        return allowed[0]
    exact, _ = _timed(EXACT, model, few)
    times: dict[Precision, float] = {}
    for one in allowed:
        try:
            output, seconds = _timed(one, model, few)
        except Exception:  # an operation that has no such kernel
            continue
        if one.bfloat16 and wanted == "auto":
            off = float(divergence.between(exact, output).mean())
            if not off <= _OFF:
                continue
            seconds *= _FASTER
        times[one] = seconds * (_PREFERRED if one.channels_last else 1.0)
    return min(times, key=lambda p: times[p]) if times else allowed[0]


def _timed(precision: Precision, model: nn.Module, batch: Batch) -> tuple[Tensor, float]:
    copied = precision.module_(copy.deepcopy(model)) if precision.channels_last else model
    (given,) = precision.batches([batch])
    best = float("inf")
    with inference(copied), precision.on(device_of(model)):
        for _ in range(3):
            start = time.perf_counter()
            output = pick(copied(*given.args, **given.kwargs)).float()
            float(output.sum())  # waits for a GPU
            best = min(best, time.perf_counter() - start)
    return output, best


def _is_images(model: nn.Module, batch: Batch) -> bool:
    convolves = any(isinstance(m, nn.Conv2d) for m in model.modules())
    return convolves and any(t.dim() == 4 for t in tensors((batch.args, batch.kwargs)))


def _last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
