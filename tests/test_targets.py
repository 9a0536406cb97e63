"""Targets: the contract for each of them, their options, and what they say when something is wrong."""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from rankopt.errors import ConditionsError, InputError
from rankopt.latency_store import LatencyStore
from rankopt.measurement import Measurement
from rankopt.target_contract import BRIEF, Twice, forms
from rankopt.targets import make, names, read
from rankopt.targets import ray_node as ray_node_module
from rankopt.targets.cuda import Cuda, _driver, event_timed
from rankopt.targets.ray_node import RayNode
from rankopt.targets.target import LocalTarget, Subject, Target
from rankopt.targets.torch_cpu import TorchCpu, converted, first_line
from rankopt.testing import TargetContract
from rankopt.timing import Timed, each

EXAMPLE = Path(__file__).parent.parent / "examples" / "onnx_timer.py"
X = torch.randn(2, 6)


def linear(key: str = "") -> Subject:
    return Subject(nn.Linear(6, 6).eval(), (X,), key=key)


@pytest.fixture(scope="module", autouse=True)
def own_locks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing here depends on how long something takes, so it waits for nobody who measures on this machine.

    The folder's name is short: Ray puts sockets below it, whose paths must not be longer than 107 bytes.
    """
    tmp_path_factory.getbasetemp()  # made now, or it would go with the folder, and tests of other files need it
    before, variable = tempfile.tempdir, os.environ.get("TMPDIR")
    with tempfile.TemporaryDirectory(prefix="ro", ignore_cleanup_errors=True) as folder:
        tempfile.tempdir = os.environ["TMPDIR"] = folder
        yield
        tempfile.tempdir = before
        del os.environ["TMPDIR"]
        if variable is not None:
            os.environ["TMPDIR"] = variable


# The contract


class TestTorch(TargetContract):
    target = "torch"


class TestTorchInBfloat16(TargetContract):
    target = TorchCpu(dtype="bfloat16", memory_format="channels_last", label="half", batch=2)


class TestReplay(TargetContract):
    target = make("replay", {"ms_per_mmac": 0.1, "ms_per_module": 0.01})


class TestOnnxRuntime(TargetContract):
    target = "onnxruntime"

    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")


class TestOpenVino(TargetContract):
    target = "openvino"

    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("onnxscript")
        pytest.importorskip("openvino")


@pytest.mark.slow
class TestTorchCompile(TargetContract):
    target = "torch-compile"


@pytest.mark.slow
class TestCommand(TargetContract):
    target = make("command", {"run": [sys.executable, str(EXAMPLE), "{onnx}", "--inputs", "{inputs}", "--runs={runs}"]})

    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """The address of a Ray cluster of two nodes, of which the second alone carries the resource "board"."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        small: Any = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
        made = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
        made.add_node(**small, resources={"board": 1})
        yield made.address
        ray.shutdown()
        made.shutdown()


def on_board(address: str, **options: Any) -> RayNode:
    found = make("ray-node", {"resource": "board", "address": address, "wait_seconds": 20.0, **options})
    assert isinstance(found, RayNode)
    return found


class TestRayNode(TargetContract):
    target: ClassVar[Target | str]

    @pytest.fixture(autouse=True)
    def _cluster(self, cluster: str) -> None:
        type(self).target = on_board(cluster, target="torch")


