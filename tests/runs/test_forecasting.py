"""Forecasts of unfinished runs: the law of the finished ones, nothing of their own future, records and logs alike."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_spectral import Run, cli, forecast
from lightning_spectral.functional import Early, stack
from lightning_spectral.runs.predicting import _given_above
from lightning_spectral.runs.report_files import ReportFiles
from tests.runs.made_up import LAYER, made_up

BATCHES = [2.0**number for number in range(4, 12)]
NEW = 192.0


def law(batch: float) -> float:
    """Tokens to loss 1."""
    return 20_000.0 * (1 + batch / 300)


def cut(folder: Path, num: int) -> Path:
    """Leave the first lines and reports of a run."""
    history = folder / "spectra/history.csv"
    history.write_text("\n".join(history.read_text().splitlines()[: num + 1]) + "\n")
    for report in sorted(folder.glob("spectra/*.npz"))[num:]:
        report.unlink()
    return folder


def family(folder: Path, **kwargs) -> str:
    for number, batch in enumerate(BATCHES):
        scatter = 1 + 0.02 * (-1) ** number
        made_up(folder / f"done{number}", law(batch) * scatter, 1.0, 1 + number / 8, batch_tokens=batch, **kwargs)
    return f"{folder}/done*"


def csv_log(folder: Path, batch: float, num: int = 6) -> Path:
    """What a CSVLogger left of a run of that batch."""
    folder.mkdir(parents=True)
    points = [(0.25, 2.0), (0.5, 1.5), (0.75, 1.2), (1.0, 1.0), (1.5, 0.7), (2.0, 0.5)][:num]
    rows = [f"{share * law(batch) / batch:.0f},{loss}\n" for share, loss in points]
    (folder / "metrics.csv").write_text("step,val_loss\n" + "".join(rows))
    (folder / "hparams.yaml").write_text(f"batch_tokens: {batch}\n")
    return folder


def test_an_unfinished_run_is_forecast_by_the_batch_law(tmp_path: Path) -> None:
    pattern = family(tmp_path)
    new = cut(made_up(tmp_path / "new", law(NEW), 1.0, batch_tokens=NEW), 3)
    (found,) = forecast([pattern, new], 1.0, by="batch")
    (one,) = found.forecasts
    assert one.run.path == new
    assert one.value == pytest.approx(law(NEW), rel=0.05)
    assert one.low < law(NEW) < one.high
    assert one.relative == pytest.approx(one.value / min(found.backtest.tokens_to_target))
    assert (one.num_references, one.num_settings) == (8, 8)
    assert one.tokens == 0.75 * law(NEW)
    assert one.loss == pytest.approx(1.2)
    assert one.weights == {"batch law": pytest.approx(1)}
    assert len(found.backtest.runs) == len(BATCHES)


def test_the_stack_is_that_of_the_losses_and_batches_at_its_tokens(tmp_path: Path) -> None:
    """The forecast of the function from what the runs showed, put together by hand."""
    pattern = family(tmp_path)
    new = cut(made_up(tmp_path / "new", law(NEW), 1.0, batch_tokens=NEW), 2)
    (found,) = forecast([pattern, new], 1.0)
    (one,) = found.forecasts
    at = 0.5 * law(NEW)
    gaps = []
    for run in found.backtest.runs:
        tokens, losses = run.history.tokens, run.history.val_loss
        inside = tokens[0] <= at <= tokens[-1]
        loss = np.interp(np.log(at), np.log(tokens), losses) if inside else math.nan
        gaps.append(math.log(loss - 1) if loss > 1 else math.nan)
    references = Early(torch.tensor(gaps), torch.tensor(BATCHES).log())
    query = Early(torch.tensor([math.log(0.5)]), torch.tensor([NEW]).log())
    expected = stack(references, torch.tensor(found.backtest.tokens_to_target), query)
    assert one.num_references == expected.num_references
    # It also goes by its own loss curve, and by spectra if they help, which these do not.
    assert not one.uses_spectra
    assert one.value == pytest.approx(expected.value, rel=0.1)


def test_a_run_within_its_interval_is_forecast_given_that(tmp_path: Path) -> None:
    """The part of a log-normal above what was taken, beside draws from it."""
    draws = np.exp(0.3 * np.random.default_rng(0).standard_normal(400_000)) * 1000
    found = _given_above(1100.0, 1000.0, 1000 * math.exp(0.3 * float(stats.norm.ppf(0.9))))
    expected = np.quantile(draws[draws > 1100], [0.5, 0.1, 0.9])
    assert found == pytest.approx(expected, rel=0.005)


def test_a_run_beyond_what_its_references_let_expect_has_no_forecast(tmp_path: Path) -> None:
    pattern = family(tmp_path)
    slow = cut(made_up(tmp_path / "slow", 3 * law(16.0), 1.0, batch_tokens=16.0), 3)
    (found,) = forecast([pattern, slow], 1.0, by="batch")
    (one,) = found.forecasts
    assert math.isnan(one.value)
    assert re.fullmatch(r"it has taken more tokens than the 2[12],\d{3} that its references let expect", one.reason)


def test_a_run_that_has_come_beyond_most_references_is_forecast_from_before(tmp_path: Path) -> None:
    """By the loss nothing is known where all references are below the target: the run's own point before is taken."""
    pattern = family(tmp_path)
    late = made_up(tmp_path / "late", 60_000.0, 1.0, batch_tokens=NEW)
    history = late / "spectra/history.csv"
    lines = history.read_text().splitlines()
    first, *rest = [line.split(",") for line in lines[1:4]]
    first[1] = str(0.5 * law(16.0))
    history.write_text("\n".join([lines[0], *(",".join(line) for line in (first, *rest))]) + "\n")
    cut(late, 3)
    (found,) = forecast([pattern, late], 1.0, by="loss")
    (one,) = found.forecasts
    assert one.tokens == pytest.approx(0.5 * law(16.0))
    assert math.isfinite(one.value)


