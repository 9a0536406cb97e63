"""`Chain`: a decomposed layer inside a model, the tensors of its module, and the dense weight that they stand for.

`merged` puts a compressed model back into the dense shape: the same function, with the products as weights.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankopt.decompositions import method
from rankopt.decompositions.chained import ChainDecomposition
from rankopt.errors import LayerError, PlanError
from rankopt.kinds import kind_named
from rankopt.layer_spec import LayerSpec
from rankopt.layers import static_layers
from rankopt.nn.folded import Folded
from rankopt.plan import LayerChoice, Plan
from rankopt.surgery import checked


@dataclass(frozen=True)
class Chain:
    """A layer, what was chosen for it, and what stands in its place: a row of modules, or one of another kind."""

    layer: LayerSpec
    choice: LayerChoice
    modules: nn.Module

    def weights(self) -> list[Tensor]:
        """Its tensors, as from `Decomposition.stage_weights`: views of the parameters, with gradients."""
        return method(self.choice.method).weights_of(self.layer, self.choice.ranks, self.modules)

    @property
    def bent(self) -> str | None:
        """Why no product computes the same, as it is now; None where one does."""
        return method(self.choice.method).bent(self.modules)

    def product(self) -> Tensor:
        """The dense weight (groups, out, in, *kernel) that it computes with; gradients reach all factors.

        Activations between stages are passed over.
        """
        return method(self.choice.method).reconstruct(self.layer, self.weights())

    def components(self) -> list[Tensor]:
        """For every stage that mixes channels, its rank components as rows: (groups, rank, entries).

        Those of the last stage are its inputs, those of the others their outputs. What is no chain has none.
        """
        found: list[Tensor] = []
        way = method(self.choice.method)
        if not isinstance(way, ChainDecomposition):
            return found
        stages = way.stages(self.layer, self.choice.ranks)
        for number, (stage, weight) in enumerate(zip(stages, self.weights(), strict=True)):
            if stage.depthwise:
                continue
            rows = weight.transpose(1, 2) if number == len(stages) - 1 else weight
            found.append(rows.flatten(2))
        return found


def chains(dense: nn.Module, model: nn.Module, plan: Plan) -> list[Chain]:
    """The chains that stand in `model` where `plan` changed `dense`.

    Raises:
        PlanError: the model was not made by this plan.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found = []
    for layer, choice in checked(dense, plan, weights=False):
        if layer.name not in modules:
            raise PlanError(f"{layer.name}: the plan says {choice}, but the model was not made by it")
        found.append(Chain(layer, choice, modules[layer.name]))
        try:
            found[-1].weights()
        except ValueError as error:
            raise PlanError(f"{layer.name}: the plan says {choice}, but the model {error}") from None
    return found


def decomposed(dense: nn.Module, model: nn.Module) -> list[str]:
    """Names of the layers of `dense` in whose place `model` has something else; needs no plan."""
    modules = dict(model.named_modules(remove_duplicate=False))
    before = dict(dense.named_modules(remove_duplicate=False))
    names = (layer.name for layer in static_layers(dense))
    return [name for name in names if name in modules and type(modules[name]) is not type(before[name])]


def merged(dense: nn.Module, model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of `dense` that computes what `model` computes: weights are the products, all else is the model's.

    The way back from ``apply(dense, plan)``, whether the result was trained further or not.

    Raises:
        PlanError: the model was not made by this plan.
        LayerError: no dense layer computes what stands in the place of one; says why.
    """
    found = chains(dense, model, plan)
    for chain in found:
        if (why := chain.bent) is not None:
            raise LayerError(f"{chain.layer.name}: no dense layer computes what {chain.choice} does now: {why}")
    result, state = copy.deepcopy(dense), model.state_dict()
    with torch.no_grad():
        for chain in found:
            way, layer = method(chain.choice.method), chain.layer
            entries = kind_named(layer).state(layer, chain.product(), way.bias_of(chain.modules))
            for name in (layer.name, *layer.aliases):
                state |= {f"{name}.{key}" if name else key: value for key, value in entries.items()}
            for name in layer.tied:
                state[f"{name}.weight"] = entries["weight"]
                bias = way.bias_of(model.get_submodule(name))
                if bias is not None:
                    state[f"{name}.bias"] = bias
        own = result.state_dict()
        for name, value in own.items():
            if isinstance(value, Tensor):
                value.copy_(state[name])
    return result


def balance(chains: Sequence[Chain], sweeps: int = 4) -> None:
    """Give neighbouring stages rank components of equal norm, in place; the products stay as they are.

    For a singular value decomposition it is U·√Σ and √Σ·Vᵀ, the spectral initialization of Khodak et al. (2021). Stages
    that share a kernel between blocks of channels, or whose weights lie in another order in memory (transposed
    convolutions), stay as they are.
    """
    with torch.no_grad():
        for chain in chains:
            way = method(chain.choice.method)
            if not isinstance(way, ChainDecomposition) or not way.linear:
                continue
            stages, weights = way.stages(chain.layer, chain.choice.ranks), chain.weights()
            shared = any(isinstance(module, Folded) for module in chain.modules.children())
            own = {p.untyped_storage().data_ptr() for p in chain.modules.parameters()}
            if shared or any(w.untyped_storage().data_ptr() not in own for w in weights):
                continue
            for _ in range(sweeps if len(weights) > 2 else 1):
                for number in range(len(weights) - 1):
                    _balanced(weights[number], weights[number + 1], stages[number + 1].depthwise)


def _balanced(first: Tensor, second: Tensor, depthwise: bool) -> None:
    before = first.flatten(2).norm(dim=2) if first.dim() > 2 else first.abs()  # (groups, channels between)
    if depthwise:
        spread = second.reshape(*before.shape, -1)
        after = spread.norm(dim=2)
    else:
        after = second.transpose(1, 2).flatten(2).norm(dim=2)
    usable = (before > 0) & (after > 0)
    scale = torch.where(usable, after / before.clamp_min(1e-30), torch.ones_like(before)).sqrt()
    first.mul_(scale.reshape(*scale.shape, *(1,) * (first.dim() - 2)))
    if depthwise:
        spread.div_(scale[..., None])
    else:
        second.div_(scale.reshape(scale.shape[0], 1, scale.shape[1], *(1,) * (second.dim() - 3)))
