"""A PostgreSQL server of a test's own: Debian's, in a temporary folder, on a socket there, run by nobody if by root."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def binary(name: str) -> str | None:
    """Debian does not put the server's own programs on the path."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(found[-1]) if found else shutil.which(name)


def why_not() -> str | None:
    """Why there can be no server here."""
    missing = [name for name in ("postgres", "initdb") if binary(name) is None]
    if missing:
        return f"needs PostgreSQL's {' and '.join(missing)} (Debian: apt install postgresql)"
    try:
        import psycopg  # noqa: F401
    except ImportError:
        return "needs psycopg: pip install 'rankopt[postgres]'"
    if os.geteuid() == 0 and nobody() is None:
        return "PostgreSQL refuses to be run by root, and there is no user nobody"
    return None


@contextmanager
def server() -> Iterator[str]:
    """The URL of an empty database, with {} for a database's name."""
    folder = Path(tempfile.mkdtemp(prefix="rankopt-pg-", dir="/tmp"))
    user = nobody() if os.geteuid() == 0 else None
    given = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if user else {}
    if user:
        os.chown(folder, user.pw_uid, user.pw_gid)
    quiet = {"cwd": folder, "stdin": subprocess.DEVNULL, "env": {"LC_ALL": "C", "PATH": os.environ["PATH"]}, **given}
    data, log = folder / "data", folder / "log"
    process = None
    try:
        made = subprocess.run(
            [str(binary("initdb")), "-D", str(data), "-U", "rankopt", "-A", "trust", "-E", "UTF8", "--no-sync"],
            capture_output=True, text=True, check=False, **quiet,
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
        options = ["-c", "listen_addresses=", "-c", "fsync=off", "-c", f"unix_socket_directories={folder}"]
        with log.open("w") as out:
            process = subprocess.Popen(
                [str(binary("postgres")), "-D", str(data), *options], stdout=out, stderr=subprocess.STDOUT, **quiet
            )
        _wait(folder, process, log)
        yield f"postgresql+psycopg://rankopt@/{{}}?host={folder}"
    finally:
        if process is not None:
            process.send_signal(signal.SIGINT)  # fast: does not wait for those who are connected
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def create(url: str, name: str) -> str:
    """A new database on a server; gives its URL."""
    import psycopg

    folder = url.partition("host=")[2]
    with psycopg.connect(f"user=rankopt dbname=postgres host={folder}", autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')  # type: ignore[call-overload]
    return url.format(name)


def _wait(folder: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    import psycopg

    end = time.monotonic() + 60
    while True:
        try:
            psycopg.connect(f"user=rankopt dbname=postgres host={folder}").close()
            return
        except psycopg.OperationalError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.05)


def nobody() -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam("nobody")
    except KeyError:
        return None
