"""Histories of W&B as its documentation has them exported: a data frame's CSV, and JSON of scanned rows."""

import json
from pathlib import Path

import numpy as np
import pytest

from lightning_spectral import Run

ROWS = [
    {"_step": 0, "_runtime": 2.0, "_timestamp": 1700000002.0, "trainer/global_step": 4, "epoch": 0, "train_loss": 3.0},
    {"_step": 1, "_runtime": 4.0, "_timestamp": 1700000004.0, "trainer/global_step": 9, "epoch": 0, "val_loss": 2.0},
    {"_step": 2, "_runtime": 6.0, "_timestamp": 1700000006.0, "trainer/global_step": 14, "epoch": 1, "train_loss": 1.5},
    {"_step": 3, "_runtime": 8.0, "_timestamp": 1700000008.0, "trainer/global_step": 19, "epoch": 1, "val_loss": 1.0},
]
COLUMNS = ("_step", "_runtime", "_timestamp", "trainer/global_step", "epoch", "train_loss", "val_loss")


def export(path: Path, rows: list[dict[str, float]] = ROWS, columns: tuple[str, ...] = COLUMNS) -> Path:
    """As pandas writes a data frame, with its index in front, or as rows come from ``scan_history``."""
    if path.suffix == ".csv":
        cells = [[str(i), *(str(row.get(name, "")) for name in columns)] for i, row in enumerate(rows)]
        path.write_text("".join(",".join(line) + "\n" for line in [["", *columns], *cells]))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps([{**row, "note": "text", "media": {"path": "x"}} for row in rows]))
    return path


@pytest.mark.parametrize("name", ["history.csv", "history.json", "history.jsonl"])
def test_a_history_is_read(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"batch_size": 4, "lr": 0.1, "data": {"length": 8}, "seed": 3}))
    run = Run(export(tmp_path / name), batch_tokens="batch_size*data.length")
    assert run.columns == {
        "tool": "W&B",
        "loss": "val_loss",
        "step": "trainer/global_step + 1 (Lightning counts from 0)",
        "tokens": "batch_size*data.length = 32 a step",
        "seconds": "_runtime (the clock on the wall)",
    }
    np.testing.assert_array_equal(run.history.step, [5, 10, 15, 20])
    np.testing.assert_array_equal(run.history.tokens, [160, 320, 480, 640])
    np.testing.assert_array_equal(run.history.seconds, [2, 4, 6, 8])
    np.testing.assert_array_equal(run.history.val_loss, [np.nan, 2, np.nan, 1])
    assert run.tokens_to(1.5) == pytest.approx(np.sqrt(320 * 640))
    assert run.about["setting"]["hyperparameters"] == {"batch_size": 4, "lr": 0.1}
    assert run.about["started"] == "2023-11-14T22:13:20.000+00:00"


def test_steps_are_those_of_w_and_b_where_nobody_logged_others(tmp_path: Path) -> None:
    run = Run(export(tmp_path / "h.csv", columns=("_step", "_timestamp", "epoch", "val_loss")))
    assert run.columns["step"] == "_step"
    np.testing.assert_array_equal(run.history.step, [1, 3])
    np.testing.assert_array_equal(run.history.seconds, [2, 6])
    assert run.columns["tokens"] == "not known"
    assert np.isnan(run.history.tokens).all()


def test_a_column_of_steps_that_is_named_is_taken_as_it_is(tmp_path: Path) -> None:
    run = Run(export(tmp_path / "h.csv"), step="trainer/global_step")
    np.testing.assert_array_equal(run.history.step, [4, 9, 14, 19])
