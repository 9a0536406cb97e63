"""What each way to better factors at the same cost is worth, on solved plans of ResNet-20 (CIFAR-10), without training.

::

    python benchmarks/factors.py --record

All variants build the same plans; kl is on 1,000 held-out training images, the refit sees 512 others. A ratio below 1
is better than the refit as it is in a search.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from machine import headed, write_record
from search_efficiency import prepared
from torch import Tensor, nn

from rankopt.decompositions import method
from rankopt.decompositions.metric import Metric
from rankopt.evaluate import Evaluator
from rankopt.factors import Factors
from rankopt.layer_spec import LayerSpec, group_weight
from rankopt.layers import inference
from rankopt.patches import patches
from rankopt.plan import Plan
from rankopt.refit import Refit, RefitOptions
from rankopt.search import Search
from rankopt.surgery import apply

RECORD = Path(__file__).parent.parent / "studies" / "records" / "factors.md"
BUDGETS = (0.7, 0.6, 0.5, 0.4, 0.3, 0.2)


def with_bias(search: Search, plan: Plan) -> nn.Module:
    """The last stage of every chain has a bias, which the refit solves for as well."""
    evaluator = search.evaluator
    built = apply(search.model, plan, search._factors, other_weights=True).eval()
    modules = dict(built.named_modules())
    chains = {n: modules[n] for n in plan.changed() if isinstance(modules[n], nn.Sequential)}
    for chain in chains.values():
        last = chain[-1]
        if last.bias is None:
            last.bias = nn.Parameter(last.weight.new_zeros(last.weight.shape[0]))
    assert evaluator.refit is not None
    evaluator.refit(built, {n: chain[-1] for n, chain in chains.items()})
    return built


def all_factors(search: Search, plan: Plan) -> nn.Module:
    """Layer after layer, the dense weight that fits best behind the compressed layers is solved for and factorized
    anew, truncated in the metric of the compressed network's inputs; then the usual refit."""
    evaluator, refit = search.evaluator, search.evaluator.refit
    assert refit is not None
    built = apply(search.model, plan, search._factors, other_weights=True).eval()
    modules = dict(built.named_modules())
    layers = {la.name: la for la in search.layers}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def before(chain: nn.Module, args: tuple[Tensor, ...]) -> None:
            solved_and_factorized(layers[name], plan, chain, args[0], refit, search._factors)  # type: ignore[arg-type]

        return before

    names = [n for n in refit.order if n in plan.changed()]
    handles = [modules[n].register_forward_pre_hook(hook(n)) for n in names]
    with inference(built):
        built(*refit.batches[0].args)
    for handle in handles:
        handle.remove()
    refit(built, {n: modules[n][-1] for n in names})  # type: ignore[index]
    assert evaluator
    return built


def solved_and_factorized(
    layer: LayerSpec, plan: Plan, chain: nn.Sequential, x: Tensor, refit: Refit, factors: Factors
) -> None:
    """Write new stage weights into a chain, just before it runs."""
    rows = patches(layer, x.float(), refit._positions[layer.name][0]).flatten(0, 1).transpose(0, 1).double()
    targets = refit._targets[layer.name][0].double().transpose(0, 1)
    gram, right = rows.mT @ rows, rows.mT @ targets
    weight = factors.weight(layer).double().flatten(2)
    pull = 1e-3 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * torch.eye(gram.shape[-1]).double()
    step = torch.linalg.solve(gram + pull, right - gram @ weight.mT)
    solved = (weight + step.mT).reshape(layer.group_shape)
    way, choice = method(plan[layer.name].method), plan[layer.name]
    metric = Metric(patch=gram / rows.shape[1])
    stages = way.stage_weights(layer, way.factorize(layer, solved, metric), choice.ranks)
    fresh = way.build(layer, [s.float() for s in way.polish(layer, stages, solved, metric)], None)
    with torch.no_grad():
        for old, new in zip(chain, fresh, strict=True):
            old.weight.copy_(new.weight)  # type: ignore[operator, union-attr]


def built_with(
    search: Search, refit: Refit | None = None, factors: Factors | None = None
) -> Callable[[Plan], nn.Module]:
    """Build as a search does, with another refit or other factors."""
    own = search.evaluator
    evaluator = Evaluator(
        search.model, search.layers, factors or search._factors, search.cost, search.validation, search.divergence,
        refit=refit or own.refit,
    )  # fmt: skip
    return evaluator.build


def plain(search: Search) -> Callable[[Plan], nn.Module]:
    """No refit at all."""
    return lambda plan: apply(search.model, plan, search._factors, other_weights=True).eval()


def weighted_by_gradients(search: Search) -> Factors:
    """Factors truncated in the metric of the inputs and of the output gradients, both sides weighted."""
    from rankopt.candidates import candidates
    from rankopt.space_file import tied_groups

    _, factors = candidates(
        search.model, search.layers, search.spaces, tied_groups(search.space_file, search.layers),
        search.calibration, search.divergence, options=search.options, gradient=True,
    )  # fmt: skip
    return factors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="resnet20", choices=["resnet20", "resnet56"])
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    search, _ = prepared(options.network, 1000, 512, precision="float32")
    plans = [search.space.solve(search.space.losses, b) for b in BUDGETS]
    assert group_weight
    batches = search.evaluator.refit.batches  # type: ignore[union-attr]
    twice = Refit(search.model, search.layers, batches, RefitOptions(passes=2))
    rows16 = Refit(search.model, search.layers, batches, RefitOptions(max_rows=2**16))
    variants: dict[str, Callable[[Plan], nn.Module]] = {
        "refit, as in a search": built_with(search),
        "no refit": plain(search),
        "a second pass": built_with(search, twice),
        "four times the output positions": built_with(search, rows16),
        "a bias in the last stage": lambda plan: with_bias(search, plan),
        "truncation weighted by output gradients too": built_with(search, factors=weighted_by_gradients(search)),
        "all factors anew, in the metric of the compressed inputs": lambda plan: all_factors(search, plan),
    }
    kl: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}
    for plan in plans:
        for name, build in variants.items():
            start = time.perf_counter()
            built = build(plan)
            seconds.setdefault(name, []).append(time.perf_counter() - start)
            kl.setdefault(name, []).append(search.evaluator.quality(built)["kl"])
    base, pace = np.array(kl["refit, as in a search"]), np.array(seconds["refit, as in a search"])
    rows = []
    for name in variants:
        ratio = np.array(kl[name]) / base
        cells = [f"{v:.3f}" for v in kl[name]]
        pace_ratio = np.median(np.array(seconds[name]) / pace)
        rows.append(f"| {name} | {' | '.join(cells)} | {np.median(ratio):.2f} | {pace_ratio:.1f} |")
        print(rows[-1], flush=True)
    lines = [
        *headed(
            "Better factors at the same cost",
            f"{options.network}, CIFAR-10, plans of the integer program at these shares of the MACs.",
        ),
        f"| kl | {' | '.join(f'{b:.0%}' for b in BUDGETS)} | times the refit's (median) | time to build, times |",
        "|---|" + "---|" * (len(BUDGETS) + 2),
        *rows,
    ]
    write_record(lines, RECORD if options.record else None)


if __name__ == "__main__":
    main()
