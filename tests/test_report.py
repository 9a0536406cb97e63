"""The report page: as text for what can be read off it, and in a real browser for what can't."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import Opened, browser
from recorded import recorded
from test_charts import filled
from test_history import history_of

from rankopt import charts
from rankopt.cli import main
from rankopt.layer_costs import layer_costs
from rankopt.study_file import load_study

pytest.importorskip("plotly", reason="needs Plotly: pip install 'rankopt[report]'")

ROOT = Path(__file__).parent.parent
HOSTILE = ("<img src=x onerror=alert(1)>", "</script><script>alert(2)</script>", "\"'`${alert(3)}&amp; $x^2$")


def written(path: Path, *options: str) -> Path:
    """A report of a study."""
    out = path.parent / "report.html"
    assert main(["report", str(path), "--out", str(out), "--quiet", *options]) == 0
    return out


def data_of(out: Path) -> dict[str, Any]:
    """The data that stand in a page."""
    (text,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', out.read_text(encoding="utf-8"), re.S
    )
    return json.loads(text)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as started:
        yield started


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that tests only read."""
    path = recorded(tmp_path_factory.mktemp("study"))
    filled(path)
    return path


@pytest.fixture(scope="module")
def out(study: Path) -> Path:
    """Its report."""
    return written(study)


def test_the_page_says_what_was_found(study: Path, out: Path) -> None:
    text = out.read_text(encoding="utf-8")
    result = history_of(study).result
    assert "numbers by a formula" in text
    assert "macs&lt;=80%" in text
    assert "Example &lt;1&gt; &amp; co" in text
    assert "accuracy 90.00, 2 ms on device" in text
    assert "90.00 ± 1.50</td>" in text
    assert "predicted latency on device: off by median 3.1%" in text
    assert "1 × ValueError: &lt;b&gt;no&lt;/b&gt; convergence" in text
    for entry in result.front:
        assert f"rankopt export {study} --trial {entry.trial} --out trial-{entry.trial}" in text
    assert set(data_of(out)["plans"]) == {str(e.trial) for e in result.entries if e.trial >= 0}


def test_the_commands_of_the_page_run_as_they_stand(tmp_path: Path) -> None:
    import shlex

    folder = tmp_path / "it's $HOME & more"
    folder.mkdir()
    path = recorded(folder, trials=2)
    plans = data_of(written(path))["plans"]
    command = shlex.split(next(iter(plans.values()))["command"])
    assert command[:3] == ["rankopt", "export", str(path)]
    url = f"sqlite:///{folder}/runs/made up.db"
    plans = data_of(written(path, "--storage", url))["plans"]
    assert shlex.split(plans["0"]["command"])[3:5] == ["--storage", url]


def test_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = recorded(tmp_path)
    out = written(study, "--no-model")
    assert "The model was not built (--no-model)" in out.read_text(encoding="utf-8")
    (study.parent / "code.py").write_text("raise RuntimeError('gone')")
    assert main(["report", str(study), "--out", str(out)]) == 0
    assert "Layers are shown without their costs:" in capsys.readouterr().err
    assert "gone" in out.read_text(encoding="utf-8")


