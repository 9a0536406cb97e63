"""`diff`: two plans, or saved models, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankopt.plan import Plan
from rankopt.plan_file import read_plan


@dataclass(frozen=True)
class Difference:
    """What differs, for programs and for people.

    Attributes:
        layers: name → the two choices as texts, where they differ.
        same: how many layers have the same choice in both.
        model: what is to be said of the models that the plans were made for; empty when they are the same.
        measurements: quantity of the compressed model → the two values, where both are saved models that state it.
    """

    layers: dict[str, tuple[str, str]]
    same: int
    model: str
    measurements: dict[str, tuple[Any, Any]]

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "layers": {name: {"a": a, "b": b} for name, (a, b) in self.layers.items()},
            "same": self.same,
            "model": self.model,
            "measurements": {name: {"a": a, "b": b} for name, (a, b) in self.measurements.items()},
        }


def diff(a: str | Path, b: str | Path) -> Difference:
    """Compare two plans or saved models; raises `PlanError` or `ArtifactError` when one can't be read."""
    first, second = plan_at(Path(a)), plan_at(Path(b))
    names = list(dict.fromkeys([*first.layers, *second.layers, *first.skipped, *second.skipped]))
    pairs = {name: (_choice(first, name), _choice(second, name)) for name in names}
    return Difference(
        {name: pair for name, pair in pairs.items() if pair[0] != pair[1]},
        sum(x == y for x, y in pairs.values()),
        _models(first, second),
        _measured(Path(a), Path(b)),
    )


def plan_at(path: Path) -> Plan:
    """A plan file, or the plan of a saved model, which is checked against its manifest."""
    if not path.is_dir():
        return read_plan(path)
    from rankopt.artifact import read_plan as of_artifact
    from rankopt.manifest import Manifest

    return of_artifact(path, Manifest.read(path))


def _choice(plan: Plan, name: str) -> str:
    if name in plan.layers:
        return str(plan.layers[name])
    return f"left alone: {plan.skipped[name]}" if name in plan.skipped else "not named (dense)"


def _models(first: Plan, second: Plan) -> str:
    a, b = first.fingerprint, second.fingerprint
    if a is None or b is None:
        return "" if a == b else f"only plan {'A' if a else 'B'} says which model it was made for"
    if a.architecture != b.architecture:
        return f"made for different architectures ({a.architecture} and {b.architecture})"
    return "" if a.weights == b.weights else f"made for different weights ({a.weights} and {b.weights})"


def _measured(a: Path, b: Path) -> dict[str, tuple[Any, Any]]:
    if not (a.is_dir() and b.is_dir()):
        return {}
    from rankopt.artifact import read_measurements

    found = [read_measurements(path).get("compressed") for path in (a, b)]
    first, second = (one if isinstance(one, dict) else {} for one in found)
    return {key: (first[key], second[key]) for key in first if key in second}
