"""What a report says of a parameter equals NumPy on the same rows: spectra, error bars, noise, and why one is NaN."""

import math

import numpy as np
import pytest
import torch

from lightning_spectral.functional import Spectrum, noise_sums
from lightning_spectral.measurement.gradient_report import GradientReport, ParameterGradients, decompose_grams
from tests._reference import gradient_moments, jackknife, power_law

NUM_SAMPLES, NUM_GROUPS = 26, 4
SIZES = {"weight": 60, "other": 60, "bias": 5}
"""Of the 26 samples groups 0 and 1 have seven, groups 2 and 3 six; a bias has fewer numbers than there are samples."""


@pytest.fixture
def rows() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        name: generator.normal(0.3, np.arange(1, size + 1) ** -0.7, (NUM_SAMPLES, size)) for name, size in SIZES.items()
    }


def spectra_of(
    rows: dict[str, np.ndarray], num_groups: int = NUM_GROUPS, dtype: torch.dtype = torch.float64
) -> dict[str, ParameterGradients]:
    grams = {name: torch.tensor(part @ part.T) for name, part in rows.items()}
    sizes = {name: part.shape[1] for name, part in rows.items()}
    num_samples = len(next(iter(rows.values())))
    found = decompose_grams(grams, sizes, torch.arange(num_samples) % num_groups, num_groups, dtype)
    assert list(found) == [one.spectrum.name for one in found.values()] == list(rows)
    return found


def svd(rows: np.ndarray) -> np.ndarray:
    return np.linalg.svd(rows, compute_uv=False)


