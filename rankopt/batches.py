"""Users' data as lists of `Batch`es: `as_batches` reads what people have, the rest of the file cuts and joins them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from rankopt.errors import DataError, RankoptError
from rankopt.nest import UnlikeError, joined, mapped, tensors

_ENDLESS = 1_000_000  # batches after which a source without `samples` is taken to have no end


@dataclass(frozen=True)
class Batch:
    """What one call of the model is given, and the labels if there are any.

    Labels are a tensor, a tuple, list or dict of tensors, or a list with one entry a sample. Inputs that are not
    tensors, or are tensors without dimensions, are handed on as they are.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    labels: Any = None

    def __len__(self) -> int:
        """The number of samples: the length of the first input tensor."""
        return next((len(t) for t in tensors((self.args, self.kwargs)) if t.dim() > 0), 0)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on `device`."""
        args, kwargs, labels = mapped((self.args, self.kwargs, self.labels), lambda t: t.to(device))
        return Batch(args, kwargs, labels)

    def take(self, index: slice | Tensor) -> Batch:
        """The samples that `index` names."""

        def pick(tensor: Tensor) -> Tensor:
            return tensor[index] if tensor.dim() > 0 else tensor

        args, kwargs = mapped((self.args, self.kwargs), pick)
        if _one_a_sample(self.labels):
            chosen = range(len(self.labels))[index] if isinstance(index, slice) else index.tolist()
            return Batch(args, kwargs, [self.labels[i] for i in chosen])
        return Batch(args, kwargs, mapped(self.labels, pick))


def as_batches(
    source: Any, *, samples: int | None = None, batch_size: int = 128, where: str = "calibration"
) -> list[Batch]:
    """Read data of any of the usual forms.

    Args:
        source: an iterable of batches (a DataLoader, a list, a generator), each one of: ``(inputs, labels)``, inputs
            alone, ``(args tuple, kwargs dict)``, or a dict of keyword inputs whose ``labels`` are taken out; inputs
            are a tensor, a tuple of tensors or a dict. Or all data at once, to be cut into batches: a map-style
            Dataset, a tensor or array, a tuple (inputs, labels) of them, or a dict of them.
        samples: stop after so many (None: all).
        batch_size: for data that do not come in batches.
        where: which data they are, for messages.

    Raises:
        DataError: one line saying which batch is wrong and what is needed.
    """
    for name, value in (("samples", samples), ("batch size", batch_size)):
        if value is not None and value < 1:
            raise DataError(f"{where}: {name} must be at least 1, got {value}")
    batches: list[Batch] = []
    total = 0
    for number, item in enumerate(_guarded(_items(source, batch_size, where), where)):
        batch = _checked(_read(item, f"{where}: batch {number}"), f"{where}: batch {number}")
        if samples is not None and total + len(batch) > samples:
            batch = batch.take(slice(0, samples - total))
        batches.append(batch)
        total += len(batch)
        if samples is not None and total >= samples:
            break
        if number >= _ENDLESS:
            raise DataError(f"{where}: still going after {number} batches; say how many samples to take")
    if not batches:
        raise DataError(f"{where}: no batches (an empty loader, or a generator that was used up before)")
    return batches


def count(batches: Iterable[Batch]) -> int:
    """How many samples there are."""
    return sum(len(batch) for batch in batches)


def concatenate(batches: Sequence[Batch]) -> Batch | None:
    """All samples in one batch, or None when their forms or shapes differ (sequences padded batch by batch, say)."""
    if not batches:
        return None
    try:
        args, kwargs = joined([(b.args, b.kwargs) for b in batches])
        if all(_one_a_sample(b.labels) for b in batches):
            return Batch(args, kwargs, [label for b in batches for label in b.labels])
        return Batch(args, kwargs, joined([b.labels for b in batches]))
    except UnlikeError:
        return None


def first(batches: Sequence[Batch], samples: int | None) -> list[Batch]:
    """The first samples (None: all), in one batch where their shapes allow."""
    taken: list[Batch] = []
    for batch in batches:
        left = None if samples is None else samples - count(taken)
        if left is not None and left <= 0:
            break
        taken.append(batch if left is None or len(batch) <= left else batch.take(slice(0, left)))
    whole = concatenate(taken)
    return [whole] if whole is not None else taken


def split(batches: Sequence[Batch], fraction: float, seed: int = 0) -> tuple[list[Batch], list[Batch]]:
    """Hold back a share of the samples, drawn at random; returns (the rest, those held back), each in its old order."""
    total = count(batches)
    if not 0 < fraction < 1:
        raise DataError(f"the share to hold back must lie between 0 and 1, got {fraction}")
    if total < 2:
        raise DataError(f"at least 2 samples are needed to hold some back, got {total}")
    held = min(max(round(total * fraction), 1), total - 1)
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:held]] = True
    parts: tuple[list[Batch], list[Batch]] = ([], [])
    start = 0
    for batch in batches:
        mask = chosen[start : start + len(batch)]
        start += len(batch)
        for part, wanted in zip(parts, (~mask, mask), strict=True):
            if wanted.any():
                part.append(batch.take(wanted.nonzero().flatten()))
    return parts


def digest(batches: Iterable[Batch]) -> str:
    """Sixteen hexadecimal digits that name the contents; the same samples in other batches have another digest."""
    state = hashlib.sha256()
    for batch in batches:
        form = mapped((batch.args, batch.kwargs, batch.labels), lambda t: f"{t.dtype} {tuple(t.shape)}")
        state.update(repr(form).encode())
        for tensor in tensors((batch.args, batch.kwargs, batch.labels)):
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            state.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return state.hexdigest()[:16]


def pieces(batch: Batch, size: int) -> Iterator[Batch]:
    """Cut a batch into pieces of at most `size` samples."""
    for start in range(0, len(batch), size):
        yield batch.take(slice(start, start + size)) if len(batch) > size else batch


def _items(source: Any, size: int, where: str) -> Iterable[Any]:
    """One item a batch; data that come whole are cut."""
    if isinstance(source, Dataset) and not isinstance(source, IterableDataset):
        return DataLoader(source, batch_size=size)
    parts = source if isinstance(source, tuple) else (source,)
    if isinstance(source, Mapping) or (parts and all(isinstance(part, Tensor | np.ndarray) for part in parts)):
        whole = _checked(_read(source, where), where)
        return [whole.take(slice(start, start + size)) for start in range(0, len(whole), size)]
    if isinstance(source, str | bytes) or not (hasattr(source, "__iter__") or hasattr(source, "__getitem__")):
        raise DataError(f"{where}: needs an iterable of batches, got {type(source).__name__}")
    return source


def _guarded(items: Iterable[Any], where: str) -> Iterator[Any]:
    """Iterate; what the user's loader raises becomes one line."""
    try:
        yield from items
    except RankoptError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise DataError(f"{where}: reading the data raised {type(error).__name__}: {first}") from error


