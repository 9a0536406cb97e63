"""The ledger of a study: what its Optuna storage holds, and how it is opened, checked and read.

Every trial's plan, measurements, violations, notes, versions and worker are in its user attributes; what the study was
begun with is in the study's.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from rankopt.begun import CONDITIONS, DENSE, FACTS, check_facts, facts_of, half_made
from rankopt.errors import InputError
from rankopt.interrupts import uninterrupted
from rankopt.limits import Limit, parse_limit
from rankopt.measurement import same_conditions
from rankopt.plan import Plan
from rankopt.result import MAXIMIZED, Entry, Result
from rankopt.space import SearchSpace
from rankopt.storages import alone, end_trial, file_of, open_storage, shown

LIMITS, CONFIRMED, SAID, WANTED = (f"rankopt:{name}" for name in ("limits", "confirmed", "said", "wanted"))
QUALITY = ("kl", "accuracy", "accuracy_se")
PLAN, VALUES, EXCESS, NOTES, REASON = "plan", "measurements", "violations", "notes", "reason"
PROPOSAL = "proposal"  # how a plan came about: strategy, and the sampler's numbers
PLAN_DIGEST = "inherited plan"  # of a plan of another study that could not be measured here
INTERRUPTED = "interrupted"  # the reason of trials whose process ended before they did
ENVIRONMENT = "environment"  # seed, machine and versions
KILLED = "killed"  # the digest of the plan of a trial whose process was killed

_MOST_LAYERS = 64


def open_study(
    storage: BaseStorage,
    name: str,
    objectives: Sequence[str],
    facts: Mapping[str, str],
    dense: Mapping[str, float],
    limits: Sequence[Limit],
    conditions: Mapping[str, Mapping[str, str]] | None = None,
) -> optuna.Study:
    """Create a study, or open it again if it was begun with the same facts.

    Args:
        storage: from `open_storage`.
        name: of the study.
        objectives: in order.
        facts: what must not change (digests of model, data, space, ...): name → value.
        dense: the dense model's measurements.
        limits: may change from one run to the next.
        conditions: target → what its times depend on besides the model.

    Raises:
        StudyMismatchError: names the first fact that differs.
        ConditionsError: a target's conditions differ; names which.
    """
    facts = {"objectives": ", ".join(objectives), **facts}
    directions = [StudyDirection.MAXIMIZE if o in MAXIMIZED else StudyDirection.MINIMIZE for o in objectives]
    with writable(name), written(), alone(storage, name):
        known = name in optuna.study.get_all_study_names(storage)
        if known and half_made(optuna.load_study(study_name=name, storage=storage)):
            optuna.delete_study(study_name=name, storage=storage)
            known = False
        if not known:
            study = optuna.create_study(storage=storage, study_name=name, directions=directions)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # names of objectives are experimental
                study.set_metric_names(list(objectives))
            study.set_user_attr(CONDITIONS, {k: dict(v) for k, v in (conditions or {}).items()})
            study.set_user_attr(DENSE, dict(dense))
            study.set_user_attr(FACTS, dict(facts))  # last: with them it is begun
        else:
            study = optuna.load_study(study_name=name, storage=storage)
            check_facts(study, name, facts)
            for label, now in (conditions or {}).items():
                begun = study.user_attrs.get(CONDITIONS, {}).get(label, {})
                same_conditions(begun, now, f"study {name}: target {label}")
            # Times are recorded at the pace that the dense model had when the study began.
            paced = {k: v for k, v in study.user_attrs[DENSE].items() if k.startswith("latency")}
            study.set_user_attr(DENSE, {**dense, **paced})
        study.set_user_attr(LIMITS, [str(li) for li in limits])
    return study


def begin(
    study: optuna.Study, space: SearchSpace, plan: Plan, proposal: Mapping[str, Any], besides: Mapping[str, Any]
) -> optuna.Trial:
    """Write down a new running trial with its plan (and other attributes), in one transaction.

    Its parameters are the layers' methods and shares of their MACs, so that the dashboard and the importances of
    Optuna show them; above `_MOST_LAYERS` layers they stand in its attributes alone.
    """
    params, distributions = layer_parameters(space, plan)
    attributes = {
        PLAN: plan.to_dict(short=True),
        PROPOSAL: dict(proposal),
        "predicted_kl": space.predicted(plan),
        **besides,
    }
    template = optuna.trial.create_trial(
        state=TrialState.RUNNING, params=params, distributions=distributions, user_attrs=attributes
    )
    with written():
        number = study._storage.create_new_trial(study._study_id, template_trial=template)
    return optuna.Trial(study, number)


def finish(
    study: optuna.Study,
    trial: int,
    state: TrialState,
    attributes: Mapping[str, Any],
    constraints: Mapping[str, float] | None = None,
    values: Sequence[float] | None = None,
) -> None:
    """Write down all that became of a running trial (by its id in the storage), its state last.

    So a process that is killed meanwhile leaves a running trial, never a finished one that lacks something. Raises
    Optuna's `UpdateFinishedTrialError` when the trial was ended by someone else.
    """
    system: dict[str, Any] = {}
    if constraints:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # constraints of made trials are experimental
            made = optuna.trial.create_trial(state=TrialState.RUNNING, constraints=dict(constraints))
        # optuna-dashboard 0.21 reads constraints as Optuna 4 kept them
        system = {**made.system_attrs, "constraints": list(constraints.values())}
    with written():
        end_trial(study._storage, trial, state, values, attributes, system)


def counts(trial: FrozenTrial) -> bool:
    """Whether it is one of the trials that a study is to have: finished, and not interrupted."""
    return trial.state.is_finished() and trial.user_attrs.get(REASON) != INTERRUPTED


def layer_parameters(space: SearchSpace, plan: Plan) -> tuple[dict[str, Any], dict[str, BaseDistribution]]:
    """What the parameters of a trial with this plan are, and their distributions."""
    numbers = space.layer_numbers(plan)
    if len(space.groups) > _MOST_LAYERS or not numbers:
        return {}, {}
    found: dict[str, BaseDistribution] = {}
    for name, given in space.layer_parameters().items():
        found[name] = CategoricalDistribution(given) if isinstance(given[0], str) else FloatDistribution(*given)
    return dict(numbers), found


def begun_with(storage: BaseStorage, name: str) -> dict[str, float]:
    """What the dense model measured when this study began; empty where there is none yet."""
    if name not in optuna.study.get_all_study_names(storage):
        return {}
    return dict(optuna.load_study(study_name=name, storage=storage).user_attrs.get(DENSE, {}))


@contextmanager
def writable(name: str) -> Iterator[None]:
    """Turn what the storage raises when it can't be written into one line."""
    try:
        yield
    except StorageInternalError as error:
        cause = error.__cause__ or error
        raise InputError(f"study {name}: its storage can't be written: {str(cause).splitlines()[0]}") from error


