"""Ways to choose plans: each keeps the limits, goes on after an interruption, and does what it says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from test_space import FIXED, GROUPS, cost, made, totals
from test_study import DENSE, measure

from rankopt.candidates import Group
from rankopt.errors import InputError
from rankopt.limits import parse_limit
from rankopt.pareto import hypervolume
from rankopt.plan import DENSE as DENSE_CHOICE
from rankopt.plan import Plan
from rankopt.result import Entry
from rankopt.sampling import SAMPLERS, Told
from rankopt.strategies import DEFAULT, STRATEGIES, strategy
from rankopt.strategies.solved import Solved, spread
from rankopt.strategies.strategy import Exhausted, Line, Proposal, Setting, Standing, Strategy
from rankopt.study_file import SAMPLER_NAMES, STRATEGY_NAMES

WITH_ENERGY = [
    Group(g.layers, g.choices, g.losses, g.macs, g.params, {}, 1 - g.macs / g.macs.max()) for g in GROUPS
]  # fmt: skip


def anew(plan: Plan) -> list[np.ndarray]:
    """Predicted changes around a plan, as if losses added up."""
    return [g.losses - g.losses[g.choices.index(plan[g.name])] for g in GROUPS]


def setting(limits: dict[str, float] | None = None, trials: int = 40, seed: int = 0, **options: Any) -> Setting:
    space = made(limits or {}, groups=WITH_ENERGY)
    given = [parse_limit(f"{q}<={100 * v:g}%") for q, v in (limits or {}).items()]
    return Setting(
        space, ("kl", "macs"), given, DENSE, trials, seed, sensitivities=anew, estimated=lambda g, m: 0.5, **options
    )


class Run:
    """A study without one: proposes, measures, tells."""

    def __init__(self, name: str, given: Setting) -> None:
        self.given, self.strategy = given, STRATEGIES[name](given)
        self.history: list[tuple[Proposal, Told]] = []
        self.entries: dict[str, Entry] = {}

    def go(self, until: int) -> Run:
        while len(self.history) < until:
            number = len(self.history)
            try:
                proposal = self.strategy.propose(Standing(number, list(self.entries.values())))
            except Exhausted:
                break
            found = measure(proposal.plan, self.given.limits)
            excess = {str(li): li.violation(found.measurements, DENSE) for li in self.given.limits}
            kl = found.measurements.get("kl")
            told = Told(proposal.numbers, [kl, found.measurements["macs"]], excess, proposal.marks)
            if kl is not None:
                entry = Entry(number, proposal.plan, found.measurements, max([0.0, *excess.values()]) <= 0)
                self.entries.setdefault(proposal.plan.digest, entry)
            self.strategy.told(proposal, told)
            self.history.append((proposal, told))
        return self

    @property
    def digests(self) -> list[str]:
        return [p.plan.digest for p, _ in self.history]

    @property
    def volume(self) -> float:
        points = [(e.measurements["kl"], e.measurements["macs_kept"]) for e in self.entries.values()]
        return hypervolume(points, (3.0, 1.0))


NAMES = list(STRATEGIES)
SEARCHING = ["mixed", "correct", "fit", "local", "relinearize", "free"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("limits", [{}, {"macs": 0.6}, {"macs": 0.7, "params": 0.8}])
def test_proposals_are_plans_of_the_space_and_keep_exact_limits(name: str, limits: dict[str, float]) -> None:
    run = Run(name, setting(limits, 24)).go(24)
    assert run.history
    for proposal, _ in run.history:
        assert run.given.space.picks(proposal.plan) is not None
        one_rule = name in ("uniform", "energy", "vbmf") and "params" not in limits  # they look at their budget alone
        if one_rule or name not in ("free", "plain", "greedy", "uniform", "energy", "vbmf"):
            for q, share in limits.items():
                assert cost(proposal.plan, q) <= share * totals()[q] * (1 + 1e-9)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("free", "plain")])
def test_no_plan_is_proposed_twice_but_by_chance(name: str) -> None:
    digests = Run(name, setting({"macs": 0.7}, 30)).go(30).digests
    again = len(digests) - len(set(digests))
    assert again <= 2


def test_where_corrections_mean_a_known_plan_another_is_fitted() -> None:
    run = Run("correct", setting({"macs": 0.7}, 30)).go(30)
    place = {digest: n for n, digest in reversed(list(enumerate(run.digests)))}
    others = [(n, p) for n, (p, _) in enumerate(run.history) if p.by != "correct"]
    assert others
    for n, proposal in others:
        numbers = {name: float(value) for name, value in proposal.numbers.items()}
        assert place[run.given.space.plan_of(numbers).digest] < n == place[proposal.plan.digest]


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_decides(name: str) -> None:
    one, two = (Run(name, setting({"macs": 0.7}, 24)).go(24).digests for _ in range(2))
    assert one == two
    if name in ("mixed", "correct", "fit", "local", "free", "plain"):
        assert Run(name, setting({"macs": 0.7}, 24, seed=1)).go(24).digests != one


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cut", [3, 17])
def test_one_that_is_made_anew_goes_on_as_the_old_one_would(name: str, cut: int) -> None:
    whole = Run(name, setting({"macs": 0.7}, 30)).go(30)
    first = Run(name, setting({"macs": 0.7}, 30)).go(cut)
    second = Run(name, setting({"macs": 0.7}, 30))
    second.strategy.recall(first.history)
    second.history, second.entries = list(first.history), dict(first.entries)
    assert second.go(30).digests == whole.digests


@pytest.mark.parametrize("name", SEARCHING)
def test_solved_plans_come_first(name: str) -> None:
    given = setting({}, 30)
    solved = [Solved(given).at(n).digest for n in range(10)]
    assert Run(name, given).go(10).digests == solved
    assert len(set(solved)) == 10


@pytest.mark.parametrize("limit", [None, 0.7])
def test_every_beginning_of_the_solved_plans_is_spread_over_the_range(limit: float | None) -> None:
    solved = Solved(setting({} if limit is None else {"macs": limit}, 36))
    budgets = [solved.budget(n) for n in range(12)]
    space = solved.space
    assert sorted(budgets) == pytest.approx(np.linspace(space.lowest, space.top, 12))
    assert budgets.index(max(budgets)) == (11 if limit is None else 0)  # without a limit it is dense
    assert budgets.index(min(budgets)) == (10 if limit is None else 11)
    for count in range(1, 12):
        inside = count - (limit is not None)  # places between the ends
        gaps = np.diff(sorted([space.lowest, *budgets[:count], space.top]))
        assert gaps.max() <= (1.0 if inside == 0 else 0.6 if inside < 3 else 0.3) * (space.top - space.lowest)
    later = [solved.budget(n) for n in range(12, 40)]
    assert len({round(b, 9) for b in later}) == 28


def test_the_order_takes_the_place_that_is_farthest_from_all_before() -> None:
    assert [spread(n) for n in (1, 2, 3, 4, 5)] == [[0], [1], [1, 2], [1, 2, 3], [2, 3, 1, 4]]
    for count in (2, 7, 12, 33):
        order = spread(count)
        assert sorted(order) == list(range(1, count))
        for n in range(1, len(order) - 1):
            far = [min(abs(place - t) for t in (0, count - 1, *order[:n])) for place in (order[n], *order[n + 1 : -1])]
            assert far[0] == max(far)


@pytest.mark.parametrize("name", ["mixed", "correct", "fit"])
def test_measuring_beats_solving_alone(name: str) -> None:
    """The made-up measurement gets some layers wrong by a factor; who learns that finds better plans."""
    volumes = [Run(name, setting({}, 60, seed)).go(60).volume for seed in range(3)]
    assert np.median(volumes) > Run("solved", setting({}, 60)).go(60).volume


def test_searching_beats_plain_optuna() -> None:
    ours = Run(DEFAULT, setting({}, 40)).go(40).volume
    assert ours > max(Run("plain", setting({}, 40, sampler=s)).go(40).volume for s in ("tpe", "nsga2", "random"))


def test_a_step_stays_near_the_front() -> None:
    run = Run("local", setting({}, 40)).go(39)
    front = Line.of(run.given.space, list(run.entries.values())).front()
    plan = run.strategy.propose(Standing(39, list(run.entries.values()))).plan
    moved = [sum(plan[g.name] != e.plan[g.name] for g in GROUPS) for e in front.entries]
    assert min(moved) <= 8


def test_around_a_plan_the_new_predictions_count() -> None:
    """Sensitivities that make one layer's compression free are followed."""

    def free_first(plan: Plan) -> list[np.ndarray]:
        return [
            np.zeros(len(g.choices)) if n == 0 else 10 * v
            for n, (g, v) in enumerate(zip(GROUPS, anew(plan), strict=True))
        ]

    given = setting({}, 40)
    run = Run("relinearize", Setting(**{**vars(given), "sensitivities": free_first})).go(30)
    later = [p.plan for p, _ in run.history[12:] if p.by == "relinearize" and p.marks]
    assert later
    first = GROUPS[0]
    share = [first.macs[first.choices.index(p["l0"])] / first.macs.max() for p in later]
    assert np.median(share) < 0.6


