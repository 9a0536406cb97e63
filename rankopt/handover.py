"""What the command line does around a saved model: checks before, measurements of the reloaded model after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankopt.errors import ArtifactError

if TYPE_CHECKING:
    from rich.console import Console


def check_free(out: Path, force: bool) -> None:
    """Refuse before anything is computed what saving would refuse after it."""
    if out.exists() and not force:
        raise ArtifactError(f"{out}: already exists; give another --out, or --force to replace a saved model there")
    if out.exists() and not (out / "plan.json").is_file():
        raise ArtifactError(f"{out}: holds no saved model, so --force does not replace it; give another --out")


def save(run: Any, entry: Any, out: Path, force: bool) -> tuple[dict[str, Any], dict[str, float] | None]:
    """Save; returns what the reloaded model measures, and the dense model on the test data if there are any."""
    saved = run.save(entry, out, force=force)
    return saved, run.measure(run.model, split="test") if saved.get("test") else None


def finish(run: Any, entry: Any, out: Path, force: bool, as_json: bool) -> None:
    """Save, and print what the reloaded model measures."""
    saved, dense_test = save(run, entry, out, force)
    if as_json:
        from rankopt.tables import front_row

        print_json({"out": str(out), **front_row(entry), **saved, "dense_test": dense_test})
    else:
        print_saved(console_for(), entry, out, saved, dense_test)


def print_saved(console: Console, entry: Any, out: Path, saved: dict[str, Any], dense_test: Any) -> None:
    """Say where the model is, and its measurements beside those of the dense one."""
    from rankopt.tables import measured_table

    name = f"trial {entry.trial}" if entry.trial is not None and entry.trial >= 0 else "the plan"
    console.print(f"\nsaved {name} to {out}; measured again from there:", soft_wrap=True)
    columns = {"validation": saved.get("validation") or {}}
    if saved.get("test"):
        columns |= {"test": saved["test"], "test, dense": dense_test or {}}
    console.print(measured_table(columns))


def console_for(stderr: bool = False) -> Console:
    """A console for plain text: nothing in it is read as markup."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False)


def print_json(value: Any) -> None:
    """Print a value for programs, and nothing else."""
    print(json.dumps(value, indent=1, default=float))
