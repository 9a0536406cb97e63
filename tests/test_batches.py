from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from rankopt.batches import Batch, as_batches, concatenate, count, digest, split
from rankopt.errors import DataError

X = torch.arange(24.0).reshape(12, 2)
Y = torch.arange(12)


def test_a_loader_of_inputs_and_labels() -> None:
    batches = as_batches(DataLoader(TensorDataset(X, Y), batch_size=5))
    assert [len(b) for b in batches] == [5, 5, 2]
    assert torch.equal(batches[1].args[0], X[5:10])
    assert torch.equal(batches[1].labels, Y[5:10])


@pytest.mark.parametrize(
    "source",
    [
        TensorDataset(X, Y),
        (X, Y),
        (X.numpy(), Y.numpy()),
        [(X[:5], Y[:5]), (X[5:], Y[5:].tolist())],
        ((x, y) for x, y in [(X[:4], Y[:4]), (X[4:], Y[4:])]),
        {"x": X, "labels": Y},
        [{"x": X, "labels": Y}],
        [((X,), {"labels": Y})],
        [((X,), Y)],
    ],
    ids=["dataset", "tensors", "arrays", "list", "generator", "dict", "dicts", "args-kwargs", "inputs-tuple"],
)
def test_all_forms_give_the_same_samples(source: Any) -> None:
    batches = as_batches(source, batch_size=5)
    whole = concatenate(batches)
    assert whole is not None
    assert count(batches) == 12
    assert torch.equal((*whole.args, *whole.kwargs.values())[0], X)
    assert torch.equal(whole.labels, Y)


def test_inputs_alone_and_several_inputs() -> None:
    assert as_batches([X])[0].labels is None
    assert [len(b) for b in as_batches(X, batch_size=8)] == [8, 4]
    batch = as_batches([((X, 2 * X), Y)])[0]
    assert len(batch.args) == 2
    batch = as_batches([((X,), {"mask": X > 3, "flag": None})])[0]
    assert set(batch.kwargs) == {"mask", "flag"}
    assert batch.labels is None


@pytest.mark.parametrize("samples", [1, 5, 7, 12, 100])
def test_samples_are_cut_along_the_batch(samples: int) -> None:
    batches = as_batches((X, Y), samples=samples, batch_size=5)
    whole = concatenate(batches)
    assert whole is not None
    assert torch.equal(whole.args[0], X[:samples])
    assert torch.equal(whole.labels, Y[:samples])


def test_an_endless_generator_is_read_only_as_far_as_needed() -> None:
    def forever() -> Any:
        while True:
            yield X, Y

    assert count(as_batches(forever(), samples=30)) == 30


def test_labels_that_are_one_a_sample() -> None:
    names = [f"n{i}" for i in range(12)]
    batches = as_batches([(X, names)], samples=7)
    assert batches[0].labels == names[:7]
    kept, held = split(batches, 0.3, seed=1)
    assert sorted(kept[0].labels + held[0].labels) == names[:7]
    assert batches[0].take(torch.tensor([3, 1])).labels == ["n3", "n1"]


@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.5, 0.99])
def test_split_is_disjoint_complete_and_repeatable(fraction: float) -> None:
    batches = as_batches((X, Y), batch_size=5)
    kept, held = split(batches, fraction, seed=3)
    labels = [torch.cat([b.labels for b in part]) for part in (kept, held)]
    assert sorted(torch.cat(labels).tolist()) == list(range(12))
    assert all(len(part) > 0 for part in labels)
    assert torch.equal(kept[0].args[0], X[kept[0].labels])
    assert digest(split(batches, fraction, seed=3)[1]) == digest(held)


def test_digest_sees_values_labels_and_shapes() -> None:
    first = digest(as_batches((X, Y)))
    assert first == digest(as_batches((X.clone(), Y.clone())))
    changed = X.clone()
    changed[3, 1] += 1e-6
    changed[3, 1] += 1
    others = [(changed, Y), (X, Y + 1), (X.double(), Y), (X, None), (X.reshape(12, 1, 2), Y)]
    digests = {digest(as_batches([other])) for other in others}
    assert len(digests | {first}) == len(others) + 1


def test_concatenate_refuses_what_differs() -> None:
    assert concatenate([]) is None
    assert concatenate([Batch((X,)), Batch((X[:, :1],))]) is None
    assert concatenate([Batch((X,)), Batch((), {"x": X})]) is None
    assert concatenate([Batch((X,), {"n": 1}), Batch((X,), {"n": 2})]) is None
    joined = concatenate([Batch((X,), {"n": 1}), Batch((X,), {"n": 1})])
    assert joined is not None
    assert len(joined) == 24


def test_to_moves_everything() -> None:
    batch = Batch((X, [X]), {"m": X}, {"a": Y}).to("meta")
    assert {t.device.type for t in (batch.args[0], batch.args[1][0], batch.kwargs["m"], batch.labels["a"])} == {"meta"}


def test_integer_inputs_pass_and_scalars_are_handed_on() -> None:
    batch = as_batches([((Y, torch.tensor(3.0)), {"flag": True})], samples=2)[0]
    assert len(batch) == 2
    assert batch.args[1].dim() == 0


def failing() -> Any:
    yield X, Y
    raise ZeroDivisionError("worker died")


BAD: dict[str, tuple[Any, str]] = {
    "empty list": ([], "no batches"),
    "empty loader": (DataLoader(TensorDataset(X[:0], Y[:0])), "no batches"),
    "used-up generator": (iter(()), "no batches"),
    "number": (3, "needs an iterable of batches, got int"),
    "none": (None, "needs an iterable of batches, got NoneType"),
    "text": ("data.npz", "needs an iterable of batches, got str"),
    "list of texts": (["a.png"], "batch 0: inputs must be tensors, got str"),
    "texts with labels": ([("a.png", Y)], "batch 0: inputs must be tensors, got str"),
    "no tensor": ([((None,), {})], "there are none"),
    "empty tuple": ([()], "got 0 parts"),
    "three parts": ([(X, X, Y)], "put several inputs into a tuple"),
    "labels too few": ([(X, Y[:5])], "12 inputs but 5 labels"),
    "label texts too few": ([(X, ["a"])], "12 inputs but 1 labels"),
    "inputs of different length": ([((X, X[:3]), Y)], "different lengths: 3, 12"),
    "no samples": ([(X[:0], Y[:0])], "holds 0 samples"),
    "not finite": ([(X, Y), (X / 0, Y)], "batch 1: an input holds NaN or infinity"),
    "nan array": ((np.full((3, 2), np.nan), np.zeros(3)), "an input holds NaN or infinity"),
    "scalar": ([torch.tensor(1.0)], "there are none"),
    "loader raises": (failing(), "raised ZeroDivisionError: worker died"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_one_line(name: str) -> None:
    source, expected = BAD[name]
    with pytest.raises(DataError) as caught:
        as_batches(source, where="validation")
    assert expected in str(caught.value)
    assert str(caught.value).startswith("validation: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("fraction", "samples"), [(0.0, 5), (1.0, 5), (float("nan"), 5), (0.5, 1)])
def test_split_needs_something_on_both_sides(fraction: float, samples: int) -> None:
    with pytest.raises(DataError):
        split(as_batches(X[:samples]), fraction)


@pytest.mark.parametrize("options", [{"samples": 0}, {"samples": -1}, {"batch_size": 0}])
def test_sizes_below_one(options: dict[str, int]) -> None:
    with pytest.raises(DataError, match="must be at least 1"):
        as_batches(X, **options)
