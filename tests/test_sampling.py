"""Optuna's samplers behind `Sampling`: in range, the same after an interruption, learning from what they are told."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import optuna
import pytest

from rankopt.errors import InputError
from rankopt.sampling import SAMPLERS, Range, Sampling, Told, _automatic, _chosen

RANGES: dict[str, Range] = {"budget": (0.2, 1.0), "a": (-1.5, 1.5), "b": (-1.5, 1.5)}
MIXED: dict[str, Range] = {"method.x": ("dense", "svd", "cp"), "keep.x": (0.0, 1.0), "keep.y": (0.0, 1.0)}
CHOICES = [n for n in SAMPLERS if n not in ("gp", "cmaes")]


def outcome(numbers: Any, marks: Any = None, limit: float = 9.0) -> Told:
    """A loss that is least at a = 1, b = −1, and a cost."""
    a, b = float(numbers["a"]), float(numbers["b"])
    loss = (1 + (a - 1) ** 2 + (b + 1) ** 2) / float(numbers["budget"])
    return Told(numbers, [loss, float(numbers["budget"])], {"loss": loss - limit}, marks or {})


def asked(name: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    sampling = Sampling(name, RANGES, 2, count, seed)
    out = []
    for n in range(count):
        numbers, marks = sampling.ask(n)
        sampling.tell(outcome(numbers, marks))
        out.append(numbers)
    return out


@pytest.mark.parametrize("name", [*CHOICES, "gp"])
def test_numbers_lie_in_their_ranges_and_depend_on_the_seed(name: str) -> None:
    count = 30 if name != "gp" else 12
    first = asked(name, count)
    for numbers in first:
        assert list(numbers) == list(RANGES)
        assert all(low <= numbers[k] <= high for k, (low, high) in RANGES.items())  # type: ignore[str-unpack,operator]
    assert asked(name, count) == first
    assert asked(name, count, seed=1) != first


@pytest.mark.parametrize("name", [*CHOICES, "gp"])
def test_one_that_is_made_anew_goes_on_as_the_old_one_would(name: str) -> None:
    count, cut = (60, 37) if name != "gp" else (14, 11)
    whole = asked(name, count)
    sampling, history = Sampling(name, RANGES, 2, count, 0), []
    for n in range(cut):
        numbers, marks = sampling.ask(n)
        history.append(outcome(numbers, marks))
        sampling.tell(history[-1])
    anew = Sampling(name, RANGES, 2, count, 0)
    anew.recall(history)
    rest = []
    for n in range(cut, count):
        numbers, marks = anew.ask(n)
        anew.tell(outcome(numbers, marks))
        rest.append(numbers)
    assert rest == whole[cut:]


@pytest.mark.parametrize("name", ["tpe", "nsga2"])
def test_it_learns(name: str) -> None:
    def far(numbers: dict[str, Any]) -> float:
        return abs(numbers["a"] - 1) + abs(numbers["b"] + 1)

    found = asked(name, 150)
    assert np.median([far(n) for n in found[-40:]]) < 0.8 * np.median([far(n) for n in asked("random", 150)])


def test_given_numbers_are_kept_and_the_others_proposed() -> None:
    sampling = Sampling("tpe", RANGES, 2, 40, 0)
    for n in range(20):
        numbers, marks = sampling.ask(n, {"budget": 0.5} if n % 2 else None)
        assert (numbers["budget"] == 0.5) == bool(n % 2)
        sampling.tell(outcome(numbers, marks))
    assert len({n for n in range(20)}) == 20


def test_limits_are_learned_as_constraints() -> None:
    sampling = Sampling("tpe", RANGES, 2, 200, 0)
    kept = []
    for n in range(120):
        numbers, marks = sampling.ask(n)
        told = outcome(numbers, marks, limit=4.0)
        kept.append(told.excess["loss"] <= 0)
        sampling.tell(told)
    assert np.mean(kept[-40:]) > 1.3 * np.mean(kept[:30])


def test_of_a_stopped_trial_the_limit_counts_and_of_a_failed_one_nothing() -> None:
    sampling = Sampling("tpe", RANGES, 2, 40, 0)
    for n in range(12):
        numbers, _ = sampling.ask(n)
        sampling.tell(
            outcome(numbers) if n % 3 else Told(numbers, [None, 0.5], {"loss": 1.0}) if n % 2 else Told(numbers, None)
        )
    trials = sampling._study.get_trials(deepcopy=False)
    states = [t.state.name for t in trials]
    assert states.count("FAIL") == 2
    stopped = [t for t in trials if t.constraints == {"loss": 1.0}]
    assert len(stopped) == 2
    assert all(np.isfinite(t.values).all() for t in stopped)


def test_texts_are_categories() -> None:
    sampling = Sampling("tpe", MIXED, 2, 20, 0)
    for n in range(20):
        numbers, marks = sampling.ask(n)
        assert numbers["method.x"] in MIXED["method.x"]
        sampling.tell(Told(numbers, [float(numbers["keep.x"]), 1.0], {}, marks))


def test_numbers_of_others_are_learned_too_and_brought_into_range() -> None:
    sampling = Sampling("tpe", RANGES, 2, 20, 0)
    sampling.tell(outcome({"budget": 3.0, "a": 0.0, "b": 0.0}))
    sampling.tell(Told({"budget": 0.5}, [1.0, 1.0]))  # of another strategy: says nothing here
    (trial,) = sampling._study.get_trials(deepcopy=False)
    assert trial.params == {"budget": 1.0, "a": 0.0, "b": 0.0}


def test_of_many_trials_the_best_and_the_newest_are_remembered() -> None:
    told = [Told({}, [float(n % 97), float(97 - n % 97)] if n % 5 else None) for n in range(2000)]
    best = Told({}, [-5.0, -5.0])
    told[3] = best
    kept = _chosen(told)
    assert len(kept) == 300
    assert best in kept
    assert told[-1] in kept
    assert [told.index(k) for k in kept[:5]] == sorted(told.index(k) for k in kept[:5])


def test_the_study_in_memory_stays_small() -> None:
    sampling = Sampling("tpe", {"a": (0.0, 1.0)}, 2, 1000, 0)
    random = np.random.default_rng(0)
    for _ in range(900):
        a = float(random.uniform())
        sampling.tell(Told({"a": a}, [a, 1 - a]))
    assert len(sampling._study.get_trials(deepcopy=False)) <= 400


def test_what_is_chosen_automatically() -> None:
    assert _automatic(100) == "tpe"
    assert _automatic(5000) == "nsga2"


@pytest.mark.skipif(importlib.util.find_spec("cmaes") is None, reason="cmaes is not installed")
def test_a_sampler_of_one_objective_sees_how_far_behind_the_front_a_trial_is() -> None:
    sampling = Sampling("cmaes", RANGES, 2, 60, 0)
    for n in range(30):
        numbers, marks = sampling.ask(n)
        sampling.tell(outcome(numbers, marks))
    values = [t.value for t in sampling._study.get_trials(deepcopy=False)]
    assert sampling._study.directions == [optuna.study.StudyDirection.MINIMIZE]
    assert min(values) < 0  # type: ignore[type-var]


@pytest.mark.skipif(importlib.util.find_spec("cmaes") is not None, reason="cmaes is installed")
def test_a_missing_package_is_named() -> None:
    with pytest.raises(InputError, match="sampler cmaes: needs the package cmaes"):
        Sampling("cmaes", RANGES, 2, 60, 0)


def test_an_unknown_sampler_is_named() -> None:
    with pytest.raises(InputError, match=r"sampler: must be auto, tpe, .*, got 'annealing'"):
        Sampling("annealing", RANGES, 2, 60, 0)
