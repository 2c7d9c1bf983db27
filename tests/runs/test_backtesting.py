"""Backtests of made-up families: a law that is known, one without relation, and nothing seen of the future."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_spectral import Run, backtest, cli
from lightning_spectral.functional import Forecast
from lightning_spectral.runs.backtesting import Point, Predictor, _skill
from tests.runs.made_up import LAYER, made_up

ALPHAS = [0.8, 0.9, 1.0, 1.15, 1.3, 1.4, 1.5, 1.7]
BATCHES = [512.0, 64.0, 128.0, 256.0, 32.0, 1024.0, 16.0, 2048.0]


def family(folder: Path, tokens: list[float], alphas: list[float] = ALPHAS, **kwargs) -> str:
    """Runs whose exponent does not change, and that reach loss 1 after some tokens; the first report comes early."""
    for number, (count, alpha, batch) in enumerate(zip(tokens, alphas, BATCHES, strict=True)):
        path = made_up(folder / f"{number}", count, 1.0, alpha, batch_tokens=batch, **kwargs)
        first = path / "spectra" / "activation-validate-000000100.npz"
        arrays = dict(np.load(first))
        np.savez(first.with_name("activation-validate-000000001.npz"), **(arrays | {"tokens": np.asarray(1.0)}))
    return f"{folder}/*"


def named(point: Point, name: str) -> Predictor:
    (found,) = [predictor for predictor in point.predictors if predictor.name == name]
    return found


def law(alpha: float) -> float:
    return 1000 * math.exp(0.8 * alpha)


def test_a_law_is_found_and_forecasts_follow_it(tmp_path: Path) -> None:
    tokens = [law(alpha) for alpha in ALPHAS]
    (found,) = backtest(family(tmp_path, tokens), 1.0)
    assert found.tokens_to_target == pytest.approx(tokens)
    assert (found.layer, found.band) == (LAYER, (0.125, 0.5))
    assert [point.tokens for point in found.points] == pytest.approx([f * min(tokens) for f in (0.1, 0.25, 0.5)])
    for point in found.points:
        tail = named(point, "alpha_tail")
        assert tail.rho == pytest.approx(1)
        assert tail.partial_rho == pytest.approx(1)
        assert tail.skill == pytest.approx(1)
        assert tail.median_error == pytest.approx(0, abs=1e-6)
        assert tail.mean_log_error == pytest.approx(0, abs=1e-6)
        assert tail.large_error == pytest.approx(0, abs=1e-6)
        assert [one.value for one in tail.forecasts] == pytest.approx(tokens)
        batch = {predictor.name: predictor for predictor in point.predictors}["log batch size"]
        assert batch.rho == pytest.approx(stats.spearmanr(BATCHES, tokens).statistic)
        assert math.isnan(batch.partial_rho)
        assert point.by_layer[LAYER]["0.125-0.5"] == pytest.approx(1)


def test_a_family_without_relation_shows_none(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    tokens = (2000 * np.exp(0.3 * generator.standard_normal(len(ALPHAS)))).tolist()
    (found,) = backtest(family(tmp_path, tokens), 1.0)
    tail = named(found.points[0], "alpha_tail")
    assert tail.low < 0 < tail.high
    assert tail.median_error > 0.1


def test_nothing_after_the_point_enters_a_forecast(tmp_path: Path) -> None:
    """What a run shows later is shuffled: the others' forecasts change, for its truth does, but not its own."""
    tokens = [law(alpha) for alpha in ALPHAS]
    pattern = family(tmp_path, tokens)
    before = backtest(pattern, 1.0)[0]
    run = Run(tmp_path / "4")
    later = [step for step in run.steps("activation") if run.tokens_at("activation", step) > before.points[1].tokens]
    generator = np.random.default_rng(0)
    for step in later:
        path = run.folder / f"activation-validate-{step:09d}.npz"
        arrays = dict(np.load(path))
        arrays[f"activation/{LAYER}/eigenvalues"] = np.sort(generator.random(32))[::-1]
        np.savez(path, **arrays)
    history = run.folder / "history.csv"
    lines = history.read_text().splitlines()
    seen = sum(float(line.split(",")[1]) <= before.points[1].tokens for line in lines[1:])
    shuffled = [
        ",".join([*line.split(",")[:-1], repr(loss)])
        for line, loss in zip(lines[1 + seen :], [1.9, 1.7, 1.3, 0.9, 0.8, 0.6][: len(lines) - 1 - seen], strict=True)
    ]
    history.write_text("\n".join([*lines[: 1 + seen], *shuffled]) + "\n")
    after = backtest(pattern, 1.0)[0]
    assert after.tokens_to_target[4] != before.tokens_to_target[4]
    for first, second in zip(before.points[1].predictors, after.points[1].predictors, strict=True):
        # Of the extrapolated curve, which sees no other run, all.
        assert first.forecasts[4] == pytest.approx(second.forecasts[4], nan_ok=True), first.name


