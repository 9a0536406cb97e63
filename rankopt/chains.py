"""`Chain`: a decomposed layer inside a model, the weights of its stages, and the dense weight that they stand for.

`merged` puts a compressed model back into the dense shape: the same function, with the products as weights.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankopt.decompositions import method
from rankopt.errors import LayerError, PlanError
from rankopt.layer_spec import KINDS, LayerSpec, ungroup_weight
from rankopt.layers import static_layers
from rankopt.nn.folded import Folded
from rankopt.nn.rebuilt import Rebuilt
from rankopt.nn.slopes import Slopes
from rankopt.plan import LayerChoice, Plan
from rankopt.surgery import checked


@dataclass(frozen=True)
class Chain:
    """A layer, what was chosen for it, and the modules that stand in its place."""

    layer: LayerSpec
    choice: LayerChoice
    modules: nn.Sequential | Rebuilt

    @property
    def stages(self) -> list[nn.Module]:
        """The modules that have weights: all but the activations between them."""
        return [module for module in self.modules.children() if not isinstance(module, Slopes)]

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias, which the last stage holds."""
        holder: Any = self.modules if isinstance(self.modules, Rebuilt) else self.stages[-1]
        return holder.bias

    @property
    def moved(self) -> int:
        """How many slopes between the stages are no longer 1; with any, no dense layer computes the same."""
        return sum(module.moved for module in self.modules.children() if isinstance(module, Slopes))

    def weights(self) -> list[Tensor]:
        """Weights of the stages, as from `Decomposition.stage_weights`: views of the parameters, with gradients."""
        if isinstance(self.modules, Rebuilt):
            return list(self.modules.factors)
        shapes = method(self.choice.method).stage_shapes(self.layer, self.choice.ranks)
        return [_stage_weight(module, shape) for module, shape in zip(self.stages, shapes, strict=True)]

    def product(self) -> Tensor:
        """The dense weight (groups, out, in, *kernel) that the stages stand for; gradients reach all factors.

        Activations between them are passed over: it is that of slopes of 1.
        """
        return method(self.choice.method).reconstruct(self.layer, self.weights())

    def components(self) -> list[Tensor]:
        """For every stage that mixes channels, its rank components as rows: (groups, rank, entries).

        Those of the last stage are its inputs, those of the others their outputs. A layer that rebuilds its weight has
        none.
        """
        found: list[Tensor] = []
        if isinstance(self.modules, Rebuilt):
            return found
        stages = method(self.choice.method).stages(self.layer, self.choice.ranks)
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
        chain = modules.get(layer.name)
        shapes = method(choice.method).stage_shapes(layer, choice.ranks)
        one = Chain(layer, choice, chain) if isinstance(chain, nn.Sequential | Rebuilt) else None
        if one is None or not _made_by(one, len(shapes)):
            raise PlanError(f"{layer.name}: the plan says {choice}, but the model was not made by it")
        try:
            fits = [tuple(w.shape) for w in one.weights()] == [tuple(shape) for shape in shapes]
        except RuntimeError:
            fits = False
        if not fits:
            raise PlanError(f"{layer.name}: the plan says {choice}, but the model has other ranks there")
        found.append(one)
    return found


def decomposed(dense: nn.Module, model: nn.Module) -> list[str]:
    """Names of the layers of `dense` in whose place `model` has something else; needs no plan."""
    modules = dict(model.named_modules(remove_duplicate=False))
    names = (layer.name for layer in static_layers(dense))
    return [name for name in names if name in modules and type(modules[name]) not in KINDS]


def merged(dense: nn.Module, model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of `dense` that computes what `model` computes: weights are the products, all else is the model's.

    The way back from ``apply(dense, plan)``, whether the result was trained further or not.

    Raises:
        PlanError: the model was not made by this plan.
        LayerError: training has moved an activation between the stages of a layer, which no dense layer computes.
    """
    found = chains(dense, model, plan)
    for chain in found:
        if chain.moved:
            raise LayerError(
                f"{chain.layer.name}: {chain.choice} can't be put back into the dense shape: training has moved"
                f" {chain.moved} slopes of its activations, and no dense layer computes the same; use"
                f" {method(chain.choice.method).twin} where that is needed"
            )
    result, state = copy.deepcopy(dense), model.state_dict()
    with torch.no_grad():
        for chain in found:
            weight = ungroup_weight(chain.layer, chain.product())
            for name in (chain.layer.name, *chain.layer.aliases):
                dot = f"{name}." if name else ""
                state[f"{dot}weight"] = weight
                if chain.layer.bias:
                    state[f"{dot}bias"] = chain.bias
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
            if isinstance(chain.modules, Rebuilt):
                continue
            stages = method(chain.choice.method).stages(chain.layer, chain.choice.ranks)
            weights = chain.weights()
            shared = any(isinstance(module, Folded) for module in chain.modules)
            own = {p.untyped_storage().data_ptr() for p in chain.modules.parameters()}
            if shared or any(w.untyped_storage().data_ptr() not in own for w in weights):
                continue
            for _ in range(sweeps if len(weights) > 2 else 1):
                for number in range(len(weights) - 1):
                    _balanced(weights[number], weights[number + 1], stages[number + 1].depthwise)


def _made_by(chain: Chain, stages: int) -> bool:
    """Whether the modules are of the kind that the choice's method builds."""
    way = method(chain.choice.method)
    if isinstance(chain.modules, Rebuilt):
        return way.saves == "params" and len(chain.modules.factors) == stages
    activations = len(chain.modules) - len(chain.stages)
    return len(chain.stages) == stages and (activations == 0) == way.linear and way.saves == "macs"


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


def _stage_weight(module: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """A stage's weight out of the module that `Decomposition.build` made of it."""
    inner: Any = module.conv if isinstance(module, Folded) else module
    weight: Tensor = inner.weight
    if weight.dim() > 2 and inner.transposed:
        weight = weight.reshape(inner.groups, -1, *weight.shape[1:]).transpose(1, 2)
    return weight.reshape(shape)
