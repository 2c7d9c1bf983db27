"""What is asked of runs in other types, or beyond what they hold, is refused by name in one line."""

import math
from pathlib import Path

import pytest

from lightning_spectral import Run, compare, forecast
from tests.runs.made_up import made_up


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
