"""`replacing`: a file that appears complete or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rankopt.errors import InputError


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """Give a file beside `out` to write to, with the same ending; it takes the place of `out` where nothing goes wrong.

    Folders are made. Raises `InputError` where `out` is a folder.
    """
    if out.is_dir():
        raise InputError(f"{out}: is a folder; give the name of a file")
    out.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(suffix=out.suffix, prefix=f".{out.stem}.", dir=out.parent)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        mask = os.umask(0)
        os.umask(mask)
        part.chmod(0o666 & ~mask)  # mkstemp makes files for the owner alone
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
