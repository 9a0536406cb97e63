"""The loop over made-up layers and a made-up measurement: limits, seeds, and going on after every kind of end."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import yaml
from test_space import GROUPS, cost, group, made, seeds, totals

from rankopt import ledger, study
from rankopt.begun import FACTS as BEGUN_WITH
from rankopt.cli import main
from rankopt.errors import InfeasibleError, InputError, RankoptError, StudyMismatchError
from rankopt.evaluate import Evaluation
from rankopt.limits import Limit, parse_limit
from rankopt.plan import Plan
from rankopt.result import Progress, Result
from rankopt.strategies.strategy import Setting

ROOT = Path(__file__).parent.parent
DENSE = {"macs": totals()["macs"], "params": totals()["params"], "kl": 0.0}
LIMITS = [parse_limit("macs<=60%")]
FACTS = {"weights": "w1", "data": "d1"}


def measure(plan: Plan, limits: Sequence[Limit] = (), *_: Any) -> Evaluation:
    """A loss that the prediction gets wrong in its own way, the same for every process."""
    macs, params = cost(plan, "macs"), cost(plan, "params")
    found = {"macs": macs, "params": params, "macs_kept": macs / DENSE["macs"], "params_kept": params / DENSE["params"]}
    broken = [str(li) for li in limits if li.key in found and li.violation(found, DENSE) > 0]
    if broken:
        return Evaluation(found, {broken[0]: 1.0}, broken[0], {"seconds": 0.0})
    kl = 0.0
    for n, g in enumerate(GROUPS):
        wrong = int(hashlib.sha256(f"{g.name}{plan[g.name]}".encode()).hexdigest()[:4], 16) / 65535
        kl += float(g.losses[g.choices.index(plan[g.name])]) * (0.3 + 3 * wrong) * (4.0 if n < 3 else 0.5)
    found["kl"] = kl
    return Evaluation(found, {str(li): li.violation(found, DENSE) for li in limits}, None, {"bn": 0.0})


def search(
    url: str | None = None,
    trials: int = 20,
    evaluate: Callable[..., Evaluation] = measure,
    limits: Sequence[Limit] = tuple(LIMITS),
    seed: int = 0,
    name: str = "s",
    objectives: Sequence[str] = ("kl", "macs"),
    facts: dict[str, str] = FACTS,
    storage: Any = None,
    progress: Callable[[Progress], None] = lambda p: None,
    strategy: str = "auto",
) -> Result:
    opened = ledger.open_study(storage or ledger.open_storage(url), name, objectives, facts, DENSE, limits)
    bounds = {li.quantity: li.bound(DENSE) / DENSE[li.quantity] for li in limits if li.quantity in ("macs", "params")}
    setting = Setting(made(bounds), objectives, limits, DENSE, trials, seed)
    study.run(opened, setting, evaluate, progress, by=strategy)
    return ledger.result_of(opened, limits)


def trials_of(url: str, name: str = "s") -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=name, storage=ledger.open_storage(url)).get_trials(deepcopy=False)


def counted(url: str, name: str = "s") -> list[optuna.trial.FrozenTrial]:
    return [t for t in trials_of(url, name) if ledger.counts(t)]


def proposals(url: str, name: str = "s") -> list[dict[str, float]]:
    return [t.params for t in counted(url, name)]


# one run -------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["s.db", "s.log", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str | None:
    return None if request.param == "memory" else str(tmp_path / "new" / "folder" / request.param)


def test_trials_keep_the_limits_and_the_front_is_one(url: str | None) -> None:
    told: list[Progress] = []
    result = search(url, 20, progress=told.append)
    assert [p.done for p in told] == list(range(1, 21))
    assert {p.total for p in told} == {20}
    volumes = [p.hypervolume for p in told]
    assert volumes == sorted(volumes)  # type: ignore[type-var]
    for entry in result.entries:
        assert entry.feasible
        assert entry.measurements == measure(entry.plan).measurements
        assert cost(entry.plan, "macs") <= 0.6 * DENSE["macs"]
    points = [(e.measurements["kl"], e.measurements["macs"]) for e in result.front]
    for a in points:
        assert not any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in points)  # type: ignore[operator]
    assert result.best().measurements["kl"] == min(e.measurements["kl"] for e in result.entries)  # type: ignore[type-var]
    assert told[-1].best == result.best().measurements
    assert len({e.plan.digest for e in result.entries}) == len(result.entries)


def test_the_study_learns_what_the_prediction_gets_wrong() -> None:
    result = search(trials=60)
    solved = {made({"macs": 0.6}).plan_of(s).digest for s in seeds(made({"macs": 0.6}), 12)}
    kl = {e.plan.digest: float(e.measurements["kl"] or 0) for e in result.entries}
    assert min(kl.values()) < 0.9 * min(kl[d] for d in solved)


def test_solved_plans_come_first_and_half_of_the_rest_is_asked_for_at_the_limit(tmp_path: Path) -> None:
    url = str(tmp_path / "s.log")
    search(url, 24, strategy="correct")
    space = made({"macs": 0.6})
    asked = [t.user_attrs["proposal"]["numbers"] for t in counted(url)]
    first = sorted(asked[:8], key=lambda n: -n["budget"])
    for numbers, wanted in zip(first, seeds(space, 8), strict=True):
        assert numbers == pytest.approx(wanted)
    later = asked[8:]
    at_the_limit = [n for n in later if n["budget"] == space.highest]
    assert len(at_the_limit) >= len(later) / 2
    assert len(later) > len(at_the_limit)
    assert len({tuple(n.values()) for n in asked}) == 24


def test_layers_that_are_measured_alone_may_break_the_limit() -> None:
    """What `greedy` chooses by are plans that keep far more than the limit allows."""
    result = search(trials=len(GROUPS) * 9 + 6, strategy="greedy")
    alone = [e for e in result.entries if len({c for c in e.plan.changed().values()}) == 1 and not e.feasible]
    assert len(alone) > len(GROUPS)
    best = result.best()
    assert len(best.plan.changed()) > 1
    assert cost(best.plan, "macs") <= 0.6 * DENSE["macs"]


def test_the_parameters_of_a_trial_are_its_layers(tmp_path: Path) -> None:
    """So that Optuna's dashboard and importances show them."""
    url = str(tmp_path / "s.db")
    search(url, 14)
    space = made({"macs": 0.6})
    for trial in trials_of(url):
        assert trial.params == space.layer_numbers(Plan.from_dict(trial.user_attrs["plan"]))
    opened = optuna.load_study(study_name="s", storage=ledger.open_storage(url))
    found = optuna.importance.get_param_importances(opened, target=lambda t: t.values[0])
    assert set(found) <= set(space.layer_parameters())
    assert found


