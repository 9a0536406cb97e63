"""`plans_named`: plans by what names them: a plan file, the folder of a saved model, or a trial of another study."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rankopt.errors import InputError, RankoptError
from rankopt.plan import Plan
from rankopt.plan_diff import plan_at
from rankopt.plan_file import YAML
from rankopt.yaml_file import read_yaml

if TYPE_CHECKING:
    from rankopt.result import Entry, Result
    from rankopt.study_file import StudyFile

_FRONT = "front"


def plans_named(
    names: Sequence[str], base_dir: Path, load: Callable[[Path], StudyFile], where: str = ""
) -> dict[str, Plan]:
    """Name → plan.

    Args:
        names: ``plan.json``, ``plan.yaml``, the folder of a saved model, or a study: ``study.yaml`` is its best plan
            within its limits, ``study.yaml:12`` that of a trial, ``study.yaml:front`` all of its front.
        base_dir: where relative paths start from.
        load: reads a study file.
        where: what messages begin with.

    Raises:
        InputError: one of them can't be read, or a study has no such trial.
    """
    found: dict[str, Plan] = {}
    for name in names:
        try:
            found |= _named(name, base_dir, load)
        except RankoptError as error:
            raise InputError(f"{where}{error.message}") from None
    return found


def _named(name: str, base_dir: Path, load: Callable[[Path], StudyFile]) -> dict[str, Plan]:
    path, which = base_dir / Path(name).expanduser(), ""
    front, _, last = name.rpartition(":")
    if not path.exists() and front.endswith(YAML):
        path, which = base_dir / Path(front).expanduser(), last
    if path.suffix not in YAML or "model" not in read_yaml(path, "plan or study"):
        if which:
            raise InputError(f"{path}: is no study, so it has no trial {which!r}")
        return {name: plan_at(path)}
    from rankopt.ledger import read_result

    file = load(path)
    result = read_result(file.storage_url, file.name, limits=file.limits)
    return {f"{name} trial {e.trial}": e.plan for e in _entries(result, which, path)}


def _entries(result: Result, which: str, path: Path) -> list[Entry]:
    if which == _FRONT:
        return result.front
    if not which:
        return [result.best()]
    found = [e for e in result.entries if str(e.trial) == which]
    if not found:
        raise InputError(f"{path}: has no finished trial {which!r}; give its number, or {_FRONT}")
    return found
