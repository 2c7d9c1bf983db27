"""MLflow's files: what may stand in them beside what the real store writes."""

from pathlib import Path

import numpy as np
import pytest

from lightning_spectral import Run


def store(folder: Path, line: str = "1700000000000 2.0 1", name: str = "val/loss") -> Path:
    file = folder / "metrics" / name
    file.parent.mkdir(parents=True)
    file.write_text(f"{line}\n1700000002000 1.0 2\n1700000003000 0.5")
    (folder / "params").mkdir()
    (folder / "params/lr").write_text("0.1")
    (folder / "params/batch_tokens").write_text("64")
    (folder / "meta.yaml").write_text("start_time: 1699999999000\n")
    return folder


def test_names_with_slashes_and_torn_lines(tmp_path: Path) -> None:
    run = Run(store(tmp_path))
    assert run.columns["loss"] == "val/loss"
    assert run.columns["tokens"] == "batch_tokens = 64 a step"
    np.testing.assert_array_equal(run.history.step, [1, 2])
    np.testing.assert_array_equal(run.history.tokens, [64, 128])
    np.testing.assert_allclose(run.history.seconds, [1, 3])
    assert run.about["setting"]["hyperparameters"] == {"batch_tokens": 64, "lr": 0.1}


def test_lines_of_newer_versions_hold_more(tmp_path: Path) -> None:
    run = Run(store(tmp_path, "1700000000000 2.0 1 dataset 5f"))
    np.testing.assert_array_equal(run.history.val_loss, [2, 1])


def test_lines_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"broken log.*line 1 of metrics/val/loss is not of timestamp, value and step"):
        Run(store(tmp_path, "1700000000000 2.0"))


@pytest.mark.parametrize("text", ["{}", '{"mlflow": 3}', '{"mlflow": {"metrics": {"a": 1}}}', "{" * 100_000, "{"])
def test_json_that_is_no_export_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"broken log: .*run.json"):
        Run(tmp_path / "run.json")
