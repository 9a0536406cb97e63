"""A PostgreSQL server of a test's own: Debian's, in a temporary folder, on a socket there, run by nobody if by root."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import own_server


def binary(name: str) -> str | None:
    """Debian does not put the server's own programs on the path."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(found[-1]) if found else shutil.which(name)


def why_not() -> str | None:
    """Why there can be no server here."""
    return own_server.why_not(("postgres", "initdb"), binary, "postgresql", "psycopg postgres")


@contextmanager
def server() -> Iterator[str]:
    """The URL of an empty database, with {} for a database's name."""

    def make(folder: Path) -> list[str]:
        kept = ["-D", str(folder / "data"), "-U", "rankopt", "-A", "trust", "-E", "UTF8", "--no-sync"]
        return [str(binary("initdb")), *kept]

    def serve(folder: Path) -> list[str]:
        options = ["-c", "listen_addresses=", "-c", "fsync=off", "-c", f"unix_socket_directories={folder}"]
        return [str(binary("postgres")), "-D", str(folder / "data"), *options]

    def connect(folder: Path) -> None:
        import psycopg

        psycopg.connect(f"user=rankopt dbname=postgres host={folder}").close()

    with own_server.running(make, serve, connect, stop=signal.SIGINT) as folder:  # fast, says PostgreSQL
        yield f"postgresql+psycopg://rankopt@/{{}}?host={folder}"


def create(url: str, name: str) -> str:
    """A new database on a server; gives its URL."""
    import psycopg

    folder = url.partition("host=")[2]
    with psycopg.connect(f"user=rankopt dbname=postgres host={folder}", autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')  # type: ignore[call-overload]
    return url.format(name)
