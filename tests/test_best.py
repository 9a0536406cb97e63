"""Which entries of a result are handed over: `best`, `top`, `knee`, and the verb that writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rankopt.cli import main
from rankopt.errors import InfeasibleError
from rankopt.limits import parse_limit
from rankopt.plan import LayerChoice, Plan
from rankopt.plan_file import read_plan
from rankopt.result import Entry, Result

DENSE = {"kl": 0.0, "macs": 100.0, "params": 100.0}
POINTS = [(0.5, 10.0), (0.1, 30.0), (0.02, 35.0), (0.015, 80.0), (0.3, 60.0)]  # (kl, macs); the last one is dominated


def entry(trial: int, kl: float, macs: float, limits: Any, **more: float) -> Entry:
    values = {"kl": kl, "macs": macs, "macs_kept": macs / 100, **more}
    feasible = all(li.violation(values, DENSE) <= 0 for li in limits)
    return Entry(trial, Plan({"a": LayerChoice("svd", {"rank": trial + 1})}), values, feasible)


def result(*limits: str, slow: int | None = None) -> Result:
    wanted = tuple(parse_limit(text) for text in limits)
    entries = [
        entry(n, kl, macs, wanted, **({"latency_kept": 1.5} if n == slow else {}))
        for n, (kl, macs) in enumerate(POINTS)
    ]
    return Result(entries, ("kl", "macs"), wanted, DENSE)


def trials(entries: list[Entry]) -> list[int]:
    return [e.trial for e in entries]


def test_the_first_of_the_top_is_the_best() -> None:
    for limits in ((), ("macs<=50%",), ("kl<=0.2",), ("macs<=32%", "kl<=0.6")):
        found = result(*limits)
        assert found.top(1)[0] is found.best()
        assert trials(found.top(99)) == trials(found.top(5))
        assert len(found.top(99)) == sum(e.feasible for e in found.entries)


def test_the_order_of_the_top() -> None:
    assert trials(result("macs<=50%").top(3)) == [2, 1, 0]  # by quality
    assert trials(result("kl<=0.2").top(2)) == [1, 2]  # a limit on quality: the cheapest first
    assert trials(result("macs<=50%", slow=2).top(3)) == [1, 0, 2]  # slower than dense comes last
    assert trials(result().top(2, ["macs<=32%"])) == [1, 0]
    with pytest.raises(InfeasibleError, match=r"reached: 10\.0% of dense"):
        result().top(2, ["macs<=1%"])


def test_the_knee() -> None:
    assert result().knee().trial == 2
    assert result("macs<=32%").knee().trial in (0, 1)
    with pytest.raises(InfeasibleError):
        result("macs<=1%").knee()


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("rankopt.ledger.read_result", lambda url, name, limits=None: result(*map(str, limits or ())))
    (tmp_path / "s.yaml").write_text("model: a:b\ndata: a:b\nmetric: kl\n")
    return tmp_path / "s.yaml"


def test_a_plan_alone(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Needs neither the model nor the data: their modules do not exist here."""
    assert main(["export", str(study), "--knee", "--out", str(tmp_path / "p.yaml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trial"] == 2
    assert read_plan(tmp_path / "p.yaml") == result().knee().plan
    assert main(["export", str(study), "--trial", "0", "--out", str(tmp_path / "p.json")]) == 0
    assert read_plan(tmp_path / "p.json").layers["a"].ranks == {"rank": 1}
    limited = ["export", str(study), "--limit", "macs<=32%", "--out", str(tmp_path / "p.json")]
    assert main(limited) == 2
    assert "already exists" in capsys.readouterr().err
    assert main([*limited, "--force"]) == 0
    assert read_plan(tmp_path / "p.json") == result("macs<=32%").best().plan


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--trial", "1", "--knee", "--out", "x"], "give one of them"),
        (["--top", "2", "--knee", "--out", "x"], "give one of them"),
        (["--top", "2", "--out", "x.yaml"], "names a file for one plan"),
        (["--export", "onnx", "--out", "x.json"], "names a file for one plan"),
        (["--export", "tflite", "--out", "x"], "export 'tflite': is not known; known: onnx, pt2, openvino, executorch"),
        (["--top", "0", "--out", "x"], "--top"),
    ],
)
def test_what_is_refused(study: Path, capsys: pytest.CaptureFixture[str], args: list[str], says: str) -> None:
    assert main(["export", str(study), *args]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