def _read(item: Any, where: str) -> Batch:
    if isinstance(item, Batch):
        return item
    if isinstance(item, list | tuple):
        if len(item) == 2 and isinstance(item[0], tuple) and isinstance(item[1], Mapping):
            inputs, labels = _inputs(dict(item[1]), where)
            return Batch(mapped(item[0]), inputs.kwargs, labels)
        if len(item) not in (1, 2):
            raise DataError(
                f"{where}: needs (inputs, labels) or (args tuple, kwargs dict), got {len(item)} parts;"
                " put several inputs into a tuple: ((x1, x2), labels)"
            )
        inputs, own = _inputs(item[0], where)
        return Batch(inputs.args, inputs.kwargs, _labels(item[1]) if len(item) == 2 else own)
    inputs, own = _inputs(item, where)
    return Batch(inputs.args, inputs.kwargs, own)


def _inputs(given: Any, where: str) -> tuple[Batch, Any]:
    """The inputs as a batch without labels, and the labels that a dict brought along."""
    if isinstance(given, Mapping):
        kwargs = {str(key): mapped(value) for key, value in given.items() if key != "labels"}
        return Batch((), kwargs), _labels(given.get("labels"))
    args = tuple(given) if isinstance(given, list | tuple) else (given,)
    if not all(isinstance(value, Tensor | np.ndarray | list | tuple | Mapping) or value is None for value in args):
        odd = next(value for value in args if not isinstance(value, Tensor | np.ndarray | list | tuple | Mapping))
        raise DataError(f"{where}: inputs must be tensors, got {type(odd).__name__}")
    return Batch(mapped(args)), None


def _labels(given: Any) -> Any:
    if isinstance(given, list) and given and all(isinstance(value, int | float) for value in given):
        return torch.tensor(given)
    return mapped(given)


def _checked(batch: Batch, where: str) -> Batch:
    inputs = [t for t in tensors((batch.args, batch.kwargs)) if t.dim() > 0]
    lengths = sorted({len(t) for t in inputs})
    if not lengths:
        raise DataError(f"{where}: inputs must be tensors with a batch dimension; there are none")
    if len(lengths) > 1:
        raise DataError(f"{where}: its input tensors have different lengths: {', '.join(map(str, lengths))}")
    if lengths == [0]:
        raise DataError(f"{where}: holds 0 samples")
    sizes = [len(t) for t in tensors(batch.labels) if t.dim() > 0]
    if _one_a_sample(batch.labels):
        sizes = [len(batch.labels)]
    for size in sizes:
        if size != len(batch):
            raise DataError(f"{where}: {len(batch)} inputs but {size} labels")
    if not all(bool(torch.isfinite(t).all()) for t in inputs if t.is_floating_point()):
        raise DataError(f"{where}: an input holds NaN or infinity")
    return batch


def _one_a_sample(labels: Any) -> bool:
    """Whether labels are a plain list of one entry a sample (texts, boxes), not a nest of batched tensors."""
    return isinstance(labels, list) and not all(isinstance(value, Tensor) for value in labels)
