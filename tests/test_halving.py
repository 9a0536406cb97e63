"""Successive halving against exhaustive training on curves that are known, and going on after a kill."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankopt.errors import ArtifactError, InputError, StudyMismatchError, TrainingError
from rankopt.halving import FILE, Rung, halve, hopeless, plan_rungs
from rankopt.pareto import front, hypervolume, ranked


class Curves:
    """Finalists whose kl falls as end + (start - end) · (1 + steps / 10)^-1, at fixed costs."""

    def __init__(self, curves: Mapping[str, tuple[float, float, float]]) -> None:
        self.curves, self.calls = dict(curves), []  # type: ignore[var-annotated]

    def values(self, name: str, steps: int) -> dict[str, float]:
        start, end, macs = self.curves[name]
        return {"kl": end + (start - end) / (1 + steps / 10), "macs": macs}

    def __call__(self, name: str, steps: int) -> dict[str, float]:
        self.calls.append((name, steps))
        return self.values(name, steps)

    @property
    def finalists(self) -> dict[str, dict[str, float]]:
        return {name: self.values(name, 0) for name in self.curves}


def curves(seed: int, n: int = 9, costs: bool = True) -> Curves:
    generator = np.random.default_rng(seed)
    end = generator.uniform(0.01, 1, n)
    start = end + generator.uniform(0.5, 1.0, n)
    macs = generator.uniform(1, 2, n) if costs else np.ones(n)
    return Curves({f"trial {i}": (start[i], end[i], macs[i]) for i in range(n)})


@pytest.mark.parametrize("seed", range(10))
def test_the_winner_is_that_of_training_everyone_at_a_third_of_the_steps(seed: int) -> None:
    train = curves(seed, costs=False)
    found = halve(train.finalists, train, ["kl", "macs"], plan_rungs(9, 900))
    exhaustive = {name: train.values(name, 900)["kl"] for name in train.curves}
    best = min(exhaustive, key=exhaustive.__getitem__)
    assert exhaustive[found.winners[0]] - exhaustive[best] < 0.1
    assert found.steps <= found.all_steps / 3
    assert found.all_steps == 9 * 900
    assert found.last(found.winners[0])["kl"] == exhaustive[found.winners[0]]
    assert set(found.stopped) | set(found.winners) == set(train.curves)


def test_curves_that_do_not_cross_give_the_exhaustive_winner() -> None:
    train = Curves({f"t{i}": (2 + 0.1 * i, 0.1 * i, 1.0) for i in range(9)})
    assert halve(train.finalists, train, ["kl", "macs"], plan_rungs(9, 90)).winners == ["t0"]


@given(st.integers(0, 1000))
@settings(max_examples=25)
def test_who_is_trained_to_the_end_is_dominated_by_nobody_who_was_too(seed: int) -> None:
    train = curves(seed, n=6)
    rungs = [Rung(10, 6), Rung(40, 4), Rung(100, 4)]
    found = halve(train.finalists, train, ["kl", "macs"], rungs)
    points = np.array([[found.last(n)["kl"], found.last(n)["macs"]] for n in found.winners])
    assert 0 in front(points)  # the best first
    for name, by_steps in found.measured.items():
        assert {n: train.values(name, n) for n in by_steps} == by_steps


def test_promotion_is_by_dominance_first() -> None:
    """The dominated one goes, though its kl is smaller than that of one on the front."""
    train = Curves({"good": (1.0, 0.5, 1.0), "cheap": (3.0, 2.5, 0.2), "dominated": (1.2, 0.7, 1.1)})
    found = halve(train.finalists, train, ["kl", "macs"], [Rung(10, 3), Rung(30, 2)])
    assert set(found.winners) == {"good", "cheap"}
    assert found.stopped["dominated"] == (10, "others are better")


def test_who_cannot_reach_the_front_is_stopped_early() -> None:
    train = Curves({"good": (1.0, 0.5, 1.0), "bad": (5.0, 4.5, 1.0), "cheap": (5.0, 4.5, 0.5)})
    found = halve(train.finalists, train, ["kl", "macs"], [Rung(10, 3), Rung(30, 3)])
    assert found.stopped == {"bad": (10, "can't reach the front")}
    assert ("bad", 30) not in train.calls
    assert set(found.winners) == {"good", "cheap"}
    near = Curves({"good": (1.0, 0.5, 1.0), "near": (1.2, 0.7, 1.0)})  # may still gain 0.25, as good did
    kept = halve(near.finalists, near, ["kl", "macs"], [Rung(10, 2), Rung(30, 2)])
    assert not kept.stopped
    assert hopeless(kept, ["good", "near"], ["kl", "macs"]) == []


def test_the_one_that_is_wanted_most_is_always_promoted() -> None:
    """Under a limit the costlier one is wanted, though the cheaper ones add more to the hypervolume."""
    train = Curves({"wanted": (0.6, 0.35, 1.0), "near": (0.61, 0.36, 0.9), "cheap": (1.0, 0.9, 0.1)})
    rungs = [Rung(10, 3), Rung(30, 1)]
    plain = halve(train.finalists, train, ["kl", "macs"], rungs)
    assert plain.winners != ["wanted"]

    def best(measured: Mapping[str, Mapping[str, float]]) -> str:
        return min(measured, key=lambda name: measured[name]["kl"])

    assert halve(train.finalists, train, ["kl", "macs"], rungs, best=best).winners == ["wanted"]


def test_accuracy_is_maximized() -> None:
    values = {"a": {"accuracy": 90.0, "macs": 1.0}, "b": {"accuracy": 80.0, "macs": 1.0}}
    found = halve(values, lambda name, steps: values[name], ["accuracy", "macs"], [Rung(5, 2), Rung(10, 1)])
    assert found.winners == ["a"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [0, 1, 4, 9, 11, 12])
def test_a_killed_halving_goes_on(after: int, tmp_path: Path) -> None:
    train = curves(3)
    rungs = plan_rungs(9, 900)
    whole = halve(train.finalists, train, ["kl", "macs"], rungs)
    calls = list(train.calls)
    train.calls.clear()

    def dying(name: str, steps: int) -> Any:
        if len(train.calls) == after:
            raise Killed
        return train(name, steps)

    with pytest.raises(Killed):
        halve(train.finalists, dying, ["kl", "macs"], rungs, folder=tmp_path)
    again = halve(train.finalists, train, ["kl", "macs"], rungs, folder=tmp_path)
    assert train.calls == calls  # nothing twice
    assert again == whole


def test_what_was_begun_otherwise_or_is_damaged_is_refused(tmp_path: Path) -> None:
    train = curves(0, n=3)
    halve(train.finalists, train, ["kl", "macs"], plan_rungs(3, 30), folder=tmp_path)
    with pytest.raises(StudyMismatchError, match="other rungs"):
        halve(train.finalists, train, ["kl", "macs"], plan_rungs(3, 60), folder=tmp_path)
    with pytest.raises(StudyMismatchError, match="other objectives"):
        halve(train.finalists, train, ["kl"], plan_rungs(3, 30), folder=tmp_path)
    other = curves(0, n=4)
    with pytest.raises(StudyMismatchError, match="other finalists"):
        halve(other.finalists, other, ["kl", "macs"], plan_rungs(3, 30), folder=tmp_path)
    (tmp_path / FILE).write_text(json.dumps({"measured": 3}))
    with pytest.raises(ArtifactError, match="is damaged"):
        halve(train.finalists, train, ["kl", "macs"], plan_rungs(3, 30), folder=tmp_path)


def test_a_finalist_that_does_not_stay_finite_is_out_and_all_of_them_is_an_error() -> None:
    train = curves(1, n=3)

    def failing(name: str, steps: int) -> dict[str, float]:
        if name == "trial 0":
            raise TrainingError("not finite")
        return train(name, steps)

    found = halve(train.finalists, failing, ["kl", "macs"], plan_rungs(3, 30))
    assert found.stopped["trial 0"] == (10, "not finite")
    assert found.winners

    def always(name: str, steps: int) -> dict[str, float]:
        raise TrainingError("never finite")

    with pytest.raises(TrainingError, match="no finalist stayed finite: never finite"):
        halve(train.finalists, always, ["kl", "macs"], plan_rungs(3, 30))
    with pytest.raises(InputError, match="no finalists"):
        halve({}, train, ["kl"], plan_rungs(3, 30))


def test_another_executor_may_answer_in_any_order() -> None:
    train = curves(5)

    def backwards(run: Any, tasks: Sequence[tuple[str, int]]) -> Iterator[Any]:
        for name, steps in reversed(tasks):
            yield name, run(name, steps), ""

    rungs = plan_rungs(9, 90)
    one = halve(train.finalists, train, ["kl", "macs"], rungs)
    two = halve(train.finalists, train, ["kl", "macs"], rungs, executor=backwards)
    assert one == two


@given(n=st.integers(1, 40), steps=st.integers(1, 5000), eta=st.floats(1.5, 5))
def test_rungs_rise_and_end_with_all_steps(n: int, steps: int, eta: float) -> None:
    rungs = plan_rungs(n, steps, eta)
    assert rungs[0].finalists == n
    assert rungs[-1].steps == steps
    assert all(a.steps < b.steps and a.finalists > b.finalists for a, b in itertools.pairwise(rungs))
    for wrong in ((0, steps, eta), (n, 0, eta), (n, steps, 1.0)):
        with pytest.raises(InputError):
            plan_rungs(*wrong)


def test_nine_finalists_take_a_quarter_of_the_steps() -> None:
    assert plan_rungs(9, 900) == [Rung(100, 9), Rung(300, 3), Rung(900, 1)]
    assert plan_rungs(1, 50) == [Rung(50, 1)]
    assert plan_rungs(3, 1) == [Rung(1, 3)]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12))
def test_ranking_is_front_by_front_and_drops_the_least_contribution(points: list[tuple[int, int, int]]) -> None:
    x = np.array(points, dtype=float)
    order = ranked(x).tolist()
    assert sorted(order) == list(range(len(x)))
    left = list(range(len(x)))
    while left:
        best = {left[i] for i in front(x[left])}
        taken, order = set(order[: len(best)]), order[len(best) :]
        assert {tuple(x[i]) for i in taken} == {tuple(x[i]) for i in best}
        left = [i for i in left if i not in taken]


def test_ranking_by_contribution() -> None:
    x = np.array([[0.0, 1.0], [0.5, 0.45], [0.52, 0.44], [1.0, 0.0]])
    first = ranked(x)[:3].tolist()
    lost = [hypervolume(np.delete(x, i, 0), [1.1, 1.1]) for i in range(4)]
    assert sorted(first) == sorted(set(range(4)) - {int(np.argmax(lost))})
    assert ranked(np.array([[np.nan, 0.0], [1.0, 1.0]])).tolist() == [1]
    assert ranked(np.zeros((0, 2))).tolist() == []
