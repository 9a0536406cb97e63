"""The README and docs/ are run: Python blocks, commands, study and search-space files, and every table of names."""

from __future__ import annotations

import inspect
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import BaseModel

from rankopt.callables import load_callable
from rankopt.decompositions import table
from rankopt.limits import parse_limit
from rankopt.sampling import SAMPLERS
from rankopt.space_file import Keep, Space, load_space, names
from rankopt.strategies import STRATEGIES
from rankopt.study_file import StudyFile, load_study
from rankopt.targets import names as target_names
from rankopt.targets import target_class
from rankopt.targets.target import Target

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def section(title: str) -> str:
    """The part of the README under a heading."""
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def commands() -> list[list[str]]:
    return [shlex.split(line) for block in blocks(README, "sh") for line in block.splitlines() if line.strip()]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a copy of the studies and none of their results; threads are set back afterwards."""
    shutil.copytree(ROOT / "studies", tmp_path / "studies", ignore=shutil.ignore_patterns("runs", "__pycache__"))
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


def test_python_blocks_run(elsewhere: Path) -> None:
    torch.manual_seed(0)
    space: dict[str, Any] = {}
    for block in blocks(README, "python"):
        exec(compile(block, "README.md", "exec"), space)
    assert (elsewhere / "compressed" / "plan.json").is_file()
    assert space["best"].measurements["macs_kept"] <= 0.5


@pytest.mark.slow
@pytest.mark.timeout(1800)  # some thirty commands, among them five searches, a comparison and two trainings
def test_commands_run(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rankopt.cli import main

    before = sorted((ROOT / "studies").rglob("*"))
    for command in commands():
        if command[0] == "rankopt":
            assert main(command[1:]) == 0, f"{shlex.join(command)}: {capsys.readouterr().err}"
    for saved in ("compressed", "smaller", "again"):
        assert (elsewhere / saved / "model.safetensors").is_file()
    for shown in ("report.html", "front.svg", "trials.csv"):
        assert (elsewhere / shown).stat().st_size > 1000
    assert sorted((ROOT / "studies").rglob("*")) == before


def test_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {command[0] for command in commands()} == {"rankopt", "make", "pip"}
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    assert {target for target in re.findall(r"`?make ([a-z-]+)`?$|`make ([a-z-]+)`", README, re.MULTILINE)}
    for found in re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE):
        assert found in targets
    for command in commands():
        if command[0] == "pip":
            extras = re.findall(r"\[(\w+)\]", " ".join(command))
            assert set(extras) <= set(project["optional-dependencies"])
    pins = re.findall(r"torch==[\d.]+", README)
    assert pins
    assert all(pin in makefile for pin in pins)


def test_every_verb_is_described() -> None:
    import typer

    from rankopt.cli import app

    verbs = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    rows = re.findall(r"^\| `(\w+) .*` \|", section("From the command line"), re.MULTILINE)
    assert set(rows) == verbs == {command[1] for command in commands() if command[0] == "rankopt"}


def keys(model: type[BaseModel], given: dict[str, Any]) -> None:
    assert set(given) == set(model.model_fields)


def test_the_study_example_reads_and_names_every_key(elsewhere: Path) -> None:
    (text,) = blocks(section("Study files"), "yaml")
    path = elsewhere / "studies" / "example.yaml"
    path.write_text(text, encoding="utf-8")
    study = load_study(path)
    given = yaml.safe_load(text)
    keys(StudyFile, given)
    make = load_callable(study.model.call, study.base_dir)
    assert inspect.signature(make).bind(**study.model.args)
    assert {key: len(batches) > 0 for key, batches in study.splits().items()} == dict.fromkeys(study.splits(), True)
    assert study.example()[0][0].shape == (1, 1, 8, 8)
    # what it calls the default is the default
    plain = StudyFile.model_validate({"model": "m:f", "data": "m:f"})
    for key in ("metric", "space", "seed", "refit", "recovery", "output", "target"):
        expected = getattr(plain, key)
        got = getattr(study, key)
        assert got == expected or key == "refit", key
    assert study.refit.enabled == plain.refit.enabled
    assert plain.refit.samples is None
    assert plain.threads == 1
    assert study.storage_url == f"sqlite:///{elsewhere / 'studies' / 'runs' / 'digits.db'}"


def test_the_space_example_reads_and_names_every_key() -> None:
    (text,) = blocks(section("Search spaces"), "yaml")
    given = yaml.safe_load(text)
    space = load_space(given)
    keys(Space, given)
    keys(Keep, {**given["keep"], "values": "the short form"})
    named = {key for rule in given["rules"] for key in rule}
    assert named == set(type(space.rules[0]).model_fields)
    ready = re.findall(r"`(\w+)`", section("Search spaces").split("Ready spaces:")[1])
    assert sorted(ready) == names()


def test_every_method_has_a_row() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|", section("Decompositions"), re.MULTILINE)
    assert [name for name, _, _ in rows] == [*(name for name in table() if not name.endswith("_memory")), "dense"]
    from torch import nn

    from rankopt.layers import find_layers

    layers = {
        "Linear": find_layers(nn.Sequential(nn.Linear(16, 16)), torch.randn(1, 16))[0],
        "depthwise": find_layers(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)), torch.randn(1, 4, 5, 5))[0],
        "convolution": find_layers(nn.Sequential(nn.Conv3d(4, 4, 3)), torch.randn(1, 4, 5, 5, 5))[0],
    }
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    x, mask = torch.randn(2, 9, 8), torch.ones(9, 9, dtype=torch.bool).triu(1)
    attention, causal = (find_layers(encoder, x, given)[0] for given in ({}, {"src_mask": mask}))
    for name, fits, ranks in rows[:-1]:
        way = table()[name]
        if fits == "capsules" or fits.startswith("self-attention"):  # test_capsules.py has the ranks of the first
            assert all(way.why_not(layer) for layer in layers.values()), name
            if fits != "capsules":
                assert tuple(re.findall(r"`(\w+)`", ranks)) == way.rank_names(attention)
                assert (way.why_not(causal) is None) == ("not causal" not in fits)
                assert way.why_not(attention) is None
            continue
        assert (way.why_not(layers["Linear"]) is None) == ("Linear" in fits), name
        tensors = fits == "Linear, Embedding"
        assert (way.why_not(layers["depthwise"]) is None) == ("not depthwise" not in fits and not tensors), name
        assert (way.why_not(layers["convolution"]) is None) == (not tensors)
        written = re.findall(r"`(\w+)`", ranks)
        have = way.rank_names(layers["Linear" if tensors else "convolution"])
        assert tuple(written) == have[: len(written)]
        assert len(written) == len(have) or "…" in ranks


def test_every_limit_reads() -> None:
    limits = re.findall(r"`([a-z_0-9]+[<>]=[^`]+)`", section("Limits"))
    assert len(limits) >= 10
    for limit in limits:
        parse_limit(limit)


@pytest.mark.parametrize("text", [README, ARCHITECTURE], ids=["README", "architecture"])
def test_links_lead_somewhere(text: str) -> None:
    base = ROOT if text is README else ROOT / "docs"
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (base / target).exists(), target
    headings = {
        re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.M)
    }
    for anchor in re.findall(r"\]\(#([^)]+)\)", text):
        assert anchor in headings


def test_every_target_is_described_with_its_options() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \|[^|]*\| (`.*`) \|$", section("Targets"), re.MULTILINE)
    described = {name: set(re.findall(r"`(\w+)`", options)) for name, options in rows}
    shared = set(Target.model_fields)
    assert described == {name: set(target_class(name).model_fields) - shared for name in target_names()}


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1], ids=["method", "target"])
def test_what_the_architecture_adds_keeps_the_contract(number: int, tmp_path: Path) -> None:
    written = blocks(ARCHITECTURE, "python")
    assert len(written) == 2
    (tmp_path / "test_added.py").write_text(written[number], encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_added.py"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]


def test_every_strategy_is_described() -> None:
    named = set(re.findall(r"`(\w+)`", section("Strategies")))
    assert set(STRATEGIES) <= named
    keys = next(b for b in blocks(section("Study files"), "yaml"))
    assert all(name in keys for name in SAMPLERS)


def test_every_option_of_the_recovery_is_described_with_its_default() -> None:
    from rankopt.recovery_options import RecoveryOptions

    rows = re.findall(r"^\| (`[^|]*`) \| (`[^|]*`) \|", section("Recovery"), re.MULTILINE)
    described = {}
    for names_, defaults in rows:
        values = [yaml.safe_load(value) for value in re.findall(r"`([^`]*)`", defaults)]
        described |= dict(zip(re.findall(r"`([^`]*)`", names_), values, strict=True))
    assert described == RecoveryOptions().model_dump()