def test_families_are_forecast_apart(tmp_path: Path) -> None:
    tokens = [law(alpha) for alpha in ALPHAS]
    family(tmp_path / "a", tokens)
    family(tmp_path / "b", tokens[::-1], family="G")
    made_up(tmp_path / "c" / "0", 100, 1, family="H")
    first, second = backtest(f"{tmp_path}/*/*", 1.0)
    assert (first.family, second.family) == ("F", "G")
    assert named(second.points[0], "alpha_tail").rho == pytest.approx(-1)


def test_command_prints_tables_json_and_a_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["forecast", family(tmp_path / "runs", [law(alpha) for alpha in ALPHAS]), "--target", "1.0"]
    cli.main([*words, "--plot", str(tmp_path / "law.png")])
    printed = capsys.readouterr().out
    assert re.search(r"alpha_tail +\+1.00 +\+1.00 .. \+1.00 +\+1.00 +\+1.00 +0% +0.00 +0.00", printed)
    assert "F: 8 runs came down to 1 in 1,896 to 3,896 tokens; none unfinished" in printed
    assert (tmp_path / "law.png").read_bytes().startswith(b"\x89PNG")
    cli.main([*words, "--json", "--tail", "4", "16"])
    (found,) = json.loads(capsys.readouterr().out)["families"]
    assert found["forecasts"] == []
    assert found["backtest"]["band"] == [4, 16]
    assert len(found["backtest"]["points"][0]["predictors"][0]["forecasts"]) == len(ALPHAS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x*", "--target", "1"], "runs must name runs with a record, got 'x*': no folder with one matches"),
        (
            ["runs/*", "--target", "0.1"],
            "runs must be references enough: F: it needs 4 runs that came down to 0.1, and has 0",
        ),
        (
            ["runs/*", "--target", "1", "--layer", "b"],
            "layer must be one that a run of F measured, got 'b': there are ",
        ),
        (["runs/*", "--target", "1", "--tail", "9", "2"], "tail must be two ascending ranks from 1, got (9, 2)"),
        (["runs/*", "--target", "1", "--by", "x"], "argument --by: invalid choice: 'x'"),
        (["runs/*"], "the following arguments are required: --target: see lightning-spectral forecast --help"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    family(tmp_path / "runs", [law(alpha) for alpha in ALPHAS])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        cli.main(["forecast", *words])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"lightning-spectral: error: {message}")


def test_validation_after_a_report_is_the_future(tmp_path: Path) -> None:
    """Reports on training rows fall between validation runs: the next loss is not known yet."""
    pattern = family(tmp_path, [law(alpha) for alpha in ALPHAS])
    for run in tmp_path.iterdir():
        history = run / "spectra" / "history.csv"
        lines = history.read_text().splitlines()
        history.write_text("\n".join([*lines[:2], *lines[3:]]) + "\n")  # no validation at the second report
    at = [0.6 * law(ALPHAS[0])]
    before = backtest(pattern, 1.0, at=at)[0].points[0]
    path = tmp_path / "4" / "spectra" / "history.csv"
    lines = path.read_text().splitlines()
    lines[2] = lines[2].replace(",1.2", ",1.9")
    path.write_text("\n".join(lines) + "\n")
    after = backtest(pattern, 1.0, at=at)[0].points[0]
    for first, second in zip(before.predictors, after.predictors, strict=True):
        assert first.forecasts[4] == pytest.approx(second.forecasts[4], nan_ok=True), first.name
        assert first.rho == pytest.approx(second.rho, nan_ok=True), first.name


def test_a_run_in_two_directories_is_one(tmp_path: Path) -> None:
    pattern = family(tmp_path, [law(alpha) for alpha in ALPHAS])
    shutil.copytree(tmp_path / "4", tmp_path / "copy")
    assert len(backtest(pattern, 1.0)[0].runs) == len(ALPHAS)


def test_forecasts_that_rest_on_no_other_run_are_judged_as_they_are() -> None:
    truth = torch.tensor([100.0, 200.0, 300.0, 400.0, 500.0, 600.0], dtype=torch.float64)
    same = [Forecast(300.0, math.nan, math.nan)] * 6
    assert math.isnan(_skill(same, truth, torch.arange(6), is_relative=False)[0])
    never = [Forecast(float(value), math.nan, math.nan) for value in truth[:4]] + [Forecast(math.inf, 0, 0)] * 2
    rho, error, log_error, num_known = _skill(never, truth, torch.arange(6), is_relative=False)
    assert (num_known, error, log_error) == (6, 0.0, math.inf)
    assert rho == pytest.approx(stats.spearmanr([1, 2, 3, 4, 9, 9], truth).statistic)
    assert (
        _skill([*never[:3], *[Forecast(math.inf, 0, 0)] * 3], truth, torch.arange(6), is_relative=False)[1] == math.inf
    )


def test_each_run_is_forecast_from_other_settings(tmp_path: Path) -> None:
    """Twins of each run among the references: forecasts are those of the family without them."""
    tokens = [law(alpha) * (1 + 0.1 * (-1) ** number) for number, alpha in enumerate(ALPHAS)]
    family(tmp_path / "runs", tokens)
    (alone,) = backtest(f"{tmp_path}/runs/*", 1.0)
    family(tmp_path / "twins", tokens)
    (found,) = backtest(f"{tmp_path}/*/*", 1.0)
    assert found.settings == [*alone.settings] * 2
    for one, both in zip(alone.points, found.points, strict=True):
        # Of so few early losses as are known, twins make enough references.
        of_all = [
            index for index, predictor in enumerate(one.predictors) if predictor.name not in ("stack", "early loss")
        ]
        for first, second in ((one.predictors[index], both.predictors[index]) for index in of_all):
            for left, right in zip([*first.forecasts] * 2, second.forecasts, strict=True):
                assert right[:4] == pytest.approx(left[:4], rel=1e-6, nan_ok=True), first.name
            assert second.skill == pytest.approx(first.skill, nan_ok=True), first.name
            assert second.median_error == pytest.approx(first.median_error, rel=1e-6, nan_ok=True), first.name
    facts = found.as_dict()
    assert facts["settings"] == found.settings
    assert {"extrapolated", "reason"} <= set(facts["points"][0]["predictors"][0]["forecasts"][0])


def test_seeds_of_three_settings_are_too_few_to_forecast_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(12):
        made_up(tmp_path / f"{number}", 1000.0 + number, 1.0, 1 + number / 12, batch_tokens=2.0 ** (number % 3))
    cli.main(["forecast", f"{tmp_path}/*", "--target", "1.0"])
    printed = capsys.readouterr().out
    assert "of 3 settings (seeds of one count once)" in printed
    assert "no run is forecast: that takes 3 other settings" in printed