def test_above_64_layers_they_stand_in_the_plan_alone() -> None:
    many = [group(f"m{n}", n) for n in range(65)]
    for groups, count in ((many, 0), (many[:64], 128)):
        space = made(groups=groups)
        params, distributions = ledger.layer_parameters(space, space.solve(space.losses, 0.5))
        assert len(params) == len(distributions) == count


def test_what_is_stored_of_a_trial(tmp_path: Path) -> None:
    url = str(tmp_path / "s.log")
    search(url, 6, limits=[*LIMITS, parse_limit("kl<=0.1")])
    for trial in trials_of(url):
        plan = Plan.from_dict(trial.user_attrs["plan"])
        assert trial.user_attrs["measurements"] == measure(plan).measurements
        assert trial.values == [measure(plan).measurements[q] for q in ("kl", "macs")]
        excess = {str(li): li.violation(measure(plan).measurements, DENSE) for li in (*LIMITS, parse_limit("kl<=0.1"))}
        named = {k: v for k, v in trial.constraints.items() if not k.isdigit()}
        assert named == pytest.approx(excess)
        assert [trial.constraints[str(n)] for n in range(len(excess))] == list(named.values())  # for optuna-dashboard
        assert trial.user_attrs["predicted_kl"] == pytest.approx(made({"macs": 0.6}).predicted(plan))
    best = optuna.load_study(study_name="s", storage=ledger.open_storage(url)).best_trials
    assert all(max(t.constraints.values()) <= 0 for t in best)


