"""What methods are tried on: a list of layers, any other small one by Hypothesis, and what they prepare for it."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from rankopt.decompositions.decomposition import Decomposition
from rankopt.decompositions.metric import Metric
from rankopt.kinds import kind_named
from rankopt.layer_spec import LayerSpec
from rankopt.layers import find_layers

LAYER_NAME = "stem"


@dataclass(frozen=True)
class Geometry:
    """A layer to try a method on, and the shape of an input for it: row numbers below `rows` where that is not 0."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    rows: int = 0

    def input(self) -> Tensor:
        """Random."""
        return torch.randint(self.rows, self.shape) if self.rows else torch.randn(self.shape, dtype=torch.float64)


GEOMETRIES = tuple(
    Geometry(name, make, shape)
    for name, make, shape in [
        ("linear", lambda: nn.Linear(7, 5), (3, 7)),
        ("linear of three dimensions, no bias", lambda: nn.Linear(4, 9, bias=False), (2, 3, 4)),
        ("conv1d", lambda: nn.Conv1d(6, 8, 5, stride=2, padding=2), (2, 6, 11)),
        (
            "conv1d even, dilated, groups, replicate",
            lambda: nn.Conv1d(6, 4, 4, dilation=2, groups=2, padding=3, padding_mode="replicate"),
            (2, 6, 12),
        ),
        ("conv2d", lambda: nn.Conv2d(6, 8, 3, padding=1), (2, 6, 7, 6)),
        (
            "conv2d stride (2, 1), groups, reflect",
            lambda: nn.Conv2d(6, 4, 3, stride=(2, 1), padding=(2, 1), groups=2, padding_mode="reflect"),
            (2, 6, 8, 7),
        ),
        (
            "conv2d dilated, circular, no bias",
            lambda: nn.Conv2d(4, 5, (3, 2), dilation=2, padding=(2, 1), padding_mode="circular", bias=False),
            (2, 4, 6, 7),
        ),
        ("conv2d same, even", lambda: nn.Conv2d(4, 6, (2, 4), padding="same", dilation=(1, 2)), (2, 4, 6, 7)),
        (
            "conv2d same, replicate",
            lambda: nn.Conv2d(4, 6, (3, 2), padding="same", padding_mode="replicate"),
            (2, 4, 6, 7),
        ),
        ("conv2d 1×1 stride 2", lambda: nn.Conv2d(5, 6, 1, stride=2), (2, 5, 6, 5)),
        ("conv2d 1×7", lambda: nn.Conv2d(4, 6, (1, 7), stride=(2, 1), padding=(1, 3)), (2, 4, 5, 8)),
        ("conv2d 7×1 groups", lambda: nn.Conv2d(4, 6, (7, 1), stride=(1, 2), padding=(3, 0), groups=2), (2, 4, 8, 5)),
        ("conv2d one input", lambda: nn.Conv2d(1, 5, 3), (2, 1, 6, 6)),
        ("conv2d depthwise", lambda: nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4), (2, 4, 7, 6)),
        ("conv2d depthwise, two outputs each", lambda: nn.Conv2d(3, 6, (3, 5), padding=2, groups=3), (2, 3, 6, 6)),
        ("conv3d", lambda: nn.Conv3d(4, 3, (2, 3, 2), stride=(1, 2, 1), padding=1, groups=1), (2, 4, 4, 5, 4)),
        (
            "conv3d flat in one dimension, circular",
            lambda: nn.Conv3d(4, 4, (1, 3, 2), stride=(2, 1, 1), padding=(0, 1, 1), padding_mode="circular", groups=2),
            (1, 4, 4, 4, 4),
        ),
        (
            "conv_transpose1d output padding",
            lambda: nn.ConvTranspose1d(6, 4, 4, stride=3, padding=1, output_padding=2),
            (2, 6, 5),
        ),
        (
            "conv_transpose2d groups, output padding",
            lambda: nn.ConvTranspose2d(4, 6, (3, 4), stride=(2, 1), padding=1, output_padding=(1, 0), groups=2),
            (2, 4, 4, 5),
        ),
        (
            "conv_transpose2d 1×3 dilated",
            lambda: nn.ConvTranspose2d(4, 3, (1, 3), stride=2, dilation=(1, 2), output_padding=1, bias=False),
            (2, 4, 3, 4),
        ),
        ("conv_transpose2d depthwise", lambda: nn.ConvTranspose2d(3, 6, 3, stride=2, groups=3), (2, 3, 4, 3)),
    ]
)

