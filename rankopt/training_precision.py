"""Which precision and memory format a training runs in: what the hardware is built for, or what is measured to gain."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from rankopt.precision import Precision, built_for_bfloat16
from rankopt.recovery_options import RecoveryOptions

_GAIN = 0.95  # of the time in float32 and the contiguous format: what is not faster than this is not worth a change
_ROUNDS = 3


def choices(options: RecoveryOptions, model: nn.Module, device: torch.device) -> list[Precision]:
    """What the options leave open and the hardware and the model can do; the plainest first."""
    images = any(isinstance(m, nn.Conv2d | nn.ConvTranspose2d) for m in model.modules())
    single = all(p.dtype == torch.float32 for p in model.parameters())
    able = single and built_for_bfloat16(device.type)
    kinds = {"float32": [False], "bfloat16": [True], "auto": [False, True] if able else [False]}[options.precision]
    formats = {"contiguous": [False], "channels_last": [True], "auto": [False, True] if images else [False]}
    found = [Precision(half, last) for half in kinds for last in formats[options.memory_format]]
    # bfloat16 without channels-last converts layouts again and again: not worth timing where both are open
    return [p for p in found if p.channels_last or not p.bfloat16 or not images or len(found) < 4]


def by_hardware(options: RecoveryOptions, model: nn.Module, device: torch.device) -> Precision:
    """The last of the choices, without timing: the same on every machine of one kind."""
    return choices(options, model, device)[-1]


def by_timing(
    options: RecoveryOptions, model: nn.Module, device: torch.device, step: Callable[[nn.Module, Precision], Any]
) -> tuple[Precision, dict[str, float]]:
    """The choice whose training steps are fastest, and the seconds of each; in turns, on copies of the model.

    Args:
        options, model, device: see `choices`.
        step: runs a model forward and backward once.
    """
    offered = choices(options, model, device)
    if len(offered) == 1:
        return offered[0], {}
    copies = {choice: choice.module_(copy.deepcopy(model)) for choice in offered}
    best = dict.fromkeys(offered, float("inf"))
    for number in range(1 + _ROUNDS):
        for choice, other in copies.items():
            start = time.perf_counter()
            step(other, choice)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number > 0:  # the first is a warm-up
                best[choice] = min(best[choice], time.perf_counter() - start)
    fastest = min(offered, key=best.__getitem__)
    chosen = fastest if best[fastest] < _GAIN * best[offered[0]] else offered[0]
    return chosen, {str(choice): seconds for choice, seconds in best.items()}
