"""``onnx``: one ONNX file with a free batch size, checked in ONNX Runtime."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any, ClassVar

import torch

from rankopt.errors import ArtifactError, InputError
from rankopt.exports.exporter import Exporter, Run
from rankopt.nest import tensors
from rankopt.targets.onnxruntime import session
from rankopt.targets.torch_cpu import first_line
from rankopt.traced import Call, Traced, quiet
from rankopt.untrusted import read_bytes

MODEL = "model.onnx"
OPSET = 20  # circular padding needs 19
_LARGEST = 2**31 - 2**20  # what one ONNX file without side files can hold
_DOMAINS = {"", "ai.onnx"}


class Onnx(Exporter):
    """By torch.onnx from the traced program."""

    name: ClassVar[str] = "onnx"
    files: ClassVar[tuple[str, ...]] = (MODEL,)

    def missing(self) -> str | None:
        """Of the packages that write and run it."""
        wanted = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
        return f"needs {', '.join(wanted)}; pip install 'rankopt[onnx]'" if wanted else None

    def write(self, traced: Traced, folder: Path) -> dict[str, Any]:
        """One file."""
        content = model_bytes(traced)
        (folder / MODEL).write_bytes(content)
        return {"opset": OPSET, "inputs": list(traced.names), "written_by": f"torch {torch.__version__}"}

    def run(self, folder: Path) -> Run:
        """In ONNX Runtime, on the CPU. A file that points to others, or has operators of its own, is refused."""
        content = read_bytes(folder / MODEL, _LARGEST)
        check_model(content, str(folder / MODEL))
        try:
            running = session(content)
        except Exception as error:
            raise ArtifactError(f"{folder / MODEL}: ONNX Runtime can't load it: {first_line(error)}") from None

        def run(call: Call) -> list[torch.Tensor]:
            arrays = [t.detach().cpu().contiguous().numpy() for t in tensors(call)]
            feed = dict(zip([i.name for i in running.get_inputs()], arrays, strict=True))
            return [torch.from_numpy(array) for array in running.run(None, feed)]

        return run

    def runtime(self) -> str:
        """ONNX Runtime."""
        from rankopt.targets.onnxruntime import runtime_version

        return runtime_version()


def model_bytes(traced: Traced) -> bytes:
    """A traced module as a serialized ONNX model."""
    from rankopt.onnx_file import simplified

    with quiet(), torch.no_grad():
        made = torch.onnx.export(
            traced.program, (), dynamo=True, opset_version=OPSET, input_names=list(traced.names), verbose=False,
            optimize=False,
        )  # fmt: skip
        if made is None:
            raise RuntimeError("torch.onnx.export returned nothing")
        model = simplified(made)
    if model.ByteSize() > _LARGEST:
        raise InputError("the model is larger than the 2 GiB that an ONNX file holds")
    opset = {entry.domain: entry.version for entry in model.opset_import}.get("")
    if opset != OPSET:
        raise RuntimeError(f"it was written with opset {opset}, asked for was {OPSET}")
    if traced.batch is None:
        _name_batch(model)
    return bytes(model.SerializeToString())


def _name_batch(model: Any) -> None:
    """Call the free size of the first dimension ``batch``; torch leaves a symbol such as ``s77`` there."""
    shapes = [entry.type.tensor_type.shape for entry in model.graph.input]
    symbol = next((shape.dim[0].dim_param for shape in shapes if len(shape.dim) and shape.dim[0].dim_param), None)
    if symbol is None:
        return
    for entry in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in entry.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(rf"\b{re.escape(symbol)}\b", "batch", dim.dim_param)


def check_model(content: bytes, where: str) -> None:
    """Refuse an ONNX model that is more than one self-contained graph of standard operators; raises `ArtifactError`."""
    from rankopt.onnx_file import graphs_of, parsed

    try:
        model = parsed(content)
    except Exception as error:
        raise ArtifactError(f"{where}: is no ONNX model: {first_line(error)}") from None
    for graph in graphs_of(model):
        odd = next((node.domain for node in graph.node if node.domain not in _DOMAINS), None)
        if odd is not None:
            raise ArtifactError(f"{where}: has operators of {odd[:60]!r}, which are not ONNX's own")
        held = [*getattr(graph, "initializer", ()), *(a.t for n in graph.node for a in n.attribute if a.HasField("t"))]
        if any(tensor.external_data or tensor.data_location for tensor in held):
            raise ArtifactError(f"{where}: takes weights from other files, which is refused")