def test_without_new_predictions_relinearize_is_fit() -> None:
    given = Setting(**{**vars(setting({}, 24)), "sensitivities": None})
    assert Run("relinearize", given).go(24).digests == Run("fit", given).go(24).digests


@pytest.mark.parametrize("name", ["uniform", "energy", "vbmf"])
def test_one_rule_for_all_layers(name: str) -> None:
    run = Run(name, setting({}, 16)).go(16)
    for proposal, _ in run.history:
        assert len(set(proposal.plan.methods()) - {"dense"}) <= 1
    for budget in (0.9, 0.6, 0.4):
        picks = run.strategy.within("svd", budget)  # type: ignore[attr-defined]
        spent = cost(run.given.space.plan(picks), "macs") / totals()["macs"]
        assert spent <= budget
        assert spent > budget - 0.25


def test_uniform_keeps_the_same_share_everywhere() -> None:
    way = STRATEGIES["uniform"](setting({}, 16))
    for group in WITH_ENERGY:
        pick = way.choice(group, "svd", 0.5)  # type: ignore[attr-defined]
        kept = group.macs[pick] / group.macs.max()
        own = [group.macs[n] / group.macs.max() for n, c in enumerate(group.choices) if c.method == "svd"]
        assert kept == max([k for k in own if k <= 0.5], default=min(own))


