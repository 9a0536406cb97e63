"""`Randomness`: the global generators of torch, NumPy and Python as one state that is swapped in and can be stored."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Randomness:
    """A state of the generators; inside it random numbers go on where they stopped, outside nothing has changed.

    Args:
        seed: to begin with, a whole number from 0.
        gpu: whether the generators of all GPUs belong to it.
    """

    def __init__(self, seed: int, gpu: bool = False) -> None:
        self._gpu = gpu and torch.cuda.is_available()
        self._entered = False
        before = self._read()
        torch.default_generator.manual_seed(seed)
        if self._gpu:
            torch.cuda.manual_seed_all(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        self._state = self._read()
        self._write(before)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Inside, the generators are in this state."""
        before = self._read()
        self._write(self._state)
        self._entered = True
        try:
            yield
        finally:
            self._entered = False
            self._state = self._read()
            self._write(before)

    def tensors(self) -> dict[str, Tensor]:
        """The state as it is inside now."""
        state = self._read() if self._entered else self._state
        cpu, gpus, (_, keys, place, has, cached), (version, numbers, gauss) = state
        found = {
            "torch": cpu,
            "numpy": torch.tensor([*keys.tolist(), place, has], dtype=torch.int64),
            "numpy_gauss": torch.tensor(cached, dtype=torch.float64),
            "python": torch.tensor([version, *numbers], dtype=torch.int64),
            "python_gauss": torch.tensor(float("nan") if gauss is None else gauss, dtype=torch.float64),
        }
        return found | {f"gpu{n}": state for n, state in enumerate(gpus)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` gave."""
        *keys, place, has = tensors["numpy"].tolist()
        version, *numbers = tensors["python"].tolist()
        gauss = float(tensors["python_gauss"])
        gpus = [tensors[f"gpu{n}"] for n in range(torch.cuda.device_count())] if self._gpu else []
        numpy = ("MT19937", np.array(keys, dtype=np.uint32), place, has, float(tensors["numpy_gauss"]))
        python = (version, tuple(numbers), None if gauss != gauss else gauss)
        self._state = (tensors["torch"], gpus, numpy, python)
        if self._entered:
            self._write(self._state)

    def _read(self) -> Any:
        gpus = torch.cuda.get_rng_state_all() if self._gpu else []
        return torch.get_rng_state(), gpus, np.random.get_state(), random.getstate()

    def _write(self, state: Any) -> None:
        cpu, gpus, numpy, python = state
        torch.set_rng_state(cpu)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)
        np.random.set_state(numpy)
        random.setstate(python)
