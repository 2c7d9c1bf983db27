"""The table that closes a forecast run: what it keeps of many forecasts, and what it says of them."""

import math

import pytest

from lightning_spectral.callbacks.forecast_table import NUM_ROWS, ForecastTable


def values(tokens: float = 3e5, extrapolated: float = 0.0) -> dict[str, float]:
    gain = {"spectral_gain": 0.46, "spectral_gain_low": 0.17, "spectral_gain_high": 0.75}
    ends = {"tokens_to_target": tokens, "low": 0.9 * tokens, "high": 1.2 * tokens}
    return ends | gain | {"relative": 1.12, "median_error": 0.05, "extrapolated": extrapolated}


def test_what_lies_beyond_the_references_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    table = ForecastTable()
    table.note(100, 204_800, values())
    table.print("Tokens", math.nan)
    out = capsys.readouterr().out
    assert "100   204,800    300,000   270,000 .. 360,000     1.12           5%   +46% (+17% .. +75%)" in out
    assert "extrapolated" not in out
    assert "needed" not in out
    table.note(125, 256_000, values(extrapolated=1.0))
    table.print("Tokens", 310_000.0)
    out = capsys.readouterr().out
    assert "300,000* " in out
    assert "*: extrapolated" in out
    assert "310,000               needed" in out


def test_of_many_the_first_the_last_and_some_between_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    table = ForecastTable()
    table.print("Tokens", 1.0)
    table.note(5, 5_000, values(math.nan))
    assert not capsys.readouterr().out, "there was no forecast"
    for step in range(10, 1000, 10):
        table.note(step, 1000 * step, values())
    table.print("Tokens", math.nan)
    steps = [int(line.split()[0]) for line in capsys.readouterr().out.splitlines() if line.lstrip()[:1].isdigit()]
    assert (steps[0], steps[-1]) == (10, 990)
    assert 2 < len(steps) <= NUM_ROWS
