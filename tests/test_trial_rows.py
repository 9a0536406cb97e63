"""Trials of a database, read and written in few statements: the same as Optuna reads and writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from rankopt.storages import end_trial, open_storage
from rankopt.trial_rows import TrialRows

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
attributes = st.dictionaries(st.text(min_size=1, max_size=6), plain, max_size=4)
numbers = st.floats(allow_nan=False)


@st.composite
def trials(draw: st.DrawFn) -> FrozenTrial:
    state = draw(st.sampled_from([TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING]))
    ranges = {"a": FloatDistribution(0, 1), "b": CategoricalDistribution(["x", "y"]), "c": IntDistribution(1, 9)}
    params = {"a": draw(st.floats(0, 1)), "b": draw(st.sampled_from("xy")), "c": draw(st.integers(1, 9))}
    kept = draw(st.sets(st.sampled_from("abc")))
    return create_trial(
        state=state,
        values=[draw(numbers), draw(numbers)] if state == TrialState.COMPLETE else None,
        params={k: params[k] for k in sorted(kept)},
        distributions={k: ranges[k] for k in sorted(kept)},
        user_attrs=draw(attributes),
        system_attrs=draw(attributes),
        intermediate_values=draw(st.dictionaries(st.integers(0, 5), st.floats(), max_size=2)),
    )


def study_in(folder: Path) -> optuna.Study:
    return optuna.create_study(storage=open_storage(str(folder / "s.db")), directions=["minimize", "minimize"])


def by_optuna(folder: Path) -> list[FrozenTrial]:
    """All trials as Optuna's own storage reads them."""
    return RDBStorage(f"sqlite:///{folder / 's.db'}").get_all_trials(1)


def backend(study: optuna.Study) -> Any:
    return study._storage._backend  # type: ignore[attr-defined]


def same(a: FrozenTrial, b: FrozenTrial) -> bool:
    """Also where a value is NaN, which does not equal itself."""
    return repr(a) == repr(b) and a.state == b.state and list(a.params) == list(b.params)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(some=st.lists(trials(), max_size=4))
