"""`quiet`: what Ray reads from the environment when it is imported, so that it says nothing and reports nothing."""

from __future__ import annotations

import os

_QUIET = {
    "RAY_DEDUP_LOGS": "1",
    "RAY_DEDUP_LOGS_SKIP_REGEX": "^",  # every line: what Ray says of nodes goes to stdout, where only results belong
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def quiet() -> None:
    """To be called before Ray is imported; what the user has set stays."""
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)