@pytest.mark.parametrize("name", SIZES)
def test_singular_values_of_all_rows_of_centred_rows_and_without_each_group(
    rows: dict[str, np.ndarray], name: str
) -> None:
    part, (spectrum, centred, _, _) = rows[name], spectra_of(rows)[name]
    num_values = min(part.shape)
    assert (spectrum.count, len(spectrum.values)) == (NUM_SAMPLES, num_values)
    np.testing.assert_allclose(spectrum.values, svd(part), rtol=1e-9)
    # Centring takes one rank away, and leaves an exact zero.
    np.testing.assert_allclose(centred, svd(part - part.mean(0)), rtol=1e-9, atol=1e-9)
    groups = np.arange(NUM_SAMPLES) % NUM_GROUPS
    for group, without in enumerate(spectrum.leave_one_out):
        expected = np.zeros(min(NUM_SAMPLES - NUM_SAMPLES // NUM_GROUPS, part.shape[1]))
        values = svd(part[groups != group])
        expected[: len(values)] = values
        np.testing.assert_allclose(without, expected, rtol=1e-9)


def test_interval_is_that_of_the_groups_of_samples(rows: dict[str, np.ndarray]) -> None:
    for name, found in spectra_of(rows).items():
        gram = torch.tensor(rows[name] @ rows[name].T)
        expected = noise_sums(gram, torch.arange(NUM_SAMPLES) % NUM_GROUPS).interval
        assert tuple(map(float, found.noise.interval)) == pytest.approx(tuple(map(float, expected)))
        assert expected.low < expected.high


@pytest.mark.parametrize("name", SIZES)
def test_norm_and_moments_are_those_of_the_rows(rows: dict[str, np.ndarray], name: str) -> None:
    spectrum = spectra_of(rows)[name]
    squared_norm, trace = gradient_moments(rows[name])
    assert spectrum.grad_norm == pytest.approx(np.linalg.norm(rows[name].mean(0)))
    assert float(spectrum.noise.moments.squared_norm) == pytest.approx(squared_norm)
    assert float(spectrum.noise.moments.trace) == pytest.approx(trace)


# Ranks of the 26 values: 3 to 13. Fractions of the 19 or 20 that a group leaves would be 2 to 9, or 2 to 10.
@pytest.mark.parametrize(("band", "ranks"), [((0.125, 0.5), (3, 13)), ((1, 10), (1, 10)), ((5, 19), (5, 19))])
@pytest.mark.parametrize("name", ["weight", "other"])
def test_error_bar_is_the_jackknifes_over_ranks_of_the_full_spectrum(
    rows: dict[str, np.ndarray], name: str, band: tuple, ranks: tuple[int, int]
) -> None:
    exponent = spectra_of(rows)[name].spectrum.exponent(band)
    groups = [rows[name][group::NUM_GROUPS] for group in range(NUM_GROUPS)]
    value, r2 = power_law(svd(rows[name]), *ranks)
    _, stderr = jackknife(lambda some: power_law(svd(some), *ranks)[0], groups)
    assert (exponent.value, exponent.r2, exponent.stderr) == pytest.approx((value, r2, stderr))
    assert exponent.reason is None
    assert math.isnan(exponent.corrected)


def test_centred_exponent_is_that_of_the_rows_about_their_mean(rows: dict[str, np.ndarray]) -> None:
    part = rows["weight"]
    expected, _ = power_law(svd(part - part.mean(0)), 3, 13)
    assert spectra_of(rows)["weight"].centred.exponent((0.125, 0.5)).value == pytest.approx(expected)


def test_a_bias_has_an_exponent_over_ranks_it_has_and_an_error_bar(rows: dict[str, np.ndarray]) -> None:
    bias = spectra_of(rows)["bias"].spectrum
    groups = [rows["bias"][group::NUM_GROUPS] for group in range(NUM_GROUPS)]
    exponent = bias.exponent((1, 5))
    assert exponent.value == pytest.approx(power_law(svd(rows["bias"]), 1, 5)[0])
    assert exponent.stderr == pytest.approx(jackknife(lambda some: power_law(svd(some), 1, 5)[0], groups)[1])


@pytest.mark.parametrize(
    ("band", "reason"),
    [
        ((1, 10), "must end at or before rank 5, the last there is, got (1, 10)"),
        ((0.125, 0.5), "band (0.125, 0.5) of 5 values spans 2, and a line needs 3: widen it"),
        ((0.1, 0.2), "band (0.1, 0.2) of 5 values spans 1, and a line needs 3: widen it"),
    ],
)
def test_a_bias_too_short_for_a_band_says_so(rows: dict[str, np.ndarray], band: tuple, reason: str) -> None:
    bias = spectra_of(rows)["bias"]
    exponent = bias.spectrum.exponent(band)
    assert math.isnan(exponent.value)
    assert math.isnan(exponent.stderr)
    assert reason in exponent.reason
    assert math.isnan(bias.centred.exponent(band).value)


@pytest.mark.parametrize(
    ("num_samples", "num_groups", "band", "reason"),
    [
        (26, 1, (1, 10), "a group of samples received no rows, or there are fewer than 2"),
        (3, 4, (1, 3), "a group of samples received no rows, or there are fewer than 2"),
        (26, 4, (1, 21), "without one group rank 21 lies beyond the 20 samples left"),
        # Two of the groups have a sample more: without one of them the 20th value is not there.
        (26, 4, (1, 20), "without one group band (1, 20) loses positive values"),
    ],
)
def test_without_an_error_bar_there_still_is_a_value(
    rows: dict[str, np.ndarray], num_samples: int, num_groups: int, band: tuple, reason: str
) -> None:
    part = rows["weight"][:num_samples]
    exponent = spectra_of({"weight": part}, num_groups)["weight"].spectrum.exponent(band)
    assert exponent.value == pytest.approx(power_law(svd(part), *band)[0])
    assert math.isnan(exponent.stderr)
    assert exponent.reason.startswith("no error bar")
    assert reason in exponent.reason


@pytest.mark.parametrize("spoil", [np.nan, np.inf])
def test_one_bad_parameter_costs_the_others_nothing(rows: dict[str, np.ndarray], spoil: float) -> None:
    rows["other"][3, 4] = spoil
    with np.errstate(invalid="ignore"):
        spectra = spectra_of(rows)
    bad = spectra["other"].spectrum
    assert bad.failure == bad.exponent((1, 10)).reason == "the gradients hold NaN or infinity"
    assert not bad.is_zero
    for name in ("weight", "bias"):
        assert spectra[name].spectrum.failure is None
        np.testing.assert_allclose(spectra[name].spectrum, svd(rows[name]), rtol=1e-9)


def test_an_eigensolver_that_fails_is_the_reason(rows: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(matrix: torch.Tensor) -> torch.Tensor:
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(torch.linalg, "eigvalsh", fail)
    assert {one.spectrum.failure for one in spectra_of(rows).values()} == {"the eigensolver did not converge"}


def test_gradients_of_zero_are_no_failure_and_have_a_norm(rows: dict[str, np.ndarray]) -> None:
    rows["other"][:] = 0
    spectrum, centred, norm, _ = spectra_of(rows)["other"]
    assert spectrum.is_zero
    assert spectrum.failure is None
    assert norm == 0
    assert "all its values are exactly zero" in spectrum.exponent((1, 10)).reason
    assert math.isnan(centred.exponent((1, 10)).value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_below_the_rounding_of_the_rows_are_zero(dtype: torch.dtype) -> None:
    # Rows of rank 5 with the rounding of their type on top; at full rank when taken at their word.
    generator = np.random.default_rng(2)
    low = torch.tensor(generator.normal(size=(NUM_SAMPLES, 5)) @ generator.normal(size=(5, 4000)))
    kept = low.to(dtype).double().numpy()
    found = spectra_of({"weight": kept}, dtype=dtype)["weight"].spectrum.values
    np.testing.assert_allclose(found[:5], svd(low.numpy())[:5], rtol=torch.finfo(dtype).eps)
    assert not found[5:].any()


def test_one_sample_has_a_value_and_no_noise(rows: dict[str, np.ndarray]) -> None:
    spectrum, _, _, noise = spectra_of({"weight": rows["weight"][:1]})["weight"]
    assert spectrum.values.tolist() == pytest.approx([np.linalg.norm(rows["weight"][0])])
    assert math.isnan(float(noise.noise_scale))
    assert spectrum.exponent((0.125, 0.5)).reason is not None


def test_what_is_missing_is_nan_with_its_reason() -> None:
    spectrum, centred, norm, noise = ParameterGradients.missing("weight", 7, "no memory left", True)
    assert (spectrum.count, spectrum.failed_here, spectrum.is_zero) == (7, True, False)
    assert math.isnan(norm)
    assert math.isnan(float(noise.noise_scale))
    assert spectrum.exponent((1, 10)).reason == "no memory left"
    assert math.isnan(centred.exponent((1, 10)).value)


def test_noise_scale_of_a_report_is_that_of_the_rows_side_by_side(rows: dict[str, np.ndarray]) -> None:
    found = spectra_of(rows)
    squared_norm, trace = gradient_moments(np.concatenate(list(rows.values()), axis=1))
    whole = GradientReport.of(4, found, {}, "loop", (4, 4)).noise
    assert float(whole.noise_scale) == pytest.approx(trace / squared_norm)
    side_by_side = torch.tensor(np.concatenate(list(rows.values()), axis=1))
    groups = torch.arange(NUM_SAMPLES) % NUM_GROUPS
    expected = noise_sums(side_by_side @ side_by_side.T, groups).interval
    assert tuple(map(float, whole.interval)) == pytest.approx(tuple(map(float, expected)))
    gone = GradientReport.of(4, found | {"gone": ParameterGradients.absent("gone", "frozen")}, {}, "loop", (4, 4))
    assert gone.noise.noise_scale == whole.noise_scale
    found["other"] = ParameterGradients.missing("other", 0, "no sample was seen", False)
    missing = GradientReport.of(4, found, {}, "loop", (4, 4)).noise
    assert all(map(math.isnan, (missing.noise_scale, *missing.interval)))


def test_weights_have_an_exponent_without_an_error_bar() -> None:
    values = np.arange(1, 31) ** -0.6
    exponent = Spectrum(torch.tensor(values)).exponent((0.1, 0.5))
    assert exponent.value == pytest.approx(0.6)
    assert math.isnan(exponent.stderr)
    spoilt = Spectrum(torch.full((30,), torch.nan, dtype=torch.float64)).exponent((0.1, 0.5))
    assert math.isnan(spoilt.value)
    assert spoilt.reason == "its values are not finite"
