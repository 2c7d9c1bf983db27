"""Logs of the real loggers say what the record of the same training says, and are compared with it."""

import math
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from lightning_spectral import Run, cli, compare
from lightning_spectral.runs.references import Wanted, find_references
from tests.runs.logs.conftest import BATCH, LENGTH, Logged

TOOLS = {"csv": "CSVLogger", "tensorboard": "TensorBoard", "mlflow": "MLflow", "mlflow_export": "MLflow"}


def of_log(logged: Logged, name: str, tmp_path: Path) -> Path:
    """A log beside which there is no record."""
    path = getattr(logged, name)
    if name != "tensorboard":
        return path
    return shutil.copytree(path, tmp_path / "tb", ignore=lambda *_: {"spectra"})


@pytest.mark.parametrize("name", TOOLS)
def test_a_log_says_what_the_record_says(name: str, logged: Logged, tmp_path: Path) -> None:
    recorded, run = Run(logged.record), Run(of_log(logged, name, tmp_path))
    assert recorded.columns == {}
    assert run.columns["tool"] == TOOLS[name]
    assert run.kinds == []
    assert run.forecasts == []
    at, losses = recorded.history.with_loss()
    mine, seen = run.history.with_loss()
    np.testing.assert_array_equal(run.history.step[mine], recorded.history.step[at])
    np.testing.assert_array_equal(run.history.tokens[mine], recorded.history.tokens[at])
    np.testing.assert_allclose(seen, losses, rtol=1e-6)
    loss = float(losses[0] + losses[-1]) / 2
    assert run.tokens_to(loss) == pytest.approx(recorded.tokens_to(loss), rel=1e-4)
    assert run.about["batch_tokens"] == recorded.about["batch_tokens"] == BATCH * LENGTH
    assert run.about["setting"]["hyperparameters"] == {"batch_size": BATCH, "lr": 0.5}
    assert run.about["val_loss"] == recorded.about["val_loss"] == "val_loss"


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "mlflow_export"])
def test_the_clock_of_a_log_counts_what_training_took_and_more(name: str, logged: Logged, tmp_path: Path) -> None:
    recorded, run = Run(logged.record), Run(of_log(logged, name, tmp_path))
    seconds = run.history.seconds
    assert (np.diff(seconds) >= 0).all()
    assert recorded.history.seconds[-1] < seconds[-1] < 600
    assert "the clock on the wall" in run.columns["seconds"]
    assert abs(np.datetime64(run.about["started"][:-6]) - np.datetime64(recorded.about["started"][:-6])) < 120 * 10**9


def test_training_loss_and_tokens_are_taken_where_they_are_named(logged: Logged) -> None:
    run = Run(logged.csv, loss="train_loss", batch_tokens="batch_size*3", family="F")
    assert run.family == "F"
    assert run.history.loss_name == "train_loss"
    assert not np.isfinite(run.history.val_loss).any()
    np.testing.assert_array_equal(run.history.tokens, run.history.step * BATCH * 3)
    assert run.columns["tokens"] == "batch_size*3 = 12 a step"


def test_a_run_from_a_log_goes_to_other_processes(logged: Logged) -> None:
    run = pickle.loads(pickle.dumps(Run(logged.csv)))
    assert math.isfinite(run.tokens_to(float(run.history.with_loss()[1][-1])))


def test_the_record_counts_where_both_are_there(logged: Logged) -> None:
    assert Run(logged.tensorboard).kinds == ["activation"]
    with pytest.raises(ValueError, match="loss must be left out for a run with a record, got 'val_loss' for"):
        Run(logged.tensorboard, loss="val_loss")


