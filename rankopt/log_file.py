"""A log of a run: what the search told, what went wrong with its traceback, and warnings of the libraries it uses."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rankopt.errors import InputError
from rankopt.progress import line

LOGGER = logging.getLogger("rankopt")
_OTHERS = ("py.warnings", "optuna")


@contextmanager
def logged(path: Path | None) -> Iterator[Callable[[Any], None]]:
    """Append to `path` while the block runs (None: log nothing); gives a callback for `Search.run`.

    Raises:
        InputError: the file can't be written.
    """
    if path is None:
        yield lambda progress: None
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--log {path}: can't be written: {error.strerror or error}") from None
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    with ExitStack() as stack:
        stack.callback(handler.close)
        for logger in (LOGGER, *map(logging.getLogger, _OTHERS)):
            logger.addHandler(handler)
            stack.callback(logger.removeHandler, handler)
        before = LOGGER.level
        LOGGER.setLevel(logging.INFO)
        stack.callback(LOGGER.setLevel, before)
        logging.captureWarnings(True)
        stack.callback(logging.captureWarnings, False)
        LOGGER.info("rankopt %s: %s", version("rankopt"), " ".join(sys.argv))
        try:
            yield _tell
        except KeyboardInterrupt:
            LOGGER.warning("interrupted")
            raise
        except Exception:
            LOGGER.exception("ended by an error")
            raise
        LOGGER.info("done")


def _tell(progress: Any) -> None:
    entry = getattr(progress, "entry", None)
    if entry is not None:
        values = ", ".join(f"{k} {v:.6g}" for k, v in entry.measurements.items() if v is not None)
        kept = "keeps the limits" if entry.feasible else "outside of the limits"
        LOGGER.info("trial %d: %s; plan %s; %s", entry.trial, kept, entry.plan.digest, values)
    LOGGER.info("%s", line(progress))
