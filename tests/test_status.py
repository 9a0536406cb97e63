"""`rankopt status`, and Ctrl-C: what a person sees of a study that runs, was interrupted, or failed."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_loop import loop_on
from test_study import CODE, LIMITS, measure, search, trials_of

from rankopt import interrupts, ledger
from rankopt.cli import main
from rankopt.errors import InputError
from rankopt.evaluate import Evaluation
from rankopt.limits import parse_limit
from rankopt.plan import Plan
from rankopt.status import read_status
from rankopt.storages import only_writer


def mixed(plan: Plan, limits: Any, *_: Any) -> Evaluation:
    """Some plans fail, some are stopped at a limit."""
    number = int(plan.digest, 16) % 5
    if number == 0:
        raise ValueError("no luck")
    return measure(plan, [parse_limit("macs<=20%")] if number == 1 else limits)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    (tmp_path / "code.py").write_text(CODE)
    content = {
        "name": "s", "model": "code.py:model", "data": "code.py:data", "metric": "kl", "limits": ["macs<=60%"],
        "storage": "s.db", "trials": 30, "space": {"methods": ["svd"], "keep": {"levels": 4}},
    }  # fmt: skip
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "s.yaml"


def told(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    assert main(["status", *map(str, args)]) == 0
    return capsys.readouterr().out


def test_what_is_done_failed_stopped_running_and_interrupted(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = str(tmp_path / "s.db")
    search(url, 24, mixed)
    loop = loop_on(url, 40)
    first, second = loop.ask(), loop.ask()
    ended = {Plan.from_dict(t.user_attrs["plan"]).digest for t in trials_of(url) if ledger.counts(t)}
    while second is not None and second.proposal.plan.digest in ended:  # it needs no second time
        loop.tell(second, loop.outcome(second, measure))
        second = loop.ask()
    assert first is not None
    assert second is not None
    loop.retry(first, "its node is gone")
    loop.trials.end(second.trial, ledger.TrialState.FAIL, {"reason": "interrupted"})
    frozen = trials_of(url)
    found = json.loads(told(capsys, study, "--json"))
    states = [t.state.name for t in frozen if ledger.counts(t)]
    assert found["done"] == len(states) >= 24
    assert found["complete"] == states.count("COMPLETE")
    assert found["stopped"] == {"stopped at the limit macs<=20%": states.count("PRUNED")}
    assert len(found["failed"]) == states.count("FAIL") > 0
    assert set(found["failed"].values()) == {"ValueError: no luck"}
    (running,) = found["running"]
    assert (running["trial"], running["alive"], running["died"]) == (24, True, ["its node is gone"])
    assert running["pid"] == first.trial.user_attrs["worker"]["pid"]
    assert found["workers"] == [{"host": running["host"], "pid": running["pid"]}]
    assert (found["interrupted"], found["again"]) == (1, 1)
    assert found["per_minute"] > 0
    assert found["best"] == dict(ledger.read_result(f"sqlite:///{url}", "s").best().measurements)
    text = told(capsys, study)
    complete, stopped = states.count("COMPLETE"), states.count("PRUNED")
    assert f"s           {len(states)} trials: {complete} complete, {stopped} stopped early" in text
    assert "failed      trial " in text
    assert "ValueError: no luck" in text
    assert f"stopped     {states.count('PRUNED')} × stopped at the limit macs<=20%" in text
    assert "running     trial 24 for " in text
    assert "begun 2 times: its node is gone" in text
    assert "interrupted 1 trial, 1 still to be run again" in text
    loop.close()  # its driver is dead from now on
    assert "its driver is dead, and the plan is run again when the study goes on" in told(capsys, study)
    assert main(["trials", str(study), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)[0]
    assert row["environment.seed"] == 0
    assert row["environment.host"] == running["host"]


def test_who_writes_is_at_work_also_between_trials(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = str(tmp_path / "s.db")
    search(url, 4)
    assert "workers     none is at work" in told(capsys, study)
    with only_writer(url, "s"):
        assert "workers     none" not in told(capsys, study)
    assert read_status(f"sqlite:///{url}", "s").workers == []


def test_a_study_that_does_not_exist(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(study)]) == 2
    assert "nothing was searched yet" in capsys.readouterr().err


def test_no_plan_keeps_the_limits(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search(str(tmp_path / "s.db"), 4, limits=LIMITS)
    assert "best        no plan keeps macs<=1% yet" in told(capsys, study, "--limit", "macs<=1%")


# Ctrl-C --------------------------------------------------------------------------------------------------------------


def test_ctrl_c_waits_for_what_is_written_and_a_second_one_would_not() -> None:
    written = []

    def write() -> None:
        with interrupts.handled():
            with interrupts.uninterrupted():
                with interrupts.uninterrupted():
                    signal.raise_signal(signal.SIGINT)
                    written.append("a")
                written.append("b")
                assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
            written.append("never")

    def compute() -> None:
        with interrupts.handled():
            signal.raise_signal(signal.SIGINT)
            written.append("never")

    for function in (write, compute):
        with pytest.raises(KeyboardInterrupt):
            function()
        assert written == ["a", "b"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_others_do_with_ctrl_c_is_left_alone() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts.handled(), interrupts.uninterrupted():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


# the options ---------------------------------------------------------------------------------------------------------


def test_a_study_file_says_when_it_ends(study: Path) -> None:
    from rankopt.study_file import load_study

    assert (load_study(study).time_limit, load_study(study).patience, load_study(study).trial_timeout) == (None,) * 3
    text = study.read_text()
    study.write_text(text + "time_limit: 1h30m\npatience: 20\ntrial_timeout: 90\n")
    file = load_study(study)
    assert (file.time_limit, file.patience, file.trial_timeout) == (5400.0, 20, 90.0)
    assert file.ending("2d", None).time_limit == 172800
    assert file.ending("2d", None).patience == 20
    assert file.ending(None, 3).patience == 3
    with pytest.raises(InputError, match="--time-limit: must be a time above 0 such as 90s, 20m, 2h or 1h30m, got 'x'"):
        file.ending("x", None)
    for key, value, says in (
        ("time_limit", "soon", "time_limit: must be a time above 0"),
        ("patience", "0", "patience: input should be greater than or equal to 1"),
        ("trial_timeout", "-3", "trial_timeout: must be a time above 0"),
    ):
        study.write_text(f"{text}{key}: {value}\n")
        with pytest.raises(InputError, match=says):
            load_study(study)


def test_a_search_is_stopped_by_what_the_command_line_says(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["search", str(study), "--trials", "40", "--patience", "3"]) == 0
    captured = capsys.readouterr()
    done = sum(ledger.counts(t) for t in trials_of(str(tmp_path / "s.db")))
    if done < 40:
        assert "stopped: no gain in hypervolume for 3 trials" in captured.out
    found = json.loads(told(capsys, study, "--json"))
    assert found["wanted"] == {"trials": 40, "time_limit": None, "patience": 3}
    assert found["done"] == done
    assert main(["search", str(study), "--trials", "60", "--time-limit", "0.01s", "--quiet"]) == 0
    assert sum(ledger.counts(t) for t in trials_of(str(tmp_path / "s.db"))) == done
    assert main(["search", str(study), "--time-limit", "soon"]) == 2
    assert "--time-limit: must be a time above 0" in capsys.readouterr().err
