"""`Precision`: how models are run: float32 as it is, channels-last, or bfloat16 by autocast; `chosen`: how in trials.

A trial asks how good a plan is, and that needs fewer digits than what is handed over. Where the processor multiplies
bfloat16 natively a pass takes a fraction of the time, and the divergence comes out within about a percent. What a study
ends with is measured again in float32.
"""

from __future__ import annotations

import copy
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
_OFF = 1e-4  # nats that the dense model may be off in it, at most
_SAMPLES = 128


@dataclass(frozen=True)
class Precision:
    """How a model is run, in a trial or a training.

    Attributes:
        bfloat16: under autocast.
        channels_last: images and convolutions in that memory format.
    """

    bfloat16: bool = False
    channels_last: bool = False

    @property
    def exact(self) -> Precision:
        """The same memory format in float32: a refit in bfloat16 lost up to a fifth more, and blew up now and then."""
        return Precision(False, self.channels_last)

    @contextmanager
    def on(self, device: str) -> Iterator[None]:
        """Run models like that inside."""
        with torch.autocast(device, torch.bfloat16, enabled=self.bfloat16):
            yield

    def batches(self, batches: Sequence[Batch]) -> list[Batch]:
        """The same batches, images in the memory format."""
        if not self.channels_last:
            return list(batches)
        return [Batch(mapped(b.args, self.placed), mapped(b.kwargs, self.placed), b.labels) for b in batches]

    def placed(self, tensor: Tensor) -> Tensor:
        """An input in the memory format."""
        images = self.channels_last and tensor.dim() == 4
        return tensor.contiguous(memory_format=torch.channels_last) if images else tensor

    def module_(self, module: nn.Module) -> nn.Module:
        """Bring a module's weights into the memory format, in place."""
        return module.to(memory_format=torch.channels_last) if self.channels_last else module  # type: ignore[call-overload]

    def __str__(self) -> str:
        return ("bfloat16" if self.bfloat16 else "float32") + (", channels-last" if self.channels_last else "")


EXACT = Precision()


def device_of(model: nn.Module) -> str:
    """ "cpu", "cuda", ...: where its first parameter is."""
    return next((p.device.type for p in model.parameters()), "cpu")


def chosen(wanted: str, model: nn.Module, batch: Batch, divergence: Divergence) -> Precision:
    """How trials of a model are run.

    Decided by what the processor has and by what comes out, not by timing: the same seed has to give the same plans.

    Args:
        wanted: float32, bfloat16, or auto: bfloat16 where the hardware is built for it (see `built_for_bfloat16`), and
            the dense model comes out the same in it.
        model: the dense model.
        batch: samples of its data.
        divergence: how outputs are compared.

    Raises:
        InputError: `wanted` is no such word.
    """
    if wanted not in PRECISIONS:
        raise InputError(f"precision: must be one of {', '.join(PRECISIONS)}, got {wanted!r}")
    few = batch.take(slice(0, _SAMPLES))
    exact = Precision(False, _is_images(model, few))
    quick = Precision(True, exact.channels_last)
    if wanted != "auto":
        return quick if wanted == "bfloat16" else exact
    if not built_for_bfloat16(device_of(model)):
        return exact
    try:
        off = float(divergence.between(_output(EXACT, model, few), _output(quick, model, few)).mean())
    except Exception:  # an operation that has no such kernel
        return exact
    return quick if off <= _OFF else exact


def built_for_bfloat16(device: str) -> bool:
    """Whether hardware multiplies bfloat16: a GPU, or a processor with AMX or AVX-512's dot products of it.

    Elsewhere it is slower than float32.
    """
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device == "cpu" and any(bool(found()) for name in checks if (found := getattr(torch.cpu, name, None)))


def _output(precision: Precision, model: nn.Module, batch: Batch) -> Tensor:
    copied = precision.module_(copy.deepcopy(model)) if precision.channels_last else model
    (given,) = precision.batches([batch])
    with inference(copied), precision.on(device_of(model)):
        return pick(copied(*given.args, **given.kwargs)).float()


def _is_images(model: nn.Module, batch: Batch) -> bool:
    convolves = any(isinstance(m, nn.Conv2d) for m in model.modules())
    return convolves and any(t.dim() == 4 for t in tensors((batch.args, batch.kwargs)))
