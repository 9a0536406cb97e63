"""Durations as people write them."""

from __future__ import annotations

import math
import re
from typing import Any

_UNITS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def seconds_of(value: Any) -> float:
    """``90``, ``"90s"``, ``"20m"``, ``"1h30m"`` or ``"2d"`` in seconds; raises ValueError, which says what is wrong."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
        return float(value)
    if isinstance(value, str):
        text = value.replace(" ", "").lower()
        parts = re.findall(r"(\d+(?:\.\d+)?)(min|[smhd])", text if not re.fullmatch(r"[\d.]+", text) else f"{text}s")
        whole = "".join(number + unit for number, unit in parts)
        total = sum(float(number) * _UNITS[unit] for number, unit in parts)
        if whole in (text, f"{text}s") and 0 < total < math.inf:
            return total
    raise ValueError(f"must be a time above 0 such as 90s, 20m, 2h or 1h30m, got {value!r}")