def test_what_can_not_be_written_is_one_line(study: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("x.txt", "study.yaml"):
        assert main(["report", str(study), "--out", str(study.parent / name)]) == 2
        assert "a report ends in .html" in capsys.readouterr().err
    (study.parent / "folder.html").mkdir()
    assert main(["report", str(study), "--out", str(study.parent / "folder.html")]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert not [p for p in study.parent.iterdir() if p.name.startswith(".")]


def points(opened: Opened) -> int:
    """The marks that are drawn in visible fronts, as the browser has them."""
    return opened.page.locator('[data-chart^="front"] .scatterlayer .trace .points path').count()


def test_points_are_there_and_a_click_shows_the_layers(chromium: Any, study: Path, out: Path) -> None:
    result = history_of(study).result
    with Opened(chromium, out, viewport={"width": 1280, "height": 900}) as opened:
        page = opened.page
        fronts = len(charts.costs_of(result))
        assert points(opened) == fronts * (12 + 1 + 1 + 1)  # plans, the best, dense, and what is shown
        assert page.locator("#trial option").count() == 12
        best = result.best()
        assert page.locator("#trial").input_value() == str(best.trial)
        shown = page.locator("#layertable tbody tr")
        assert shown.count() == 3
        other = next(e for e in result.front if e.trial != best.trial)
        place = page.evaluate(
            """trial => {
              const div = document.querySelector('[data-chart="front accuracy macs_kept"]');
              div.scrollIntoView({block: 'center', behavior: 'instant'});
              const {xaxis, yaxis} = div._fullLayout, box = div.getBoundingClientRect();
              for (const trace of div.data) {
                const at = (trace.customdata || []).indexOf(trial);
                if (at >= 0) return [box.left + xaxis._offset + xaxis.d2p(trace.x[at]),
                                     box.top + yaxis._offset + yaxis.d2p(trace.y[at])];
              }
            }""",
            other.trial,
        )
        page.mouse.move(*place)
        page.wait_for_selector(".hoverlayer .hovertext")
        assert f"trial {other.trial}" in page.locator(".hoverlayer .hovertext").first.text_content()
        page.mouse.click(*place)
        page.wait_for_function("t => document.getElementById('trial').value === String(t)", arg=other.trial)
        for n, name in enumerate(("stem", "body", "head")):
            text = shown.nth(n).text_content()
            assert name in text
            assert str(other.plan[name]) in text
        opened.clean(out)


def test_what_is_drawn_of_layers_is_what_python_says(chromium: Any, study: Path, out: Path) -> None:
    result, costs = history_of(study).result, layer_costs(load_study(study))
    used = ["dense", "svd"]
    with Opened(chromium, out) as opened:
        for entry in [e for e in result.entries if e.trial in (1, 5)]:
            opened.page.select_option("#trial", str(entry.trial))
            for quantity in ("params", "macs", "latency@device", "rank"):
                chart = charts.layers(costs, entry, quantity, used)
                script = (
                    f"Array.from(document.querySelector('[data-chart=\"layers {quantity}\"]').data, t => [t.name, t.x])"
                )
                drawn = opened.page.evaluate(script)
                assert [name for name, _ in drawn] == [s.name for s in chart.series]
                for (_, x), series in zip(drawn, chart.series, strict=True):
                    assert x == [v if v is None else pytest.approx(v) for v in series.x]
        opened.clean(out)


def test_the_keyboard_reaches_everything(chromium: Any, study: Path, out: Path) -> None:
    with Opened(chromium, out) as opened:
        page = opened.page
        first = page.locator("#best tbody button.show").first
        trial = first.get_attribute("data-trial")
        reached: list[str] = []
        for _ in range(60):
            page.keyboard.press("Tab")
            reached.append(
                page.evaluate("(a => a.id || a.dataset.trial || a.className || a.tagName)(document.activeElement)")
            )
            if reached[-1] == trial and page.evaluate("document.activeElement.closest('table') !== null"):
                break
        else:
            raise AssertionError(reached)
        assert "scroll" in reached
        page.keyboard.press("Enter")
        page.wait_for_function("t => document.getElementById('trial').value === t", arg=trial)
        for figure in page.locator(".figure").all():
            assert figure.get_attribute("role") == "img"
            assert len(figure.get_attribute("aria-label")) > 20
        assert page.locator("#best table caption").count() == 1
        assert page.locator("#best th[scope=row]").count() > 1
        opened.clean(out)


def test_copying_a_command(chromium: Any, study: Path, out: Path) -> None:
    with Opened(chromium, out, permissions=["clipboard-read", "clipboard-write"]) as opened:
        button = opened.page.locator("#best button.copy").first
        button.click()
        opened.page.wait_for_function("() => document.querySelector('#best button.copy').textContent === 'copied'")
        assert opened.page.evaluate("navigator.clipboard.readText()") == button.get_attribute("data-text")
        opened.clean(out)


@pytest.mark.parametrize("width", [320, pytest.param(390, marks=pytest.mark.slow)])
def test_a_phone_needs_no_sideways_scrolling(chromium: Any, study: Path, out: Path, width: int) -> None:
    with Opened(chromium, out, viewport={"width": width, "height": 800}, is_mobile=True, has_touch=True) as opened:
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
        for box in opened.page.locator(".figure svg.main-svg").all():
            found = box.bounding_box()
            if found is not None:
                assert found["x"] + found["width"] <= width + 1
        opened.clean(out)


def luminance(colour: str) -> float:
    """By WCAG, of rgb(…)."""
    parts = [int(v) / 255 for v in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [pytest.param("light", marks=pytest.mark.slow), "dark"])
def test_text_can_be_read_in_both_schemes(chromium: Any, study: Path, out: Path, scheme: str) -> None:
    with Opened(chromium, out, color_scheme=scheme) as opened:
        paper = luminance(opened.page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert (paper > 0.5) == (scheme == "light")
        inks = [
            opened.page.evaluate(f"getComputedStyle(document.querySelector('{s}')).color")
            for s in ("body", "a", ".note", "dt")
        ]
        inks.append(opened.page.evaluate("getComputedStyle(document.querySelector('.figure .xtick text')).fill"))
        for ink in inks:
            bright, dark = sorted((luminance(ink), paper), reverse=True)
            assert (bright + 0.05) / (dark + 0.05) >= 4.5, ink
        opened.page.emulate_media(color_scheme="dark" if scheme == "light" else "light")
        opened.page.wait_for_function(  # figures follow
            "ink => getComputedStyle(document.querySelector('.figure .xtick text')).fill !== ink", arg=inks[-1]
        )
        opened.clean(out)


def test_printed(chromium: Any, study: Path, out: Path) -> None:
    with Opened(chromium, out, color_scheme="dark") as opened:
        opened.page.emulate_media(media="print")
        assert luminance(opened.page.evaluate("getComputedStyle(document.body).backgroundColor")) > 0.9
        assert (
            luminance(opened.page.evaluate("getComputedStyle(document.querySelector('.figure .xtick text')).fill"))
            < 0.2
        )
        pdf = opened.page.pdf(format="A4")
        assert pdf.startswith(b"%PDF")
        opened.clean(out)


def test_nothing_of_a_hostile_study_is_run(chromium: Any, tmp_path: Path) -> None:
    names = tuple(name.replace(".", "") for name in HOSTILE)
    path = recorded(tmp_path, names=names, description=HOSTILE[0] + HOSTILE[1])
    filled(path)
    out = written(path)
    with Opened(chromium, out) as opened:
        page = opened.page
        assert page.locator("#layertable tbody th").all_text_contents() == list(names)
        for trial in range(12):
            page.select_option("#trial", str(trial))
        assert page.locator(".lead").text_content() == HOSTILE[0] + HOSTILE[1]
        assert page.locator("img").count() == 0
        assert page.locator(".figure a").count() == 0
        assert page.locator("script").count() == 3
        for index in range(3):
            tick = page.locator('[data-chart="layers params"] .ytick text').nth(index).text_content()
            assert tick.lstrip("…") in names[index]
        # The policy would stop it even if it stood in the page.
        page.evaluate("const s = document.createElement('script'); s.textContent = 'alert(9)'; document.body.append(s)")
        assert opened.dialogs == []
        assert any("Content Security Policy" in e for e in opened.errors)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param({"latency": False}, "No latency was measured", marks=pytest.mark.slow),
        pytest.param({"accuracy": False}, "numbers by a formula", marks=pytest.mark.slow),
        ({"accuracy": False, "latency": False}, "No latency was measured"),
        ({"limits": ["macs<=1%"]}, "none of them keeps the limits"),
        ({"trials": 1}, "too few trials, or all alike"),
        pytest.param({"trials": 0}, "No plan was measured yet", marks=pytest.mark.slow),
        ({"trials": 0, "failures": False}, "No plan was measured to the end"),
    ],
)
def test_poor_studies_have_a_page_too(chromium: Any, tmp_path: Path, options: dict[str, Any], expected: str) -> None:
    path = recorded(tmp_path, **options)
    out = written(path)
    assert expected in out.read_text(encoding="utf-8")
    with Opened(chromium, out) as opened:
        if options.get("trials", 12):
            assert points(opened) > 0
            assert opened.page.locator("#layertable tbody tr").count() == 3
        opened.clean(out)


def test_one_quality_at_a_time(chromium: Any, study: Path, out: Path) -> None:
    with Opened(chromium, out) as opened:
        page = opened.page
        assert page.locator('[data-chart="front kl macs_kept"]').is_hidden()
        page.check("input[value=kl]")
        assert page.locator('[data-chart="front kl macs_kept"]').is_visible()
        assert page.locator('[data-chart="front accuracy macs_kept"]').is_hidden()
        assert points(opened) > 0
        opened.clean(out)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "trials"), [("digits", 12), ("cifar10_resnet20", 3)])
