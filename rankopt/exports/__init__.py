"""The table of export formats: name → `Exporter`."""

from __future__ import annotations

from rankopt.errors import InputError
from rankopt.exports.executorch import ExecuTorch
from rankopt.exports.exporter import Exporter
from rankopt.exports.onnx import Onnx
from rankopt.exports.openvino import OpenVinoIr
from rankopt.exports.pt2 import Pt2

FORMATS: dict[str, Exporter] = {e.name: e for e in (Onnx(), Pt2(), OpenVinoIr(), ExecuTorch())}


def exporter(name: str) -> Exporter:
    """The format of a name; raises `InputError` with the known names."""
    if name not in FORMATS:
        raise InputError(f"export {name[:40]!r}: is not known; known: {', '.join(FORMATS)}")
    return FORMATS[name]
