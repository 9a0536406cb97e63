"""What a saved model says of itself: `environment`, `plain` measurements and the `model_card`."""

from __future__ import annotations

import dataclasses
import math
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from rankopt.errors import ArtifactError
from rankopt.machine import processor
from rankopt.plan import Plan
from rankopt.result import told

_ERROR = "_se"  # how the names of standard errors end
_SPEAKING = ("device", "processor", "runtime", "dtype")  # conditions whose values say themselves what they are


def environment() -> dict[str, str]:
    """Versions, platform and processor of this machine."""
    found = {
        "rankopt": _version("rankopt"),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
    }
    if torch.cuda.is_initialized():  # asking otherwise would make a CUDA context
        found["gpu"] = torch.cuda.get_device_name()
    return found


def plain(measurements: Any, where: str = "measurements") -> Any:
    """Measurements as JSON values; NaN and infinity become None. Raises `ArtifactError` naming what is no value."""
    if hasattr(measurements, "to_dict"):
        measurements = measurements.to_dict()
    elif dataclasses.is_dataclass(measurements) and not isinstance(measurements, type):
        measurements = dataclasses.asdict(measurements)
    elif hasattr(measurements, "tolist"):  # a NumPy number or array, a tensor
        measurements = measurements.tolist()
    if isinstance(measurements, float):
        return float(measurements) if math.isfinite(measurements) else None
    if measurements is None or isinstance(measurements, bool | int | str):
        return measurements
    if isinstance(measurements, Mapping):
        return {str(key): plain(value, f"{where}.{key}") for key, value in measurements.items()}
    if isinstance(measurements, list | tuple):
        return [plain(value, f"{where}[{n}]") for n, value in enumerate(measurements)]
    raise ArtifactError(f"{where}: needs numbers, texts, lists and mappings, got {type(measurements).__name__}")


def model_card(
    name: str,
    plan: Plan,
    measurements: Any,
    record: Mapping[str, Any],
    exports: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """Markdown: the dense model beside the compressed one, the methods used, how to load it, and the exports."""
    dense, small = (_section(measurements, key) for key in ("dense", "compressed"))
    keys = [key for key in {**dense, **small} if told(key, {**dense, **small}) and not key.endswith(_ERROR)]
    rows = [f"| {key} | {_with_error(dense, key)} | {_with_error(small, key)} |" for key in keys]
    methods = ", ".join(f"{count} × {method}" for method, count in plan.methods().items()) or "no layers"
    argument = "" if record.get("source") else ", model=YourDenseModel()"
    return "\n".join(
        [
            f"# {name}",
            "",
            f"A model compressed by low-rank decomposition with rankopt {record['rankopt']}: {methods}.",
            f"Plan {plan.digest}; torch {record['torch']}, Python {record['python']}, {record['processor']}.",
            "",
            "| | dense | compressed |",
            "|---|---|---|",
            *(rows or ["| not measured | – | – |"]),
            "",
            *_conditions(measurements),
            "```python",
            "import rankopt",
            "",
            f'model = rankopt.load("{name}"{argument})  # in eval mode; nothing is decomposed again',
            "```",
            "",
            *_exports(name, exports or {}),
        ]
    )


def _conditions(measurements: Any) -> list[str]:
    """Under which conditions latency and memory were measured, a paragraph for every target."""
    known = measurements.get("conditions") if isinstance(measurements, dict) else None
    lines = []
    for label, facts in known.items() if isinstance(known, dict) else ():
        if isinstance(facts, dict):
            texts = [
                _shown(value) if name in _SPEAKING else f"{name.replace('_', ' ')} {_shown(value)}"
                for name, value in facts.items()
                if name not in ("target", "architecture", "system")
            ]
            lines += [f"Measured on {label}: {', '.join(texts)}.", ""]
    return lines


def _exports(name: str, exports: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A table of the exported files, and how the program is loaded without the model's code."""
    if not exports:
        return []
    rows = []
    for kind, entry in exports.items():
        macs, sizes = entry.get("macs"), "any" if entry.get("any_batch") else str(entry["batches"][0])
        sizes = f"up to {entry['largest_batch']}" if entry.get("largest_batch") else sizes
        opset = f", opset {entry['opset']}" if entry.get("opset") else ""
        rows.append(
            f"| {kind}{opset} | {', '.join(entry['files'])} | {entry['bytes']:,} | {_shown(macs)} | {sizes} | "
            f"{entry['difference']:.1e} (allowed {entry['tolerance']:.0e}), {entry['checked_with']} |"
        )
    lines = [
        "Exports, in float32; the difference is the largest on fresh inputs, as a share of the largest output.",
        "",
        "| format | files | bytes | MACs | batch size | difference |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
    ]
    if "pt2" in exports:
        load = f'model = rankopt.load("{name}", standalone=True)  # needs none of the model\'s own code'
        lines += ["```python", "import rankopt", "", load, "```", ""]
    return lines


def _section(measurements: Any, key: str) -> dict[str, Any]:
    found = measurements.get(key) if isinstance(measurements, dict) else None
    return found if isinstance(found, dict) else {}


def _with_error(values: Mapping[str, Any], key: str) -> str:
    """A value with its standard error, where that is known."""
    error = values.get(f"{key}{_ERROR}")
    text = _shown(values.get(key))
    return f"{text} ± {error:.2f}" if isinstance(error, float) else text


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        unit = value.get("unit") or ""
        return f"{_shown(value.get('value'))} {unit}".strip()
    if value is None:
        return "–"
    if isinstance(value, float) and value.is_integer() and abs(value) >= 1000:
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return (f"{value:.4g}" if isinstance(value, float) else str(value)).replace("|", "\\|").replace("\n", " ")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
