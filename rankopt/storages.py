"""Where studies are kept: Optuna's storages, opened; and who may write to them.

SQLite and a journal file have one writing process at a time, which holds a lock that the operating system takes back
when it is killed. In PostgreSQL and MySQL several drivers share a study; they choose plans one at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from rankopt.errors import InputError
from rankopt.heartbeat import identity, lives
from rankopt.trial_rows import TrialRows

_TABLE_TRIES = 20
SERVERS = ("postgresql", "mysql", "mariadb")  # databases that several drivers may write to
_EXTRAS = {
    "psycopg": "rankopt[postgres]",
    "pymysql": "rankopt[mysql]",
    "psycopg2": "psycopg2-binary",
    "mysqldb": "mysqlclient",
}

optuna.logging.set_verbosity(optuna.logging.WARNING)


def open_storage(url: str | None) -> BaseStorage:
    """An Optuna storage: None (memory), a path or ``sqlite:///file.db``, ``journal:///file.log``, or the URL of a
    PostgreSQL or MySQL database, ``postgresql+psycopg://user@host/database``.

    Folders are made. Raises `InputError`, one line without the password, when it can't be opened.
    """
    if url is None:
        return InMemoryStorage()
    url = _full(url)
    path = file_of(url)
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"storage {url}: {path.parent} can't be made: {error.strerror}") from None
    try:
        if url.startswith("journal:"):
            if path is None:
                raise InputError(f"storage {url}: names no file; write journal:///FILE.log")
            return JournalStorage(JournalFileBackend(str(path)))
        if url.startswith("sqlite:"):
            return _file(url)
        return _server(url)
    except ImportError:
        driver = make_url(url).get_driver_name()
        package = _EXTRAS.get(driver, driver)
        raise InputError(f"storage {shown(url)}: needs {driver}; install it with: pip install '{package}'") from None
    except InputError:
        raise
    except Exception as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"storage {shown(url)}: can't be opened: {line}") from None


def file_of(url: str | None) -> Path | None:
    """The file that a storage is kept in; None for memory and for servers."""
    if url is None:
        return None
    scheme, _, rest = _full(url).partition("://")
    if scheme not in ("sqlite", "journal"):
        return None
    name = rest.removeprefix("/")
    if scheme == "sqlite":  # it may be a URI of SQLite's own
        name = name.partition("?")[0].removeprefix("file:")
    return Path(name) if name and name != ":memory:" else None


def shared(storage: BaseStorage) -> bool:
    """Whether several drivers may write to it."""
    engine = _engine(storage)
    return engine is not None and engine.dialect.name in SERVERS


def shown(url: str) -> str:
    """A storage's URL without its password."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except SQLAlchemyError:
        return url


def end_trial(
    storage: BaseStorage,
    trial: int,
    state: TrialState,
    values: Sequence[float] | None,
    user_attrs: Mapping[str, Any],
    system_attrs: Mapping[str, Any],
) -> None:
    """Write down all that became of a running trial (by its id), its state last or all at once.

    Raises Optuna's `UpdateFinishedTrialError` when it has ended.
    """
    backend = getattr(storage, "_backend", storage)  # Optuna wraps the storages of a study in a cache
    if isinstance(backend, TrialRows):
        backend.end_trial(trial, state, values, user_attrs, system_attrs)
        return
    for key, value in user_attrs.items():
        storage.set_trial_user_attr(trial, key, value)
    for key, value in system_attrs.items():
        storage.set_trial_system_attr(trial, key, value)
    storage.set_trial_state_values(trial, state, values)


