"""`Measurement`: a time or a size that was measured, how sure it is, and under which conditions.

Needs neither torch nor a runtime. Times are in milliseconds, sizes in MiB.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np

from rankopt.errors import ConditionsError, InputError

NOISY_SPREAD = 0.10  # an interquartile range above this share of the median
NOISY_OTHERS = 0.25  # cores that other processes kept busy meanwhile


@dataclass(frozen=True)
class Measurement:
    """One measured quantity.

    Attributes:
        value: the median.
        unit: "ms" or "MiB".
        n: how many runs it is of.
        low, high: quartiles of the runs.
        p95: the 95th percentile of the runs.
        error: half the 95 % confidence interval of the median, as a share of it (from the medians of the rounds).
        conditions: what it depends on besides the model: device, runtime, threads, ...
        kept: the median over rounds of the ratio to the reference that was measured between the same runs.
        kept_low, kept_high: quartiles of that ratio.
        kept_error: half the 95 % confidence interval of `kept`, as a share of it.
        p95_kept: the ratio of the 95th percentiles.
        others: how many cores other processes kept busy meanwhile (0 where that can't be read).
        repeats: how often it was measured again because it was noisy.
    """

    value: float
    unit: str
    n: int
    low: float
    high: float
    p95: float
    error: float
    conditions: Mapping[str, str] = field(default_factory=dict)
    kept: float | None = None
    kept_low: float | None = None
    kept_high: float | None = None
    kept_error: float | None = None
    p95_kept: float | None = None
    others: float = 0.0
    repeats: int = 0

    @classmethod
    def of(
        cls,
        rounds: Sequence[Sequence[float]],
        conditions: Mapping[str, str],
        reference: Sequence[Sequence[float]] | None = None,
        *,
        unit: str = "ms",
        others: float = 0.0,
    ) -> Measurement:
        """Summarize runs.

        Args:
            rounds: the runs of every round; the rounds are what the confidence interval is taken over.
            conditions: under which they ran.
            reference: the runs of what it is compared with, in the same rounds.
            unit: of the runs.
            others: see above.

        Raises:
            InputError: there are no runs, or one is not a number above 0.
        """
        runs = np.concatenate([np.asarray(r, float) for r in rounds]) if rounds else np.zeros(0)
        bad = runs[~(np.isfinite(runs) & (runs > 0))]
        if len(bad) or any(len(r) == 0 for r in [*rounds, *(reference or [])]) or not rounds:
            given = f"a time of {bad[0]:g}" if len(bad) else "a round without any"
            raise InputError(f"measurement: needs runs that took a time above 0, got {given}")
        if reference is not None and len(reference) != len(rounds):
            raise InputError(f"measurement: {len(rounds)} rounds can't be compared with {len(reference)}")
        medians = np.array([np.median(r) for r in rounds])
        low, middle, high, p95 = np.quantile(runs, [0.25, 0.5, 0.75, 0.95])
        found = cls(
            float(middle), unit, len(runs), float(low), float(high), float(p95), _half_width(medians),
            dict(conditions), others=others,
        )  # fmt: skip
        if reference is None:
            return found
        base = np.array([np.median(r) for r in reference])
        ratios = medians / base
        kept_low, kept, kept_high = np.quantile(ratios, [0.25, 0.5, 0.75])
        p95_base = float(np.quantile(np.concatenate([np.asarray(r, float) for r in reference]), 0.95))
        return replace(
            found, kept=float(kept), kept_low=float(kept_low), kept_high=float(kept_high),
            kept_error=_half_width(ratios), p95_kept=float(p95) / p95_base,
        )  # fmt: skip

    @property
    def spread(self) -> float:
        """The interquartile range as a share of the median."""
        return (self.high - self.low) / self.value

    @property
    def noisy(self) -> bool:
        """Whether it should not be trusted without a word."""
        return self.spread > NOISY_SPREAD or self.others > NOISY_OTHERS

    def describe(self) -> str:
        """``0.442 ms (quartiles 0.440 to 0.447, 500 runs)``, and how noisy it is where it is."""
        text = f"{self.value:.4g} {self.unit} (quartiles {self.low:.4g} to {self.high:.4g}, {self.n} runs)"
        return f"{text}; {self.noise()}" if self.noisy else text

    def noise(self) -> str:
        """What is noisy about it, or nothing."""
        parts = []
        if self.spread > NOISY_SPREAD:
            parts.append(f"the middle half of the runs spreads over {self.spread:.0%} of the median")
        if self.others > NOISY_OTHERS:
            parts.append(f"other processes kept {self.others:.1f} cores busy")
        again = f" (after {self.repeats} repeats)" if self.repeats else ""
        return f"noisy: {' and '.join(parts)}{again}" if parts else ""

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, without the conditions (a file holds those once) and without what is not known."""
        found = asdict(replace(self, conditions={}))
        return {k: v for k, v in found.items() if k != "conditions" and v is not None and v != math.inf}

    @classmethod
    def from_dict(
        cls, data: Any, conditions: Mapping[str, str] | None = None, where: str = "measurement"
    ) -> Measurement:
        """Read the JSON form strictly; raises `InputError` naming what is wrong."""
        types = {f.name: f.type for f in fields(cls) if f.name != "conditions"}
        if not isinstance(data, dict) or set(data) - set(types):
            raise InputError(f"{where}: needs an object of {', '.join(types)}, got {str(data)[:80]}")
        for key, value in data.items():
            if key == "unit":
                needed, good = "text", isinstance(value, str)
            elif key in ("n", "repeats"):
                needed, good = "a whole number", _is_number(value) and isinstance(value, int) and value >= 0
            elif key == "value":
                needed, good = "a number above 0", _is_number(value) and value > 0
            else:
                needed, good = "a number of at least 0", _is_number(value) and value >= 0
            if not good:
                raise InputError(f"{where}: {key} must be {needed}, got {str(value)[:40]!r}")
        missing = [k for k in ("value", "unit", "n", "low", "high", "p95") if k not in data]
        if missing:
            raise InputError(f"{where}: {missing[0]} is needed")
        unknown = {"error": math.inf, **({"kept_error": math.inf} if "kept" in data else {})}
        return cls(**{**unknown, **data}, conditions=dict(conditions or {}))


def same_conditions(begun: Mapping[str, str], now: Mapping[str, str], where: str) -> None:
    """Raise `ConditionsError` that names the first condition in which two records differ."""
    for key in [*begun, *(k for k in now if k not in begun)]:
        if begun.get(key) != now.get(key):
            raise ConditionsError(
                f"{where}: measured with another {key} ({begun.get(key, 'none')}, now {now.get(key, 'none')});"
                " times of different conditions are not mixed"
            )


def conditions_digest(conditions: Mapping[str, str]) -> str:
    """A short name for these conditions."""
    return hashlib.sha256(json.dumps(dict(sorted(conditions.items()))).encode()).hexdigest()[:16]


def _half_width(values: np.ndarray) -> float:
    """Half the 95 % confidence interval of the median by order statistics, as a share of it.

    Below 6 values no interval covers it so surely: then half the range is given; infinite for one value.
    """
    n = len(values)
    if n < 2:
        return float("inf")
    # The true median is outside of values `skip` and n - 1 - skip with twice the chance of at most `skip` heads in n.
    skip, chance = 0, 2 * (1 + n) / 2**n
    while chance <= 0.05:
        skip += 1
        chance += 2 * math.comb(n, skip + 1) / 2**n
    ordered = np.sort(values)
    return float((ordered[n - 1 - skip] - ordered[skip]) / 2 / np.median(values))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