@contextmanager
def written() -> Iterator[None]:
    """Write all of it even if Ctrl-C comes; and a journal file that can't be written is as a database that can't."""
    try:
        with uninterrupted():
            yield
    except OSError as error:
        raise StorageInternalError(error.strerror or str(error)) from error


def result_of(study: optuna.Study, limits: Sequence[Limit] | None = None) -> Result:
    """What the study holds, judged by these limits (its own when None)."""
    wanted = [parse_limit(t) for t in study.user_attrs.get(LIMITS, [])] if limits is None else list(limits)
    return gathered(study, wanted, known_entries(study, wanted))


def known_entries(study: optuna.Study, limits: Sequence[Limit]) -> list[Entry]:
    """All measured plans of a study; what was measured again at the end counts instead of the first measurement."""
    dense = study.user_attrs.get(DENSE, {})
    again = study.user_attrs.get(CONFIRMED, {})
    return [
        confirmed(entry, again[entry.plan.digest], limits, dense) if entry.plan.digest in again else entry
        for entry in entries_of(study.get_trials(deepcopy=False), limits, dense)
    ]


def confirm(study: optuna.Study, plan: Plan, values: Mapping[str, float]) -> None:
    """Record that a plan was measured again."""
    with writable(study.study_name), written(), alone(study._storage, study.study_name):
        study.set_user_attr(CONFIRMED, {**study.user_attrs.get(CONFIRMED, {}), plan.digest: dict(values)})


def want(study: optuna.Study, trials: int, time_limit: float | None, patience: int | None) -> None:
    """Record how far the study is to go, for those who watch it."""
    with writable(study.study_name), written():
        study.set_user_attr(WANTED, {"trials": trials, "time_limit": time_limit, "patience": patience})


def say(study: optuna.Study, notes: Sequence[str]) -> None:
    """Record what the user should know of the measurements."""
    with writable(study.study_name), written():
        study.set_user_attr(SAID, list(notes))


def confirmed(entry: Entry, values: Mapping[str, float], limits: Sequence[Limit], dense: Mapping[str, float]) -> Entry:
    """An entry with newer measurements."""
    merged = {**entry.measurements, **values}
    known = {k: v for k, v in merged.items() if v is not None}
    feasible = all(li.violation(known, dense) <= 0 for li in limits)
    return replace(entry, measurements=merged, feasible=feasible, notes={**entry.notes, "confirmed": 1.0})


@dataclass(frozen=True)
class Judged:
    """A plan whose quality was measured in some study of a storage, and what was proposed for it."""

    plan: Plan
    quality: Mapping[str, float]
    numbers: Mapping[str, float | str]


