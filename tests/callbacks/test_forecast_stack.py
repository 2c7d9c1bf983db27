"""TailForecaster by the stack of predictors in real runs: a law of loss and batch, gates, the end of hopeless runs."""

import math
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from lightning_spectral import Run, TailForecaster
from lightning_spectral.callbacks import tail_forecaster
from lightning_spectral.runs import predicting
from tests.callbacks.test_tail_forecaster import DATA, LAYER, Kept, fit
from tests.models import LENGTH
from tests.runs.made_up import made_up

STEP = 4 * LENGTH
"""Tokens of a step of the run that is forecast."""
SIZES = [STEP * factor for factor in (0.25, 0.5, 0.75, 1.25, 1.5, 2)]
UNRELATED = [1.3, 0.8, 1.6, 1.1, 1.5, 1.0]
"""Exponents of references that say nothing of their tokens."""


def law(batch_tokens: float) -> float:
    return 375 * (1 + batch_tokens / 200)


def references(folder: Path, exponents: list[float] = UNRELATED, data: str = DATA) -> str:
    for number, (size, exponent) in enumerate(zip(SIZES, exponents, strict=True)):
        tokens = law(size) * (1.005, 0.995, 0.995, 1.005, 1.005, 0.995)[number]
        common = {"layer": LAYER, "loss": "falling_loss", "num_tokens": 512, "batch_tokens": size, "data": data}
        made_up(folder / f"{number}", tokens, 1.0, exponent, **common)
    return f"{folder}/*"


def stacked(references: str, **kwargs: object) -> Kept:
    return Kept(references, **{"predictor": "batch", **kwargs})


def test_batch_law_is_found(tmp_path: Path) -> None:
    forecaster = stacked(references(tmp_path / "refs"))
    fit(tmp_path / "run", forecaster, max_steps=12)
    found = {name.removeprefix("forecast/"): value for name, value in forecaster.logged[12].items()}
    assert found["tokens_to_target"] == pytest.approx(law(STEP), rel=0.05)
    assert found["low"] < law(STEP) < found["high"]
    assert found["steps"] == pytest.approx(found["tokens_to_target"] / STEP)
    assert found["relative"] == pytest.approx(found["tokens_to_target"] / (law(SIZES[0]) * 1.005))
    assert found["skill"] > 0.9
    assert found["median_error"] < 0.05
    assert math.isnan(found["spectral_gain"])


@pytest.mark.filterwarnings("ignore:Kept makes no forecast", "ignore:Kept forecasts beyond", "ignore:Kept has no skill")
def test_stack_reports_what_spectra_add(tmp_path: Path) -> None:
    """The made-up references all have the same losses at the same share of their way: far from this run's."""
    forecaster = stacked(references(tmp_path / "refs"), predictor="stack", every_n_steps=2)
    fit(tmp_path / "run", forecaster, max_steps=12, val_check_interval=2)
    assert forecaster.values("num_references")[-1] == 6
    gains = [forecaster.values(f"spectral_gain{end}")[-1] for end in ("_low", "", "_high")]
    assert gains == sorted(gains)
    assert all(map(math.isfinite, gains))
    assert Run(tmp_path / "run").forecasts[-1]["spectral_gain"] == pytest.approx(gains[1])


@pytest.mark.filterwarnings("ignore:Kept makes no forecast", "ignore:Kept forecasts beyond", "ignore:Kept has no skill")
def test_references_without_spectra_serve_by_loss_and_batch(tmp_path: Path) -> None:
    refs = references(tmp_path / "refs")
    for path in (tmp_path / "refs" / "0" / "spectra").glob("*.npz"):
        path.unlink()
    assert not Run(tmp_path / "refs" / "0").steps("activation")
    forecaster = stacked(refs, predictor="stack")
    fit(tmp_path / "run", forecaster, max_steps=8)
    assert forecaster.values("num_references")[-1] == 6
    assert math.isnan(forecaster.values("spectral_gain")[-1])
    by_tail = stacked(refs, predictor="tail")
    fit(tmp_path / "b", by_tail, max_steps=8)
    assert {reference.series for reference in by_tail._forecaster.references.usable} == {"activation-validate"}
    assert len(by_tail._forecaster.references.usable) == 5


def test_no_tail_before_so_many_steps(tmp_path: Path) -> None:
    assert predicting.MIN_STEPS == 32
    forecaster = stacked(references(tmp_path / "refs"), predictor="tail")
    with pytest.warns(UserWarning, match="makes no forecast by the tail before 32 optimizer steps, .*: at 4"):
        fit(tmp_path / "run", forecaster, max_steps=8)
    assert np.isnan(forecaster.values("tokens_to_target")).all()
    assert math.isfinite(forecaster.values("alpha_tail")[-1])


