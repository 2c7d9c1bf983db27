"""What seeds show: floors are SciPy's t and F quantiles, pooled variances the residuals of a least-squares fit."""

import json
from math import isnan, nan, sqrt
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial.distance import jensenshannon

from lightning_spectral.functional.estimate import Estimate, Spectrum
from lightning_spectral.runs.kinds import Key
from lightning_spectral.runs.measured import Measured
from lightning_spectral.runs.statistics import Scatter, Variance, mean_spectrum, number, read_scatter, scatter
from lightning_spectral.runs.to_json import to_json

TOKENS, TAIL = Key("tokens"), Key("alpha_tail", "activation", "b.0")
LAYERS = "b.0", "b.1"


def run(name: str, tokens: float, alpha: float, family: str = "F") -> Measured:
    ranks = torch.arange(1, 17, dtype=torch.float64)
    spectra = {
        Key("js", "activation", layer): Spectrum(ranks ** -(alpha * (1 + index))) for index, layer in enumerate(LAYERS)
    }
    return Measured(
        SimpleNamespace(id=name, family=family), {TOKENS: tokens}, {TAIL: Estimate(alpha, 0.1)}, spectra, {}
    )


def sides_of(*sizes: int, seed: int = 0) -> list[list[Measured]]:
    """Sides of so many runs, each about a mean of its own."""
    generator = np.random.default_rng(seed)
    means = generator.normal(size=len(sizes))
    return [
        [
            run(f"{seed}-{side}-{index}", mean + generator.normal(), 1 + 0.2 * generator.random())
            for index in range(size)
        ]
        for side, (size, mean) in enumerate(zip(sizes, means, strict=True))
    ]


def residual_variance(sides: list[list[Measured]], key: Key) -> tuple[float, int]:
    """Mean square of what a fit of one mean per side leaves, and its degrees of freedom."""
    numbers = [number(one, key) for side in sides for one in side]
    groups = [index for index, side in enumerate(sides) for _ in side]
    design = np.eye(len(sides))[groups]
    fit = np.linalg.lstsq(design, numbers, rcond=None)[0]
    degrees = len(numbers) - len(sides)
    return float(((numbers - design @ fit) ** 2).sum() / degrees), degrees


@pytest.mark.parametrize("sizes", [(3, 3), (2, 5), (1, 4), (4, 1, 3), (2,)], ids=str)
@pytest.mark.parametrize("key", [TOKENS, TAIL], ids=lambda key: key.text)
def test_variances_are_the_residuals_of_a_fit(sizes: tuple[int, ...], key: Key) -> None:
    sides = sides_of(*sizes)
    value, degrees = residual_variance(sides, key)
    assert scatter(sides).variances[key] == (pytest.approx(value), degrees)


@pytest.mark.parametrize("sizes", [(3, 2), (1, 4)], ids=str)
def test_the_scatter_of_spectra_is_their_divergence_from_the_mean(sizes: tuple[int, ...]) -> None:
    sides = sides_of(*sizes)
    found = scatter(sides).variances
    degrees = sum(sizes) - len(sizes)
    expected = []
    for layer in LAYERS:
        key, total = Key("js", "activation", layer), 0.0
        for side in sides:
            shares = [np.asarray(one.spectra[key]) / np.asarray(one.spectra[key]).sum() for one in side]
            # SciPy's distance is the root of the divergence.
            total += sum(jensenshannon(share, np.mean(shares, 0)) ** 2 for share in shares)
        expected.append(total / degrees)
        assert found[key] == (pytest.approx(expected[-1], rel=1e-6), degrees)
    assert found[Key("js", "activation")] == (pytest.approx(np.mean(expected), rel=1e-6), degrees)


@pytest.mark.parametrize(("num_base", "num_variant"), [(3, 3), (2, 4), (1, 3)])
def test_a_floor_is_half_the_interval_of_a_t_test(num_base: int, num_variant: int) -> None:
    sides = sides_of(num_base, num_variant)
    base, variant = ([number(one, TOKENS) for one in side] for side in sides)
    if num_base == 1:  # SciPy wants two a side; the scatter is that of the other alone
        error = np.std(variant, ddof=1) * sqrt(1 + 1 / num_variant)
        expected = stats.t.ppf(0.9875, num_variant - 1) * error
    else:
        interval = stats.ttest_ind(base, variant).confidence_interval(0.975)
        expected = (interval.high - interval.low) / 2
    assert scatter(sides).floor(TOKENS, num_base, num_variant) == pytest.approx(expected)


