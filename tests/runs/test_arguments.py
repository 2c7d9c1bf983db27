"""What is asked of runs in other types, or beyond what they hold, is refused by name in one line."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_spectral import Run, backtest, compare, forecast
from tests.runs.made_up import LAYER, made_up


@pytest.fixture
def runs(tmp_path: Path) -> str:
    for index in range(4):
        made_up(tmp_path / f"run{index}", 1e5 * (1 + index), 10.0, 1 + 0.1 * index)
    return f"{tmp_path}/run*"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Run(None), "path must be a path, got None"),
        (lambda: Run("a\0b"), "path must be a path, got"),
        (lambda: Run("x" * 5000), "run must be a folder with a record"),
        (lambda: Run("/dev/null"), "run must be a folder with a record, got '/dev/null'"),
        (lambda: compare("nothing", None), "run must be a folder with a record"),
        (lambda: compare(5, "b"), "base must be a path, a pattern or a list of them, got 5"),
        (lambda: compare({"a": 1}, "b"), "base must be a path, a pattern or a list of them"),
        (lambda: compare("a", "b", at_loss="1"), "at_loss must be a finite number, got '1'"),
        (lambda: forecast([""], 1.0), "runs must be a path, got ''"),
    ],
)
def test_paths_and_losses_that_are_none(call, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda run: run.tokens_to("2.0"), "loss must be a number, got '2.0'"),
        (lambda run: run.tokens_to(None), "loss must be a number, got None"),
        (lambda run: run.at_loss([1.0]), r"loss must be a number, got \[1.0\]"),
        (lambda run: run.at_loss(10**400), "loss must be within the floating-point range"),
        (lambda run: run.history.first_at("1"), "loss must be a number, got '1'"),
        (lambda run: run.spectrum_at("activation", LAYER, "x"), "tokens must be a number, got 'x'"),
        (lambda run: run.spectrum_at("activation", None, 5e4), "name must be a name, got None"),
        (lambda run: run.spectra_at("activation", None), "tokens must be a number, got None"),
        (lambda run: run.spectra_at("activation", 5e4, without=5), "without must be a list of names of fields, got 5"),
        (lambda run: run.spectra("activation", 100, without="vectors"), "without must be a list of names of fields"),
        (lambda run: run.spectra("activation", [100]), r"step must be one of 100, 200, .* got \[100\]"),
        (lambda run: run.course("activation").rankme(LAYER, "5e4"), "tokens must be a number, got '5e4'"),
        (lambda run: run.use("activation", "nonsense"), "series must be one of activation-validate, got 'nonsense'"),
        (lambda run: run.use("activation", ["a"]), r"series must be one of activation-validate, got \['a'\]"),
        (
            lambda run: run.use("gradient", "gradient-train"),
            "kind must be one that .* has a report of, activation, act",
        ),
        (lambda run: run.series(["activation"]), r"kind must be a name, got \['activation'\]"),
        (lambda run: run.steps({}), "kind must be a name, got {}"),
        (lambda run: run.steps("activation", [LAYER]), "name must be a name, got "),
        (lambda run: run.holds("activation", {}), "name must be a name, got {}"),
        (lambda run: run.settings([]), r"kind must be a name, got \[\]"),
        (lambda run: run.names(None), "kind must be a name, got None"),
        (lambda run: run.span("gradient-train"), "kind must be one that .*, got 'gradient-train'"),
        (lambda run: run.noise_scale(100, kind=5), "kind must be a name, got 5"),
        (lambda run: run.readout(100, kind=5), "kind must be a name, got 5"),
    ],
)
def test_what_no_run_can_be_asked(runs: str, call, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        call(Run(runs.replace("*", "0")))
    assert "\n" not in str(caught.value)


def test_numbers_of_all_types_are_asked_for(runs: str) -> None:
    run = Run(runs.replace("*", "0"))
    for loss in (1, np.float32(1), np.int64(1), torch.tensor(1.0)):
        assert run.tokens_to(loss) == run.tokens_to(1.0) == 1e5
    assert math.isnan(run.tokens_to(math.nan))
    assert run.spectrum_at("activation", LAYER, math.nan).failure == "the loss was never reached"
    assert run.spectrum("activation", LAYER, np.int64(100)).step == 100
    beyond = run.spectrum_at("activation", LAYER, torch.tensor([1e9]))
    assert (beyond.tokens, beyond.failure) == (1e9, "1,000,000,000 tokens lie outside its reports")
    run.use("activation", "activation-validate")
    assert run.series("activation") == "activation-validate"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "4.8"}, "target must be a finite number, got '4.8'"),
        ({"target": math.nan}, "target must be a finite number, got nan"),
        ({"layer": 5}, "layer must be a name of one line, or None, got 5"),
        ({"layer": "a\nb"}, "layer must be a name of one line"),
        ({"tail": "x"}, "tail must be two ranks or two fractions, got 'x'"),
        ({"tail": (5, 1)}, "tail must be two ascending ranks"),
        ({"tail": (0.1, 0.2, 0.3)}, "tail must be two ranks"),
        ({"tail": (1, 100)}, "tail must end at or before rank 32"),
        ({"at": 5.0}, "at must be a list of numbers of tokens, got 5.0"),
        ({"at": [math.nan]}, "at must hold positive numbers of tokens, got nan"),
        ({"at": [-5.0]}, "at must hold positive numbers of tokens, got -5.0"),
        ({"at": [1e99]}, "at must be from 25,000 tokens, at which a run was measured first, to the 100,000"),
        ({"at": [10.0]}, "at must be from 25,000 tokens"),
    ],
)
def test_forecasts_of_nothing(runs: str, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        forecast(runs, **{"target": 1.0} | arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tail", [(2, 8), (0.125, 0.5)])
@pytest.mark.parametrize("call", [forecast, backtest])
def test_a_band_may_be_a_list(runs: str, call, tail: tuple) -> None:
    listed, given = (call(runs, 1.0, tail=band) for band in (list(tail), tail))
    assert repr(listed) == repr(given)
