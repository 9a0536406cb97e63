"""``openvino``: OpenVINO's intermediate representation, two files, made from the ONNX model."""

from __future__ import annotations

import importlib.util
import re
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import torch

from rankopt.errors import ArtifactError
from rankopt.exports.exporter import Exporter, Run
from rankopt.exports.onnx import MODEL, OPSET, model_bytes
from rankopt.nest import tensors
from rankopt.targets.openvino import compiled, converted_model, runtime_version
from rankopt.targets.torch_cpu import first_line
from rankopt.traced import Call, Traced
from rankopt.untrusted import read_bytes

XML, WEIGHTS = "model.xml", "model.bin"


class OpenVinoIr(Exporter):
    """Weights stay float32, and it is checked with float32 arithmetic."""

    name: ClassVar[str] = "openvino"
    files: ClassVar[tuple[str, ...]] = (XML, WEIGHTS)

    def missing(self) -> str | None:
        """Of the packages that write and run it."""
        wanted = [name for name in ("openvino", "onnx", "onnxscript") if importlib.util.find_spec(name) is None]
        return f"needs {', '.join(wanted)}; pip install 'rankopt[openvino]'" if wanted else None

    def write(self, traced: Traced, folder: Path) -> dict[str, Any]:
        """Two files."""
        with tempfile.TemporaryDirectory(prefix="rankopt-") as between:
            path = folder / MODEL  # where the ONNX model was asked for too, it was written a moment ago
            if not path.exists():
                path = Path(between) / MODEL
                path.write_bytes(model_bytes(traced))
            try:
                converted_model(path, folder / XML)
            except RuntimeError as error:  # a report of many lines; the one that says what is not there
                found = re.search(r"(Unsupported|No translator|not supported)[^\n]*", str(error))
                raise RuntimeError(found[0] if found else first_line(error)) from None
        return {"opset": OPSET, "inputs": list(traced.names), "written_by": runtime_version()}

    def run(self, folder: Path) -> Run:
        """On the CPU."""
        text = read_bytes(folder / XML, 2**28)
        if b"<!DOCTYPE" in text or b"<!ENTITY" in text:
            raise ArtifactError(f"{folder / XML}: declares XML entities, which OpenVINO never writes")
        try:
            infer, names = compiled(text, read_bytes(folder / WEIGHTS, 2**40))
        except Exception as error:
            raise ArtifactError(f"{folder / XML}: OpenVINO can't load it: {first_line(error)}") from None

        def run(call: Call) -> list[torch.Tensor]:
            arrays = [t.detach().cpu().contiguous().numpy() for t in tensors(call)]
            if len(names) != len(arrays):  # an input that the model does not use is left out by OpenVINO
                raise ValueError(f"the model takes {len(names)} inputs, got {len(arrays)}")
            return [torch.from_numpy(array) for array in infer(arrays)]

        return run

    def runtime(self) -> str:
        """OpenVINO."""
        return runtime_version()