def test_the_same_seed_gives_the_same_plans_and_another_does_not() -> None:
    plans = [[e.plan.digest for e in search(trials=24, seed=s).entries] for s in (5, 5, 6)]
    assert plans[0] == plans[1]
    assert plans[0] != plans[2]


def test_a_limit_on_quality_is_searched_at_its_edge() -> None:
    limits = [parse_limit("kl<=0.15")]
    result = search(trials=40, limits=limits)
    best = result.best()
    assert float(best.measurements["kl"] or 9) <= 0.15
    assert best.measurements["macs"] == min(e.measurements["macs"] for e in result.entries if e.feasible)  # type: ignore[type-var]
    solved = [measure(made().plan_of(s)).measurements for s in seeds(made(), 12)]
    assert float(best.measurements["macs"] or 0) < min(m["macs"] for m in solved if m["kl"] <= 0.15)


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    """The solver has a line of its own for some problems, which would spoil JSON."""
    search(trials=30)
    search(trials=30, limits=[parse_limit("kl<=0.15")])
    print("still here")
    assert capfd.readouterr().out == "still here\n"


def test_plans_that_come_again_are_not_measured_again() -> None:
    asked: list[str] = []

    def once(plan: Plan, limits: Sequence[Limit], *_: Any) -> Evaluation:
        asked.append(plan.digest)
        return measure(plan, limits)

    result = search(trials=40, evaluate=once)
    assert len(asked) == len(set(asked)) == len(result.entries)


@pytest.mark.parametrize(
    "objectives", [("kl", "params"), ("accuracy", "macs"), ("kl",), ("accuracy", "kl", "macs", "params")]
)
def test_other_objectives(objectives: tuple[str, ...]) -> None:
    def both(plan: Plan, limits: Sequence[Limit], *_: Any) -> Evaluation:
        found = measure(plan, limits)
        found.measurements["accuracy"] = 100 - 20 * found.measurements.get("kl", 0)
        return found

    result = search(trials=12, objectives=objectives, evaluate=both)
    assert result.objectives == objectives
    assert result.front
    assert result.best().measurements["kl"] == min(e.measurements["kl"] for e in result.entries)  # type: ignore[type-var]


# going on ------------------------------------------------------------------------------------------------------------


class Ends:
    """An evaluation that ends the process in some way at its n-th call."""

    def __init__(self, at: int, how: type[BaseException]) -> None:
        self.left, self.how = at, how

    def __call__(self, plan: Plan, limits: Sequence[Limit], *_: Any) -> Evaluation:
        if self.left == 0:
            raise self.how
        self.left -= 1
        return measure(plan, limits)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """What is proposed without an interruption."""
    url = str(tmp_path_factory.mktemp("whole") / "s.log")
    search(url, 16)
    return proposals(url)


@pytest.mark.parametrize(
    ("file", "at", "how"),
    [
        ("s.db", 0, KeyboardInterrupt),
        ("s.db", 3, SystemExit),  # leaves the trial running, as a kill does
        ("s.db", 9, KeyboardInterrupt),
        ("s.db", 10, SystemExit),
        ("s.log", 13, KeyboardInterrupt),
        ("s.log", 8, SystemExit),
    ],
)
def test_after_an_interruption_the_same_is_proposed(
    tmp_path: Path, whole: list[dict[str, float]], file: str, at: int, how: type[BaseException]
) -> None:
    parts = str(tmp_path / file)
    with pytest.raises(how):
        search(parts, 16, Ends(at, how))
    running = [t for t in trials_of(parts) if t.state == optuna.trial.TrialState.RUNNING]
    assert len(running) == (how is SystemExit)
    told: list[Progress] = []
    search(parts, 16, progress=told.append)
    assert proposals(parts) == whole
    assert told[-1].done == len(counted(parts)) == 16
    interrupted = [t for t in trials_of(parts) if t.user_attrs.get("reason") == "interrupted"]
    assert len(interrupted) == 1
    assert not [t for t in trials_of(parts) if not t.state.is_finished()]


