"""`TargetContract`: the contract test of targets, shipped for packages that add one. Needs pytest.

A whole test file for a target of your own::

    from rankopt.testing import TargetContract
    from mypackage import Jetson


    class TestJetson(TargetContract):
        target = Jetson(host="jetson")   # or the name of a registered target that needs no options


The contract: conditions are texts that stay the same and name the target; there is a measurement a subject, in their
order, with ratios to the first; models are called with what they are given and left as they were; a model that can't be
run raises `InputError`; torch's threads and gradient mode are as before. Nothing is said of how long anything takes,
except that sixty times the work takes longer.
"""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from rankopt.errors import InputError
from rankopt.measurement import Measurement
from rankopt.targets import make
from rankopt.targets.target import Subject, Target
from rankopt.timing import Effort

# The shortest that still gives every number: no machine that runs tests is quiet anyhow.
BRIEF = Effort(seconds=0.02, rounds=6, error=1.0, longest=1, repeats=0, warmup=0.05)


class KeywordModel(nn.Module):
    """Called with keywords, in another order than the signature's, and with an argument that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor, shift: Tensor | None = None, factor: float = 1.0) -> Tensor:
        """The shift has a shape that the input can't have, so that exchanging the two is found out."""
        out = self.layer(x) * factor
        return out if shift is None else out + shift.sum(1)


class TwoInputs(nn.Module):
    """Two positional inputs of different shapes, and two outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 4), nn.Linear(3, 4)

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        """Their sum and their product."""
        return {"sum": self.left(a) + self.right(b), "product": self.left(a) * self.right(b)}


class Tokens(nn.Module):
    """Whole numbers in."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 6), nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        """One vector a sequence."""
        return self.head(self.embedding(tokens).mean(1))


class Twice(nn.Module):
    """One layer that is called two times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """The layer of the layer."""
        return self.layer(self.layer(x).relu())


class Broken(nn.Module):
    """A model that fails on its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        """The shapes do not fit."""
        return self.layer(x.flatten())


class TargetContract:
    """Subclass it with a `target`: an instance, or a registered name."""

    target: ClassVar[Target | str]
    effort: ClassVar[Effort] = BRIEF

    @property
    def there(self) -> Target:
        """The target."""
        return make(self.target) if isinstance(self.target, str) else self.target

    def measured(self, *subjects: Subject) -> list[Measurement]:
        """Their measurements, whose form is checked."""
        found = self.there.measure(list(subjects), self.effort)
        assert len(found) == len(subjects)
        stated = self.there.conditions()
        for m in found:
            assert isinstance(m, Measurement)
            assert m.unit == "ms"
            assert m.n > 0
            assert all(math.isfinite(v) and v > 0 for v in (m.value, m.low, m.high, m.p95))
            assert m.low <= m.value <= m.high <= m.p95
            assert m.kept is not None
            assert m.kept > 0
            assert dict(m.conditions) == {**m.conditions, **stated}, "measurements state the target's conditions"
            assert all(isinstance(k, str) and isinstance(v, str) for k, v in m.conditions.items())
        if found:
            assert found[0].kept == 1
            assert all(m.conditions == found[0].conditions for m in found)
        return found

    def test_conditions_are_texts_that_stay_the_same(self) -> None:
        """They are compared with those of records, so a time or a counter has no place in them."""
        conditions = self.there.conditions()
        assert all(isinstance(k, str) and isinstance(v, str) for k, v in conditions.items())
        assert conditions["target"]
        assert self.there.conditions() == conditions
        assert json.loads(json.dumps(conditions)) == conditions

    def test_models_of_many_forms(self) -> None:
        """Keywords, two inputs, whole numbers, batch norm, a layer used twice; each is left as it was."""
        subjects = forms()
        before = [_state(s.module) for s in subjects]
        for m in self.measured(*subjects):
            again = Measurement.from_dict(json.loads(json.dumps(m.to_dict(), allow_nan=False)), m.conditions)
            assert again == m
        for subject, state in zip(subjects, before, strict=True):
            _assert_unchanged(subject.module, state)

    def test_nothing_to_measure(self) -> None:
        """No subjects, no measurements."""
        assert self.measured() == []

    def test_more_work_takes_longer(self) -> None:
        """About sixty times the multiply-accumulates."""
        first, second = self.measured(*small_and_large())
        assert second.value > first.value
        assert second.kept is not None
        assert second.kept > 1

    def test_what_cannot_be_run_is_an_input_error(self) -> None:
        """With a text of one line."""
        with pytest.raises(InputError) as caught:
            self.there.measure([Subject(Broken().eval(), (torch.randn(2, 6),), key="broken")], self.effort)
        assert caught.value.message
        assert "\n" not in str(caught.value)

    def test_torch_is_left_as_it_was(self) -> None:
        """Threads and gradient mode, also where a model fails."""
        before = (torch.get_num_threads(), torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        plain = forms()[0]
        self.measured(plain)
        with pytest.raises(InputError):
            self.there.measure([Subject(Broken().eval(), plain.args, key="broken")], self.effort)
        assert (torch.get_num_threads(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before

    def test_what_layers_are_measured_on(self) -> None:
        """Another target at most, under the same label."""
        other = self.there.for_layers()
        assert isinstance(other, Target)
        assert other.batch == self.there.batch


@functools.cache
def forms() -> tuple[Subject, ...]:
    """Small models that are called in different ways; the same ones each time, so that each is exported once."""
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    x, image = torch.randn(2, 6), torch.randn(2, 4, 8, 8)
    norm = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    with torch.no_grad():
        norm(image)
    frozen = nn.Linear(6, 6)
    frozen.weight.requires_grad_(False)
    frozen.weight[0].zero_()
    subjects = (
        Subject(frozen, (x,), key="linear"),
        Subject(KeywordModel(), (), {"shift": torch.randn(2, 5, 6), "factor": 2.0, "x": x}, key="keywords"),
        Subject(TwoInputs(), (x, torch.randn(2, 3)), key="two inputs"),
        Subject(Tokens(), (torch.randint(0, 11, (2, 5)),), key="tokens"),
        Subject(norm, (image,), key="batch norm"),
        Subject(Twice(), (image,), key="twice"),
    )
    torch.random.set_rng_state(torch_state)
    for subject in subjects:
        subject.module.eval()
    return subjects


@functools.cache
def small_and_large() -> tuple[Subject, Subject]:
    """One layer, and sixty of its size; the same ones each time."""
    x = torch.randn(1, 32, 24, 24, generator=torch.Generator().manual_seed(0))
    small = nn.Conv2d(32, 32, 3, padding=1).eval()
    large = nn.Sequential(*(nn.Conv2d(32, 32, 3, padding=1) for _ in range(60))).eval()
    return Subject(small, (x,), key="one layer"), Subject(large, (x,), key="sixty layers")


def _state(module: nn.Module) -> dict[str, Any]:
    return {
        "values": copy.deepcopy(module.state_dict()),
        "parameters": [(id(p), p.requires_grad, p.device, p.dtype, p.stride(), p.grad) for p in module.parameters()],
        "modules": [(id(m), m.training, len(m._forward_hooks), set(vars(m))) for m in module.modules()],
    }


def _assert_unchanged(module: nn.Module, before: Mapping[str, Any]) -> None:
    now = _state(module)
    assert now["values"].keys() == before["values"].keys()
    assert all(torch.equal(v, before["values"][k]) for k, v in now["values"].items()), "the model's values have changed"
    assert now["parameters"] == before["parameters"], "the model's parameters have changed"
    assert now["modules"] == before["modules"], "the model's modules or their modes have changed"