def test_optuna_reads_what_is_written_and_the_other_way_round(
    tmp_path_factory: pytest.TempPathFactory, some: list[FrozenTrial]
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    study = study_in(folder)
    for trial in some:
        study.add_trial(trial)
    theirs = by_optuna(folder)
    ours = study.get_trials(deepcopy=False)
    assert all(same(a, b) for a, b in zip(ours, theirs, strict=True))
    for made, read in zip(some, ours, strict=True):
        assert (made.params, made.values, made.user_attrs) == (read.params, read.values, read.user_attrs)
    plain_storage = RDBStorage(f"sqlite:///{folder / 's.db'}")
    for trial in some:
        plain_storage.create_new_trial(1, trial)
    assert all(same(a, b) for a, b in zip(study.get_trials(), by_optuna(folder), strict=True))
    assert all(same(backend(study).get_trial(t._trial_id), t) for t in theirs)


def test_a_trial_ends_at_once(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    number = study._storage.create_new_trial(
        study._study_id, create_trial(state=TrialState.RUNNING, user_attrs={"k": 1})
    )
    running = study.get_trials(deepcopy=False)[0]
    assert (running.state, running.user_attrs) == (TrialState.RUNNING, {"k": 1})
    end_trial(
        study._storage, number, TrialState.COMPLETE, [1.0, float("inf")], {"k": 2, "m": [0.5]}, {"constraints": [0.0]}
    )
    (ended,) = study.get_trials(deepcopy=False)
    assert (ended.state, ended.values) == (TrialState.COMPLETE, [1.0, float("inf")])
    assert (ended.user_attrs, ended.system_attrs) == ({"k": 2, "m": [0.5]}, {"constraints": [0.0]})
    assert ended.duration is not None
    assert same(ended, by_optuna(tmp_path)[0])
    with pytest.raises(UpdateFinishedTrialError):
        end_trial(study._storage, number, TrialState.FAIL, None, {"k": 3}, {})
    assert by_optuna(tmp_path)[0].user_attrs == {"k": 2, "m": [0.5]}
    with pytest.raises(KeyError):
        end_trial(study._storage, 77, TrialState.FAIL, None, {}, {})
    with pytest.raises(KeyError):
        backend(study).get_trial(77)


class Said(Exception):
    """Of a server."""

    def __init__(self, *args: Any, sqlstate: str | None = None) -> None:
        super().__init__(*args)
        self.sqlstate = sqlstate


@pytest.mark.parametrize("said", [Said(1213, "Deadlock found"), Said(1205, "timeout"), Said("no", sqlstate="40P01")])
@pytest.mark.parametrize("times", [1, 3, 99])
def test_a_transaction_that_lost_to_another_one_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Said, times: int
) -> None:
    left, waited = [said] * times, []

    def set_value(self: TrialRows, *given: Any) -> None:
        if left:
            raise OperationalError("INSERT", {}, left.pop())
        write(self, *given)

    write = TrialRows._set_trial_value_without_commit
    monkeypatch.setattr(TrialRows, "_set_trial_value_without_commit", set_value)
    monkeypatch.setattr("time.sleep", waited.append)
    study = study_in(tmp_path)
    trial = study.ask()
    if times == 99:
        with pytest.raises(StorageInternalError):
            end_trial(study._storage, trial._trial_id, TrialState.COMPLETE, [1.0, 2.0], {"a": 1}, {})
        assert by_optuna(tmp_path)[0].state == TrialState.RUNNING
        assert by_optuna(tmp_path)[0].user_attrs == {}
        return
    end_trial(study._storage, trial._trial_id, TrialState.COMPLETE, [1.0, 2.0], {"a": 1}, {})
    (found,) = by_optuna(tmp_path)
    assert (found.values, found.user_attrs, len(waited)) == ([1.0, 2.0], {"a": 1}, times)


def test_an_attribute_of_a_running_trial_is_written_again_where_it_was_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [Said(1213, "Deadlock found")] * 2
    write = TrialRows._set_trial_attr_without_commit

    def set_attribute(self: TrialRows, *given: Any, **named: Any) -> None:
        if left:
            raise OperationalError("INSERT", {}, left.pop())
        write(self, *given, **named)

    monkeypatch.setattr(TrialRows, "_set_trial_attr_without_commit", set_attribute)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    trial = study_in(tmp_path).ask()
    trial.set_user_attr("died", ["its process was killed"])
    assert by_optuna(tmp_path)[0].user_attrs == {"died": ["its process was killed"]}


def test_what_else_a_server_says_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def set_value(self: TrialRows, *given: Any) -> None:
        raise OperationalError("INSERT", {}, Said(1114, "The table is full"))

    monkeypatch.setattr(TrialRows, "_set_trial_value_without_commit", set_value)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waited"))
    study = study_in(tmp_path)
    with pytest.raises(StorageInternalError, match="The table is full"):
        end_trial(study._storage, study.ask()._trial_id, TrialState.COMPLETE, [1.0, 2.0], {}, {})


def test_a_parameter_keeps_its_kind_of_range(tmp_path: Path) -> None:
    def made(ranges: Any, value: Any) -> FrozenTrial:
        return create_trial(values=[0, 0], params={"p": value}, distributions={"p": ranges})

    study_in(tmp_path).add_trial(made(CategoricalDistribution(["x", "y"]), "x"))
    again = optuna.load_study(study_name=None, storage=open_storage(str(tmp_path / "s.db")))
    with pytest.raises(ValueError, match="dynamic value space"):
        again.add_trial(made(CategoricalDistribution(["x", "z"]), "z"))
    again.add_trial(made(CategoricalDistribution(["x", "y"]), "y"))
    assert [t.params for t in by_optuna(tmp_path)] == [{"p": "x"}, {"p": "y"}]


def test_what_ran_when_it_was_read_is_read_again(tmp_path: Path) -> None:
    study, other = study_in(tmp_path), open_storage(str(tmp_path / "s.db"))
    numbers = [study._storage.create_new_trial(1, create_trial(state=TrialState.RUNNING)) for _ in range(3)]
    loaded = optuna.load_study(study_name=None, storage=other)
    assert [t.state.name for t in loaded.get_trials()] == ["RUNNING"] * 3
    end_trial(study._storage, numbers[2], TrialState.COMPLETE, [1, 2], {}, {})
    end_trial(study._storage, numbers[0], TrialState.FAIL, None, {"reason": "x"}, {})
    assert [t.state.name for t in loaded.get_trials()] == ["FAIL", "RUNNING", "COMPLETE"]
    assert [t.state.name for t in loaded.get_trials(states=[TrialState.RUNNING])] == ["RUNNING"]


def test_reading_takes_few_statements_whatever_the_number_of_trials(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    for n in range(30):
        study.add_trial(create_trial(values=[n, n], user_attrs={"plan": n}))
    storage = open_storage(str(tmp_path / "s.db"))
    assert isinstance(storage, TrialRows)
    said: list[str] = []
    event.listen(storage.engine, "before_cursor_execute", lambda *a: said.append(a[2]))
    assert len(storage.get_all_trials(1)) == 30
    assert len([text for text in said if text.startswith("SELECT")]) <= 8
