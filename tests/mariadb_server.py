"""A MariaDB server of a test's own, which speaks as MySQL: Debian's, in a temporary folder, on a socket there."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from postgres import nobody

PATH = f"{os.environ.get('PATH', '')}:/usr/sbin"


def binary(name: str) -> str | None:
    """Debian does not put the server on everybody's path."""
    return shutil.which(name, path=PATH)


def why_not() -> str | None:
    """Why there can be no server here."""
    missing = [name for name in ("mariadbd", "mariadb-install-db") if binary(name) is None]
    if missing:
        return f"needs MariaDB's {' and '.join(missing)} (Debian: apt install mariadb-server)"
    try:
        import pymysql  # noqa: F401
    except ImportError:
        return "needs pymysql: pip install 'rankopt[mysql]'"
    if os.geteuid() == 0 and nobody() is None:
        return "a server should not be run by root, and there is no user nobody"
    return None


@contextmanager
def server() -> Iterator[str]:
    """The URL of an empty database, with {} for a database's name."""
    folder = Path(tempfile.mkdtemp(prefix="rankopt-my-", dir="/tmp"))
    user = nobody() if os.geteuid() == 0 else None
    given = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if user else {}
    if user:
        os.chown(folder, user.pw_uid, user.pw_gid)
    quiet = {"cwd": folder, "stdin": subprocess.DEVNULL, "env": {"LC_ALL": "C", "PATH": PATH}, **given}
    data, log = folder / "data", folder / "log"
    process = None
    try:
        made = subprocess.run(
            [str(binary("mariadb-install-db")), "--no-defaults", f"--datadir={data}", "--skip-test-db",
             "--auth-root-authentication-method=normal"],
            capture_output=True, text=True, check=False, **quiet,
        )  # fmt: skip
        assert made.returncode == 0, made.stdout + made.stderr
        options = [f"--datadir={data}", f"--socket={folder}/sock", f"--pid-file={folder}/pid", "--skip-networking"]
        options += ["--innodb-flush-log-at-trx-commit=0", "--innodb-buffer-pool-size=32M"]
        with log.open("w") as out:
            process = subprocess.Popen(
                [str(binary("mariadbd")), "--no-defaults", *options], stdout=out, stderr=subprocess.STDOUT, **quiet
            )
        _wait(folder, process, log)
        yield f"mysql+pymysql://root@localhost/{{}}?unix_socket={folder}/sock"
    finally:
        if process is not None:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def create(url: str, name: str) -> str:
    """A new database on a server; gives its URL."""
    import pymysql

    with pymysql.connect(user="root", unix_socket=url.partition("unix_socket=")[2]) as connection:
        connection.cursor().execute(f"CREATE DATABASE `{name}`")
    return url.format(name)


def _wait(folder: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    import pymysql

    end = time.monotonic() + 60
    while True:
        try:
            pymysql.connect(user="root", unix_socket=f"{folder}/sock").close()
            return
        except pymysql.OperationalError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.05)
