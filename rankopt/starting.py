"""Plans that a study starts with: given by name, checked against its model, and made plans of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from rankopt.errors import PlanError, RankoptError
from rankopt.layer_spec import LayerSpec
from rankopt.plan import Fingerprint, LayerChoice, Plan
from rankopt.surgery import checked


def starting_plans(
    given: Mapping[str, Plan], model: nn.Module, layers: Sequence[LayerSpec], own: Fingerprint
) -> list[Plan]:
    """The plans as plans of this model, each once. Those of the same architecture with other weights will do.

    Args:
        given: what names a plan → plan.
        model, layers, own: the dense model, its layers and its fingerprint.

    Raises:
        PlanError: one does not fit; names it, and the first difference.
    """
    skipped = {layer.name: layer.skip for layer in layers if layer.skip}
    found: dict[str, Plan] = {}
    for name, plan in given.items():
        try:
            checked(model, plan, weights=False)
        except RankoptError as error:
            raise PlanError(f"start: {name}: {error.message.removeprefix('plan: ')}") from None
        for layer in plan.changed():
            if layer in skipped:
                raise PlanError(f"start: {name}: {layer}: can't be decomposed: {skipped[layer]}")
        found.setdefault(plan.digest, Plan(plan.layers, own, skipped))
    return list(found.values())


def joined(plans: Sequence[Plan], earlier: Sequence[Plan]) -> list[Plan]:
    """These, and those that an earlier run of the study started with, which are as much part of it."""
    return list({plan.digest: plan for plan in [*earlier, *plans]}.values())


def choices_of(plans: Iterable[Plan]) -> dict[str, list[LayerChoice]]:
    """Layer → what these plans make of it."""
    found: dict[str, list[LayerChoice]] = {}
    for plan in plans:
        for name, choice in plan.changed().items():
            found.setdefault(name, []).append(choice)
    return found
