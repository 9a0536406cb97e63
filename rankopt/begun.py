"""What a study was begun with: whether it was begun at all, and whether all of it is still so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import optuna

from rankopt.errors import StudyMismatchError

FACTS, DENSE, CONDITIONS = (f"rankopt:{name}" for name in ("begun_with", "dense", "conditions"))


def half_made(study: optuna.Study) -> bool:
    """Whether a process was killed while it made the study, of which there is nothing but its name."""
    return FACTS not in study.user_attrs and set(study.user_attrs) <= {CONDITIONS, DENSE} and not study.trials


def facts_of(study: optuna.Study, name: str) -> dict[str, str]:
    """What it was begun with; raises `StudyMismatchError` when that was not by rankopt."""
    begun: dict[str, str] | None = study.user_attrs.get(FACTS)
    if begun is None:
        raise StudyMismatchError(f"study {name}: this storage holds a study of that name that rankopt did not begin")
    return begun


def check_facts(study: optuna.Study, name: str, facts: Mapping[str, str]) -> None:
    """Raises `StudyMismatchError`, which names the first fact that differs."""
    begun = facts_of(study, name)
    for key in [*facts, *(k for k in begun if k not in facts)]:
        if begun.get(key) != facts.get(key):
            raise StudyMismatchError(
                f"study {name}: was begun with another {key} ({_short(begun.get(key))}, now {_short(facts.get(key))});"
                " take another name or storage, or go back to it"
            )


def _short(value: Any) -> str:
    return json.dumps(value)[:60] if value is not None else "none"
