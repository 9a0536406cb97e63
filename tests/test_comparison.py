"""`compare`: every method alone at equal cost, on a small net and at the command line."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankopt
from rankopt.allocate import allocate
from rankopt.cli import main
from rankopt.comparison import MIXED, Comparison, Row, compare, widened
from rankopt.comparison_files import charts_of, flat, markdown, ranked, sentences, tables, write
from rankopt.errors import InputError, LayerError
from rankopt.nn.capsules import CapsuleLayer, PrimaryCapsules
from rankopt.plan import LayerChoice, Plan
from rankopt.search import Search
from rankopt.space_file import load_space
from rankopt.targets.replay import Replay


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.c, self.fc = nn.Conv2d(12, 16, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x))))))
        return self.fc(x.mean((2, 3)))


EXAMPLE = torch.zeros(1, 3, 8, 8)
SPACE = {"methods": ["svd", "spatial_svd", "tucker2"], "keep": {"levels": 8}}


def made(space: Any = SPACE, **options: Any) -> Search:
    torch.manual_seed(0)
    net = Net().eval()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(90, 3, 8, 8, generator=generator)
    batches = rankopt.batches.as_batches((x, torch.randint(0, 5, (90,), generator=generator)), batch_size=30)
    given = {"metric": "accuracy", "refit_samples": 30, "precision": "float32", **options}
    return Search(net, EXAMPLE, calibration=batches, space=space, cache=False, **given)


@pytest.fixture(scope="module")
def search() -> Search:
    return made()


@pytest.fixture(scope="module")
def found(search: Search) -> Comparison:
    return compare(search, levels=(0.6, 0.4))


def test_every_row_keeps_its_level_and_is_what_it_says(search: Search, found: Comparison) -> None:
    assert len(found.rows) == 2 * 2 * 4
    for row in found.rows:
        assert row.plan is not None, row
        assert row.values[f"{row.by}_kept"] <= row.level
        used = set(row.plan.methods()) - {"dense"}
        if row.method != MIXED:
            # svd stands in where there is no kernel
            assert used <= {row.method, "svd"}
            for name in ("a", "b"):
                assert row.plan[name].method in ("dense", row.method)
        built = search.build(row.plan)
        counted = rankopt.count(built, EXAMPLE)
        assert counted.macs == row.values["macs"]
        assert counted.params == row.values["params"]
        assert search.measure(built)["kl"] == pytest.approx(row.values["kl"], rel=1e-5)
        assert row.values["accuracy"] == search.measure(built)["accuracy"]


def test_mixed_is_predicted_to_lose_least_and_each_is_the_optimum(search: Search, found: Comparison) -> None:
    for by in ("macs", "params"):
        for level in (0.6, 0.4):
            own = {r.method: search.space.predicted(r.plan) for r in found.rows if (r.by, r.level) == (by, level)}  # type: ignore[arg-type]
            assert own[MIXED] <= min(own.values()) * 1.001 + 1e-12
            total = getattr(search.cost, by)
            fixed = total - sum(getattr(la, by) for g in search.groups for la in g.layers)
            for name in ("svd", "tucker2"):
                groups = []
                for g in search.groups:
                    fits = name if g.name in ("a", "b") else "svd"
                    kept = [n for n, c in enumerate(g.choices) if c.method in ("dense", fits)]
                    costs = {by: getattr(g, by)[kept]}
                    groups.append(rankopt.allocate.Choices(g.losses[kept].clip(0), costs))
                best = allocate(groups, {by: level * total - fixed})
                assert own[name] == pytest.approx(best.loss, rel=1e-3, abs=1e-9)


def test_methods_joined_by_plus_count_as_one(search: Search) -> None:
    rows = compare(search, ["spatial_svd", "tucker2", "spatial_svd+tucker2"], (0.4,), ["macs"])
    lost = {r.method: search.space.predicted(r.plan) for r in rows.rows if r.plan}
    assert list(lost) == ["spatial_svd", "tucker2", "spatial_svd+tucker2", MIXED]
    assert lost["spatial_svd+tucker2"] <= min(lost["spatial_svd"], lost["tucker2"]) * 1.001
    assert lost["spatial_svd+tucker2"] == pytest.approx(lost[MIXED], rel=1e-3)
    assert list(rows.chosen) == ["spatial_svd", "tucker2"]
    with pytest.raises(InputError, match="methods: cp has no candidate here"):
        compare(search, ["svd+cp"], (0.4,))


def test_methods_for_capsules_beside_those_for_convolutions() -> None:
    class CapsNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.primary = nn.Conv2d(1, 8, 3), PrimaryCapsules(8, 2, 4, 3, stride=2)
            self.caps = CapsuleLayer(8, 4, 5, 4, iterations=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.caps(self.primary(torch.relu(self.conv(x)))).norm(dim=-1)

    torch.manual_seed(0)
    data = rankopt.batches.as_batches(torch.randn(40, 1, 8, 8), batch_size=20)
    space = widened(load_space({"keep": [0.3, 0.6]}), ["svd+caps_svd", "svd"])
    run = Search(CapsNet().eval(), torch.zeros(1, 1, 8, 8), calibration=data, space=space, cache=False)
    rows = {r.method: r.plan for r in compare(run, ["svd+caps_svd", "svd"], (0.7,), ["params"]).rows}
    assert rows["svd+caps_svd"] is not None
    assert rows["svd"] is not None
    assert rows["svd+caps_svd"]["caps"].method == "caps_svd"
    assert rows["svd"]["caps"].method == "dense"


def test_activations_stand_in_for_activations(search: Search) -> None:
    """What takes the place of a method that needs a kernel is as nonlinear as it is."""
    run = made(widened(load_space(SPACE), ["spatial_svd_act"]))
    (row, _) = compare(run, ["spatial_svd_act"], (0.4,), ["macs"]).rows
    assert row.plan is not None
    assert set(row.plan.methods()) - {"dense"} == {"spatial_svd_act", "svd_act"}


def test_what_was_chosen_and_what_never(found: Comparison) -> None:
    mixed = [r.plan for r in found.rows if r.method == MIXED]
    uses = [c.method for plan in mixed if plan for c in plan.changed().values()]
    assert found.mixed == len(mixed) == 4
    assert dict(found.chosen) == {n: uses.count(n) for n in ("svd", "spatial_svd", "tucker2")}
    assert found.never == [n for n in found.chosen if n not in uses]
    lines = sentences(Comparison(found.rows, found.dense, {"svd": 3, "cp": 0}, 4))
    assert lines == ["layers per method in 4 mixed plans: svd 3", "never chosen by the mixed search: cp"]


def test_a_level_out_of_reach_and_costs_that_do_not_fall() -> None:
    run = made({"methods": ["tucker2", "relu_svd"], "keep": [0.5, 0.8]})
    rows = {(r.by, r.method): r for r in compare(run, levels=(0.2,)).rows}
    assert "the least that it reaches is" in rows["macs", "tucker2"].missing
    assert rows["macs", "relu_svd"].missing == "the least that it reaches is 100.0% of dense"
    assert rows["macs", "relu_svd"].plan is None
    notes = compare(run, levels=(0.2, 0.1)).notes
    assert "relu_svd at 20%, 10% of macs: the least that it reaches is 100.0% of dense" in notes
    storage = {(r.by, r.method): r for r in compare(run, ["relu_svd"], (0.7,), ["params"]).rows}["params", "relu_svd"]
    assert storage.values["params_kept"] <= 0.7
    assert storage.values["macs_kept"] > 1


def test_equal_measured_latency() -> None:
    """A device whose times are MACs and calls of modules: measured shares come to the level by themselves."""
    run = made(targets=[Replay(ms_per_mmac=1.0, ms_per_module=0.01)])
    result = compare(run, levels=(0.7,), by=["latency", "macs"])
    timed = [r for r in result.rows if r.by == "latency" and r.plan is not None]
    assert timed
    assert all(r.values["latency_kept"] <= 0.7 * 1.02 for r in timed)
    assert all("latency_kept" in r.values for r in result.rows if r.plan is not None)
    assert all(r.missing for r in result.rows if r.plan is None)
    assert result.conditions["replay"]["ms_per_mmac"] == "1.0"


def test_training_is_measured_again_and_test_data_too() -> None:
    run = made(tests=None)
    run.tests = run.validation
    seen: list[Plan] = []

    def train(built: nn.Module, plan: Plan) -> nn.Module:
        seen.append(plan)
        return run.model

    rows = compare(run, ["svd"], (0.5,), ["macs", "params"], test=True, train=train).rows
    for row in rows:
        assert row.values["trained_kl"] == pytest.approx(0, abs=1e-6)  # the dense model itself was handed back
        assert row.values["test_kl"] == row.values["kl"] > 0
    assert len(seen) == len({row.plan.digest for row in rows if row.plan})  # a plan that comes twice is built once


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": (0.5, 1.2)}, "levels: each is a share"),
        ({"by": ["flops"]}, "by: is one of macs, params .latency needs a target., got 'flops'"),
        ({"by": ["latency"]}, "latency needs a target"),
        ({"by": []}, "by: names nothing"),
        ({"methods": ["cp"]}, "methods: cp has no candidate here, since the search space does not offer it"),
    ],
)
def test_wrong_input(search: Search, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        compare(search, **options)


def test_widened_spaces() -> None:
    space = load_space(
        {"methods": ["svd"], "rules": [{"match": "kind:conv", "methods": ["svd_in"]}, {"match": "fc", "dense": True}]}
    )
    other = widened(space, ["cp", "relu_tucker"])
    assert other.methods == ["cp", "relu_tucker", "svd", "relu_svd"]
    assert [rule.methods for rule in other.rules] == [None, None]
    assert other.rules[1].dense
    assert space.methods == ["svd"]
    assert space.rules[0].methods == ["svd_in"]
    with pytest.raises(LayerError, match="unknown decomposition 'no'"):
        widened(space, ["no"])


# what is shown


def made_up() -> Comparison:
    plan = Plan({"a": LayerChoice("svd", {"rank": 2}), "b": LayerChoice("dense")})

    def row(by: str, level: float, name: str, accuracy: float, kept: float) -> Row:
        return Row(by, level, name, plan, {"accuracy": accuracy, "kl": 1 - accuracy / 100, f"{by}_kept": kept})

    rows = [
        row("macs", 0.5, "svd", 80, 0.5), row("macs", 0.5, "cp", 90, 0.48),
        Row("macs", 0.5, "tucker2", missing="no way"),
        row("macs", 0.25, "svd", 60, 0.25), row("macs", 0.25, "mixed", 85, 0.24), row("params", 0.5, "cp", 70, 0.5),
    ]  # fmt: skip
    return Comparison(rows, {"accuracy": 95.0}, {"svd": 1, "cp": 2, "tucker2": 0}, 1, ["a note"])


def test_rows_are_ranked_and_flat() -> None:
    found = made_up()
    assert [(r.level, r.method) for r in ranked(found, "macs")] == [
        (0.5, "cp"), (0.5, "svd"), (0.25, "mixed"), (0.25, "svd"),
    ]  # fmt: skip
    rows = flat(found)
    assert len({tuple(row) for row in rows}) == 1
    assert rows[2]["missing"] == "no way"
    assert rows[2]["accuracy"] is None
    assert rows[0]["layers_per_method"] == "dense 1, svd 1"


def test_tables_and_records_say_all_of_it() -> None:
    from rich.console import Console

    found = made_up()
    console = Console(width=80, record=True, file=io.StringIO())
    for table in tables(found):
        console.print(table)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    for word in ("at equal macs", "at equal params", "dense", "cp", "90.00", "48.0%"):
        assert word in text
    assert "tucker2" not in text  # no plan; a note says why
    record = markdown(found, "A title", ["a head", ""])
    assert record.startswith("# A title\n\na head\n")
    assert "| 50% | cp | 90.00 | 0.1000 | 48.0% |" in record
    assert "never chosen by the mixed search: tucker2" in record
    assert "- a note" in record


def test_charts_have_a_line_a_method() -> None:
    found = made_up()
    charts = charts_of(found)
    assert [c.key for c in charts] == [
        "compare kl macs",
        "compare accuracy macs",
        "compare kl params",
        "compare accuracy params",
    ]
    accuracy = charts[1]
    assert {s.name: (list(s.x), list(s.y), s.kind) for s in accuracy.series} == {
        "svd": ([25.0, 50.0], [60, 80], "line"), "cp": ([48.0], [90], "line"), "mixed": ([24.0], [85], "points"),
    }  # fmt: skip
    assert [rule.at for rule in accuracy.rules] == [95.0]


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = made_up()
    assert write(found, tmp_path / "new" / "folder", "t") == [
        "compare.md",
        "compare.csv",
        "compare.json",
        "compare.svg",
    ]
    with (tmp_path / "new" / "folder" / "compare.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 6
    stored = json.loads((tmp_path / "new" / "folder" / "compare.json").read_text())
    assert stored["never"] == ["tucker2"]
    assert Plan.from_dict(stored["rows"][0]["plan"]) == found.rows[0].plan
    assert "<svg" in (tmp_path / "new" / "folder" / "compare.svg").read_text()
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert write(found, tmp_path / "plain", "t") == ["compare.md", "compare.csv", "compare.json"]
    with pytest.raises(InputError, match="is a file"):
        write(found, tmp_path / "plain" / "compare.md", "t")


def test_files_where_nothing_reaches_a_level(tmp_path: Path) -> None:
    """The tables say so; there is nothing to draw."""
    rows = [Row("latency", 0.5, name, missing="the least that it reaches is 90.0% of dense") for name in ("svd", "cp")]
    found = Comparison(rows, {"accuracy": 95.0}, {"svd": 0}, 0, ["svd at 50% of latency: the least is 90.0% of dense"])
    assert write(found, tmp_path, "t") == ["compare.md", "compare.csv", "compare.json"]
    text = (tmp_path / "compare.md").read_text()
    assert "## At equal latency\n\nNo method reaches this; see the notes.\n" in text
    assert "| level |" not in text
    assert "- svd at 50% of latency: the least is 90.0% of dense" in text
    assert list(tables(found)) == []


# the command line


STUDY = """
description: a small net
model: code.py:model
data: code.py:data
metric: accuracy
space: {methods: [svd, tucker2], keep: [0.3, 0.5, 0.7]}
limits: ["macs<=50%"]
precision: float32
recovery: {batch: 30, lr: 0.01}
"""
CODE = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    convs = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3)
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(128, 4)).eval()

def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(90, 3, 6, 6, generator=generator)
    y = torch.arange(90) % 4
    return {"calibration": (x[:60], y[:60]), "validation": (x[60:], y[60:]), "test": (x[:30], y[:30])}
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    (tmp_path / "code.py").write_text(CODE, encoding="utf-8")
    (tmp_path / "study.yaml").write_text(STUDY, encoding="utf-8")
    return tmp_path / "study.yaml"


def test_the_command(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["compare", str(study), "--methods", "svd,svd_act", "--levels", "60%,0.4", "--by", "macs"]
    assert main([*command, "--steps", "3", "--test", "--out", str(out), "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    text = (out / "compare.md").read_text(encoding="utf-8")
    assert f"rankopt compare {study} --methods svd,svd_act --levels 60%,0.4 --by macs --steps 3 --test" in text
    assert "| level | method | accuracy | kl | test | trained | kl trained | test trained | MACs | params |" in text
    rows = json.loads((out / "compare.json").read_text(encoding="utf-8"))["rows"]
    values = {(r["method"], r["level"]): r for r in rows}
    assert set(values) == {(m, level) for m in ("svd", "svd_act", "mixed") for level in (0.6, 0.4)}
    for level in (0.6, 0.4):
        straight, bent = values["svd", level], values["svd_act", level]
        assert bent["kl"] == straight["kl"]  # the same start
        assert bent["macs"] == straight["macs"]
        assert bent["params"] > straight["params"]
        assert bent["trained_kl"] != straight["trained_kl"]
    assert not (study.parent / "runs").exists()  # nothing is searched


def test_the_command_in_json_and_tables(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(study), "--levels", "0.6", "--json", "--quiet"]) == 0
    stored = json.loads(capsys.readouterr().out)
    assert {r["method"] for r in stored["rows"]} == {"svd", "tucker2", "mixed"}
    assert {r["by"] for r in stored["rows"]} == {"macs", "params"}
    assert main(["compare", str(study), "--levels", "0.6", "--by", "params"]) == 0
    shown = capsys.readouterr().out
    assert "at equal params" in shown
    assert "at equal macs" not in shown
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--levels", "0"], "--levels: needs shares above 0 and at most 1 (100%), got '0'"),
        (["--levels", "half"], "got 'half'"),
        (["--methods", "svd,,cp"], "--methods: needs names with commas between them"),
        (["--methods", "svdd"], "unknown decomposition 'svdd'"),
        (["--by", "latency"], "latency needs a target"),
        (["--target", "nowhere"], "nowhere"),
        (["--steps", "-1"], "--steps"),
    ],
)
def test_wrong_options_are_one_line(
    study: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(study), "--quiet", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert "Traceback" not in error


def test_out_that_is_a_file_is_refused_before_anything_is_computed(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(study), "--out", str(study), "--quiet"]) == 2
    assert "is a file; give a folder" in capsys.readouterr().err