def test_more_trials_go_on_and_no_more_trials_do_nothing(tmp_path: Path) -> None:
    url = str(tmp_path / "s.log")
    first = search(url, 12)
    assert len(counted(url)) == 12
    again = search(url, 12, evaluate=Ends(0, AssertionError))
    assert [e.plan.digest for e in again.entries] == [e.plan.digest for e in first.entries]
    assert len(trials_of(url)) == 12
    search(url, 20)
    assert len(counted(url)) == 20
    digests = [Plan.from_dict(t.user_attrs["plan"]).digest for t in counted(url)]
    assert len(set(digests)) == len(digests)  # none is proposed twice
    assert search(url, 3).entries  # fewer than there are


@pytest.mark.filterwarnings("error", "ignore::ResourceWarning")  # these may be of any test before
def test_other_limits_go_on_with_what_is_known(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    url = str(tmp_path / "s.db")
    search(url, 10)
    tighter = [parse_limit("macs<=45%"), parse_limit("kl<=9")]
    result = search(url, 20, limits=tighter)
    assert len(counted(url)) == 20
    assert any(e.feasible for e in result.entries)
    for entry in result.entries:
        assert entry.feasible == (float(entry.measurements["macs_kept"] or 1) <= 0.45)
    assert float(result.best().measurements["macs_kept"] or 1) <= 0.45
    assert ledger.read_result(f"sqlite:///{url}", "s").limits == tuple(tighter)
    assert capfd.readouterr().err == ""


def test_several_studies_in_one_storage(tmp_path: Path) -> None:
    url = str(tmp_path / "s.db")
    search(url, 4, name="one")
    search(url, 6, name="two", objectives=("kl", "params"))
    assert (len(trials_of(url, "one")), len(trials_of(url, "two"))) == (4, 6)
    with pytest.raises(InputError, match=r"study three: not in .*; it holds one, two"):
        ledger.read_result(f"sqlite:///{url}", "three")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"objectives": ("kl", "params")}, "another objectives"),
        ({"objectives": ("macs", "kl")}, "another objectives"),
        ({"facts": {**FACTS, "weights": "w2"}}, 'another weights ("w1", now "w2")'),
        ({"facts": {**FACTS, "data": "d2"}}, "another data"),
        ({"facts": {"data": "d1"}}, 'another weights ("w1", now none)'),
        ({"facts": {**FACTS, "target": "onnx"}}, "another target (none"),
    ],
)
def test_a_study_that_was_begun_with_something_else(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    url = str(tmp_path / "s.log")
    search(url, 3)
    with pytest.raises(StudyMismatchError) as caught:
        search(url, 6, **change)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(trials_of(url)) == 3


def test_a_study_of_someone_else(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 's.db'}"
    other = optuna.create_study(storage=url, study_name="s")
    other.ask()
    for action in (lambda: search(url, 3), lambda: ledger.read_result(url, "s")):
        with pytest.raises(StudyMismatchError, match="that rankopt did not begin"):
            action()


@pytest.mark.parametrize("file", ["s.db", "s.log"])
def test_killed_while_the_study_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    """After each of the writes that make it: who reads is told so, and a search begins it or goes on."""
    scheme = "sqlite" if file == "s.db" else "journal"
    for writes in range(20):
        url = f"{scheme}:///{tmp_path / str(writes) / file}"
        storage = ledger.open_storage(url)
        left = iter(range(writes))

        def write(self: Any, doing: Any, *args: Any, left: Any = left, **given: Any) -> Any:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return doing(self, *args, **given)

        with monkeypatch.context() as patched:
            kind = type(storage)
            for name in ("create_new_study", "set_study_user_attr", "set_study_system_attr"):
                patched.setattr(kind, name, partialmethod(write, getattr(kind, name)))
            try:
                ledger.open_study(storage, "s", ("kl", "macs"), FACTS, DENSE, LIMITS)
            except KeyboardInterrupt:
                pass
            else:
                break
        begun = any(BEGUN_WITH in s.user_attrs for s in optuna.get_all_study_summaries(ledger.open_storage(url)))
        if begun:
            assert ledger.read_result(url, "s").entries == []
        else:
            with pytest.raises(InputError, match=r"nothing was searched yet|it holds no study"):
                ledger.read_result(url, "s")
        assert search(url, 3, objectives=("kl", "macs") if begun else ("kl", "params", "macs")).entries
    assert 4 < writes < 19


# failures ------------------------------------------------------------------------------------------------------------


def failing(every: int, error: Exception | None = None) -> Callable[..., Evaluation]:
    calls = 0

    def evaluate(plan: Plan, limits: Sequence[Limit], *_: Any) -> Evaluation:
        nonlocal calls
        calls += 1
        if calls % every == 0:
            if error is not None:
                raise error
            return Evaluation({**measure(plan).measurements, "kl": float("nan")}, {})
        return measure(plan, limits)

    return evaluate


@pytest.mark.parametrize("error", [ValueError("no\nluck"), RankoptError("refused"), None])
def test_failed_trials_are_recorded_and_the_study_goes_on(tmp_path: Path, error: Exception | None) -> None:
    url = str(tmp_path / "s.log")
    result = search(url, 13, failing(4, error))
    assert len(counted(url)) == 13
    assert 2 <= len(result.failed) <= 4
    expected = {"ValueError": "ValueError: no luck", "RankoptError": "refused"}.get(
        type(error).__name__, "measured {'kl'"
    )
    assert all(why.startswith(expected) for why in result.failed.values())
    assert all("\n" not in why for why in result.failed.values())
    assert result.best()


def test_eight_in_a_row_end_it(tmp_path: Path) -> None:
    url = str(tmp_path / "s.log")
    with pytest.raises(RankoptError, match=r"8 trials failed in a row; the last: trial 7: ZeroDivisionError: x"):
        search(url, 30, failing(1, ZeroDivisionError("x")))
    assert len(trials_of(url)) == 8
    with pytest.raises(InfeasibleError, match="no trial was measured to the end: ZeroDivisionError"):
        ledger.read_result(f"journal:///{url}", "s").best()


def test_a_trial_that_is_stopped_at_a_limit_is_no_failure(tmp_path: Path) -> None:
    url = str(tmp_path / "s.log")

    def strict(plan: Plan, limits: Sequence[Limit], *_: Any) -> Evaluation:
        return measure(plan, [parse_limit("macs<=40%")])

    result = search(url, 10, strict)
    assert {t.state.name for t in trials_of(url)} <= {"COMPLETE", "PRUNED"}
    assert any(why == "stopped at the limit macs<=40%" for why in result.failed.values())
    assert all(e.measurements.get("kl") is not None for e in result.front)


# storages ------------------------------------------------------------------------------------------------------------


def test_reading_needs_a_study(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing was searched yet"):
        ledger.read_result(f"sqlite:///{tmp_path / 'gone.db'}", "s")
    assert not (tmp_path / "gone.db").exists()


def test_reading_gives_what_the_run_gave(url: str | None) -> None:
    if url is None:
        pytest.skip("memory is not read from elsewhere")
    result = search(url, 8)
    full = f"journal:///{url}" if url.endswith(".log") else f"sqlite:///{url}"
    read = ledger.read_result(full, "s")
    assert [(e.trial, e.plan, e.measurements, e.feasible) for e in read.entries] == [
        (e.trial, e.plan, e.measurements, e.feasible) for e in result.entries
    ]
    assert read.dense == DENSE
    stricter = ledger.read_result(full, "s", [parse_limit("macs<=30%")])
    assert [e.feasible for e in stricter.entries] == [
        float(e.measurements["macs_kept"] or 1) <= 0.3 for e in read.entries
    ]
    with pytest.raises(InputError, match="open the study with its model"):
        read.best().build()


BROKEN: dict[str, Callable[[Path], str]] = {
    "no database": lambda folder: written(folder / "text.db", "not a database " * 99),
    "no journal": lambda folder: written(folder / "text.log", "not a journal\n{}\n{"),
    "a folder": lambda folder: str(folder),
    "inside a file": lambda folder: written(folder / "file", "x") + "/s.db",
    "journal inside a file": lambda folder: written(folder / "file", "x") + "/s.log",
    "unknown scheme": lambda folder: "nosuch://host/db",
    "no scheme": lambda folder: "://",
    "no driver": lambda folder: "mysql+nosuchdriver://host/db",
    "read only": lambda folder: f"sqlite:///file:{folder / 'empty.db'}?mode=ro&uri=true",
    "other tables": lambda folder: foreign(folder / "other.db"),
}


def written(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def foreign(path: Path) -> str:
    with sqlite3.connect(path) as db:
        db.execute("create table version_info (x int)")
    return str(path)


@pytest.mark.parametrize("case", BROKEN)
def test_storages_that_can_not_be_used(tmp_path: Path, case: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(InputError) as caught:
            search(BROKEN[case](tmp_path), 2)
    assert str(caught.value).startswith(("storage ", "study "))
    assert "\n" not in str(caught.value)


def test_a_database_that_becomes_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # Optuna tries again for seconds
    path = tmp_path / "s.db"
    search(str(path), 3)
    with pytest.raises(InputError, match=r"study s: its storage can't be written"):
        search(f"sqlite:///file:{path}?mode=ro&uri=true", 5)


# a process that is killed --------------------------------------------------------------------------------------------

CODE = """
import time
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)).eval()

def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 12, generator=generator)
    return {"calibration": x[:100], "validation": x[100:]}

def metric(module, batches):
    time.sleep(0.1)
    with torch.no_grad():
        return -float(sum(module(b.args[0]).square().mean() for b in batches))
"""


def shell(*args: str) -> list[str]:
    code = "import sys; from rankopt.cli import main; sys.exit(main())"
    return [sys.executable, "-c", code, *args]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def finished(path: Path) -> int:
    if not path.exists():
        return 0
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5) as db:
            return int(db.execute("select count(*) from trials where state = 'COMPLETE'").fetchone()[0])
    except sqlite3.Error:
        return 0


def test_killed_in_the_middle_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "code.py").write_text(CODE)
    content = {
        "model": "code.py:model",
        "data": "code.py:data",
        "metric": "code.py:metric",
        "space": {"methods": ["svd"], "keep": {"levels": 8}},
        "limits": ["macs<=70%"],
        "trials": 14,
    }
    (tmp_path / "k.yaml").write_text(yaml.safe_dump(content))
    arguments = ["search", str(tmp_path / "k.yaml"), "--json", "--storage"]
    assert main([*arguments, str(tmp_path / "whole.db")]) == 0
    whole = json.loads(capsys.readouterr().out)["front"]

    database = tmp_path / "killed.db"
    process = subprocess.Popen(
        shell(*arguments, str(database)), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 100
    while finished(database) < 6 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert 6 <= finished(database) < 14
    ran = subprocess.run(
        shell(*arguments, str(database)), env=environment(), capture_output=True, text=True, timeout=200, check=False
    )
    assert ran.returncode == 0, ran.stderr
    again = json.loads(ran.stdout)["front"]

    keys = ("kl", "macs_kept", "params_kept")
    assert [[row[k] for k in keys] for row in again] == [[pytest.approx(row[k]) for k in keys] for row in whole]
    assert len(counted(str(database), "k")) == 14
    assert {t.state.name for t in trials_of(str(database), "k")} <= {"COMPLETE", "FAIL", "PRUNED"}


@pytest.mark.slow
def test_reading_while_another_process_writes(tmp_path: Path) -> None:
    """What `front` does while a search runs."""
    path = tmp_path / "s.db"
    search(str(path), 4)
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=search, args=(str(path), 10))
    process.start()
    counts = []
    while process.is_alive():
        counts.append(len(ledger.read_result(f"sqlite:///{path}", "s").entries))
        time.sleep(0.05)
    process.join()
    assert process.exitcode == 0
    assert counts == sorted(counts)
    assert np.all(np.array(counts) >= 1)
