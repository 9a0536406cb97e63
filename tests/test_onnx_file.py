"""Exported models compute what the modules compute, alone and together, for every form of input and output."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankopt.errors import InputError
from rankopt.nest import tensors
from rankopt.onnx_file import arrays, exported, input_names
from rankopt.target_contract import forms
from rankopt.targets.target import Subject

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


class Calls(nn.Module):
    """A module made of a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


class Nests(nn.Module):
    def forward(self, pair: Any, named: Any) -> Any:
        return {"a": pair[0] - 2 * pair[1], "b": [named["q"] * 3 - named["p"]]}


class Constant(nn.Module):
    def forward(self, x: Tensor, parts: int, scale: float = 1.0) -> Tensor:
        return x.reshape(parts, -1) * scale


class Unused(nn.Module):
    def forward(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return a - 2 * c


def run(model: bytes, subject: Subject) -> list[Tensor]:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    assert names == input_names(model)
    return [torch.as_tensor(out) for out in session.run(None, dict(zip(names, arrays(subject), strict=True)))]


def check(*subjects: Subject) -> None:
    """What the files give is what the modules give, in eval mode and float32."""
    for subject, model in zip(subjects, exported(subjects), strict=True):
        assert subject.onnx is model
        module = copy.deepcopy(subject.module).eval().float()
        with torch.no_grad():
            wanted = tensors(module(*_float(subject.args), **_float(dict(subject.kwargs))))
        found = run(model, subject)
        assert len(found) == len(wanted)
        for out, expected in zip(found, wanted, strict=True):
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def _float(value: Any) -> Any:
    from rankopt.nest import mapped

    return mapped(value, lambda t: t.float() if t.is_floating_point() else t)


def test_models_that_are_called_in_different_ways() -> None:
    check(*forms())


def test_models_on_one_input_are_exported_together(monkeypatch: pytest.MonkeyPatch) -> None:
    from rankopt import onnx_file

    exports = []
    monkeypatch.setattr(onnx_file, "_export", lambda *a, real=onnx_file._export: exports.append(a) or real(*a))
    args = (torch.randn(2, 4),)
    layer = nn.Linear(4, 4)
    modules = [
        layer,
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)),
        nn.Sequential(layer, nn.Sigmoid()),  # begins like the first
        copy.deepcopy(layer),  # equal to the first
        nn.Identity(),
    ]
    subjects = [Subject(m.eval(), args) for m in modules]
    check(*subjects)
    assert len(exports) == 1
    assert len(subjects[0].onnx or b"") < len(subjects[1].onnx or b""), "each file holds its own branch"


def test_what_has_several_outputs_is_exported_on_its_own() -> None:
    class Both(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), x + 1

    args = (torch.randn(2, 4),)
    check(Subject(Both(4, 4).eval(), args), Subject(nn.Linear(4, 4).eval(), args))


def test_one_input_with_and_without_keywords() -> None:
    class Shifted(nn.Linear):
        def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
            return super().forward(x) + (0 if shift is None else shift)

    args = (torch.randn(2, 4),)
    check(
        Subject(Shifted(4, 4).eval(), args, {"shift": torch.randn(2, 4)}),
        Subject(Shifted(4, 4).eval(), args),
        Subject(Shifted(4, 4).eval(), args, {"shift": torch.randn(2, 4)}),
    )


def test_nests_constants_and_inputs_that_are_not_used() -> None:
    x, y, z = torch.randn(2, 4), torch.randn(2, 4), torch.randn(2, 4)
    check(Subject(Nests().eval(), ([x, y], {"q": y, "p": z})))  # a dict at the end is no set of keywords
    check(Subject(Constant().eval(), (x, 4), {"scale": 2.5}))
    check(Subject(Unused().eval(), (x, y, z)))
    check(Subject(Unused().eval(), (x, y.numpy(), torch.tensor(2.0))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_all_is_float32(dtype: torch.dtype) -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval().to(dtype)
    subject = Subject(module, (torch.randn(2, 4, dtype=dtype),))
    check(subject)
    assert {a.dtype.name for a in arrays(subject)} == {"float32"}
    assert next(module.parameters()).dtype == dtype


def test_a_model_in_training_mode_is_exported_in_eval_mode_and_stays_as_it_was() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4).eval())
    before = [m.training for m in module.modules()], {k: v.clone() for k, v in module.state_dict().items()}
    args = (torch.randn(2, 4),)
    check(Subject(module, args), Subject(nn.Linear(4, 4), args))
    assert [m.training for m in module.modules()] == before[0]
    assert all(torch.equal(v, before[1][k]) for k, v in module.state_dict().items())


def test_a_file_is_exported_once() -> None:
    subject = Subject(nn.Linear(4, 4).eval(), (torch.randn(2, 4),), onnx=b"there")
    assert exported([subject]) == [b"there"]
    assert exported([]) == []


def test_what_can_not_be_exported_is_said_in_one_line() -> None:
    def branches(x: Tensor) -> Tensor:
        return x + 1 if float(x.sum()) > 0 else x

    with pytest.raises(InputError, match="onnx: Calls can't be exported: ") as caught:
        exported([Subject(Calls(branches).eval(), (torch.randn(2, 4),))])
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert "step 1" not in str(caught.value)
