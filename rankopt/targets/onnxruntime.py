"""``onnxruntime``: ONNX Runtime with any of its providers; the CPU by default."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

from rankopt.errors import InputError
from rankopt.machine import cpu_conditions
from rankopt.targets.target import LocalTarget, Subject
from rankopt.targets.torch_cpu import first_line
from rankopt.timing import Timed, each

_FATAL = 4  # what a session may log: what goes wrong is raised as well


class OnnxRuntime(LocalTarget):
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
        return [each(self._session(runtime, m, s)) for m, s in zip(exported(subjects), subjects, strict=True)]

    def _provider(self, runtime: Any) -> str:
        known = runtime.get_available_providers()
        wanted = self.provider if self.provider.endswith("ExecutionProvider") else f"{self.provider}ExecutionProvider"
        if wanted not in known:
            short = ", ".join(k.removesuffix("ExecutionProvider") for k in known)
            raise InputError(f"target {self.called}: provider {self.provider!r} is not installed; there are {short}")
        return wanted

    def _session(self, runtime: Any, model: bytes, subject: Subject) -> Callable[[], Any]:
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        options.log_severity_level = _FATAL
        level = {"all": "ALL", "extended": "EXTENDED", "basic": "BASIC", "off": "DISABLE_ALL"}[self.optimization]
        options.graph_optimization_level = getattr(
            runtime.GraphOptimizationLevel, f"ORT_{level}" if level == "DISABLE_ALL" else f"ORT_ENABLE_{level}"
        )
        try:
            session = runtime.InferenceSession(model, options, providers=[self._provider(runtime)])
            feed = dict(zip([i.name for i in session.get_inputs()], arrays(subject), strict=True))
            session.run(None, feed)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"target {self.called}: the model can't be run: {first_line(error)}") from error
        return lambda: session.run(None, feed)


def arrays(subject: Subject) -> list[Any]:
    """The input tensors as NumPy arrays, in the order in which they are given."""
    import torch

    from rankopt.nest import tensors

    return [
        t.detach().float().numpy() if t.dtype == torch.bfloat16 else t.detach().numpy()
        for t in tensors((subject.args, dict(subject.kwargs)))
    ]


def _runtime() -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise InputError("target onnxruntime: is not installed; pip install 'rankopt[onnx]'") from None
    return onnxruntime
