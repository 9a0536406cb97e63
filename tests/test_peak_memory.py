"""Peak memory against sizes that are known beforehand, and against what the operating system says on its own."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rankopt.peak_memory as module
from rankopt.errors import InputError
from rankopt.peak_memory import outcome
from rankopt.targets import make, read
from rankopt.targets.target import Subject

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
MIB = 2**20


@pytest.fixture
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process instead of several: a process that imports torch takes seconds."""
    monkeypatch.setattr(module, "PROCESSES", 1)


@pytest.fixture
def empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Temporary files go to a folder that must hold none of them in the end."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    theirs = (".lock", "torchinductor_")  # the device's lock, and a cache that torch makes at its first export
    assert not [path for path in tmp_path.iterdir() if not any(name in path.name for name in theirs)]


def linears(count: int, width: int = 1024) -> Subject:
    """`count` weights of width² floats each: 4 MiB at a width of 1024."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(count)])
    return Subject(model.eval(), (torch.randn(1, width),))


def activations(mib: int) -> Subject:
    """No weights. While the last step runs its input, its output and the model's input are there."""
    return Subject(nn.Sequential(nn.ReLU(), nn.Sigmoid(), nn.Tanh()).eval(), (torch.randn(mib, MIB // 4),))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(1024, 1024, bias=False), nn.Linear(1024, 1024, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))


class Named(nn.Module):
    def forward(self, *, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return left + right


class Huge(nn.Module):
    """Wants 4 TiB when it is run; nothing when it is exported."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.reshape(-1)[:1].expand(2**40) + 1).sum()


class Undecided(nn.Module):
    """Can be run, but not exported."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if float(x.sum()) > 0 else x


class Looked(nn.Module):
    """Finds out only when it is run that its input is wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return self.table(index)


def test_weights_in_torch(once: None, empty: None) -> None:
    found = make("torch").peak_memory(linears(4))  # type: ignore[attr-defined]
    assert found.unit == "MiB"
    assert found.value == pytest.approx(16, abs=1)
    assert found.conditions == make("torch").conditions()


def test_activations_in_torch(once: None) -> None:
    assert make("torch").peak_memory(activations(16)).value == pytest.approx(48, abs=1)


def test_the_dtype_of_torch_counts(once: None) -> None:
    assert read("torch:dtype=bfloat16").peak_memory(linears(4)).value == pytest.approx(8, abs=1)


def test_several_processes_agree(empty: None) -> None:
    found = make("onnxruntime").peak_memory(linears(4))
    assert found.n == 3
    assert found.value == pytest.approx(16, abs=1)
    assert found.high - found.low < 0.5


def test_fewer_weights_need_less(once: None) -> None:
    dense = linears(4)
    thin = nn.Sequential(*[nn.Sequential(nn.Linear(1024, 64, bias=False), nn.Linear(64, 1024)) for _ in range(4)])
    target = make("onnxruntime")
    # 2 · 64 / 1024 of the weights
    kept = target.peak_memory(Subject(thin.eval(), dense.args)).value / target.peak_memory(dense).value
    assert kept == pytest.approx(0.125, abs=0.06)


def test_inputs_count(once: None) -> None:
    left, right = torch.randn(8, MIB // 4), torch.randn(8, MIB // 4)
    subject = Subject(Named().eval(), (), {"left": left, "right": right})
    assert make("onnxruntime").peak_memory(subject).value == pytest.approx(24, abs=1)  # two inputs, one output


def test_openvino_holds_the_weights(once: None) -> None:
    found = make("openvino").peak_memory(linears(8)).value
    assert 31 < found < 2.2 * 32  # it keeps a second copy in its own layout


def test_the_smallest_model_has_a_size_too(once: None) -> None:
    tiny = Subject(nn.Linear(2, 2).eval(), (torch.randn(1, 2),))
    assert 0 < make("onnxruntime").peak_memory(tiny).value < 2


@pytest.mark.parametrize(
    ("subject", "target", "expected"),
    [
        (Subject(Undecided().eval(), (torch.ones(3),)), "torch", "Undecided can't be exported to measure its memory: "),
        (Subject(Undecided().eval(), (torch.ones(3),)), "onnxruntime", "onnx: Undecided can't be exported"),
        (Subject(Huge().eval(), (torch.ones(3),)), "torch", "needed more memory than there is"),
        (Subject(Looked().eval(), (torch.tensor([99]),)), "onnxruntime", "can't be run in a process of its own: "),
    ],
    ids=["torch-export", "onnx-export", "memory", "run"],
)
def test_what_can_not_be_measured(once: None, empty: None, subject: Subject, target: str, expected: str) -> None:
    with pytest.raises(InputError) as raised:
        make(target).peak_memory(subject)
    assert expected in raised.value.message
    assert "\n" not in str(raised.value)


def test_a_process_that_does_not_end(once: None, empty: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TIMEOUT", 0.05)
    with pytest.raises(InputError, match=r"did not run within 0\.05 s"):
        make("onnxruntime").peak_memory(linears(1, 8))


def test_only_where_it_can_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="memory is not measured there"):
        make("torch-compile").peak_memory(linears(1, 8))
    with pytest.raises(InputError, match="on the CPU only, not on cuda"):
        make("onnxruntime", {"provider": "CUDA"}).peak_memory(linears(1, 8))
    with pytest.raises(InputError, match="on the CPU only, not on gpu"):
        make("openvino", {"on": "GPU"}).peak_memory(linears(1, 8))
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(InputError, match="on Linux only, by /proc; this is darwin"):
        make("torch").peak_memory(linears(1, 8))


@pytest.mark.parametrize(
    ("code", "out", "err", "expected"),
    [
        (-9, "", "", "target t: running the model needed more memory than there is"),
        (0, '{"out_of_memory": true}\n', "", "needed more memory than there is"),
        (0, '{"error": "ValueError: no"}\n', "", "can't be run in a process of its own: ValueError: no"),
        (-6, "", "terminate called\nabort\n", "the process that ran the model was ended by signal 6: abort"),
        (1, "noise", "Traceback\nImportError: x", "ended with status 1: ImportError: x"),
        (0, "12.5\n", "", "ended with status 0"),
        (0, '{"mib": "12"}\n', "", "ended with status 0"),
    ],
)
def test_what_the_other_process_tells(code: int, out: str, err: str, expected: str) -> None:
    with pytest.raises(InputError) as raised:
        outcome("t", code, out, err)
    assert expected in str(raised.value)


def test_a_runtime_may_print_as_well() -> None:
    assert outcome("t", 0, 'loading {"a": 1}\n3\n{"mib": 12.5}\nbye 7\n[1]\n', "a warning") == 12.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "subject", "expected"),
    [
        ("torch", linears(4, 2048), 64),
        ("torch:threads=2", linears(4, 2048), 64),
        ("torch:dtype=bfloat16", linears(4, 2048), 32),
        ("torch:memory_format=channels_last", linears(4, 2048), 64),
        ("onnxruntime", linears(4, 2048), 64),
        ("onnxruntime:threads=2", linears(4, 2048), 64),
        ("torch", Subject(Tied().eval(), (torch.randn(1, 1024),)), 4),
        ("onnxruntime", Subject(Tied().eval(), (torch.randn(1, 1024),)), 4),
        ("torch", activations(100), 300),
        # The input and what comes out of the convolution, changed in place: no reordering in this layout.
        (
            "torch:memory_format=channels_last",
            Subject(
                nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(True)).eval(), (torch.randn(1, 3, 640, 640),)
            ),
            104.7,
        ),
    ],
)
def test_known_sizes(target: str, subject: Subject, expected: float) -> None:
    found: Any = read(target).peak_memory(subject)
    assert found.value == pytest.approx(expected, rel=0.01, abs=0.5)
    assert found.spread < 0.02


# What a process of its own says of itself at its end: this counts the runtime's libraries too, and loading.
ALONE = """
import re, sys
import numpy, onnxruntime, psutil
before = psutil.Process().memory_info().rss
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
x = numpy.ones((1, 3, 640, 640), "float32")
for _ in range(4):
    session.run(None, {session.get_inputs()[0].name: x})
print(int(re.search("VmHWM:(.*)kB", open("/proc/self/status").read())[1]) / 1024 - before / 2**20)
"""


@pytest.mark.slow
def test_against_what_the_system_says(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)).eval()
    subject = Subject(model, (torch.randn(1, 3, 640, 640),))
    target: Any = make("onnxruntime")
    found = target.peak_memory(subject).value
    target.write(subject, tmp_path)
    command = [sys.executable, "-c", ALONE, str(tmp_path / "model.onnx")]
    alone = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found > 200  # the activation and its copy for the ReLU or in another layout
    assert alone - 25 < found < alone + 2
