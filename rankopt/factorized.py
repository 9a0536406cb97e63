"""`factorized`: a net in factorized form from the beginning, to be trained that way.

    net, plan = factorized(model, images[:1], keep=0.25)
    trained = recover(net, model, loader, plan=plan, distill=0, decay_on="product", lr=0.1, steps=10_000).model

Every layer gets the ranks that lose least of its (random) weight at the given share of its MACs, the weights come from
its decomposition, and neighbouring factors get equal norms: the spectral initialization of Khodak, Tenenholtz, Mackey
and Fusi ("Initialization and regularization of factorized neural layers", 2021), who also show that weight decay
belongs on the product (``decay_on="product"``). ``orthogonality`` is the other regularization.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from rankopt.chains import balance, chains
from rankopt.decompositions import method
from rankopt.decompositions.metric import Metric
from rankopt.errors import InputError
from rankopt.kinds import kind_named
from rankopt.layer_patterns import matching
from rankopt.layers import LayerSpec, find_layers, fingerprint
from rankopt.plan import DENSE, LayerChoice, Plan
from rankopt.rank_split import split
from rankopt.surgery import apply


def factorized(
    model: nn.Module,
    example_input: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    keep: float = 0.5,
    methods: Sequence[str] = ("spatial_svd", "svd"),
    dense: Sequence[str] = (),
    rank_multiple: int = 1,
) -> tuple[nn.Module, Plan]:
    """A copy of a net whose layers are products, and the plan that says how.

    Args:
        model: as its constructor initialized it (or trained; then this is a uniform compression).
        example_input, example_kwargs: a call of it.
        keep: the share of its MACs that every layer keeps at most.
        methods: the first one that fits a layer is taken.
        dense: patterns of layers that stay dense, e.g. the first and the last one.
        rank_multiple: ranks are multiples of it.

    Raises:
        InputError: nothing can be factorized, or `keep` is not between 0 and 1.
    """
    if not 0 < keep <= 1:
        raise InputError(f"keep: must lie above 0 and at most at 1, got {keep}")
    layers = find_layers(model, example_input, example_kwargs)
    kept = {layer.name for pattern in dense for layer in matching(pattern, layers, "dense")}
    modules = dict(model.named_modules(remove_duplicate=False))
    choices: dict[str, LayerChoice] = {}
    weights: dict[str, list[Tensor]] = {}
    for layer in layers:
        choices[layer.name] = DENSE
        if layer.skip is not None or layer.name in kept:
            continue
        for name in methods:
            way = method(name)
            if way.why_not(layer) is not None:
                continue
            parent: Any = modules[layer.name]
            prepared = way.factorize(layer, kind_named(layer).weight(layer, parent).detach().float(), Metric())
            ranks = split(way, layer, prepared, [keep], rank_multiple).get(keep)
            if ranks is not None:
                choices[layer.name] = LayerChoice(name, ranks)
                weights[layer.name] = way.stage_weights(layer, prepared, ranks)
            break
    skipped = {layer.name: layer.skip for layer in layers if layer.skip}
    choices = {name: choice for name, choice in choices.items() if name not in skipped}
    plan = Plan(choices, fingerprint(model, layers), skipped)
    if not plan.changed():
        raise InputError(f"model: none of its {len(layers)} layers can be factorized to {keep:.0%} of its MACs")

    def give(layer: LayerSpec, choice: LayerChoice) -> list[Tensor]:
        return weights[layer.name]

    net = apply(model, plan, give)
    balance(chains(model, net, plan))
    return net, plan