@given(st.floats(1e-6, 1e3), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9))
def test_floors_are_quantiles(value: float, degrees: int, num_base: int, num_variant: int) -> None:
    js = Key("js", "activation", "b.0")
    known = Scatter({TOKENS: Variance(value, degrees), js: Variance(value, degrees)}, [], [])
    squared = value * (1 / num_base + 1 / num_variant)
    t, f = stats.t.ppf(0.9875, degrees), stats.f.ppf(0.975, 1, degrees)
    assert known.floor(TOKENS, num_base, num_variant) == pytest.approx(t * sqrt(squared), rel=1e-6)
    assert known.floor(js, num_base, num_variant) == pytest.approx(f * squared, rel=1e-6)
    assert known.floor(TOKENS, num_variant, num_base) == known.floor(TOKENS, num_base, num_variant)
    assert known.floor(TOKENS, num_base + 1, num_variant) < known.floor(TOKENS, num_base, num_variant)


def test_single_runs_show_no_scatter() -> None:
    found = scatter([[run("a", 1, 1)], [run("b", 2, 2, "G")]])
    assert found == Scatter({}, ["F", "G"], ["a", "b"])
    assert isnan(found.floor(TOKENS, 1, 1))


def test_a_number_that_is_not_known_has_no_scatter_and_others_keep_theirs() -> None:
    sides = [[run("a", nan, 1.0), run("b", 2.0, 1.5)]]
    found = scatter(sides).variances
    assert TOKENS not in found
    assert found[TAIL] == (pytest.approx(0.125), 1)


def test_runs_that_are_alike_scatter_by_nothing() -> None:
    found = scatter([[run(name, 5.0, 1.0) for name in "abc"]])
    assert {variance.value for variance in found.variances.values()} == {0.0}
    assert found.floor(TOKENS, 3, 3) == 0.0


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_pooling_two_scatters_is_the_scatter_of_all(one: list[int], other: list[int]) -> None:
    first, second = sides_of(*one, seed=1), sides_of(*other, seed=2)
    both, pooled = scatter([*first, *second]), scatter(first).and_of(scatter(second))
    assert pooled.variances.keys() == both.variances.keys()
    for key, variance in both.variances.items():
        assert pooled.variances[key] == (pytest.approx(variance.value, rel=1e-9, abs=1e-15), variance.degrees)
    assert (pooled.families, pooled.runs) == (both.families, both.runs)


def test_what_only_one_scatter_knows_is_kept() -> None:
    one, other = Scatter({TOKENS: Variance(2.0, 3)}, ["F"], ["a"]), Scatter({TAIL: Variance(5.0, 1)}, ["F", "G"], ["b"])
    pooled = one.and_of(other)
    assert pooled.variances == {TOKENS: Variance(2.0, 3), TAIL: Variance(5.0, 1)}
    assert (pooled.families, pooled.runs) == (["F", "G"], ["a", "b"])
    assert one.variances == {TOKENS: Variance(2.0, 3)}  # is not written into


def test_a_scatter_reads_back_from_json(tmp_path: Path) -> None:
    known = scatter(sides_of(3, 2))
    path = tmp_path / "earlier.json"
    path.write_text(to_json({"run_floor": known.as_dict(), "loss": 1.0, "loss_name": "val_loss"}))
    assert read_scatter(path) == known._replace(loss=1.0, loss_name="val_loss")


GOOD = {"variances": {"tokens": {"value": 1.0, "degrees": 2}}, "families": ["F"], "runs": ["a"]}


@pytest.mark.parametrize(
    "text",
    [
        "no JSON",
        "[]",
        "{}",
        json.dumps({"run_floor": None}),
        json.dumps({"run_floor": GOOD | {"variances": []}}),
        json.dumps({"run_floor": GOOD | {"variances": {"tokens": {"value": None, "degrees": 2}}}}),
        json.dumps({"run_floor": GOOD | {"variances": {"tokens": {"value": 1.0}}}}),
        json.dumps({"run_floor": {"variances": {}, "families": ["F"]}}),
    ],
    ids=["text", "list", "empty", "null", "no table", "no value", "no degrees", "no runs"],
)
def test_a_file_without_a_scatter_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "earlier.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"^floor must be runs, or a file that .*earlier\.json' without one") as raised:
        read_scatter(path)
    assert "\n" not in str(raised.value)


def test_a_mean_spectrum_weighs_all_alike() -> None:
    first, second = torch.tensor([3.0, 1.0]), torch.tensor([1.0, 1.0])
    np.testing.assert_allclose(mean_spectrum([first, second]), [0.625, 0.375])
    np.testing.assert_allclose(mean_spectrum([1000 * first, second]), [0.625, 0.375])
