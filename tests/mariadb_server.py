"""A MariaDB server of a test's own, which speaks as MySQL: Debian's, in a temporary folder, on a socket there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import own_server

PATH = f"{os.environ.get('PATH', '')}:/usr/sbin"


def binary(name: str) -> str | None:
    """Debian does not put the server on everybody's path."""
    return shutil.which(name, path=PATH)


def why_not() -> str | None:
    """Why there can be no server here."""
    return own_server.why_not(("mariadbd", "mariadb-install-db"), binary, "mariadb-server", "pymysql mysql")


@contextmanager
def server() -> Iterator[str]:
    """The URL of an empty database, with {} for a database's name."""

    def make(folder: Path) -> list[str]:
        kept = [f"--datadir={folder}/data", "--skip-test-db", "--auth-root-authentication-method=normal"]
        return [str(binary("mariadb-install-db")), "--no-defaults", *kept]

    def serve(folder: Path) -> list[str]:
        options = [f"--datadir={folder}/data", f"--socket={folder}/sock", f"--pid-file={folder}/pid"]
        options += ["--skip-networking", "--innodb-flush-log-at-trx-commit=0", "--innodb-buffer-pool-size=32M"]
        return [str(binary("mariadbd")), "--no-defaults", *options]

    def connect(folder: Path) -> None:
        import pymysql

        pymysql.connect(user="root", unix_socket=f"{folder}/sock").close()

    with own_server.running(make, serve, connect, path=PATH) as folder:
        yield f"mysql+pymysql://root@localhost/{{}}?unix_socket={folder}/sock"


def create(url: str, name: str) -> str:
    """A new database on a server; gives its URL."""
    import pymysql

    with pymysql.connect(user="root", unix_socket=url.partition("unix_socket=")[2]) as connection:
        connection.cursor().execute(f"CREATE DATABASE `{name}`")
    return url.format(name)
