from __future__ import annotations

import struct
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from recorded import recorded
from test_charts import filled

from rankopt.cli import main

pytest.importorskip("matplotlib", reason="needs Matplotlib: pip install 'rankopt[plots]'")
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = recorded(tmp_path)
    filled(path)
    return path


def plot(study: Path, kind: str, out: str, *options: str) -> Path:
    path = study.parent / out
    assert main(["plot", kind, str(study), "--out", str(path), *options]) == 0
    return path


@pytest.mark.parametrize("kind", ["front", "layers", "prediction", "history", "importances"])
def test_every_kind_in_every_format(study: Path, kind: str) -> None:
    root = ET.parse(plot(study, kind, "p.svg")).getroot()
    assert root.tag == f"{SVG}svg"
    assert len(root.findall(f".//{SVG}path")) > 5
    assert plot(study, kind, "p.pdf").read_bytes().startswith(b"%PDF")
    assert plot(study, kind, "p.png").read_bytes().startswith(b"\x89PNG")


def texts(path: Path) -> set[str]:
    return {"".join(node.itertext()).strip() for node in ET.parse(path).getroot().iter(f"{SVG}text")}


def test_text_stays_text_and_the_size_is_as_asked(study: Path) -> None:
    found = texts(plot(study, "front", "front.svg", "--cost", "macs", "--quality", "accuracy"))
    assert {"MACs, % of dense", "accuracy", "macs<=80%", "dense", "front"} <= found
    width, height = struct.unpack(">II", plot(study, "front", "front.png", "--width", "2").read_bytes()[16:24])
    assert width == 600
    assert height > 300
    assert {"kl to dense, nats", "parameters, % of dense"} <= texts(
        plot(study, "front", "kl.svg", "--cost", "params", "--quality", "kl")
    )


def test_the_same_study_gives_the_same_bytes(study: Path) -> None:
    assert plot(study, "layers", "a.svg").read_bytes() == plot(study, "layers", "b.svg").read_bytes()


def test_names_are_no_formulas(tmp_path: Path) -> None:
    path = recorded(tmp_path, names=("$x^{2$", "a_b", "c"))
    assert "$x^{2$" in texts(plot(path, "layers", "l.svg", "--trial", "1", "--cost", "macs"))


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["front", "--out", "a.jpg"], "a plot ends in .svg, .pdf, .png, got '.jpg'"),
        (["front", "--out", "a"], "got 'no ending'"),
        (["front", "--out", "a.svg", "--trial", "3"], "--trial: is not an option of plot front"),
        (["history", "--out", "a.svg", "--cost", "macs"], "--cost: is not an option of plot history"),
        (["front", "--out", "a.svg", "--cost", "speed"], "--cost: 'speed' was not measured; there are"),
        (["layers", "--out", "a.svg", "--trial", "77"], "--trial 77"),
        (["fronts", "--out", "a.svg"], "fronts"),
        (["front", "--out", "a.svg", "--width", "0"], "--width"),
    ],
)
def test_bad_input(study: Path, capsys: pytest.CaptureFixture[str], args: list[str], expected: str) -> None:
    kind, *rest = args
    rest[1] = str(study.parent / rest[1])
    assert main(["plot", kind, str(study), *rest]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert not Path(rest[1]).exists()


def test_nothing_to_draw_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recorded(tmp_path, trials=1)
    assert main(["plot", "importances", str(path), "--out", str(tmp_path / "i.svg")]) == 2
    assert "too few trials" in capsys.readouterr().err
