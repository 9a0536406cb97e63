"""`Limit`: what the handed-over model must keep, e.g. ``macs<=50%``, ``latency<=4ms``, ``accuracy>=-0.5``.

Grammar: ``QUANTITY[@TARGET] (<=|>=) NUMBER [UNIT]``.

=================  ===========================================================================
quantity           units (none: the plain number)
=================  ===========================================================================
macs, params       ``%`` or ``x`` of dense; K, M, G; plain count
latency            ``ms``, ``us``, ``s``; ``x`` or ``%`` of dense on the same target; also latency_p95
memory             ``KiB``, ``MiB``, ``GiB``; ``x`` or ``%`` of dense; peak of inference, see `rankopt.peak_memory`
accuracy           change in points against dense when the number carries a sign (``>=-0.5``),
                   else the value itself
kl                 nats
=================  ===========================================================================
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from rankopt.errors import LimitError

_PATTERN = re.compile(
    r"\s*(?P<quantity>[a-z_0-9]+)(?:@(?P<target>[A-Za-z0-9_.-]+))?\s*(?P<op><=|>=)\s*"
    r"(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(?P<unit>[A-Za-z%]*)\s*$"
)
_RELATIVE = {"%": 0.01, "x": 1.0}
_COUNTS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9}
# quantity -> (direction, absolute units to the base unit, may be relative to dense)
_QUANTITIES: dict[str, tuple[str, dict[str, float], bool]] = {
    "macs": ("<=", _COUNTS, True),
    "params": ("<=", _COUNTS, True),
    "latency": ("<=", {"ms": 1.0, "us": 1e-3, "s": 1e3}, True),
    "latency_p95": ("<=", {"ms": 1.0, "us": 1e-3, "s": 1e3}, True),
    "memory": ("<=", {"KiB": 1 / 1024, "MiB": 1.0, "GiB": 1024.0}, True),
    "accuracy": (">=", {"": 1.0}, False),
    "kl": ("<=", {"": 1.0}, False),
}
# quantity, as limits and objectives name it → the key of its measurement, where that is another
_MEASURED = {"latency": "latency_ms", "latency_p95": "latency_p95_ms", "memory": "peak_memory_mib"}


def measured_key(quantity: str) -> str:
    """The key under which a quantity is measured: latency → ``latency_ms``, latency@pi → ``latency_ms@pi``."""
    name, at, target = quantity.partition("@")
    return f"{_MEASURED.get(name, name)}{at}{target}"


@dataclass(frozen=True)
class Limit:
    """One inequality. `relative` is None (absolute), "dense" (a factor of dense) or "change" (dense plus value)."""

    quantity: str
    op: str
    value: float
    relative: str | None = None
    target: str | None = None
    text: str = ""

    def __str__(self) -> str:
        return self.text

    @property
    def key(self) -> str:
        """The key of its measurement, with the target: ``latency_ms@onnxruntime``."""
        return measured_key(f"{self.quantity}@{self.target}" if self.target else self.quantity)

    def bound(self, dense: Mapping[str, float]) -> float:
        """The bound in the quantity's base unit (count, ms, MiB, score), given the dense model's values."""
        if self.relative is None:
            return self.value
        if self.key not in dense:
            name = f"{self.quantity}@{self.target}" if self.target else self.quantity
            raise LimitError(f"{self.text}: the dense model's {name} is not known")
        return self.value * dense[self.key] if self.relative == "dense" else dense[self.key] + self.value

    def violation(self, values: Mapping[str, float], dense: Mapping[str, float]) -> float:
        """How far outside: 0 or less when kept, else the excess as a fraction of the bound. NaN counts as infinite."""
        value, bound = values.get(self.key, math.nan), self.bound(dense)
        if math.isnan(value):
            return math.inf
        excess = (value - bound if self.op == "<=" else bound - value) / max(abs(bound), 1e-12)
        return 0.0 if 0 < excess <= 1e-12 else excess  # 29 of 100 keep 29 %, though 0.29 * 100 is a little less


def parse_limit(text: str) -> Limit:
    """Read one limit; raises `LimitError` that repeats what was typed and says what is possible."""
    match = _PATTERN.match(text) if isinstance(text, str) else None
    if match is None:
        raise LimitError(f"limit {text!r}: needs QUANTITY<=NUMBER with a unit, e.g. 'macs<=50%' or 'accuracy>=-0.5'")
    quantity, op, unit = match["quantity"], match["op"], match["unit"]
    if quantity not in _QUANTITIES:
        raise LimitError(f"limit {text!r}: unknown quantity {quantity!r}; known: {', '.join(_QUANTITIES)}")
    direction, units, may_be_relative = _QUANTITIES[quantity]
    if op != direction:
        raise LimitError(f"limit {text!r}: {quantity} can only be limited with {direction}")
    if match["target"] and not quantity.startswith("latency"):
        raise LimitError(f"limit {text!r}: only latency is measured on a target")
    number = float(match["number"])
    if not math.isfinite(number):
        raise LimitError(f"limit {text!r}: the number is too large")
    relative: str | None = None
    if may_be_relative and unit in _RELATIVE:
        relative, number = "dense", number * _RELATIVE[unit]
    elif quantity == "accuracy" and match["number"][0] in "+-" and not unit:
        relative = "change"
    elif unit in units:
        number *= units[unit]
    else:
        known = [u or "none" for u in units] + (list(_RELATIVE) if may_be_relative else [])
        raise LimitError(f"limit {text!r}: unit {unit or 'none'!r} is not one of {', '.join(known)}")
    if quantity != "accuracy" and number <= 0:
        raise LimitError(f"limit {text!r}: the bound must be above 0")
    return Limit(quantity, op, number, relative, match["target"], text.strip())
