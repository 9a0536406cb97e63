"""Who may write to a storage, and what a killed writer leaves behind."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from optuna.storages import RDBStorage
from sqlalchemy.exc import OperationalError
from test_study import environment, search, trials_of

from rankopt import ledger
from rankopt.cli import _fail
from rankopt.errors import InputError, RankoptError
from rankopt.storages import alone, file_of, only_writer, open_storage, shared, shown

HOLD = """
import sys
from rankopt.storages import only_writer
with only_writer(sys.argv[1], "s"):
    print("writing", flush=True)
    sys.stdin.read()
"""


def holder(url: str) -> subprocess.Popen[str]:
    """Another process that writes to a storage until its stdin is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, url], env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


@pytest.mark.parametrize("file", ["s.db", "s.log"])
def test_a_second_process_is_refused_as_long_as_the_first_lives(tmp_path: Path, file: str) -> None:
    url = str(tmp_path / "folder" / file)
    process = holder(url)
    with pytest.raises(InputError) as caught, only_writer(url, "s"):
        pass
    text = str(caught.value)
    assert text.startswith(f"study s: {url} is being written by process {process.pid} on ")
    assert "one writing process at a time" in text
    assert "postgresql+psycopg://" in text
    assert "\n" not in text
    process.kill()
    process.communicate()
    with only_writer(url, "s"), only_writer(str(tmp_path / "other.db"), "s"):
        search(url, 3)
    assert len(trials_of(url)) == 3
    assert process.stdin is not None
    process.stdin.close()


def test_reading_needs_no_lock(tmp_path: Path) -> None:
    url = str(tmp_path / "s.db")
    search(url, 3)
    process = holder(url)
    assert len(ledger.read_result(f"sqlite:///{url}", "s").entries) == 3
    process.communicate("")


def test_memory_and_servers_have_no_file(tmp_path: Path) -> None:
    assert file_of(None) is None
    for url in ("sqlite://", "sqlite:///:memory:", "postgresql+psycopg://me:secret@host/db", "mysql+pymysql://host/db"):
        assert file_of(url) is None
        with only_writer(url, "s"):
            pass
    for url, path in (
        ("a/b.db", "a/b.db"),
        ("a/b.log", "a/b.log"),
        ("sqlite:////a/b.db", "/a/b.db"),
        ("sqlite:///a/b.db?timeout=3", "a/b.db"),
        ("sqlite:///file:/a/b.db?mode=ro&uri=true", "/a/b.db"),
        ("journal:////a/b.log", "/a/b.log"),
        ("journal:///b.log", "b.log"),
    ):
        assert file_of(url) == Path(path), url
    storage = open_storage(str(tmp_path / "s.db"))
    assert not shared(storage)
    with alone(storage, "s"), alone(storage, "s"):  # nobody to hold off
        pass


def test_a_lock_that_can_not_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(InputError, match="study s: its storage can't be written"),
        only_writer(f"{tmp_path}/file/s.db", "s"),
    ):
        pass


def test_passwords_are_not_shown() -> None:
    assert "secret" not in shown("postgresql+psycopg://me:secret@host/db")
    with pytest.raises(InputError) as caught:
        open_storage("postgresql+psycopg://me:secret@127.0.0.1:1/db?connect_timeout=1")
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("storage postgresql+psycopg://me:***@127.0.0.1:1/db")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("mysql+aiomysql://host/db", "needs aiomysql; install it with: pip install 'aiomysql'"),
        ("oracle+oracledb://host/db", "needs oracledb"),
        ("journal://", "names no file"),
    ],
)
def test_what_is_missing_is_said(url: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        open_storage(url)


def test_a_journal_whose_last_line_is_half_there(tmp_path: Path) -> None:
    """As after kill -9 or a full disk in the middle of a write: the next line would be appended to it."""
    url = str(tmp_path / "s.log")
    search(url, 5)
    path = Path(url)
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines()[-1][:40])
    path.with_name("s.log.lock").symlink_to(path)  # Optuna's own lock, which stays when its holder is killed
    start = time.monotonic()
    with only_writer(url, "s"):
        search(url, 8)
    assert time.monotonic() - start < 20
    assert [t.state.name for t in trials_of(url)] == ["COMPLETE"] * 8
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_file_that_is_no_journal_is_not_cut(tmp_path: Path) -> None:
    path = tmp_path / "notes.log"
    path.write_text("my notes\nno end")
    with only_writer(str(path), "s"):
        pass
    assert path.read_text() == "my notes\nno end"


def on_a_full_disk(url: str, size: int, out: Path) -> None:
    """A limit on the size of files acts as a full disk does: a write ends in the middle."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    code = 0
    try:
        with only_writer(url, "s"):
            search(url, 400)
    except RankoptError as error:
        sys.stderr = out.open("w")
        code = _fail(error.message)
        sys.stderr.flush()
    os._exit(code)


@pytest.mark.parametrize(("file", "size"), [("s.db", 600_000), ("s.log", 60_000)])
def test_a_full_disk_is_one_line_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, size: int
) -> None:
    url, out = str(tmp_path / file), tmp_path / "said"
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # Optuna tries again for seconds
    process = multiprocessing.get_context("fork").Process(target=on_a_full_disk, args=(url, size, out))
    process.start()
    process.join(200)
    said = out.read_text()
    assert process.exitcode == 2, said
    assert said.startswith("rankopt: error: study s: its storage can't be written: ")
    assert said.count("\n") == 1
    before = [(t.number, t.state, t.values) for t in trials_of(url) if t.state.is_finished()]
    assert before
    with only_writer(url, "s"):
        search(url, len(before) + 3)
    after = trials_of(url)
    assert [(t.number, t.state, t.values) for t in after][: len(before)] == before
    assert all(t.state.is_finished() for t in after)
    assert sum(ledger.counts(t) for t in after) == len(before) + 3


def test_a_study_is_read_while_its_tables_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`rankopt status` in the moment in which a search begins: another process makes the tables first."""
    url, make, calls = f"sqlite:///{tmp_path / 's.db'}", RDBStorage.__init__, 0

    def late(self: RDBStorage, *args: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise OperationalError("CREATE TABLE studies", {}, Exception("table studies already exists"))
        make(self, *args, **options)

    (tmp_path / "s.db").touch()
    monkeypatch.setattr(RDBStorage, "__init__", late)
    with pytest.raises(InputError, match="it holds no study"):
        ledger.read_study(url, "s")
    assert calls == 2
