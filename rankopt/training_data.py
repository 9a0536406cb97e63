"""`TrainingData`: endless batches from users' data, whose order follows from a seed and which can be taken up anywhere.

Loaders are iterated anew for every epoch, so their shuffling and augmentation are different each time. Whatever they
draw from the generators of torch, NumPy and Python comes from a state that depends on the seed and the epoch alone;
the model's own randomness (dropout, mixup) is another one. So the batches do not depend on what is trained with them.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from rankopt.batches import Batch, as_batches, concatenate
from rankopt.errors import DataError, RankoptError
from rankopt.randomness import Randomness


class TrainingData:
    """Batches for training.

    Args:
        source: as for `as_batches`. What can be iterated again (a DataLoader, an object with ``__iter__``) is iterated
            once an epoch and shuffles itself; data in memory (tensors, a Dataset, a list of batches) are shuffled
            here, batches of one shape sample by sample, and an incomplete last batch is left out.
        batch_size: for data that do not come in batches.
        seed: of order and augmentation.
        where: which data they are, for messages.

    A loader with ``persistent_workers`` draws other numbers after a resume, since its workers are not seeded anew.
    """

    def __init__(self, source: Any, batch_size: int = 128, seed: int = 0, where: str = "train") -> None:
        self._seed, self._where, self._size = seed, where, batch_size
        self.epoch = self.position = 0  # of the batch that comes next
        if isinstance(source, Dataset) and not isinstance(source, IterableDataset):
            full = len(source) >= batch_size  # type: ignore[arg-type]
            source = DataLoader(source, batch_size=batch_size, shuffle=True, drop_last=full)
        self._source = source
        self._pool: list[Batch] | None = None
        if _in_memory(source):
            batches = as_batches(source, batch_size=batch_size, where=where)
            whole = concatenate(batches)
            self._pool = batches if whole is None else [whole]
            self._size = batch_size if _uncut(source) else len(batches[0])
        elif not hasattr(source, "__iter__") and not hasattr(source, "__getitem__"):
            raise DataError(f"{where}: needs an iterable of batches, got {type(source).__name__}")
        elif hasattr(source, "__next__"):
            raise DataError(f"{where}: a generator can be read only once; give a DataLoader, a list or a Dataset")
        self._random = Randomness(0)
        self._batches: Iterator[Batch] | None = None

    def next(self) -> Batch:
        """The next batch; a new epoch begins where the data end. Raises `DataError` when there are none."""
        if self._batches is None:
            self._begin(self.epoch, self.position)
        with self._random.inside():
            batch = self._step()
        if batch is None:
            self._begin(self.epoch + 1, 0)
            with self._random.inside():
                batch = self._step()
        if batch is None:
            raise DataError(f"{self._where}: no batches (an empty loader, or a generator that was used up before)")
        self.position += 1
        return batch

    def go_to(self, epoch: int, position: int) -> None:
        """Let the next batch be that of this epoch and position; those before it are read and thrown away."""
        _close(self._batches)
        self.epoch, self.position, self._batches = epoch, position, None

    def some(self, count: int) -> list[Batch]:
        """The first batches of an epoch of their own, without moving on."""
        other = object.__new__(TrainingData)
        other.__dict__.update(self.__dict__)
        other._batches = None
        other._begin(2**20, 0)
        found: list[Batch] = []
        with other._random.inside():
            while len(found) < count and (batch := other._step()) is not None:
                found.append(batch)
        _close(other._batches)
        if not found:
            raise DataError(f"{self._where}: no batches (an empty loader, or a generator that was used up before)")
        return found

    def _begin(self, epoch: int, position: int) -> None:
        seed = int(np.random.SeedSequence([self._seed, epoch]).generate_state(1)[0])
        _close(self._batches)
        self._random = Randomness(seed)
        with self._random.inside():
            for part in (self._source, *(getattr(self._source, n, None) for n in ("sampler", "batch_sampler"))):
                generator = getattr(part, "generator", None)
                if isinstance(generator, torch.Generator):
                    generator.manual_seed(seed)
                if callable(again := getattr(part, "set_epoch", None)):
                    again(epoch)
            self._batches = self._epoch(seed)
            for _ in range(position):
                if self._step() is None:
                    raise DataError(f"{self._where}: has fewer than the {position} batches it had before")
        self.epoch, self.position = epoch, position

    def _step(self) -> Batch | None:
        assert self._batches is not None
        try:
            return next(self._batches, None)
        except RankoptError:
            raise
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            raise DataError(f"{self._where}: reading the data raised {type(error).__name__}: {first}") from error

    def _epoch(self, seed: int) -> Iterator[Batch]:
        if self._pool is None:
            return self._read(self._source)
        generator = torch.Generator().manual_seed(seed)
        if len(self._pool) > 1:
            return iter([self._pool[n] for n in torch.randperm(len(self._pool), generator=generator).tolist()])
        whole = self._pool[0]
        order = torch.randperm(len(whole), generator=generator).split(self._size)
        full = [index for index in order if len(index) == self._size] or list(order)
        return (whole.take(index) for index in full)

    def _read(self, source: Iterable[Any]) -> Iterator[Batch]:
        for number, item in enumerate(source):
            (batch,) = as_batches([item], where=f"{self._where}: batch {number}")
            yield batch


def _close(batches: Iterator[Batch] | None) -> None:
    """End a pass that may be in its middle, so that a loader's workers go at once."""
    if isinstance(batches, Generator):
        batches.close()


def _uncut(source: Any) -> bool:
    """Whether data come whole, not in batches."""
    parts = source if isinstance(source, tuple) else (source,)
    return isinstance(source, Mapping) or (bool(parts) and all(isinstance(p, Tensor | np.ndarray) for p in parts))


def _in_memory(source: Any) -> bool:
    return isinstance(source, list | tuple | Tensor | np.ndarray | Mapping)
