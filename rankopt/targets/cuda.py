"""``cuda``: PyTorch on an NVIDIA GPU, timed by the GPU's own clock."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from rankopt.errors import InputError
from rankopt.targets.target import LocalTarget, Subject
from rankopt.targets.torch_cpu import MemoryFormat, converted, first_line
from rankopt.timing import Timed

_DRIVER = Path("/proc/driver/nvidia/version")
_SHORTEST = 1e-4  # ms; events can't tell shorter times from none
_WARM_UP = 3  # runs before a graph is captured: libraries choose their kernels in the first ones


class Cuda(LocalTarget):
    """PyTorch on an NVIDIA GPU.

    Each run lies between two events in the GPU's stream, and the block is waited for as a whole: a time is what the GPU
    needs, as long as the processor launches its kernels fast enough, and what launching them takes where it does not.
    `graphs` takes the launching out.

    Attributes:
        dtype: what weights and floating inputs are converted to.
        memory_format: of four-dimensional weights and inputs.
        graphs: whether the model is captured in a CUDA graph and replayed.
        index: the device's number.
    """

    name: ClassVar[str] = "cuda"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    memory_format: MemoryFormat = "contiguous"
    graphs: bool = False
    index: int = Field(0, ge=0)

    @property
    def device(self) -> str:
        """What is locked: this one GPU."""
        return f"cuda-{self.index}"

    def conditions(self) -> dict[str, str]:
        """GPU, driver, versions, dtype, memory format, graphs, and how torch is set to compute float32 products."""
        import torch

        self._check()
        major, minor = torch.cuda.get_device_capability(self.index)
        return {
            "target": self.name,
            "device": torch.cuda.get_device_name(self.index),
            "capability": f"{major}.{minor}",
            "driver": _driver(),
            "cuda": str(torch.version.cuda or torch.version.hip),
            "cudnn": str(torch.backends.cudnn.version()),
            "cudnn_benchmark": _word(torch.backends.cudnn.benchmark),
            "runtime": f"torch {torch.__version__}",
            "threads": str(self.threads),
            "dtype": self.dtype,
            "memory_format": self.memory_format,
            "graphs": _word(self.graphs),
            "tf32": _tf32(torch),
        }

    @contextmanager
    def running(self) -> Iterator[None]:
        """On this device, so many threads, no gradients."""
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            with torch.cuda.device(self.index), torch.inference_mode():
                yield
        finally:
            torch.set_num_threads(before)

    def prepare(self, subjects: Sequence[Subject]) -> list[Timed]:
        """Copies on the GPU."""
        import torch

        return [event_timed(self.callable(subject), torch.cuda) for subject in subjects]

    def callable(self, subject: Subject) -> Callable[[], Any]:
        """A function of no arguments that launches one run of the module."""
        import torch

        try:
            module, args, kwargs = converted(subject, self.dtype, self.memory_format, f"cuda:{self.index}")
            module(*args, **kwargs)
            torch.cuda.synchronize()
        except Exception as error:
            raise InputError(
                f"target {self.called}: the model can't be run with {self.dtype}: {first_line(error)}"
            ) from error
        if not self.graphs:
            return lambda: module(*args, **kwargs)
        try:
            return _captured(lambda: module(*args, **kwargs))
        except Exception as error:
            raise InputError(
                f"target {self.called}: the model can't be captured in a CUDA graph: {first_line(error)}; "
                "leave graphs out"
            ) from error

    def _check(self) -> None:
        import torch

        if not torch.cuda.is_available():
            raise InputError(
                f"target {self.called}: this machine has no CUDA device that torch {torch.__version__} can use; "
                "install the driver and a CUDA build of torch, or measure on target torch"
            )
        count = torch.cuda.device_count()
        if self.index >= count:
            found = ", ".join(f"{n} ({torch.cuda.get_device_name(n)})" for n in range(count))
            raise InputError(f"target {self.called}: there is no CUDA device {self.index}; there are {found}")


def event_timed(call: Callable[[], object], cuda: Any) -> Timed:
    """Time what a function launches, by a pair of events a run; `cuda` is the module torch.cuda."""

    def timed(n: int) -> list[float]:
        pairs = [(cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)) for _ in range(n)]
        cuda.synchronize()
        for start, end in pairs:
            start.record()
            call()
            end.record()
        cuda.synchronize()
        return [max(_SHORTEST, start.elapsed_time(end)) for start, end in pairs]

    return timed


def _captured(run: Callable[[], object]) -> Callable[[], Any]:
    """The same as a CUDA graph; its outputs stay where the graph writes them."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()
    graph.replay()
    torch.cuda.synchronize()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def _driver() -> str:
    """The driver's version where the system says it."""
    with suppress(OSError):
        found = re.search(r"\s(\d+(?:\.\d+)+)\s", _DRIVER.read_text(encoding="utf-8"))
        if found:
            return found[1]
    return "unknown"


def _tf32(torch: Any) -> str:
    """Whether float32 may be computed in TF32; torch refuses to tell the old settings once the new ones were used."""
    try:
        products = torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:
        products = torch.backends.cuda.matmul.fp32_precision == "tf32"
    try:
        convolutions = torch.backends.cudnn.allow_tf32
    except RuntimeError:
        convolutions = torch.backends.cudnn.conv.fp32_precision == "tf32"
    return f"products {_word(products)}, convolutions {_word(convolutions)}"


def _word(flag: bool) -> str:
    return "on" if flag else "off"