def test_reports_of_the_studies_that_come_along(
    chromium: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, trials: int
) -> None:
    """Searched for real; the second needs the images of CIFAR-10."""
    shutil.copytree(ROOT / "studies", tmp_path / "studies", ignore=shutil.ignore_patterns("runs", "records"))
    study = tmp_path / "studies" / f"{name}.yaml"
    root = Path(os.environ.get("RANKOPT_DATA") or ROOT.parent / "shared" / "data")
    if name != "digits" and not (root / "cifar10").is_dir():
        pytest.skip(f"needs CIFAR-10 in {root}; set RANKOPT_DATA")
    monkeypatch.setenv("RANKOPT_DATA", str(root))
    threads = torch.get_num_threads()
    assert main(["search", str(study), "--trials", str(trials), "--quiet"]) == 0
    torch.set_num_threads(threads)
    out = tmp_path / "report.html"
    assert main(["report", str(study), "--out", str(out), "--quiet"]) == 0
    result = history_of(study).result
    with Opened(chromium, out) as opened:
        assert points(opened) >= len([e for e in result.entries if e.trial >= 0])
        layers = opened.page.locator("#layertable tbody tr").count()
        assert layers == len(layer_costs(load_study(study)).layers)
        opened.page.locator("#best button.show").last.click()
        assert opened.page.locator("#trial").input_value() == str(result.front[-1].trial)
        opened.clean(out)
