"""What the database servers of tests have in common: a temporary folder, a user that is not root, an end."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def nobody() -> pwd.struct_passwd | None:
    """Whom servers run as that refuse to be run by root."""
    try:
        return pwd.getpwnam("nobody")
    except KeyError:
        return None


def why_not(programs: Sequence[str], found: Callable[[str], str | None], package: str, driver: str) -> str | None:
    """Why there can be no server here.

    Args:
        programs: that it needs.
        found: where a program is, or None.
        package: of Debian, that has them.
        driver: the Python module that speaks with it, and the extra of rankopt that has it.
    """
    missing = [name for name in programs if found(name) is None]
    if missing:
        return f"needs {' and '.join(missing)} (Debian: apt install {package})"
    module, _, extra = driver.partition(" ")
    try:
        __import__(module)
    except ImportError:
        return f"needs {module}: pip install 'rankopt[{extra}]'"
    if os.geteuid() == 0 and nobody() is None:
        return f"{package}: a server is not run by root, and there is no user nobody"
    return None


@contextmanager
def running(
    make: Callable[[Path], Sequence[str]],
    serve: Callable[[Path], Sequence[str]],
    connect: Callable[[Path], object],
    path: str = os.environ["PATH"],
    stop: signal.Signals = signal.SIGTERM,
) -> Iterator[Path]:
    """A folder in which a server runs until the block ends.

    Args:
        make: the command that makes the data, given the folder.
        serve: the command that serves them.
        connect: raises as long as nobody answers.
        path: where programs are looked for.
        stop: what ends it without waiting for those who are connected.
    """
    folder = Path(tempfile.mkdtemp(prefix="rankopt-db-", dir="/tmp"))
    user = nobody() if os.geteuid() == 0 else None
    given = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if user else {}
    if user:
        os.chown(folder, user.pw_uid, user.pw_gid)
    quiet = {"cwd": folder, "stdin": subprocess.DEVNULL, "env": {"LC_ALL": "C", "PATH": path}, **given}
    log, process = folder / "log", None
    try:
        made = subprocess.run(list(make(folder)), capture_output=True, text=True, check=False, **quiet)
        assert made.returncode == 0, made.stdout + made.stderr
        with log.open("w") as out:
            process = subprocess.Popen(list(serve(folder)), stdout=out, stderr=subprocess.STDOUT, **quiet)
        end = time.monotonic() + 60
        while True:
            try:
                connect(folder)
                break
            except Exception:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < end, log.read_text()
                time.sleep(0.05)
        yield folder
    finally:
        if process is not None:
            process.send_signal(stop)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(folder, ignore_errors=True)
