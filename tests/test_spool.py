"""`Spool` against a plain dictionary, under any order of puts and gets and any bound."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankopt.spool import Spool


def entry(value: int, size: int = 8) -> dict[str, torch.Tensor]:
    return {"a": torch.full((size,), float(value)), "b": torch.full((2, 3), value, dtype=torch.float64).T}


@settings(max_examples=40, derandomize=True)
@given(
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 4), st.integers(1, 40)), max_size=25),
    bound=st.sampled_from([0, 1, 200, 500, 2**30]),
)
def test_holds_what_a_dictionary_holds(steps: list[tuple[bool, int, int]], bound: int) -> None:
    spool, model = Spool(bound), dict[str, int]()
    for number, (write, key, size) in enumerate(steps):
        name = f"layer.{key}|svd"
        if write:
            spool.put(name, entry(number, size))
            model[name] = number
        elif name in model:
            assert float(spool.get(name)["a"][0]) == model[name]
        else:
            with pytest.raises(KeyError):
                spool.get(name)
        largest = 4 * 40 + 8 * 6
        assert spool.held_bytes <= max(bound, largest)  # one entry is always held
    for name, number in model.items():
        assert name in spool
        got = spool.get(name)
        assert torch.equal(got["b"], torch.full((3, 2), number, dtype=torch.float64))
    assert "other" not in spool


def test_dtypes_scalars_and_odd_keys_survive_the_disk() -> None:
    spool = Spool(0)
    first = {"x": torch.tensor(3.5), "y": torch.randn(2, 2).bfloat16(), "z": torch.arange(6).reshape(2, 3).T}
    spool.put("a/../b|{'rank': 3}\n", first)
    spool.put("other", entry(1))
    got = spool.get("a/../b|{'rank': 3}\n")
    assert all(torch.equal(got[k], v) and got[k].dtype == v.dtype for k, v in first.items())


def test_a_replaced_entry_leaves_what_was_handed_out_alone() -> None:
    spool = Spool(0)
    for number in range(3):
        spool.put("a", entry(number))
        spool.put("b", entry(10))  # sends a to disk
        old = spool.get("a")
        spool.put("a", entry(number + 50))
        spool.put("b", entry(11))
        assert float(spool.get("a")["a"][0]) == number + 50
        assert float(old["a"][0]) == number


def test_the_directory_goes_away() -> None:
    spool = Spool(0)
    spool.put("a", entry(1))
    assert spool._directory is None  # nothing was written yet
    spool.put("b", entry(2))
    assert spool._directory is not None
    path = spool._directory
    assert len(list(path.iterdir())) == 1
    del spool
    gc.collect()
    assert not path.exists()


def test_a_copy_for_another_process_holds_what_waits_on_disk_too() -> None:
    spool = Spool(max_bytes=100)
    for n in range(4):
        spool.put(str(n), {"a": torch.full((20,), float(n)), "b": torch.tensor([n])})
    assert spool.held_bytes < 200
    copied = copy.deepcopy(spool)
    del spool
    assert copied._directory is None
    for n in range(4):
        assert torch.equal(copied.get(str(n))["a"], torch.full((20,), float(n)))
    copied.put("more", {"a": torch.zeros(20)})
    assert copied.held_bytes <= 100