@pytest.mark.filterwarnings("ignore:Kept has no skill", "ignore:Kept makes no forecast", "ignore:Kept forecasts beyond")
def test_references_on_both_sides_of_their_peaks_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predicting, "MIN_STEPS", 0)
    refs = references(tmp_path / "refs")
    for number in range(6):
        record = Run(tmp_path / "refs" / f"{number}")
        for index, step in enumerate(record.steps("activation")):
            path = record.folder / f"activation-validate-{step:09d}.npz"
            arrays = dict(np.load(path))
            # Of one the tail rises all the way; of others it falls from the first report on.
            exponent = UNRELATED[number] + (0.1 if number == 3 else -0.1) * index
            arrays[f"activation/{LAYER}/eigenvalues"] = np.arange(1, 33.0) ** -exponent
            np.savez(path, **arrays)
    forecaster = stacked(refs, predictor="tail")
    with pytest.warns(UserWarning, match=r"both sides of their own peaks, .* those of 1 references still rise \(.*3\)"):
        fit(tmp_path / "run", forecaster, max_steps=12)


def test_a_run_is_ended_by_the_low_end_and_only_with_skill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(tail_forecaster, "rank_zero_info", said.append)
    refs = references(tmp_path / "refs")
    best = law(SIZES[0]) * 1.005
    patient = stacked(refs)
    fit(tmp_path / "a", patient, max_steps=12)
    lows, values = (np.array(patient.values(name)) / best for name in ("low", "tokens_to_target"))
    between = float((lows[-1] + values[-1]) / 2)
    # The forecast lies above the limit, the low end below: training goes on.
    assert fit(tmp_path / "b", stacked(refs, stop_if_relative_above=between), max_steps=12).global_step == 12
    limit = (1 + float(lows[-1])) / 2
    assert limit > 1
    ended = fit(tmp_path / "c", stacked(refs, stop_if_relative_above=limit), max_steps=12)
    assert ended.should_stop
    assert ended.global_step <= 12
    (reason,) = [text for text in said if "ends training" in text]
    assert f"stop_if_relative_above={limit:g}" in reason
    assert "(p = 0." in reason
    for name in ("forecaster", "tail_forecaster"):
        monkeypatch.setattr(f"lightning_spectral.callbacks.{name}.NO_SKILL", 0.0)
    with pytest.warns(UserWarning, match="has no skill"):
        assert fit(tmp_path / "d", stacked(refs, stop_if_relative_above=limit), max_steps=12).global_step == 12


def test_table_closes_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forecaster = stacked(references(tmp_path / "refs"), target_loss=2.1)
    with pytest.warns(UserWarning, match="makes no forecast"):  # references came down to 2.1 in no time
        fit(tmp_path / "none", forecaster, max_steps=4)
    capsys.readouterr()
    forecaster = stacked(references(tmp_path / "refs"))
    logger = TensorBoardLogger(tmp_path, "tb", "")
    with pytest.warns(UserWarning, match="it has taken more tokens than the 439 that its references let expect"):
        fit(tmp_path / "run", forecaster, max_steps=24, max_epochs=-1, logger=logger)
    shown = capsys.readouterr().out
    assert "Tokens to falling_loss 1, by the batch size" in shown
    assert "80% interval" in shown
    line = next(line for line in shown.splitlines() if "needed" in line)
    assert f"{forecaster.actual:,.0f}" in line
    # No forecast after the target was reached, at step 20, and no marks of any on a board.
    assert math.isnan(forecaster.values("tokens_to_target")[-1])
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    for quantity, steps in {
        "tokens_to_target": [4, 8, 12],
        "actual": [20, 20, 24],
        "failed": list(range(4, 25, 4)),
    }.items():
        logged = events.Scalars(f"forecast/{quantity}")
        assert [event.step for event in logged] == steps
        assert all(math.isfinite(event.value) for event in logged)
    assert "forecast/spectral_gain" not in events.Tags()["scalars"], "the batch alone has none"
    content = events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0]
    (category,) = [one for one in Layout.FromString(content).category if one.title == "forecast"]
    charts = {chart.title: chart for chart in category.chart}
    (margin,) = charts["forecast/tokens_to_target"].margin.series
    assert (margin.value, margin.lower, margin.upper) == (
        "forecast/tokens_to_target",
        "forecast/low",
        "forecast/high",
    )
    assert list(charts["forecast/actual"].multiline.tag) == ["^forecast/tokens_to_target$", "^forecast/actual$"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"predictor": "tails"}, "predictor must be one of stack, tail, head, loss, batch, got 'tails': try 'stack'"),
        ({"predictor": np.array(["tail", "head"])}, "predictor must be one of stack, .*, got array.*: try 'stack'"),
        ({"references": "bundled:none"}, "references must name runs that the package carries, got 'bundled:none'"),
        ({"references": 3}, "references must be a path, a pattern or a list of them, got 3"),
        (
            {"references": ["a", {"loss": "b"}]},
            "references must say path, and of logs loss, .* without a path",
        ),
        ({"references": {"path": "a", "los": "b"}}, "references must say path, and of logs loss, step, .*, got 'los'"),
        ({"references": {"path": "a", "batch_tokens": -1}}, "batch_tokens must be a positive number, or a product"),
        ({"references": {"path": 3}}, "references must be a path, got 3"),
        ({"head": (0, 3)}, "head must be two ascending ranks from 1"),
    ],
)
def test_bad_input_is_one_line(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        TailForecaster(1.0, **arguments)
    assert "\n" not in str(raised.value)