@contextmanager
def only_writer(url: str | None, study: str) -> Iterator[None]:
    """Be the one process that writes to a storage in a file; others are refused as long as this one lives.

    The lock is ``FILE.writer`` beside the file. What a killed process left half-written in a journal is cut off.

    Raises:
        InputError: another process writes there, or the lock can't be made.
    """
    path = file_of(url)
    if path is None:
        yield
        return
    beside = path.with_name(f"{path.name}.writer")
    lock = FileLock(beside, timeout=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise InputError(
            f"study {study}: {path} is being written by {_named(writer_of(url))}, and a file takes one writing process"
            " at a time; wait for it or end it, take another --storage, or share the study in PostgreSQL"
            " (postgresql+psycopg://USER@HOST/DATABASE)"
        ) from None
    except OSError as error:
        raise InputError(f"study {study}: its storage can't be written: {beside}: {error.strerror}") from None
    try:
        with suppress(OSError):
            beside.write_text(json.dumps(identity()), encoding="utf-8")
        if str(url).endswith((".log", ".journal")) or str(url).startswith("journal:"):
            _mend(path)
        yield
    finally:
        with suppress(OSError):
            beside.write_text("", encoding="utf-8")
        lock.release()


@contextmanager
def alone(storage: BaseStorage, study: str) -> Iterator[None]:
    """Hold off the other drivers of a study, so that what is read is still true when something is written.

    A lock of the database server, which it takes back when this process dies; nothing where there are no others.
    """
    engine = _engine(storage)
    if engine is None or engine.dialect.name not in SERVERS:
        yield
        return
    with _locked(engine, f"rankopt {study}"):
        yield


@contextmanager
def _locked(engine: Engine, name: str) -> Iterator[None]:
    digest = hashlib.sha256(name.encode()).digest()[:8]
    given: dict[str, Any]
    if engine.dialect.name == "postgresql":
        take, give = "SELECT pg_advisory_lock(:key)", "SELECT pg_advisory_unlock(:key)"
        given = {"key": int.from_bytes(digest, signed=True)}
    else:
        take, give = "SELECT GET_LOCK(:key, 3600)", "SELECT RELEASE_LOCK(:key)"
        given = {"key": f"rankopt {digest.hex()}"}
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        _execute(connection, take, given)
        try:
            yield
        finally:
            _execute(connection, give, given)


def _execute(connection: Connection, statement: str, given: dict[str, Any]) -> None:
    try:
        connection.execute(text(statement), given)
    except SQLAlchemyError as error:
        raise StorageInternalError(str(error)) from error


def _file(url: str) -> RDBStorage:
    """An SQLite file. Who reads it in the moment in which a search makes its tables finds some of them there."""
    for attempt in range(_TABLE_TRIES):
        try:
            return _closing(TrialRows(url, {"connect_args": {"factory": _Connection}}))
        except OperationalError as error:
            if "already exists" not in str(error) or attempt == _TABLE_TRIES - 1:
                raise
            time.sleep(0.1)
    raise AssertionError


def _server(url: str) -> RDBStorage:
    """A database on a server; its tables are made by one process at a time."""
    # MySQL's own level of isolation locks the gaps between rows too, and so lets drivers wait for one another
    options: dict[str, Any] = {"pool_pre_ping": True, "isolation_level": "READ COMMITTED"}
    engine = create_engine(url, **options)
    if engine.dialect.name not in SERVERS:
        raise InputError(f"storage {shown(url)}: must be sqlite, journal, {', '.join(SERVERS)}")
    try:
        with _locked(engine, "rankopt tables"):
            return _closing(TrialRows(url, options))
    finally:
        engine.dispose()


def _closing(storage: RDBStorage) -> RDBStorage:
    """The same; Optuna leaves its connections open until they are collected, which a server counts."""
    weakref.finalize(storage, storage.engine.dispose)
    return storage


def _engine(storage: BaseStorage) -> Engine | None:
    backend = getattr(storage, "_backend", storage)
    return backend.engine if isinstance(backend, RDBStorage) else None


def _full(url: str) -> str:
    """A path as a URL."""
    if "://" in url:
        return url
    return f"journal:///{url}" if url.endswith((".log", ".journal")) else f"sqlite:///{url}"


def writer_of(url: str | None) -> dict[str, Any]:
    """The process that writes to a storage in a file, see `heartbeat.identity`; empty where none lives or is known."""
    path = file_of(url)
    if path is None:
        return {}
    with suppress(OSError, ValueError):
        process = json.loads(path.with_name(f"{path.name}.writer").read_text(encoding="utf-8")[:1000])
        if isinstance(process, dict) and lives(process) is not False:
            return process
    return {}


def _named(process: Mapping[str, Any]) -> str:
    return f"process {process.get('pid')} on {process.get('host')}" if process else "another process"


def _mend(path: Path) -> None:
    """Make a journal whole after its writer was killed or its disk was full.

    The last line may be half there, and Optuna's own lock may have stayed, for which it would wait half a minute.
    """
    with suppress(OSError):
        path.with_name(f"{path.name}.lock").unlink()
    try:
        with path.open("r+b") as file:
            first = file.readline()
            size = file.seek(0, os.SEEK_END)
            with suppress(ValueError):
                if size and "op_code" in json.loads(first or b"{}"):
                    _cut(file, size)
    except OSError:
        return  # there is none yet, or it can't be written, which opening it will say


def _cut(file: Any, size: int) -> None:
    """Cut off what stands behind the last line's end."""
    at, step = size, 1 << 16
    while at > 0:
        start = max(0, at - step)
        file.seek(start)
        end = file.read(at - start).rfind(b"\n")
        if end >= 0:
            if start + end + 1 < size:
                file.truncate(start + end + 1)
            return
        at = start


class _Connection(sqlite3.Connection):
    """Waits for the disk now and then instead of twenty times a trial; what is committed survives a killed process."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        with suppress(sqlite3.OperationalError):  # opened for reading only
            self.execute("PRAGMA journal_mode=WAL")
            self.execute("PRAGMA synchronous=NORMAL")
