from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from recorded import recorded

from rankopt.errors import InputError
from rankopt.history import FRONT, History, read_history
from rankopt.ledger import read_study
from rankopt.study_file import load_study
from rankopt.worth import volume


def history_of(path: Path) -> History:
    file = load_study(path)
    return read_history(file.storage_url, file.name, file.limits)


def brute_volume(points: np.ndarray, reference: np.ndarray, cells: int = 2_000_000) -> float:
    """Monte Carlo, to be independent of the formula."""
    low = points.min(axis=0)
    samples = np.random.default_rng(0).uniform(low, reference, (cells // 20, 2))
    covered = (points[:, None, :] <= samples[None, :, :]).all(axis=2).any(axis=0)
    return float(covered.mean() * np.prod(reference - low))


def test_all_trials_are_there_also_the_failed_ones(tmp_path: Path) -> None:
    history = history_of(recorded(tmp_path, trials=9))
    assert [t.number for t in history.trials] == list(range(10))
    assert [t.state for t in history.trials] == ["complete"] * 9 + ["failed"]
    assert history.trials[9].reason == "ValueError: <b>no</b> convergence"
    assert history.trials[9].plan is None
    assert history.trials[9].feasible is None
    for trial in history.trials[:9]:
        assert trial.feasible == (trial.measurements["macs_kept"] <= 0.8)
        assert trial.predicted_kl is not None
        assert trial.plan is not None


def test_the_hypervolume_grows_to_what_the_search_shows(tmp_path: Path) -> None:
    history = history_of(recorded(tmp_path, trials=20, accuracy=False, latency=False))
    grown = history.volumes()
    for series in (1, 2):
        values = [step[series] for step in grown]
        assert values == sorted(values)
    assert grown[-1][1] == pytest.approx(volume(history.result))
    assert all(kept <= everything + 1e-12 for _, kept, everything in grown)
    kept = [e for e in history.result.entries if e.feasible]
    points = np.array([[e.measurements["kl"], e.measurements["macs_kept"]] for e in kept], float)
    assert grown[-1][1] == pytest.approx(brute_volume(points, np.array([3.0, 1.0])), rel=0.02)


def test_without_a_plan_within_the_limits_the_hypervolume_is_of_all(tmp_path: Path) -> None:
    history = history_of(recorded(tmp_path, limits=["macs<=1%"]))
    assert all(kept == 0 for _, kept, _ in history.volumes())
    assert history.volumes()[-1][2] == pytest.approx(volume(history.result))


def test_importances_find_what_matters(tmp_path: Path) -> None:
    """All that is measured follows from the budget; nothing else is of importance."""
    history = history_of(recorded(tmp_path, trials=60))
    assert set(history.importances) <= {FRONT, "accuracy", "latency"}
    for what in ("accuracy", "latency"):
        shares = history.importances[what]
        assert next(iter(shares)) == "budget"
        assert sum(shares.values()) == pytest.approx(1)
    assert {"method.stem", "keep.stem"} <= set(history.importances["accuracy"])


def test_a_few_trials_say_nothing_of_importances(tmp_path: Path) -> None:
    assert history_of(recorded(tmp_path, trials=3)).importances == {}


def test_reading_does_not_change_the_study(tmp_path: Path) -> None:
    path = recorded(tmp_path)
    file = load_study(path)
    before = read_study(file.storage_url, file.name).user_attrs
    history_of(path)
    assert read_study(file.storage_url, file.name).user_attrs == before


def test_there_is_no_such_study(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing was searched yet"):
        read_history(f"sqlite:///{tmp_path / 'none.db'}", "x")
