"""`svd_act`, `spatial_svd_act`, `tucker2_act`, `cp_act`: another method's chain with an activation between its stages.

The activation is a PReLU with a slope a channel (`Slopes`) that begins at 1, the identity. So the start is the linear
factorization to the last bit, and everything that is known of that one holds: prediction, ranks, refit (which solves
the last stage behind the activations). Training then moves the slopes, and the layer computes what no linear layer of
the same MACs can. A slope costs a parameter a channel, and a multiplication for every negative entry, which like
biases, activations and norms is not counted in MACs.

Without training they are their linear twins with some parameters more, so a search that does not train (``recovery:
{steps: ...}``) has no reason to choose them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from rankopt.decompositions.chained import ChainDecomposition, Stage
from rankopt.decompositions.decomposition import Factors, Ranks
from rankopt.decompositions.metric import Metric
from rankopt.layer_spec import LayerSpec
from rankopt.nn.chain import Chain
from rankopt.nn.slopes import Slopes


class Activated(ChainDecomposition):
    """The chain of another method with `Slopes` behind every stage but the last.

    Args:
        inner: the linear method, none whose stages share kernels (tensor_ring).
    """

    linear = False

    def __init__(self, inner: ChainDecomposition) -> None:
        self.inner = inner
        self.name = f"{inner.name}_act"
        self.twin, self.pointwise = inner.name, f"{inner.pointwise}_act"
        self.sliceable, self.exact = inner.sliceable, inner.exact

    def why_not(self, layer: LayerSpec) -> str | None:
        """As the linear method; rows of an embedding are looked up, with nothing to bend."""
        if layer.kind == "embedding":
            return f"an activation behind a table makes another table; take {self.twin}"
        return self.inner.why_not(layer)

    def rank_names(self, layer: LayerSpec) -> tuple[str, ...]:
        """As the linear method."""
        return self.inner.rank_names(layer)

    def rank_bounds(self, layer: LayerSpec) -> dict[str, int]:
        """As the linear method."""
        return self.inner.rank_bounds(layer)

    def stages(self, layer: LayerSpec, ranks: Ranks) -> list[Stage]:
        """The linear maps; activations stand between them."""
        return self.inner.stages(layer, ranks)

    def params(self, layer: LayerSpec, ranks: Ranks) -> Any:
        """Those of the linear method and a slope for every channel between two stages."""
        total = self.inner.params(layer, ranks)
        for stage in self.stages(layer, ranks)[:-1]:
            total = total + layer.groups * stage.outputs
        return total

    def factorize(self, layer: LayerSpec, weight: Tensor, metric: Metric) -> Factors:
        """As the linear method."""
        return self.inner.factorize(layer, weight, metric)

    def stage_weights(self, layer: LayerSpec, factors: Factors, ranks: Mapping[str, int]) -> list[Tensor]:
        """As the linear method: the slopes are not among them, they begin at 1."""
        return self.inner.stage_weights(layer, factors, ranks)

    def reconstruct(self, layer: LayerSpec, weights: Sequence[Tensor]) -> Tensor:
        """The dense weight while all slopes are 1."""
        return self.inner.reconstruct(layer, weights)

    def ranks_of(self, layer: LayerSpec, weights: Sequence[Tensor]) -> dict[str, int]:
        """As the linear method."""
        return self.inner.ranks_of(layer, weights)

    def lost(self, factors: Factors, ranks: Ranks) -> Any:
        """As the linear method."""
        return self.inner.lost(factors, ranks)

    def weights_of(self, layer: LayerSpec, ranks: Mapping[str, int], built: nn.Module) -> list[Tensor]:
        """Of the stages; raises `ValueError` where no slopes are between them."""
        modules = list(built.children())
        if len(modules) < 3 or not all(isinstance(m, Slopes) == (n % 2 == 1) for n, m in enumerate(modules)):
            raise ValueError("has no chain with activations there")
        return self.inner.weights_of(layer, ranks, nn.Sequential(*modules[::2]))

    def bent(self, built: nn.Module) -> str | None:
        """Once a slope is no longer 1."""
        moved = sum(module.moved for module in built.children() if isinstance(module, Slopes))
        return f"training has moved {moved} slopes of its activations; {self.twin} stays linear" if moved else None

    def build(self, layer: LayerSpec, weights: Sequence[Tensor], bias: Tensor | None) -> Chain:
        """The chain with slopes of 1 between its stages."""
        modules: list[nn.Module] = []
        for module, weight in zip(self.inner.build(layer, weights, bias), weights, strict=True):
            channels = weight.shape[0] * weight.shape[1]
            modules += [module, Slopes(channels, layer.dims, weight)]
        return Chain(*modules[:-1])
