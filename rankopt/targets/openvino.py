"""``openvino``: OpenVINO on the CPU or another of its devices, from the exported ONNX model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

from rankopt.errors import InputError
from rankopt.machine import cpu_conditions
from rankopt.peak_memory import MemoryTarget
from rankopt.targets.onnxruntime import ONNX, read_arrays, write_onnx
from rankopt.targets.target import Subject
from rankopt.targets.torch_cpu import first_line
from rankopt.timing import Timed, each


class OpenVino(MemoryTarget):
    """OpenVINO, one stream.

    Attributes:
        threads: of the CPU plugin.
        precision: what it may compute in. Left to itself OpenVINO takes bfloat16 where the processor has it, so it is
            always stated.
        on: the device, as OpenVINO calls it: CPU, GPU, NPU.
    """

    name: ClassVar[str] = "openvino"
    precision: Literal["f32", "bf16", "f16"] = "f32"
    on: str = "CPU"

    @property
    def from_onnx(self) -> bool:
        """Yes."""
        return True

    @property
    def device(self) -> str:
        """What is locked: the CPU, or the device's own name."""
        return self.on.lower()

    def conditions(self) -> dict[str, str]:
        """Machine, version, device, precision, threads."""
        openvino, known = _openvino(), core().available_devices
        if self.on not in known:
            raise InputError(f"target {self.called}: no device {self.on!r}; there are {', '.join(known)}")
        return {
            "target": self.name,
            **cpu_conditions(),
            "runtime": f"openvino {openvino.__version__.partition('-')[0]}",
            "plugin": self.on,
            "threads": str(self.threads),
            "dtype": self.precision,
        }

    def prepare(self, subjects: Sequence[Subject]) -> list[Timed]:
        """Exported and compiled."""
        from rankopt.onnx_file import exported

        return [each(self._ready(m, s)) for m, s in zip(exported(subjects), subjects, strict=True)]

    def write(self, subject: Subject, folder: Path) -> None:
        """Exported as one ONNX file, with the inputs."""
        write_onnx(subject, folder)

    def loaded(self, folder: Path) -> Callable[[], Any]:
        """A function of no arguments that runs what `write` wrote."""
        return self._compiled(str(folder / ONNX), read_arrays(folder))

    def _ready(self, model: bytes, subject: Subject) -> Callable[[], Any]:
        from rankopt.onnx_file import arrays

        try:
            call = self._compiled(model, arrays(subject))
            call()
        except Exception as error:
            raise InputError(f"target {self.called}: the model can't be run: {first_line(error)}") from error
        return call

    def _compiled(self, model: bytes | str, given: Sequence[Any]) -> Callable[[], Any]:
        openvino = _openvino()
        options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": self.precision}
        if self.on == "CPU":
            options |= {"INFERENCE_NUM_THREADS": self.threads, "NUM_STREAMS": 1}
        compiled = core().compile_model(core().read_model(model), self.on, options)
        request = compiled.create_infer_request()
        if len(compiled.inputs) != len(given):  # it leaves out inputs that the model does not use
            from rankopt.onnx_file import input_names

            serialized = Path(model).read_bytes() if isinstance(model, str) else model
            named = dict(zip(input_names(serialized), given, strict=True))
            given = [named[next(n for n in sorted(i.names) if n in named)] for i in compiled.inputs]
        for n, array in enumerate(given):
            request.set_input_tensor(n, openvino.Tensor(array))
        return lambda: request.infer()


@cache
def core() -> Any:
    """OpenVINO's `Core`, the only one of this process.

    Its CPU plugin gives the thread that loads it a small stack for signal handlers (seen with 2026.4), and frees that
    with the core. Of two cores the second one's end puts the first one's back, which may be gone by then: Ctrl-C in
    the main thread was handled on freed memory. So there is one, which stays, and its plugins are loaded in a thread
    that ends.
    """
    made = _openvino().Core()
    with ThreadPoolExecutor(1) as apart:
        apart.submit(lambda: made.available_devices).result()
    return made


def converted_model(onnx: Path, xml: Path) -> None:
    """Write an ONNX model as OpenVINO's own files (``.xml`` and ``.bin``); weights stay float32."""
    openvino = _openvino()
    openvino.save_model(core().read_model(str(onnx)), str(xml), compress_to_fp16=False)


def compiled(xml: bytes, weights: bytes) -> tuple[Callable[[Sequence[Any]], list[Any]], list[str]]:
    """A function from arrays to arrays that runs a model on the CPU in float32, and the names of its inputs."""
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
    ready = core().compile_model(core().read_model(xml, weights), "CPU", options)

    def infer(arrays: Sequence[Any]) -> list[Any]:
        found = ready(list(arrays))
        return [found[output].copy() for output in ready.outputs]

    return infer, [one.get_any_name() for one in ready.inputs]


def runtime_version() -> str:
    """Name and version."""
    return f"openvino {_openvino().__version__.partition('-')[0]}"


def _openvino() -> Any:
    try:
        import openvino
    except ImportError:
        raise InputError("target openvino: is not installed; pip install 'rankopt[openvino]'") from None
    return openvino