def test_a_log_is_compared_with_a_record_by_tokens(
    logged: Logged, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = shutil.copytree(logged.record / "spectra", tmp_path / "other/spectra").parent
    comparison = compare([Run(recorded)], [Run(logged.csv)])
    assert comparison.gains["tokens"].gain == pytest.approx(0, abs=1e-4)
    assert comparison.shifts == []
    assert comparison.timing.compared_by == ""
    cli.main(["compare", str(recorded), str(logged.csv)])
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{logged.csv} has no spectra: read from CSVLogger (loss: val_loss, step: step + 1" in printed


def test_seconds_of_logs_and_of_records_are_told_apart(logged: Logged, tmp_path: Path) -> None:
    log = of_log(logged, "tensorboard", tmp_path)
    comparison = compare(logged.record, log)
    assert "count validation and measuring" in comparison.timing.reason
    assert math.isnan(comparison.gains["seconds"].gain)


def test_show_tells_where_a_run_is_from(logged: Logged, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["show", str(logged.csv), "--batch-tokens", "100"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "over 20 steps, 2,000 tokens, - s" in printed
    assert (
        "read from CSVLogger (loss: val_loss, step: step + 1 (Lightning counts from 0), tokens: 100 a step" in printed
    )


def test_a_pattern_finds_logs_beside_records(logged: Logged, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["show", f"{logged.csv.parents[1]}/*/version_0"])
    printed = capsys.readouterr().out
    assert "read from CSVLogger" in " ".join(printed.split())
    assert "activation spectra, validate" in printed


@pytest.mark.parametrize("name", TOOLS)
def test_logs_serve_as_references_of_a_forecast(name: str, logged: Logged, tmp_path: Path) -> None:
    """Given as references of runs of a family they are of it, without spectra."""
    recorded, log = Run(logged.record), of_log(logged, name, tmp_path)
    loss = float(np.nanmean([recorded.history.val_loss.max(), recorded.history.val_loss.min()]))
    wanted = Wanted("F", loss, "val_loss", "blocks.1", {"stage": "validate"}, needs_spectra=False)
    for asked in (str(log), {"path": log}, [{"path": log, "batch_tokens": BATCH * LENGTH}]):
        (found,) = find_references(asked, wanted).usable
        assert (found.series, found.run.family) == ("", "F")
        assert found.tokens_to_target == pytest.approx(recorded.tokens_to(loss), rel=1e-4)
    (twice,) = find_references({"path": log, "batch_tokens": 2 * BATCH * LENGTH}, wanted).usable
    assert twice.tokens_to_target == pytest.approx(2 * recorded.tokens_to(loss), rel=1e-4)
    (trained,) = find_references({"path": log, "loss": "train_loss"}, wanted).usable
    assert trained.tokens_to_target == pytest.approx(Run(log, loss="train_loss").tokens_to(loss))
    (of_training,) = find_references([log], wanted._replace(monitor="train_loss")).usable
    assert of_training.tokens_to_target == trained.tokens_to_target
    for changed, told, reason in (
        ({"monitor": "nll"}, {}, "that recorded val_loss and not nll: name its loss"),
        ({}, {"family": "G"}, "of another family (G, not F)"),
        ({}, {"loss": "nll"}, "that cannot be read (loss must be one of its columns"),
        ({"needs_spectra": True}, {}, "that did not measure activations"),
        ({"target": 0.0}, {}, "that never came down to 0"),
    ):
        found = find_references({"path": log, **told}, wanted._replace(**changed))
        (why,) = found.skipped.values()
        assert why.startswith(reason)
        assert found.usable == []


def test_a_log_that_does_not_count_its_tokens_is_no_reference(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,val_loss\n1,3\n2,1\n")
    wanted = Wanted("F", 2.0, "val_loss", "a", {"stage": "validate"}, needs_spectra=False)
    reason = "whose log does not say how many tokens its steps took: say batch_tokens"
    assert find_references(tmp_path, wanted).skipped == {str(tmp_path): reason}
    (found,) = find_references({"path": tmp_path, "batch_tokens": 10}, wanted).usable
    assert found.tokens_to_target == pytest.approx(10 * 2**0.5)
