"""Plans as files: `read_plan` and `write_plan`, JSON or YAML by the name, and the folder of a saved model."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import yaml

from rankopt.errors import PlanError, StudyFileError
from rankopt.plan import Plan
from rankopt.yaml_file import read_yaml

YAML = (".yaml", ".yml")


def read_plan(path: str | Path) -> Plan:
    """A plan from ``.json``, ``.yaml`` or ``.yml``, or from the folder of a saved model; raises `PlanError`."""
    path = Path(path)
    if path.suffix not in YAML:
        return Plan.load(path)
    try:
        return Plan.from_dict(read_yaml(path, "plan"), str(path))
    except StudyFileError as error:
        raise PlanError(error.message) from None


def write_plan(plan: Plan, path: str | Path, force: bool = False) -> Path:
    """Write a plan as YAML or JSON, whole or not at all.

    Raises:
        PlanError: the file exists and is not to be replaced, or can't be written.
    """
    path = Path(path)
    if path.exists() and not force:
        raise PlanError(f"{path}: already exists; give another name, or force to replace it")
    is_yaml = path.suffix in YAML
    text = yaml.safe_dump(plan.to_dict(), sort_keys=False, allow_unicode=True) if is_yaml else plan.to_json()
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        raise PlanError(f"{path}: can't be written: {error.strerror or error}") from error
    finally:
        beside.unlink(missing_ok=True)
    return path