# Options, for all of them


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("tensorflow", "target: 'tensorflow' is not known; known: torch, "),
        ("torc", "target: 'torc' is not known; did you mean 'torch'"),
        ("torch:threads=0", r"target torch: threads: .*greater than or equal to 1, got 0"),
        ("torch:threads=two", r"target torch: threads: .*valid integer, got 'two'"),
        ("torch:thread=2", r"target torch: unknown key 'thread'; did you mean 'threads'"),
        ("torch:2", r"options are written NAME:KEY=VALUE,KEY=VALUE, got '2'"),
        ("torch:threads=[", r"target 'torch:threads=\[': threads can't be read, got '\['"),
        ("torch:dtype=int8", r"target torch: dtype: .*'float32' or 'bfloat16', got 'int8'"),
        ("torch:label=a b", r"target torch: label: "),
        ("torch:batch=0", r"target torch: batch: "),
        ("torch-compile:mode=fast", r"target torch-compile: mode: "),
        ("cuda:dtype=int8", r"target cuda: dtype: "),
        ("cuda:index=-1", r"target cuda: index: "),
        ("cuda:graphs=1", r"target cuda: graphs: "),
        ("onnxruntime:optimization=most", r"target onnxruntime: optimization: "),
        ("openvino:precision=int8", r"target openvino: precision: "),
        ("replay", r"target replay: needs table, ms_per_mmac or ms_per_module"),
        ("replay:ms_per_mmac=-1.0", r"target replay: ms_per_mmac: "),
        ("replay:ms_per_mmac=.inf", r"target replay: ms_per_mmac: "),
        ("command", r"target command: run: is needed"),
        ("ray-node:target=torch", r"target ray-node: resource: is needed"),
        ("ray-node:resource=pi5", r"target ray-node: target: is needed"),
        ("ray-node:resource=pi5,target=torhc", r"target ray-node: target: 'torhc' is not known; did you mean 'torch'"),
        ("ray-node:resource=pi5,target=ray-node", r"target ray-node: target: needs the target that is measured on"),
        ("ray-node:resource=GPU,target=torch", r"target ray-node: resource must be one of your own.*got 'GPU'"),
        ("ray-node:resource=a,target=torch,wait_seconds=-1.0", r"target ray-node: wait_seconds: "),
    ],
)
def test_options_that_do_not_fit_are_named(text: str, fault: str) -> None:
    with pytest.raises(InputError, match=fault) as caught:
        read(text)
    assert "\n" not in str(caught.value)


def test_options_of_the_target_on_the_node_are_checked_too() -> None:
    with pytest.raises(InputError, match=r"target ray-node: target torch: threads: .*got 0"):
        make("ray-node", {"resource": "pi5", "target": "torch", "options": {"threads": 0}})


def test_a_target_is_read_from_one_line() -> None:
    found = read("torch:threads=2,dtype=bfloat16,label=pi")
    assert found == TorchCpu(threads=2, dtype="bfloat16", label="pi")
    assert (found.called, read("torch").called) == ("pi", "torch")
    assert set(names()) >= {
        "torch",
        "torch-compile",
        "cuda",
        "onnxruntime",
        "openvino",
        "ray-node",
        "command",
        "replay",
    }


def test_runtimes_name_what_there_is() -> None:
    pytest.importorskip("onnxruntime")
    with pytest.raises(InputError, match=r"target onnxruntime: provider 'Pocket' is not installed; there are .*CPU"):
        read("onnxruntime:provider=Pocket").conditions()
    pytest.importorskip("openvino")
    with pytest.raises(InputError, match=r"target openvino: no device 'Pocket'; there are .*CPU"):
        read("openvino:on=Pocket").conditions()


