"""`compress`: search, recover, and search again from the recovered model, each stage under a share of the limit.

Between two stages the recovered model is put back into the dense shape, its products as weights (`chains.merged`): the
same function, so nothing is lost, and the next stage decomposes the original layers, whose weights are of low rank by
now. Every stage's plan is therefore one of the original architecture, and the last one is all that is handed over.
Costs are those of the dense architecture in every stage, and the teacher is the original model throughout.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from rankopt import artifact
from rankopt.chains import merged
from rankopt.decompositions import method
from rankopt.errors import ArtifactError, InputError, RankoptError
from rankopt.limits import Limit
from rankopt.plan import Plan
from rankopt.recovering import Recovery, beside
from rankopt.result import Progress
from rankopt.search import Search

if TYPE_CHECKING:
    from rankopt.study_file import StudyFile


def stage_limits(limits: Sequence[Limit], dense: Mapping[str, float], stage: int, stages: int) -> list[Limit]:
    """Limits of stage 1 ≤ `stage` ≤ `stages`: bounds on costs fall geometrically from dense to the limit.

    With macs<=25% and two stages they are 50 % and 25 %. A cost of which the dense value is not known, and limits on
    quality, hold in the last stage only; those that are changes against the dense model are of the original one.
    """
    found = []
    for limit in limits:
        if limit.quantity in ("accuracy", "kl"):
            if stage == stages:
                absolute = replace(limit, value=limit.bound(dense), relative=None) if limit.relative else limit
                found.append(absolute)
            continue
        if stage == stages:
            found.append(limit)
        elif limit.relative == "dense":
            share = min(limit.value, 1.0) ** (stage / stages)
            found.append(replace(limit, value=share, text=f"{_named(limit)}<={100 * share:.4g}%"))
        elif limit.key in dense:
            share = min(limit.bound(dense) / dense[limit.key], 1.0) ** (stage / stages)
            bound = share * dense[limit.key]
            found.append(replace(limit, value=bound, text=f"{_named(limit)}<={100 * share:.4g}% of dense"))
    return found


def compress(
    file: StudyFile,
    out: Path,
    *,
    stages: int = 1,
    steps: int | None = None,
    limits: Sequence[Limit] | None = None,
    trials: int | None = None,
    seed: int | None = None,
    folder: Path | None = None,
    force: bool = False,
    progress: Callable[[Progress], None] = lambda p: None,
) -> dict[str, Any]:
    """Search and recover in stages, and write the last stage's model.

    Args:
        file: the study.
        out: where the model is written.
        stages: how often; 1 is one shot.
        steps: optimizer steps in all, shared equally by the stages (None: the study's ``recovery.final_steps``), so
            that any number of stages costs the same training.
        limits, trials, seed: in place of the study's; `trials` in every stage.
        folder: where studies, checkpoints and the models of stages are kept; beside `out`, and removed in the end, when
            None. Running again goes on there. Where nothing was measured before an error, nothing is left.
        force: replace a saved model in `out`.
        progress: told what happens.

    Returns:
        Measurements as of `recovering.recover_saved`, and ``stages``: for each its limits, plan and quality.
    """
    total = file.recovery.final_steps if steps is None else steps
    wanted = list(file.limits if limits is None else limits)
    if stages < 1 or total < stages:
        raise InputError(f"stages: needs from 1 to as many as there are steps ({total}), got {stages}")
    if stages > 1 and not any(li.quantity not in ("accuracy", "kl") for li in wanted):
        raise InputError("stages: need a limit on a cost, which is approached step by step; give e.g. macs<=30%")
    place = folder or beside(out)
    anew, measured = not place.exists(), False

    def noted(told: Progress) -> None:
        nonlocal measured
        measured = measured or told.done > 0
        progress(told)

    original = Recovery(file, seed=seed)
    if stages > 1:
        _check_linear(original.search)
    dense = dict(original.judge.dense)
    current: nn.Module | None = None
    told: list[dict[str, Any]] = []
    written: dict[str, Any] = {}
    for stage in range(1, stages + 1):
        here = place / f"stage-{stage}-of-{stages}"
        share = total // stages + (stage <= total % stages)
        own_limits = stage_limits(wanted, dense, stage, stages)
        texts = [str(li) for li in own_limits]
        say = _staged(noted, stage, stages)
        recovery = Recovery(
            file, steps=share, storage=f"sqlite:///{here.resolve()}/study.db", seed=seed, dense=current, progress=say
        )
        target = out if stage == stages else here / "model"
        if stage < stages and (target / "plan.json").is_file():
            plan = Plan.load(target)
            model = artifact.load(target, recovery.teacher)
            told.append(_recorded(target, texts))
        else:
            run = Search.from_study(
                file, own_limits, trials, f"sqlite:///{here.resolve()}/study.db", seed, model=current
            )
            try:
                result = run.run(say)
            except RankoptError:  # such as a limit that nothing can keep; what was measured is worth going on from
                if folder is None and anew and not measured:
                    shutil.rmtree(place, ignore_errors=True)
                raise
            best = result.best(own_limits)
            if not best.plan.changed():
                raise InputError(f"stage {stage}: within {', '.join(texts)} nothing is better than the dense model")
            built = run.build(best.plan, bn=bool(best.notes.get("bn", 0)))
            before = recovery.measure(built)
            recovered = recovery.trained(built, best.plan, here / "checkpoints")
            plan, model = best.plan, recovered.model
            device = {"compressed": best.measurements, "dense": result.dense, "conditions": dict(result.conditions)}
            stage_facts = {"limits": texts, "steps": share}
            written = recovery.written(
                target, before, recovered, plan, device, force if stage == stages else True, stage_facts
            )
            told.append({**stage_facts, "before": before, "after": written["after"], "costs": written["costs"]})
        if stage < stages:
            shutil.rmtree(here / "checkpoints", ignore_errors=True)
            current = merged(recovery.teacher, model, plan).eval()
    if folder is None:
        shutil.rmtree(place, ignore_errors=True)
    return {**written, "stages": told}


def _check_linear(search: Search) -> None:
    """Refuse, before anything is trained, methods that can't be put back into the dense shape after training."""
    spaces = search.spaces.values()
    offered = {name for s in spaces if not s.dense for name in (*s.methods, *(e["method"] for e in s.explicit))}
    bent = sorted(name for name in offered if not method(name).linear)
    if bent:
        raise InputError(
            f"stages: between two of them a model is put back into the dense shape, which layers of {', '.join(bent)}"
            " can't be after training; leave them out of the search space, or take one stage"
        )


def _named(limit: Limit) -> str:
    return f"{limit.quantity}@{limit.target}" if limit.target else limit.quantity


def _staged(progress: Callable[[Progress], None], stage: int, stages: int) -> Callable[[Progress], None]:
    """Progress whose text names the stage."""
    if stages == 1:
        return progress
    return lambda p: progress(replace(p, text=" · ".join(filter(None, [f"stage {stage}/{stages}", p.text]))))


def _recorded(directory: Path, limits: list[str]) -> dict[str, Any]:
    """What an earlier run said of a stage."""
    values = artifact.read_measurements(directory)
    try:
        after = {"validation": values["compressed"], **({"test": t} if (t := values.get("compressed_test")) else {})}
        costs = {k: values["compressed"][k] for k in ("macs", "params", "macs_kept", "params_kept")}
        return {
            "limits": limits, "steps": values["recovery"]["steps"], "before": {"validation": values["before_recovery"]},
            "after": after, "costs": costs,
        }  # fmt: skip
    except (KeyError, TypeError):
        raise ArtifactError(f"{directory}: was not written by a stage; give another folder") from None
