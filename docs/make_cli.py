"""Writes docs/cli.md, what every verb's --help says at 80 columns. `make docs` runs it, a test compares."""

from __future__ import annotations

from pathlib import Path

import typer

HERE = Path(__file__).parent
HEAD = """\
# Command line

Written by `make docs` from the program's own `--help`; a test compares them.
The [README](../README.md) shows how the verbs go together.

| exit status | |
|---|---|
| 0 | done |
| 1 | a fault of rankopt itself, with a traceback; or nobody reads its output any more (as with `head -1`) |
| 2 | wrong input, or no plan keeps the limits; one line on stderr says what, and nothing is half-written |
| 130 | interrupted (Ctrl-C); what was measured is kept, the same command goes on |

Results go to stdout, progress and errors to stderr. `--json` prints JSON and nothing else on stdout, `--quiet`
prints errors only. There is colour on a terminal only, and never where `NO_COLOR` is set. `search --log FILE`
appends what was told, with times, warnings and tracebacks.
"""


def text() -> str:
    """The whole page."""
    from rankopt.cli import app

    group = typer.main.get_command(app)
    parts = [HEAD, _section("rankopt", group, None)]
    context = typer.Context(group, info_name="rankopt")
    for name, command in sorted(group.commands.items()):  # type: ignore[attr-defined]
        parts.append(_section(f"rankopt {name}", command, context))
    return "\n".join(parts)


def _section(title: str, command: object, parent: typer.Context | None) -> str:
    name = title.rpartition(" ")[2]
    context = typer.Context(command, info_name=name, parent=parent, terminal_width=80, max_content_width=80)  # type: ignore[arg-type]
    shown = "\n".join(line.rstrip() for line in context.get_help().splitlines())
    return f"## {title}\n\n```text\n{shown}\n```\n"


if __name__ == "__main__":
    (HERE / "cli.md").write_text(text(), encoding="utf-8")