def test_openvino_leaves_the_stack_for_signal_handlers_alone() -> None:
    """It would free what it gives the main thread, and Ctrl-C be handled on that."""
    pytest.importorskip("openvino")
    code = """
import ctypes, faulthandler, gc, torch
from rankopt.targets import make
from rankopt.targets.target import Subject

class Stack(ctypes.Structure):
    _fields_ = [("place", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

def stack():
    found = Stack()
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found)) == 0
    return found.place, found.flags, found.size

faulthandler.enable()
before = stack()
for _ in range(3):
    target = make("openvino", {"threads": 1})
    target.conditions()
    ready = target.prepare([Subject(torch.nn.Linear(4, 2).eval(), (torch.randn(1, 4),), {}, "net")])
    assert stack() == before
    del ready
    gc.collect()
assert stack() == before
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_runtime_that_is_missing_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=rf"target {name}: is not installed; pip install 'rankopt\["):
        make(name).conditions()


def test_memory_is_refused_where_it_is_not_measured() -> None:
    for target in (make("cuda"), make("torch-compile"), make("replay", {"ms_per_mmac": 1.0})):
        with pytest.raises(InputError, match=f"target {target.name}: memory is not measured there"):
            target.peak_memory(linear())


# What modules are made into


def test_a_module_that_fits_is_not_copied() -> None:
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1)).eval()  # their layout is both formats' at once
    assert converted(Subject(module, ()), "float32", "contiguous")[0] is module


@pytest.mark.parametrize("change", [lambda m: m[1].train(), lambda m: m[1].double(), lambda m: m.to(torch.bfloat16)])
def test_a_module_that_differs_anywhere_is_copied(change: Callable[[nn.Module], object]) -> None:
    module = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, affine=False)).eval()
    change(module)
    before = {k: v.dtype for k, v in module.state_dict().items()}, [m.training for m in module.modules()]
    copied, (x,), kwargs = converted(Subject(module, (X.double(),), {"n": 3}), "float32", "contiguous")
    assert copied is not module
    assert {v.dtype for v in copied.state_dict().values()} == {torch.float32, torch.int64}
    assert not any(m.training for m in copied.modules())
    assert (x.dtype, kwargs) == (torch.float32, {"n": 3})
    assert ({k: v.dtype for k, v in module.state_dict().items()}, [m.training for m in module.modules()]) == before


def test_images_get_the_memory_format_and_whole_numbers_keep_theirs() -> None:
    args = (torch.randn(2, 4, 5, 5), torch.arange(3), [torch.randn(3)])
    module, (image, numbers, (row,)), _ = converted(Subject(Twice().eval(), args), "bfloat16", "channels_last")
    assert image.is_contiguous(memory_format=torch.channels_last)
    assert module.layer.weight.is_contiguous(memory_format=torch.channels_last)
    assert (image.dtype, numbers.dtype, row.dtype) == (torch.bfloat16, torch.int64, torch.bfloat16)


def test_the_first_line_that_says_something() -> None:
    assert first_line(
        RuntimeError("Exception from src/a.cpp:104:\nCheck 'x > y' failed at src/b.cpp:6:\nno port\n")
    ) == ("RuntimeError: no port")
    assert first_line(ValueError("")) == "ValueError: no text"


# CUDA, without a GPU


class Event:
    """In place of torch.cuda.Event: a clock that ticks 2 ms a run."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Event.now

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


