"""``onnxruntime``: ONNX Runtime with any of its providers; the CPU by default."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from rankopt.errors import InputError
from rankopt.machine import cpu_conditions
from rankopt.peak_memory import INPUTS, MemoryTarget
from rankopt.targets.target import Subject
from rankopt.targets.torch_cpu import first_line
from rankopt.timing import Timed, each

ONNX = "model.onnx"
_FATAL = 4  # what a session may log: what goes wrong is raised as well


class OnnxRuntime(MemoryTarget):
    """ONNX Runtime.

    Attributes:
        threads: within operations.
        provider: an execution provider that is installed, e.g. CPU or CUDA; its full name will do too.
        optimization: of the graph.
    """

    name: ClassVar[str] = "onnxruntime"
    provider: str = "CPU"
    optimization: Literal["all", "extended", "basic", "off"] = "all"

    @property
    def from_onnx(self) -> bool:
        """Yes."""
        return True

    @property
    def device(self) -> str:
        """The CPU, or what the provider is named after."""
        return "cpu" if self.provider.startswith("CPU") else self.provider.removesuffix("ExecutionProvider").lower()

    def conditions(self) -> dict[str, str]:
        """Machine, version, provider, threads."""
        runtime = _runtime()
        return {
            "target": self.name,
            **cpu_conditions(),
            "runtime": f"onnxruntime {runtime.__version__}",
            "provider": self._provider(runtime),
            "optimization": self.optimization,
            "threads": str(self.threads),
            "dtype": "float32",
        }

    def prepare(self, subjects: Sequence[Subject]) -> list[Timed]:
        """Exported, and loaded into sessions."""
        from rankopt.onnx_file import exported

        runtime = _runtime()
        return [each(self._ready(runtime, m, s)) for m, s in zip(exported(subjects), subjects, strict=True)]

    def write(self, subject: Subject, folder: Path) -> None:
        """Exported as one ONNX file, with the inputs."""
        write_onnx(subject, folder)

    def loaded(self, folder: Path) -> Callable[[], Any]:
        """A function of no arguments that runs what `write` wrote."""
        return self._session(_runtime(), str(folder / ONNX), read_arrays(folder))

    def _provider(self, runtime: Any) -> str:
        known = runtime.get_available_providers()
        wanted = self.provider if self.provider.endswith("ExecutionProvider") else f"{self.provider}ExecutionProvider"
        if wanted not in known:
            short = ", ".join(k.removesuffix("ExecutionProvider") for k in known)
            raise InputError(f"target {self.called}: provider {self.provider!r} is not installed; there are {short}")
        return wanted

    def _ready(self, runtime: Any, model: bytes, subject: Subject) -> Callable[[], Any]:
        from rankopt.onnx_file import arrays

        try:
            call = self._session(runtime, model, arrays(subject))
            call()
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"target {self.called}: the model can't be run: {first_line(error)}") from error
        return call

    def _session(self, runtime: Any, model: bytes | str, inputs: Sequence[Any]) -> Callable[[], Any]:
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        options.log_severity_level = _FATAL
        level = {"all": "ALL", "extended": "EXTENDED", "basic": "BASIC", "off": "DISABLE_ALL"}[self.optimization]
        options.graph_optimization_level = getattr(
            runtime.GraphOptimizationLevel, f"ORT_{level}" if level == "DISABLE_ALL" else f"ORT_ENABLE_{level}"
        )
        session = runtime.InferenceSession(model, options, providers=[self._provider(runtime)])
        feed = dict(zip([i.name for i in session.get_inputs()], inputs, strict=True))
        return lambda: session.run(None, feed)


def session(model: bytes) -> Any:
    """A session on the CPU with one thread, which logs nothing; raises what ONNX Runtime raises."""
    runtime = _runtime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = 1, 1
    options.log_severity_level = _FATAL
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def runtime_version() -> str:
    """Name and version of what runs an ONNX model."""
    return f"onnxruntime {_runtime().__version__}"


def write_onnx(subject: Subject, folder: Path) -> None:
    """Write a subject as an ONNX file, and its inputs beside it."""
    import numpy as np

    from rankopt.onnx_file import arrays, exported

    (folder / ONNX).write_bytes(exported([subject])[0])
    np.savez(folder / INPUTS, *arrays(subject))


def read_arrays(folder: Path) -> list[Any]:
    """The inputs that `write_onnx` wrote, in their order."""
    import numpy as np

    with np.load(folder / INPUTS, allow_pickle=False) as file:
        return [file[f"arr_{n}"] for n in range(len(file.files))]


def _runtime() -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise InputError("target onnxruntime: is not installed; pip install 'rankopt[onnx]'") from None
    return onnxruntime
