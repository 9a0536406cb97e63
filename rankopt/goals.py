"""What a search strives for: its objectives and limits, checked against the metric and the targets that it has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rankopt.errors import InputError, LimitError
from rankopt.limits import Limit

EXACT = ("macs", "params")
_TIMES = ("latency", "latency_p95")


def checked_objectives(
    given: Sequence[str] | None, metric: Any, labels: Sequence[str] = (), limits: Sequence[Limit] = ()
) -> tuple[str, ...]:
    """The objectives, or the default: accuracy (kl without a metric), and latency (macs without a target).

    Quality must be among them or have a limit, or everything would be cut away.
    """
    if given is None or (not isinstance(given, str) and len(given) == 0):
        return ("accuracy" if metric else "kl", "latency" if labels else "macs")
    known = ["accuracy", "kl", *EXACT] if metric else ["kl", *EXACT]
    if labels:
        known += [*_TIMES, *(f"{time}@{label}" for time in _TIMES for label in labels), "memory"]
    wrong = [o for o in ([given] if isinstance(given, str) else given) if o not in known]
    if wrong and not labels and str(wrong[0]).partition("@")[0] in (*_TIMES, "memory"):
        raise InputError(f"objectives: {wrong[0]} is not measured without a target")
    if isinstance(given, str) or wrong:
        raise InputError(
            f"objectives: needs a list out of {', '.join(known)}, got {given if not wrong else wrong[0]!r}"
        )
    kept = {"accuracy", "kl"} & {*given, *(li.quantity for li in limits)}
    if len(set(given)) < len(given) or not kept:
        raise InputError(
            f"objectives: each stands once, and accuracy or kl is among them or has a limit, got {', '.join(given)}"
        )
    return tuple(given)


def checked_limit(limit: Limit, metric: Any, labels: Sequence[str] = ()) -> Limit:
    """The limit, if it can be checked; raises `LimitError` that says what is missing."""
    if limit.quantity in (*_TIMES, "memory") and not labels:
        raise LimitError(f"limit {str(limit)!r}: {limit.quantity} is not measured without a target")
    if limit.target is not None and limit.target not in labels:
        raise LimitError(
            f"limit {str(limit)!r}: no target is called {limit.target!r}; there are {', '.join(labels) or 'none'}"
        )
    if limit.quantity == "accuracy" and not metric:
        raise LimitError(f"limit {str(limit)!r}: accuracy needs a metric other than kl")
    return limit
