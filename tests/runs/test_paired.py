"""Sampling floors of a comparison whose sides were measured on the same rows are those of paired differences."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import t

from lightning_spectral.functional import Spectrum, power_law
from lightning_spectral.functional.estimate import Estimate
from lightning_spectral.runs.kinds import Key
from lightning_spectral.runs.measured import Measured
from lightning_spectral.runs.shifts import js_shift, sampling_floor_of
from lightning_spectral.runs.sides import Sides
from lightning_spectral.runs.statistics import Scatter

BAND = (1, 8)
ALPHA, JS = Key("alpha_tail", "activation", "layer"), Key("js", "activation", "layer")


def measured(exponent: float, rows: str) -> Measured:
    """A run whose groups scatter alike, whatever its exponent."""
    ranks = torch.arange(1, 9, dtype=torch.float64)
    noise = torch.tensor([-0.03, 0.01, 0.0, 0.02], dtype=torch.float64)
    values, without = ranks**-exponent, ranks ** -(exponent + noise).unsqueeze(-1)
    spectrum = Spectrum(values, without, rows=rows, count=100)
    fit = spectrum.exponent(BAND)
    return Measured(
        SimpleNamespace(id="", family="F"),
        {},
        {ALPHA: Estimate(fit.value, fit.stderr)},
        {JS: spectrum},
        without={ALPHA: power_law(without, BAND).exponent},
    )


def sides(rows: str, second_exponent: float = 1.3, num_runs: int = 1) -> Sides:
    first, second = ([measured(exponent, rows)] * num_runs for exponent in (1.0, second_exponent))
    return Sides(first, second, Scatter({}, [], []))


@pytest.mark.parametrize("num_runs", [1, 3])
def test_scatter_that_both_sides_share_goes_out(num_runs: int) -> None:
    same = sides("same", num_runs=num_runs)
    assert sampling_floor_of(ALPHA, same, 0.3) == pytest.approx(0, abs=1e-12)
    assert js_shift("activation", "layer", sides("same", 1.0, num_runs)).sampling_floor == pytest.approx(0, abs=1e-15)
    apart = sides("", num_runs=num_runs)
    assert sampling_floor_of(ALPHA, apart, 0.3) > 0.01
    assert js_shift("activation", "layer", apart).sampling_floor > 1e-6


def test_what_they_do_not_share_is_the_jackknife_of_the_difference() -> None:
    same = sides("same")
    (other,) = same.variant
    moved = torch.tensor([0.01, -0.02, 0.0, 0.01], dtype=torch.float64)
    changed = other._replace(without={ALPHA: other.without[ALPHA] + moved})
    stderr = float((3 / 4 * (moved - moved.mean()).square().sum()).sqrt())
    found = sampling_floor_of(ALPHA, same._replace(variant=[changed]), 0.3)
    assert found == pytest.approx(float(t.ppf(0.975, 3)) * stderr)


def test_one_group_has_no_floor() -> None:
    same = sides("same")
    lone = [
        [
            run._replace(
                without={ALPHA: run.without[ALPHA][:1]}, spectra={JS: replace(s, leave_one_out=s.leave_one_out[:1])}
            )
        ]
        for run, s in ((side[0], side[0].spectra[JS]) for side in same.both)
    ]
    assert torch.tensor(sampling_floor_of(ALPHA, same._replace(base=lone[0], variant=lone[1]), 0.3)).isnan()