@pytest.mark.parametrize("by", ["tail", "head"])
def test_a_line_on_an_exponent_forecasts_too(by: str, tmp_path: Path) -> None:
    pattern = family(tmp_path)
    new = cut(made_up(tmp_path / "new", law(BATCHES[0]), 1.0, 1.3, batch_tokens=NEW), 4 - 1)
    (found,) = forecast([pattern, new], 1.0, by=by)
    (one,) = found.forecasts
    assert one.num_references >= 4
    assert one.low <= one.value <= one.high
    assert math.isfinite(one.skill)


def test_logs_are_references_by_loss_and_batch(tmp_path: Path) -> None:
    """Records and logs of one family; of the logs a spectrum is not asked."""
    pattern = family(tmp_path)
    logs = [Run(csv_log(tmp_path / f"log{batch:.0f}", batch), family="F") for batch in (24.0, 96.0, 700.0)]
    new = Run(csv_log(tmp_path / "new", NEW, num=3), family="F")
    (found,) = forecast([pattern, *logs, new], 1.0)
    assert len(found.backtest.runs) == 11
    assert found.backtest.layer == LAYER
    assert set(found.backtest.without_spectra.values()) == {"is read from CSVLogger"}
    by_name = {one.name: one for one in found.backtest.points[1].predictors}
    assert by_name["alpha_tail"].num_forecasts <= 8
    assert by_name["log batch size"].num_forecasts == 11
    (one,) = found.forecasts
    assert one.value == pytest.approx(law(NEW), rel=0.1)
    (by_tail,) = forecast([pattern, *logs, new], 1.0, by="tail")[0].forecasts
    assert by_tail.reason == "it is read from CSVLogger"


def test_logs_alone_are_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for batch in BATCHES:
        csv_log(tmp_path / f"logs/{batch:.0f}", batch)
    csv_log(tmp_path / "logs/new", NEW, num=3)
    cli.main(["forecast", f"{tmp_path}/logs/*", "--target", "1.0", "--json"])
    (found,) = json.loads(capsys.readouterr().out)["families"]
    assert found["family"] == "logs without a family"
    assert found["forecasts"][0]["value"] == pytest.approx(law(NEW), rel=0.1)
    assert (found["backtest"]["layer"], found["backtest"]["band"]) == ("", None)
    cli.main(["forecast", f"{tmp_path}/logs/*", "--target", "1.0", "--plot", str(tmp_path / "a.png")])
    printed = capsys.readouterr().out
    assert "8 runs came down to 1" in printed
    assert "alpha_tail" not in printed
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_family_with_too_few_references_says_so_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pattern = family(tmp_path)
    for number in range(3):
        made_up(tmp_path / f"other{number}", 1000.0, 1.0, family="G")
    cli.main(["forecast", pattern, f"{tmp_path}/other*", "--target", "1.0"])
    lines = capsys.readouterr().out.splitlines()
    assert "G: no forecast, it needs 4 runs that came down to 1, and has 3" in lines


def test_each_report_and_history_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = family(tmp_path)
    new = cut(made_up(tmp_path / "new", law(NEW), 1.0, batch_tokens=NEW), 3)
    read: list[Path] = []
    spectra = ReportFiles.spectra

    def noted(self: ReportFiles, report, *args, **kwargs):
        read.append(report.path)
        return spectra(self, report, *args, **kwargs)

    monkeypatch.setattr(ReportFiles, "spectra", noted)
    forecast([pattern, new], 1.0)
    assert len(read) == len(set(read))


def test_a_run_below_the_target_from_the_first_is_neither(tmp_path: Path) -> None:
    pattern = family(tmp_path)
    shutil.copytree(tmp_path / "done0", tmp_path / "low")
    about = tmp_path / "low/spectra/run.json"
    about.write_text(about.read_text().replace("done0", "low"))
    history = tmp_path / "low/spectra/history.csv"
    lines = history.read_text().splitlines()
    history.write_text("\n".join([lines[0], *lines[5:]]) + "\n")
    (found,) = forecast([pattern, tmp_path / "low"], 1.0)
    assert found.backtest.skipped == {str(tmp_path / "low"): "was below 1 from the first loss on"}


def test_an_unknown_way_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="by must be one of stack, tail, head, loss, batch, got 'x'"):
        forecast(tmp_path, 1.0, by="x")
