from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from recorded import recorded
from test_history import history_of

from rankopt.cli import main
from rankopt.trial_table import to_pandas, trial_rows


def test_every_trial_is_a_row_with_all_there_is(tmp_path: Path) -> None:
    history = history_of(recorded(tmp_path))
    rows = trial_rows(history)
    assert [row["trial"] for row in rows] == list(range(13))
    assert len({tuple(row) for row in rows}) == 1
    assert {"param.budget", "param.method.stem", "param.keep.head", "layer.body", "latency_ms@device"} <= set(rows[0])
    assert rows[12]["state"] == "failed"
    assert rows[12]["kl"] is None
    assert rows[12]["layer.stem"] is None
    front = {e.trial for e in history.result.front}
    assert {row["trial"] for row in rows if row["front"]} == front
    assert rows[3]["layer.stem"] == str(history.trials[3].plan["stem"])  # type: ignore[index]


def test_csv_parquet_and_json_hold_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pd = pytest.importorskip("pandas")
    study = recorded(tmp_path)
    rows = trial_rows(history_of(study))
    for ending in ("csv", "parquet", "json"):
        assert main(["trials", str(study), "--out", str(tmp_path / f"t.{ending}")]) == 0
        assert "wrote 13 trials" in capsys.readouterr().out
    assert json.loads((tmp_path / "t.json").read_text()) == rows
    with (tmp_path / "t.csv").open(encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    assert [{k: "" if v is None else str(v) for k, v in row.items()} for row in rows] == read
    table = pd.read_parquet(tmp_path / "t.parquet")
    pd.testing.assert_frame_equal(table, to_pandas(rows), check_dtype=False)
    assert main(["trials", str(study), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == rows


def test_the_table_fits_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trials", str(recorded(tmp_path))]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "ValueError" in out
    assert "\x1b" not in out
    assert len([line for line in out.splitlines() if "complete" in line]) == 12


def test_an_ending_that_is_not_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = recorded(tmp_path)
    assert main(["trials", str(study), "--out", str(study)]) == 2
    assert "a table ends in .csv, .parquet, .json, got '.yaml'" in capsys.readouterr().err
    assert "made up" in study.read_text()


def test_a_result_as_a_data_frame(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    result = history_of(recorded(tmp_path)).result
    table = result.to_pandas()
    assert len(table) == 12
    assert set(table[table.front].trial) == {e.trial for e in result.front}
    assert (
        table.loc[table.trial == 3, "kl"].item() == next(e for e in result.entries if e.trial == 3).measurements["kl"]
    )
    assert "layer.stem" in table
