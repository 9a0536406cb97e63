from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankopt.fold import folded
from rankopt.traced import traced


def norm(channels: int, dims: int = 2, **options: Any) -> nn.Module:
    made = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims](channels, **options)
    if made.running_mean is not None:
        made.running_mean.normal_()
        made.running_var.uniform_(0.2, 3)
    if made.affine:
        nn.init.normal_(made.weight)
        nn.init.normal_(made.bias)
    return made


def fold(module: nn.Module, x: Tensor) -> tuple[nn.Module, dict[str, int]]:
    program = torch.export.export(module.eval(), (x,))
    return folded(program.module())


class Twice(nn.Module):
    """The convolution's output is read by the batch norm and by the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), norm(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y


class Shared(nn.Module):
    """One convolution before two batch norms: its own weight must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), norm(3), norm(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.conv(self.a(self.conv(x)))) + self.conv(x)


def conv(*args: Any, **options: Any) -> nn.Module:
    return nn.Conv2d(*args, **options)


image = (2, 4, 9, 8)
FOLDS: dict[str, tuple[Any, tuple[int, ...], dict[str, int]]] = {
    "conv and norm": (lambda: [conv(4, 6, 3), norm(6)], image, {"batch norm": 1}),
    "no bias": (lambda: [conv(4, 6, 3, bias=False), norm(6)], image, {"batch norm": 1}),
    "no affine": (lambda: [conv(4, 6, 3), norm(6, affine=False)], image, {"batch norm": 1}),
    "groups": (lambda: [conv(4, 6, 3, groups=2, stride=2), norm(6)], image, {"batch norm": 1}),
    "same padding": (lambda: [conv(4, 6, 3, padding="same"), norm(6)], image, {"batch norm": 1}),
    "reflected": (lambda: [conv(4, 6, 3, padding=1, padding_mode="reflect"), norm(6)], image, {"batch norm": 1}),
    "1-d": (lambda: [nn.Conv1d(4, 6, 3), norm(6, 1)], (2, 4, 9), {"batch norm": 1}),
    "3-d": (lambda: [nn.Conv3d(2, 3, 2), norm(3, 3)], (2, 2, 4, 4, 4), {"batch norm": 1}),
    "transposed": (
        lambda: [nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), norm(6)],
        image,
        {"batch norm": 1},
    ),
    "transposed 1-d": (lambda: [nn.ConvTranspose1d(4, 6, 3, bias=False), norm(6, 1)], (2, 4, 9), {"batch norm": 1}),
    "without statistics": (lambda: [conv(4, 6, 3), norm(6, track_running_stats=False)], image, {}),
    "norm first": (lambda: [norm(4), conv(4, 6, 3)], image, {}),
    "relu between": (lambda: [conv(4, 6, 1), nn.ReLU(), conv(6, 4, 1)], image, {}),
    "a pair": (lambda: [conv(4, 6, 1), conv(6, 4, 1)], image, {"pointwise pair": 1}),
    "a pair without biases": (
        lambda: [conv(4, 6, 1, bias=False), conv(6, 4, 1, bias=False)],
        image,
        {"pointwise pair": 1},
    ),
    "a pair of which the first has a bias": (
        lambda: [conv(4, 6, 1), conv(6, 4, 1, bias=False)],
        image,
        {"pointwise pair": 1},
    ),
    "a pair with strides": (
        lambda: [conv(4, 6, 1, stride=2), conv(6, 4, 1, stride=(1, 2))],
        image,
        {"pointwise pair": 1},
    ),
    "a bottleneck costs less as it is": (lambda: [conv(4, 1, 1), conv(1, 4, 1)], image, {}),
    "as dear as before": (lambda: [conv(4, 2, 1), conv(2, 4, 1)], image, {"pointwise pair": 1}),
    "a row": (lambda: [conv(4, 9, 1), conv(9, 9, 1), conv(9, 4, 1)], image, {"pointwise pair": 2}),
    "kernels do not pair": (lambda: [conv(4, 6, 1), conv(6, 4, 3)], image, {}),
    "padded ones do not pair": (lambda: [conv(4, 6, 1, padding=1), conv(6, 4, 1)], image, {}),
    "groups do not pair": (lambda: [conv(4, 6, 1, groups=2), conv(6, 4, 1)], image, {}),
    "a pair through a norm": (
        lambda: [conv(4, 6, 1), norm(6), conv(6, 4, 1), norm(4)],
        image,
        {"batch norm": 2, "pointwise pair": 1},
    ),
    "linear": (lambda: [nn.Linear(8, 9), nn.Linear(9, 5)], (3, 2, 8), {"pointwise pair": 1}),
    "a linear bottleneck": (lambda: [nn.Linear(8, 2), nn.Linear(2, 8, bias=False)], (3, 8), {}),
}


@pytest.mark.parametrize("case", FOLDS)
def test_folded_computes_the_same(case: str) -> None:
    torch.manual_seed(0)
    make, shape, expected = FOLDS[case]
    module, x = nn.Sequential(*make()).eval(), torch.randn(shape)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    small, count = fold(module, x)
    assert count == expected
    torch.testing.assert_close(small(x), module(x), rtol=2e-5, atol=2e-5)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


@pytest.mark.parametrize(("make", "expected"), [(Twice, {}), (Shared, {"batch norm": 2})])
def test_what_is_read_elsewhere(make: Any, expected: dict[str, int]) -> None:
    torch.manual_seed(0)
    module, x = make().eval(), torch.randn(2, 3, 7, 7)
    small, count = fold(module, x)
    assert count == expected
    torch.testing.assert_close(small(x), module(x), rtol=2e-5, atol=2e-5)


def test_a_folded_program_has_fewer_operations_and_tensors() -> None:
    module = nn.Sequential(conv(4, 6, 1), norm(6), conv(6, 4, 1)).eval()
    made = traced(module, (torch.randn(1, 4, 5, 5),), {})
    calls = [str(n.target) for n in made.program.graph.nodes if n.op == "call_function"]
    assert calls == ["aten.conv2d.default"]
    assert len(made.program.state_dict) == 2
    assert made.folds == {"batch norm": 1, "pointwise pair": 1}
    assert made.macs == 25 * 4 * 4
    assert made.batch is None