def test_energy_keeps_the_same_share_of_energy_everywhere() -> None:
    way = STRATEGIES["energy"](setting({}, 16))
    for group in WITH_ENERGY:
        pick = way.choice(group, "svd", 0.4)  # type: ignore[attr-defined]
        good = [n for n, c in enumerate(group.choices) if c.method == "svd" and group.energy[n] <= 0.4]
        if good:
            assert group.macs[pick] == min(group.macs[n] for n in good)
        else:
            assert group.choices[pick] == DENSE_CHOICE


def test_greedy_measures_layers_alone_and_then_takes_one_threshold() -> None:
    given = setting({}, 400)
    run = Run("greedy", given)
    ladder = run.strategy.ladder  # type: ignore[attr-defined]
    run.go(len(ladder) + 6)
    alone = [p.plan.changed() for p, _ in run.history[: len(ladder)]]
    tied = {la.name for la in GROUPS[4].layers}
    assert all(len(changed) == 1 or set(changed) == tied for changed in alone)
    lost: dict[tuple[int, int], float] = {}
    for step, (_, told) in zip(ladder, run.history, strict=False):
        assert told.values is not None
        lost[step] = float(told.values[0] or 0.0)
    for proposal, _ in run.history[len(ladder) :]:
        picks = given.space.picks(proposal.plan)
        assert picks is not None
        taken = [lost[n, pick] for n, pick in enumerate(picks) if (n, pick) in lost]
        worst = max(taken, default=0.0)
        for n, pick in enumerate(picks):  # of every layer the cheapest step at or below the threshold
            good = [s for (at, s), v in lost.items() if at == n and v <= worst]
            if good:
                assert GROUPS[n].macs[pick] == min(GROUPS[n].macs[s] for s in good)


def test_a_limit_on_quality_is_asked_for_at_its_edge() -> None:
    given = setting({}, 40)
    given = Setting(**{**vars(given), "limits": [parse_limit("kl<=0.15")]})
    for name in ("mixed", "correct", "fit"):
        run = Run(name, given).go(40)
        kept = [e for e in run.entries.values() if float(e.measurements["kl"] or 9) <= 0.15]
        solved = Run("solved", setting({}, 12)).go(12).entries.values()
        assert min(float(e.measurements["macs"] or 0) for e in kept) < min(
            float(e.measurements["macs"] or 0) for e in solved if float(e.measurements["kl"] or 9) <= 0.15
        )


def test_what_each_point_adds_to_a_front() -> None:
    run = Run("solved", setting({}, 12)).go(12)
    line = Line.of(run.given.space, list(run.entries.values()))
    whole = hypervolume(line.points, (3.0, 1.0))
    for n, own in enumerate(line.own()):
        assert own == pytest.approx(whole - hypervolume(np.delete(line.points, n, 0), (3.0, 1.0)))
    assert (np.diff(line.front().points[:, 0]) > 0).all()
    shares = [cost(e.plan, "macs") / totals()["macs"] for e in line.entries]
    assert line.points[:, 1] == pytest.approx(shares)
    assert FIXED["macs"] > 0  # what lies outside of the groups is counted


def test_plans_of_other_spaces_are_passed_over() -> None:
    entry = Entry(0, Plan({}), {"kl": 0.1, "macs": 1.0}, True)
    whole = Run("solved", setting({}, 12)).given.space
    foreign = Entry(1, Plan({**whole.solve(whole.losses, 0.5).layers, "l0": _odd()}), {"kl": 0.1, "macs": 1.0}, True)
    assert len(Line.of(whole, [entry, foreign]).entries) == 1


def _odd() -> Any:
    from rankopt.plan import LayerChoice

    return LayerChoice("cp", {"rank": 1})


def test_names_of_study_files_are_those_of_the_tables() -> None:
    assert set(STRATEGY_NAMES) == {"auto", *STRATEGIES}
    assert set(SAMPLER_NAMES) == {"auto", *SAMPLERS}
    assert strategy("auto") is STRATEGIES["correct"]
    with pytest.raises(InputError, match=r"strategy: must be auto, mixed, .*, got 'best'"):
        strategy("best")


def test_the_seam_is_small() -> None:
    """One's own strategy: a class with `propose`."""

    class Cheapest(Strategy):
        name = "cheapest"

        def propose(self, standing: Standing) -> Proposal:
            if standing.number:
                raise Exhausted("one plan is enough")
            return Proposal(self.space.solve(self.space.losses, self.space.lowest), self.name)

    proposals: Sequence[Proposal] = [Cheapest(setting({})).propose(Standing(0, []))]
    assert cost(proposals[0].plan, "macs") <= 1.03 * (FIXED["macs"] + sum(float(g.macs.min()) for g in GROUPS))