EMBEDDINGS = (
    Geometry("embedding", lambda: nn.Embedding(11, 6), (3, 4), 11),
    Geometry("embedding of prime sizes, padding", lambda: nn.Embedding(67, 5, padding_idx=2), (2, 3, 4), 67),
)
# What methods that split a matrix into modes are tried on: odd, prime and large enough for three and four modes a side.
MATRICES = (
    *GEOMETRIES[:2],
    Geometry("linear of prime sizes", lambda: nn.Linear(17, 19), (2, 17)),
    Geometry("linear of three modes, no bias", lambda: nn.Linear(66, 64, bias=False), (2, 3, 66)),
    *EMBEDDINGS,
    Geometry("embedding of four modes", lambda: nn.Embedding(19, 16), (2, 3), 19),
)


@dataclass(frozen=True)
class Case:
    """A layer with what a method has prepared for it, in double precision."""

    module: nn.Module
    layer: LayerSpec
    weight: Tensor
    metric: Metric
    input: Tensor
    factors: Any

    @property
    def bias(self) -> Tensor | None:
        """The layer's."""
        return kind_named(self.layer).bias(self.module)


def correlated_metric(layer: LayerSpec, seed: int = 0, samples: int = 400) -> Metric:
    """Second moments of strongly correlated random patches and output gradients, as a trained layer would see them."""
    generator = torch.Generator().manual_seed(seed)
    g, o, i, *k = layer.group_shape

    def moment(size: int) -> Tensor:
        mix = torch.randn(g, size, size, generator=generator, dtype=torch.float64)
        scale = torch.arange(1, size + 1, dtype=torch.float64) ** -1.0
        data = (mix * scale) @ torch.randn(g, size, samples, generator=generator, dtype=torch.float64)
        return data @ data.mT / samples

    return Metric(patch=moment(i * math.prod(k)), gradient=moment(o))


def prepare(decomposition: Decomposition, geometry: Geometry, with_data: bool = True) -> Case:
    """Build the layer and, where the method fits, factorize it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(geometry.name))
        module = geometry.make().double()
        x = geometry.input()
    layer = specify(module, x)
    weight = kind_named(layer).weight(layer, module).detach()
    metric = correlated_metric(layer) if with_data else Metric()
    factors = None if decomposition.why_not(layer) else decomposition.factorize(layer, weight, metric)
    return Case(module, layer, weight, metric, x, factors)


def specify(module: nn.Module, x: Tensor) -> LayerSpec:
    """The `LayerSpec` of one module, under the name `LAYER_NAME`."""
    (layer,) = find_layers(nn.Sequential(OrderedDict([(LAYER_NAME, module)])), x)
    return layer


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    """Any layer of a known kind that is small, with an input that it takes."""
    kinds: list[Any] = [nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d]
    kind = draw(st.sampled_from(kinds))
    bias = draw(st.booleans())
    if kind is nn.Linear:
        sizes = draw(st.tuples(st.integers(1, 8), st.integers(1, 8)))
        return Geometry("linear", lambda: nn.Linear(*sizes, bias=bias), (draw(st.integers(1, 3)), sizes[0]))
    dims = int(kind.__name__[-2])

    def sizes_of(low: int, high: int) -> tuple[int, ...]:
        return draw(st.tuples(*[st.integers(low, high)] * dims))

    groups, kernel, stride, dilation = draw(st.integers(1, 3)), sizes_of(1, 4), sizes_of(1, 3), sizes_of(1, 2)
    channels = [groups * draw(st.integers(1, 5)) for _ in range(2)]
    options: dict[str, Any] = {"stride": stride, "dilation": dilation, "groups": groups, "bias": bias}
    span = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    padding = tuple(draw(st.integers(0, s // 2)) for s in span)
    if "Transpose" in kind.__name__:
        options["output_padding"] = tuple(
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        )
        options["padding"] = padding
        size = [2 + draw(st.integers(0, 3)) for _ in range(dims)]
    else:
        modes = ["zeros", "reflect", "replicate", "circular"]
        options["padding_mode"] = draw(st.sampled_from(modes))
        same = set(stride) == {1} and draw(st.booleans())
        options["padding"] = "same" if same else padding
        size = [s + draw(st.integers(0, 3)) for s in span]
    name = f"{kind.__name__}{channels}{kernel}{options}"
    shape = (draw(st.integers(1, 2)), channels[0], *size)
    return Geometry(name, lambda: kind(*channels, kernel, **options), shape)