def run_on_the_fake() -> None:
    Event.now += 2.0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A GPU that is made up; returns the log of what was asked of it."""
    log: list[str] = []
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "get_device_name": lambda n: f"Test GPU {n}",
        "get_device_capability": lambda n: (9, 0),
        "synchronize": lambda: log.append("synchronize"),
        "device": lambda n: log.append(f"device {n}") or nullcontext(),
        "Event": Event,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return log


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_says_so() -> None:
    for ask in (Cuda().conditions, lambda: Cuda().measure([linear()], BRIEF)):
        with pytest.raises(InputError, match=r"target cuda: this machine has no CUDA device that torch \S+ can use; "):
            ask()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
class TestCuda(TargetContract):
    target = "cuda"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
class TestCudaGraphs(TargetContract):
    target = Cuda(graphs=True, dtype="float16", memory_format="channels_last")


def test_cuda_states_the_device_and_its_settings(gpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = Cuda(index=1, dtype="float16", graphs=True).conditions()
    assert found["device"] == "Test GPU 1"
    assert (found["capability"], found["dtype"], found["graphs"]) == ("9.0", "float16", "on")
    assert found["runtime"] == f"torch {torch.__version__}"
    assert found["tf32"] == "products off, convolutions on"
    assert all(isinstance(v, str) and v for v in found.values())
    assert found != Cuda(index=1, dtype="float16").conditions()
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert Cuda().conditions()["tf32"] == "products on, convolutions on"
    assert (Cuda().device, Cuda(index=1).device) == ("cuda-0", "cuda-1")
    with pytest.raises(InputError, match=r"target cuda: there is no CUDA device 2; there are 0 \(Test GPU 0\), 1 \("):
        Cuda(index=2).conditions()


def test_events_time_every_run_and_the_block_is_waited_for_once(gpu: list[str]) -> None:
    assert event_timed(run_on_the_fake, torch.cuda)(3) == [2.0, 2.0, 2.0]
    assert gpu == ["synchronize", "synchronize"]
    assert event_timed(lambda: None, torch.cuda)(1) == [1e-4], "shorter than an event can tell, and still a time"


def test_cuda_measures_by_events(gpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cuda, "callable", lambda self, subject: run_on_the_fake)
    threads = torch.get_num_threads()
    found = Cuda(index=1).measure([linear(), linear()], BRIEF)
    assert [(m.value, m.kept) for m in found] == [(2.0, 1.0), (2.0, 1.0)]
    assert "device 1" in gpu
    assert found[0].conditions == Cuda(index=1).conditions()
    assert (torch.get_num_threads(), torch.is_inference_mode_enabled()) == (threads, False)


def test_what_the_gpu_can_not_run_is_an_input_error(gpu: list[str]) -> None:
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    with pytest.raises(InputError, match=r"target cuda: the model can't be run with float32: "):
        Cuda().callable(linear())


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.14  Release Build", "550.54.14"),
        ("something else", "unknown"),
    ],
)
def test_the_driver_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, version: str) -> None:
    (tmp_path / "version").write_text(text)
    monkeypatch.setattr("rankopt.targets.cuda._DRIVER", tmp_path / "version")
    assert _driver() == version
    monkeypatch.setattr("rankopt.targets.cuda._DRIVER", tmp_path / "none")
    assert _driver() == "unknown"


# torch-compile


def test_layers_are_not_compiled() -> None:
    target = make("torch-compile", {"threads": 2, "dtype": "bfloat16", "label": "fast", "batch": 4})
    assert target.for_layers() == TorchCpu(threads=2, dtype="bfloat16", label="fast", batch=4)
    assert type(target.for_layers()) is TorchCpu
    assert target.conditions()["mode"] == "default"
    assert target.conditions()["target"] == "torch-compile"


def test_what_can_not_be_compiled_is_an_input_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*_: Any, **__: Any) -> None:
        raise RuntimeError("backend='inductor' raised:\nInvalidCxxCompiler: No working C++ compiler found\n\nmore")

    monkeypatch.setattr(torch, "compile", lambda *a, **k: no_compiler)
    with pytest.raises(InputError, match=r"target torch-compile: the model can't be compiled: .*No working C\+\+") as e:
        make("torch-compile").measure([linear()], BRIEF)
    assert "\n" not in str(e.value)


@pytest.mark.slow
def test_many_models_of_one_class_are_all_compiled() -> None:
    import torch._dynamo

    class Net(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, width), nn.Linear(width, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.sin(self.first(x)).exp())

    limit = torch._dynamo.config.recompile_limit
    graphs = []
    torch._dynamo.utils.counters.clear()
    make("torch-compile").measure([Subject(Net(4 + n).eval(), (X,)) for n in range(limit + 3)], BRIEF)
    graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [limit + 3]
    assert torch._dynamo.config.recompile_limit == limit


# ray-node


def test_a_node_measures_from_the_exported_file_alone(cluster: str) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")

    class Unpicklable(nn.Linear):
        def __reduce__(self) -> Any:
            raise TypeError("stays here")

    target = on_board(cluster, target="onnxruntime", options={"threads": 2}, label="pi")
    subject = Subject(Unpicklable(6, 6).eval(), (X,))
    (found,) = target.measure([subject], BRIEF)
    assert found.kept == 1
    inner = make("onnxruntime", {"threads": 2}).conditions()
    assert found.conditions == {**inner, "target": "ray-node", "inner": "onnxruntime", "resource": "board"}
    assert target.conditions() == found.conditions
    with pytest.raises(InputError, match=r"target ray-node: the model can't be sent to the node: TypeError: "):
        on_board(cluster, target="torch").measure([subject], BRIEF)


def test_classes_of_this_file_travel_with_the_model(cluster: str) -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return helper(super().forward(x))

    (found,) = on_board(cluster, target="torch").measure([Subject(Own(6, 6).eval(), (X,))], BRIEF)
    assert found.value > 0


def helper(x: Tensor) -> Tensor:
    return x + math.pi


def test_errors_of_the_node_come_back_with_their_text(cluster: str) -> None:
    class Fails(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("no such luck")

    with pytest.raises(InputError) as caught:
        on_board(cluster, target="torch").measure([Subject(Fails(6, 6).eval(), (X,))], BRIEF)
    assert str(caught.value) == "target torch: the model can't be run with float32: ValueError: no such luck"
    on_node = on_board(cluster, target="onnxruntime", options={"provider": "Pocket"})
    with pytest.raises(InputError, match="target onnxruntime: provider 'Pocket' is not installed"):
        on_node.conditions()


def test_a_node_that_dies_is_an_error_and_no_wait(cluster: str) -> None:
    class Deadly(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            os._exit(3)

    target = on_board(cluster, target="torch")
    with pytest.raises(InputError, match="target ray-node: the node with board failed: WorkerCrashedError: "):
        target.measure([Subject(Deadly(6, 6).eval(), (X,))], BRIEF)
    assert target.conditions()["resource"] == "board"


def test_a_resource_that_no_node_has_is_named(cluster: str) -> None:
    target = make("ray-node", {"resource": "pi5", "target": "torch", "address": cluster, "wait_seconds": 0.1})
    with pytest.raises(InputError) as caught:
        target.conditions()
    assert str(caught.value) == (
        "target ray-node: no node of the Ray cluster has the resource 'pi5' (waited 0.1 s); the cluster has 2 CPU, "
        "1 board. Start Ray there with --resources='{\"pi5\": 1}'"
    )


def test_layers_are_measured_on_the_same_node() -> None:
    compiled = make(
        "ray-node",
        {
            "resource": "pi5",
            "target": "torch-compile",
            "options": {"mode": "max-autotune", "threads": 2},
            "label": "pi",
        },
    )
    layers = compiled.for_layers()
    assert isinstance(layers, RayNode)
    assert (layers.target, layers.options["threads"], layers.resource, layers.label) == ("torch", 2, "pi5", "pi")
    assert make(layers.target, layers.options) == TorchCpu(threads=2)
    plain = make("ray-node", {"resource": "pi5", "target": "onnxruntime"})
    assert plain.for_layers() is plain
    assert plain.from_onnx
    assert not compiled.from_onnx


def test_the_gpus_that_ray_hides_are_seen_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    wrong, found = ray_node_module._run("replay", {"ms_per_mmac": 1.0}, "conditions", (), BRIEF)
    assert (wrong, found) == (None, {"target": "replay", "ms_per_mmac": "1.0"})
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    assert ray_node_module._run("replay", {"table": "none.jsonl"}, "conditions", (), BRIEF)[1] is None


# command

# Takes a log, a model and a number of runs; each takes as many milliseconds as the model's file has bytes.
FAKE = """
import json, sys
open(sys.argv[1], "a").write(sys.argv[2] + "\\n")
size = len(open(sys.argv[2], "rb").read())
print("warming up")
print(json.dumps({{"times_ms": [float(size)] * int(sys.argv[3]), "conditions": {{"clock": "1 GHz"}}}}))
print()
"""


def command(*run: str, **options: Any) -> Target:
    return make("command", {"run": list(run), **options})


def script(text: str) -> Target:
    """A shell script with the model's path as $1 and the runs as $2."""
    return command("/bin/sh", "-c", text, "timer", "{onnx}", "{runs}")


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are written as so many bytes as they have parameters, since nothing here reads them."""

    def exported(subjects: Any) -> list[bytes]:
        return [b"x" * sum(p.numel() for p in s.module.parameters()) for s in subjects]

    monkeypatch.setattr("rankopt.onnx_file.exported", exported)


def test_the_example_times_models() -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    target = command(sys.executable, str(EXAMPLE), "{onnx}", "--inputs", "{inputs}", "--runs", "{runs}", label="pi")
    tokens = next(s for s in forms() if s.key == "tokens")
    (found,) = target.measure([tokens], BRIEF)
    assert found.kept == 1
    assert found.n >= 60
    assert found.conditions["threads"] == "1"
    assert found.conditions["runtime"].startswith("onnxruntime ")
    assert dict(target.conditions()).items() <= dict(found.conditions).items()


def test_a_round_runs_every_subject_once_and_files_are_written_once(tmp_path: Path, no_export: None) -> None:
    log = tmp_path / "log"
    target = command(sys.executable, "-S", "-c", FAKE, str(log), "{onnx}", "{runs}", stated={"device": "pi"})
    subjects = [linear(), Subject(nn.Linear(6, 3).eval(), (X,))]
    found = target.measure(subjects, BRIEF)
    assert [m.value for m in found] == [42.0, 21.0]
    assert [m.kept for m in found] == [1.0, 0.5]
    assert found[0].conditions == {**target.conditions(), "clock": "1 GHz"}
    assert found[0].conditions["device"] == "pi"
    paths = log.read_text().splitlines()
    first, second = paths[:2]
    assert paths == [first, second, second, first] * 3
    assert not Path(first).exists(), "what was written is removed"


def test_what_placeholders_stand_for(tmp_path: Path, no_export: None) -> None:
    import numpy as np

    out = tmp_path / "out"
    copy = "cp $1 $5/inputs.npz; cp $4 $5/model.pt2; echo $2 $3 {{x}} > $5/texts; "
    copy += """echo '{{"times_ms": [1,1,1,1,1,1,1,1,1,1]}}'"""
    out.mkdir()
    target = command("/bin/sh", "-c", copy, "t", "{inputs}", "{shapes}", "a{runs}b", "{pt2}", str(out))
    args = (torch.randn(1, 3, 2, 2), torch.tensor([[1, 2]]))

    class Net(nn.Module):
        def forward(self, x: Tensor, tokens: Tensor, scale: Tensor) -> Tensor:
            return x.sum() * tokens * scale

    target.measure([Subject(Net().eval(), args, {"scale": torch.tensor(2.0)})], BRIEF)
    assert (out / "texts").read_text() == "1x3x2x2:float32,1x2:int64,scalar:float32 a10b {x}\n"
    with np.load(out / "inputs.npz") as file:
        assert sorted(file.files) == ["input_0", "input_1", "input_2"]
        assert (file["input_1"] == [[1, 2]]).all()
    program = torch.export.load(out / "model.pt2").module()
    torch.testing.assert_close(program(*args, scale=torch.tensor(2.0)), Net()(*args, torch.tensor(2.0)))


def test_runs_fill_the_time(no_export: None) -> None:
    from rankopt.targets.command import _runs
    from rankopt.timing import Effort

    assert _runs([], Effort(seconds=6)) == 10
    assert _runs([[2.0, 3.0]], Effort(seconds=6)) == 500
    assert _runs([[0.1]], Effort(seconds=6)) == 1000
    assert _runs([[900.0]], Effort(seconds=6)) == 10


@pytest.mark.parametrize(
    ("run", "fault"),
    [
        ([], "run: "),
        ("timer {onnx}", "run: .*valid list"),
        (["timer"], r"run: needs \{onnx\} or \{pt2\} among its arguments"),
        (["timer", "{{onnx}}"], r"run: needs \{onnx\} or \{pt2\}"),
        (
            ["timer", "{onnx}", "{model}"],
            r"run: '\{model\}': unknown placeholder \{model\}; known: \{onnx\}, \{pt2\}, ",
        ),
        (["timer", "{onnx}", "{}"], r"unknown placeholder \{\}; known"),
        (["timer", "{onnx!r}"], r"unknown placeholder \{onnx!r\}"),
        (["timer", "{onnx:>3}"], r"unknown placeholder \{onnx:>3\}"),
        (["timer", "{onnx.__class__}"], r"unknown placeholder"),
        (["timer", "{onnx}", "awk {print"], r"a brace that is meant is written twice"),
        (["timer", "{onnx}", "}"], r"a brace that is meant is written twice"),
    ],
)
def test_arguments_that_do_not_fit_are_named(run: Any, fault: str) -> None:
    with pytest.raises(InputError, match=f"target command: .*{fault}"):
        make("command", {"run": run})


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("exit 3", "/bin/sh ended with status 3: nothing on stderr"),
        ("echo >&2; echo first >&2; echo second >&2; exit 1", "/bin/sh ended with status 1: first$"),
        ("kill -9 $$", "/bin/sh ended with status -9"),
        ("true", r"/bin/sh: its last line must be \{\"times_ms\": \[...\]\}, got ''"),
        ("echo hello", "must be .*got 'hello'"),
        ("echo [1,2]", r"must be .*got '\[1,2\]'"),
        ("""echo '{{"times": [1]}}'""", "times_ms"),
        ("""echo '{{"times_ms": [1], "condition": {{}}}}'""", '"conditions" or without'),
        ("""echo '{{"times_ms": 3}}'""", "times_ms must be a list of times in ms, got '3'"),
        ("""echo '{{"times_ms": [1, NaN]}}'""", r"times_ms\[1\] must be a time in ms above 0, got 'nan'"),
        ("""echo '{{"times_ms": [1, -2]}}'""", r"times_ms\[1\] must be a time in ms above 0, got '-2'"),
        ("""echo '{{"times_ms": [0]}}'""", r"times_ms\[0\] must be"),
        ("""echo '{{"times_ms": [true]}}'""", r"times_ms\[0\] must be"),
        ("""echo '{{"times_ms": ["1"]}}'""", r"times_ms\[0\] must be"),
        ("""echo '{{"times_ms": [1e999]}}'""", r"times_ms\[0\] must be"),
        (f"""echo '{{{{"times_ms": [{10**400}]}}}}'""", r"times_ms\[0\] must be"),
        ("""echo '{{"times_ms": [1,1,1]}}'""", r"times_ms must have at least 10 times, as \{runs\} said, got 3"),
        (
            """echo '{{"times_ms": [1,1,1,1,1,1,1,1,1,1], "conditions": {{"a": 1}}}}'""",
            "conditions must be an object of texts",
        ),
    ],
)
def test_answers_of_a_program_are_checked(text: str, fault: str, no_export: None) -> None:
    with pytest.raises(InputError, match=f"target command: .*{fault}") as caught:
        script(text).measure([linear()], BRIEF)
    assert "/bin/sh" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_program_that_is_missing_or_too_slow(no_export: None, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no-such-timer can't be started: No such file"):
        command("no-such-timer", "{onnx}").measure([linear()], BRIEF)
    with pytest.raises(InputError, match="can't be started: Permission denied"):
        command(str(tmp_path), "{onnx}").measure([linear()], BRIEF)
    with pytest.raises(InputError, match=r"/bin/sh did not end within 0.2 s; raise timeout"):
        command("/bin/sh", "-c", "exec sleep 20", "t", "{onnx}", timeout=0.2).measure([linear()], BRIEF)


def test_conditions_that_a_program_reports_stay_the_same(no_export: None, tmp_path: Path) -> None:
    count = shlex.quote(str(tmp_path / "count"))
    answer = """{{\\"times_ms\\": [1,1,1,1,1,1,1,1,1,1], \\"conditions\\": {{\\"clock\\": \\"$n\\"}}}}"""
    changing = script(f'echo x >> {count}; n=$(wc -l < {count} | tr -d " "); echo "{answer}"')
    with pytest.raises(ConditionsError, match=r"/bin/sh reports another clock than before \(1, now 2\)"):
        changing.measure([linear()], BRIEF)
    run = ["/bin/sh", "-c", f'n=1; echo "{answer}"', "t", "{onnx}"]
    assert command(*run, stated={"clock": "1"}).measure([linear()], BRIEF)[0].conditions["clock"] == "1"
    with pytest.raises(ConditionsError, match=r"/bin/sh reports clock '1', stated is '2'"):
        command(*run, stated={"clock": "2"}).measure([linear()], BRIEF)


def test_commands_of_one_device_share_its_lock(monkeypatch: pytest.MonkeyPatch, no_export: None) -> None:
    locked: list[str] = []
    monkeypatch.setattr("rankopt.targets.command.device_lock", lambda device: locked.append(device) or nullcontext())
    answer = """echo '{{"times_ms": [1,1,1,1,1,1,1,1,1,1]}}'"""
    for options in ({}, {}, {"device": "pi"}):
        command("/bin/sh", "-c", answer, "t", "{onnx}", **options).measure([linear()], BRIEF)
    assert locked[0] == locked[1] != locked[2] == "command-pi"
    assert command("timer", "{onnx}").from_onnx
    assert not command("timer", "{onnx}", "{pt2}").from_onnx


# replay


@pytest.fixture
def table(tmp_path: Path) -> Path:
    store = LatencyStore(tmp_path / "pi.jsonl", {"target": "torch", "device": "pi"})
    for key, value in (("dense", 4.0), ("half", 2.5)):
        store.put(key, Measurement(value, "ms", 50, value * 0.9, value * 1.1, value * 1.2, 0.01, {}, others=0.2))
    store.put("memory", Measurement(4.0, "MiB", 3, 4.0, 4.0, 4.0, 0.0))
    return tmp_path / "pi.jsonl"


def test_recorded_times_are_given_by_their_keys(table: Path) -> None:
    target = make("replay", {"table": str(table)})
    assert target.conditions() == {"target": "torch", "device": "pi"}
    dense, half = target.measure([linear("dense"), linear("half")])
    assert (half.value, half.low, half.n, half.others) == (2.5, 2.25, 50, 0.2)
    assert (half.kept, half.kept_low, half.kept_error, half.p95_kept) == pytest.approx((0.625, 0.625, 0, 0.625))
    assert (dense.kept, dense.p95_kept) == (1, 1)
    assert target.measure([linear("half"), linear("dense")])[1].kept == pytest.approx(1.6)
    with pytest.raises(InputError, match=r"target replay: .*pi.jsonl holds nothing under 'third'; record it, or give"):
        target.measure([linear("dense"), linear("third")])
    with pytest.raises(InputError, match=r"'memory' is in MiB, not ms"):
        target.measure([linear("memory")])


def test_a_table_is_read_again_when_it_has_grown(table: Path) -> None:
    target = make("replay", {"table": str(table)})
    target.measure([linear("dense")])
    LatencyStore(table, target.conditions()).put("new", Measurement(7.0, "ms", 1, 7.0, 7.0, 7.0, 0.0))
    assert target.measure([linear("new")])[0].value == 7


def test_made_up_times_follow_from_macs_and_modules() -> None:
    layer = nn.Conv2d(3, 3, 3, padding=1)
    twice = nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU()).eval()
    subject = Subject(twice, (torch.randn(1, 3, 8, 8),))
    macs = 2 * 3 * 3 * 9 * 64
    (found,) = make("replay", {"ms_per_mmac": 0.5, "ms_per_module": 0.25}).measure([subject])
    assert found.value == pytest.approx(0.5 * macs / 1e6 + 0.25 * 4)
    (found,) = make("replay", {"ms_per_module": 2}).measure([subject])
    assert (found.value, found.low, found.n, found.error) == (8.0, 8.0, 1, 0.0)
    (found,) = make("replay", {"ms_per_mmac": 1.0}).measure([Subject(nn.ReLU().eval(), (X,))])
    assert 0 < found.value < 1e-5
    assert not any(m._forward_hooks for m in twice.modules())


def test_made_up_times_are_not_mixed_with_measured_ones(table: Path) -> None:
    target = make("replay", {"table": str(table), "ms_per_module": 1.0})
    assert target.conditions() == {"target": "torch", "device": "pi", "ms_per_module": "1.0"}
    recorded, made_up = target.measure([linear("dense"), linear("third")])
    assert (recorded.value, made_up.value, made_up.kept) == (4.0, 1.0, 0.25)
    assert recorded.conditions == made_up.conditions == target.conditions()


def test_tables_with_a_fault_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"target replay: .*none.jsonl: can't be read: No such file"):
        make("replay", {"table": str(tmp_path / "none.jsonl")}).conditions()
    (tmp_path / "bad.jsonl").write_text(json.dumps({"schema": 1, "conditions": {}}) + "\n{\n")
    with pytest.raises(InputError, match=r"bad.jsonl: line 2: not valid JSON"):
        make("replay", {"table": str(tmp_path / "bad.jsonl")}).measure([linear("a")])


# Targets of others


class Counted(LocalTarget):
    """A target that another package could bring."""

    name = "counted"

    def conditions(self) -> dict[str, str]:
        return {"target": self.name}

    def prepare(self, subjects: Any) -> list[Timed]:
        return [each(lambda: None) for _ in subjects]


def test_a_package_can_add_a_target(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = SimpleNamespace(name="counted", load=lambda: Counted)
    monkeypatch.setattr("rankopt.targets.entry_points", lambda group: [entry] if group == "rankopt.targets" else [])
    target = read("counted:threads=3")
    assert isinstance(target, Counted)
    assert target.threads == 3
    assert target.measure([linear()], BRIEF)[0].conditions == {"target": "counted"}
    assert target.measure([], BRIEF) == []
