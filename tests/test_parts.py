"""Stages and roles, and what their corrections do to plans."""

from __future__ import annotations

import pytest
from test_space import group

from rankopt.candidates import Group
from rankopt.parts import roles, stages
from rankopt.plan import Plan
from rankopt.space import SearchSpace

BLOCKS = [group(f"layer{n // 2}.{n // 2}.conv{n % 2 + 1}", n, size=16 >> (n // 4)) for n in range(8)]


def names(groups: list[Group], last: str) -> set[str]:
    return {g.name for g in groups if g.name.endswith(last)}


def test_roles_are_names_that_blocks_share() -> None:
    assert roles(BLOCKS) == {"conv1": names(BLOCKS, "conv1"), "conv2": names(BLOCKS, "conv2")}


@pytest.mark.parametrize(
    "given",
    [
        ["conv1", "layer1.conv2", "layer2.conv2"],  # one name is shared, the other stands alone
        ["features.0", "features.3", "classifier.0", "classifier.3"],  # numbers say nothing
        [f"block{b}.l{n}" for b in range(2) for n in range(7)],  # too many to be learned
        ["a", "b", "c"],
        [],
    ],
)
def test_there_are_no_roles_where_names_say_nothing(given: list[str]) -> None:
    assert roles([group(name, n) for n, name in enumerate(given)]) == {}


def test_stages_are_cut_where_the_size_changes() -> None:
    found = stages(BLOCKS)
    assert found == {"16x16": {g.name for g in BLOCKS[:4]}, "8x8": {g.name for g in BLOCKS[4:]}}


def test_a_correction_of_a_role_moves_the_layers_of_that_role() -> None:
    totals = {q: sum(float(getattr(la, q)) for g in BLOCKS for la in g.layers) for q in ("macs", "params")}
    space = SearchSpace(BLOCKS, {"macs": 0.0, "params": 0.0}, totals, {"macs": 0.4 * totals["macs"]})
    assert {"role.conv1", "role.conv2"} <= set(space.parameters())

    def lost(plan: Plan, role: str) -> float:
        chosen = [g for g in BLOCKS if g.name.endswith(role)]
        return sum(float(g.losses[g.choices.index(plan[g.name])]) for g in chosen)

    dear = space.plan_of({"budget": 0.4, "role.conv2": 1.5})
    cheap = space.plan_of({"budget": 0.4, "role.conv2": -1.5})
    assert lost(dear, "conv2") < lost(cheap, "conv2")
    assert lost(dear, "conv1") > lost(cheap, "conv1")