def proposed(storage: BaseStorage, name: str, by: str) -> list[Plan]:
    """The plans of a study, if there is one of that name, that were proposed by this."""
    if name not in optuna.study.get_all_study_names(storage):
        return []
    trials = optuna.load_study(study_name=name, storage=storage).get_trials(deepcopy=False)
    own = [t for t in trials if t.user_attrs.get(PROPOSAL, {}).get("by") == by]
    return [Plan.from_dict(t.user_attrs[PLAN], f"trial {t.number}") for t in own]


def judged(storage: BaseStorage, facts: Mapping[str, str], besides: str) -> list[Judged]:
    """Plans of all studies of a storage (besides one) that were begun with the same model, data, space and refit."""
    found: dict[str, Judged] = {}
    for name in optuna.study.get_all_study_names(storage):
        study = optuna.load_study(study_name=name, storage=storage)
        begun = study.user_attrs.get(FACTS, {})
        if name == besides or any(begun.get(key) != value for key, value in facts.items() if key != "targets"):
            continue
        again = study.user_attrs.get(CONFIRMED, {})
        for trial in study.get_trials(deepcopy=False):
            values = trial.user_attrs.get(VALUES, {})
            if trial.state in (TrialState.COMPLETE, TrialState.PRUNED) and values.get("kl") is not None:
                plan = Plan.from_dict(trial.user_attrs[PLAN], f"study {name}, trial {trial.number}")
                values = {**values, **again.get(plan.digest, {})}
                quality = {k: v for k, v in values.items() if k in QUALITY}
                quality["bn"] = trial.user_attrs.get(NOTES, {}).get("bn", 0.0)
                numbers = trial.user_attrs.get(PROPOSAL, {}).get("numbers", {})
                found.setdefault(plan.digest, Judged(plan, quality, dict(numbers)))
    return list(found.values())


def read_result(url: str, name: str, limits: Sequence[Limit] | None = None) -> Result:
    """Read a study from storage; needs neither the model nor the data.

    Raises:
        InputError: there is no such study.
    """
    return result_of(read_study(url, name), limits)


def read_study(url: str, name: str) -> optuna.Study:
    """A study that is only read; raises `InputError` when there is none of that name."""
    path = file_of(url)
    if path is not None and not path.is_file():
        raise InputError(f"study {name}: nothing was searched yet ({path} does not exist); run: rankopt search")
    storage = open_storage(url)
    known = optuna.study.get_all_study_names(storage)
    if name not in known:
        raise InputError(f"study {name}: not in {shown(url)}; it holds {', '.join(sorted(known)) or 'no study'}")
    study = optuna.load_study(study_name=name, storage=storage)
    if half_made(study):
        raise InputError(f"study {name}: nothing was searched yet ({shown(url)}); run: rankopt search")
    facts_of(study, name)
    return study


def entries_of(trials: Sequence[FrozenTrial], limits: Sequence[Limit], dense: Mapping[str, float]) -> list[Entry]:
    """Measured plans in the order of trials; of one that came twice the first."""
    found: dict[str, Entry] = {}
    for trial in trials:
        values = trial.user_attrs.get(VALUES)
        if values is None or trial.state not in (TrialState.COMPLETE, TrialState.PRUNED):
            continue
        plan = Plan.from_dict(trial.user_attrs[PLAN], f"trial {trial.number}")
        feasible = all(li.violation(values, dense) <= 0 for li in limits)
        found.setdefault(plan.digest, Entry(trial.number, plan, values, feasible, trial.user_attrs.get(NOTES, {})))
    return list(found.values())


def gathered(study: optuna.Study, limits: Sequence[Limit], entries: Any) -> Result:
    """Entries, with what the study knows besides."""
    attrs = study.user_attrs
    failed = {t.number: t.user_attrs[REASON] for t in study.get_trials(deepcopy=False) if t.user_attrs.get(REASON)}
    objectives = tuple(attrs[FACTS]["objectives"].split(", "))
    dense = attrs.get(DENSE, {})
    said = tuple(attrs.get(SAID, ()))
    conditions = attrs.get(CONDITIONS, {})
    return Result([*entries, *_unchanged(dense, limits)], objectives, tuple(limits), dense, failed, said, conditions)


def _unchanged(dense: Mapping[str, float], limits: Sequence[Limit]) -> list[Entry]:
    """The dense model as an entry, where latency is measured: what is handed over is never slower than it."""
    if not any(key.startswith("latency_ms") for key in dense):
        return []
    values = {**dense, "kl": 0.0, "macs_kept": 1.0, "params_kept": 1.0}
    feasible = all(li.violation(values, dense) <= 0 for li in limits)
    return [Entry(-1, Plan({}), values, feasible)]


def with_owner(result: Result, owner: Any) -> Result:
    """The same result whose entries can be built."""
    return replace(result, entries=[replace(e, _owner=owner) for e in result.entries])
