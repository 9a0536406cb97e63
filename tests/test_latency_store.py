"""The store of latencies: what was put is there again, whoever wrote it and however the writer ended."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rankopt.errors import ConditionsError, InputError
from rankopt.latency_store import LatencyStore, default_path
from rankopt.measurement import Measurement

CONDITIONS = {"target": "torch", "device": "Größe 5"}


def measurement(value: float) -> Measurement:
    return Measurement(value, "ms", 3, value, value, value, 0.0, CONDITIONS)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "made" / "when" / "needed.jsonl"


def filled(path: Path, **values: float) -> None:
    store = LatencyStore(path, CONDITIONS)
    for key, value in values.items():
        store.put(key, measurement(value))


def test_what_was_put_is_there_when_the_file_is_opened_again(path: Path) -> None:
    store = LatencyStore(path, CONDITIONS)
    assert not path.exists()
    assert store.get("a") is None
    store.put("a", measurement(1.0))
    store.put("b ü\n", measurement(2.0))
    store.put("a", measurement(3.0))
    for again in (store, LatencyStore(path, CONDITIONS), LatencyStore.read(path), LatencyStore.read(str(path))):
        assert again.keys() == ["a", "b ü\n"]
        assert again.get("a") == measurement(3.0)
        assert again.get("b ü\n") == measurement(2.0)
        assert again.conditions == CONDITIONS
    lines = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == {"schema": 1, "conditions": CONDITIONS}
    assert json.loads(lines[1]) == {"key": "a", "measurement": measurement(1.0).to_dict()}
    assert len(lines) == 4


def test_without_a_path_it_is_in_memory() -> None:
    store = LatencyStore(None, CONDITIONS)
    store.put("a", measurement(1.0))
    assert store.get("a") == measurement(1.0)


def test_other_conditions_are_not_mixed(path: Path) -> None:
    filled(path, a=1.0)
    with pytest.raises(ConditionsError, match=r"needed.jsonl: measured with another device \(Größe 5, now pi\)"):
        LatencyStore(path, {**CONDITIONS, "device": "pi"})
    store = LatencyStore(path, CONDITIONS)
    wrong = Measurement(1.0, "ms", 1, 1.0, 1.0, 1.0, 0.0, {**CONDITIONS, "device": "pi"})
    with pytest.raises(ConditionsError, match="another device"):
        store.put("b", wrong)
    assert store.get("b") is None
    store.put("b", Measurement(1.0, "ms", 1, 1.0, 1.0, 1.0, 0.0, {**CONDITIONS, "reported by a program": "x"}))
    assert LatencyStore(path, CONDITIONS).keys() == ["a", "b"]


def test_the_line_of_a_killed_writer_is_left_out_and_written_over(path: Path) -> None:
    filled(path, a=1.0, b=2.0)
    whole = path.read_bytes()
    last = len(whole) - whole[:-1].rfind(b"\n") - 1
    for cut in range(1, last):
        path.write_bytes(whole[:-cut])
        again = LatencyStore(path, CONDITIONS)
        assert again.keys() == (["a", "b"] if cut == 1 else ["a"]), "a line that only lacks its end is whole"
        assert LatencyStore.read(path).keys() == again.keys()
        if cut in (1, 2, 40, last - 1):
            again.put("c", measurement(3.0))
            assert path.read_bytes().startswith(whole if cut == 1 else whole[:-last])
            assert LatencyStore.read(path).keys() == [*again.keys()]
            assert LatencyStore.read(path).get("c") == measurement(3.0)


@pytest.mark.parametrize("content", [b"", b'{"schema": 1, "cond'])
def test_a_file_without_a_whole_first_line_is_begun_again(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(InputError, match="line 1: needs schema and conditions"):
        LatencyStore.read(path)
    filled(path, a=1.0)
    assert LatencyStore.read(path).keys() == ["a"]


HEAD = {"schema": 1, "conditions": CONDITIONS}
GOOD = {"key": "a", "measurement": measurement(1.0).to_dict()}


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ([{"schema": 2, "conditions": {}}], "line 1: schema must be 1, got '2'"),
        ([{"schema": 1}], "line 1: needs an object of schema and conditions"),
        ([{"schema": 1, "conditions": {"a": 3}}], "line 1: conditions must be an object of texts"),
        ([[1, 2]], "line 1: needs an object"),
        ([HEAD, GOOD, {"key": "a"}, GOOD], "line 3: needs an object of key and measurement"),
        ([HEAD, {"key": 3, "measurement": {}}], "line 2: key must be text, got '3'"),
        ([HEAD, {"key": "a", "measurement": {"value": 1.0}}], "line 2: unit is needed"),
        ([HEAD, {"key": "a", "measurement": 1.0}], "line 2: needs an object of value"),
        ([HEAD, "{torn", GOOD], "line 2: not valid JSON"),
        ([HEAD, "", GOOD], "line 2: not valid JSON"),
        ([HEAD, b"\xff\xfe", GOOD], "line 2: not valid JSON"),
    ],
)
def test_a_fault_is_named_with_its_line(tmp_path: Path, lines: list[Any], text: str) -> None:
    path = tmp_path / "bad.jsonl"
    encoded = [v if isinstance(v, bytes) else (v if isinstance(v, str) else json.dumps(v)).encode() for v in lines]
    path.write_bytes(b"\n".join([*encoded, b""]))
    for open_it in (LatencyStore.read, lambda p: LatencyStore(p, CONDITIONS)):
        with pytest.raises(InputError, match=rf"bad.jsonl: {text}") as caught:
            open_it(path)
        assert "\n" not in str(caught.value)


def test_files_that_can_not_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="can't be read: No such file"):
        LatencyStore.read(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="can't be read: Is a directory"):
        LatencyStore.read(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="can't be written: "):
        LatencyStore(tmp_path / "file" / "below.jsonl", CONDITIONS).put("a", measurement(1.0))


WRITER = """
import sys
from pathlib import Path
from rankopt.latency_store import LatencyStore
from rankopt.measurement import Measurement
conditions = {"target": "torch", "device": "Größe 5"}
store = LatencyStore(Path(sys.argv[1]), conditions)
for n in range(40):
    store.put(f"{sys.argv[2]} {n} " + "x" * 3000, Measurement(1.0 + n, "ms", 1, 1.0, 1.0, 1.0, 0.0, conditions))
"""


def test_several_processes_write_one_file(path: Path) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), name]) for name in "abc"]
    assert [w.wait() for w in writers] == [0, 0, 0]
    keys = LatencyStore.read(path).keys()
    assert sorted(k.split(" x")[0] for k in keys) == sorted(f"{w} {n}" for w in "abc" for n in range(40))
    assert path.read_bytes().count(b'"schema"') == 1


def test_the_default_path_depends_on_the_conditions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RANKOPT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    plain = default_path(CONDITIONS)
    assert plain.parent == tmp_path / ".cache" / "rankopt" / "latency"
    assert plain.name.startswith("torch-")
    assert plain.suffix == ".jsonl"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_path(CONDITIONS) == tmp_path / "xdg" / "rankopt" / "latency" / plain.name
    monkeypatch.setenv("RANKOPT_CACHE", str(tmp_path / "own"))
    assert default_path(CONDITIONS) == tmp_path / "own" / "latency" / plain.name
    assert default_path({**CONDITIONS, "device": "pi"}) != default_path(CONDITIONS)
    assert default_path({"target": "my/../own target"}).parent == tmp_path / "own" / "latency"
