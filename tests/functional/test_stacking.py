"""The stack against its parts done slowly, laws that are known, and what may not matter."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_spectral.functional import PREDICTORS, Early, StackedForecast, anchored_power_law, stack
from lightning_spectral.functional.gaussian_process import LENGTH, NOISE, SIGNAL, gaussian_process
from lightning_spectral.functional.predictors import MARGIN, NUM_BATCHES, RIDGE, batch_law, ridge
from lightning_spectral.functional.stacking import spectral_gain


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def family(rng: np.random.Generator, num: int, noise: float = 0.05) -> tuple[Early, Tensor]:
    """The batch law and a slope on the loss; a third number that says nothing."""
    log_batch = np.log(rng.uniform(4, 128, num))
    gap = 0.3 * rng.standard_normal(num)
    y = 12 + np.log1p(np.exp(log_batch) / 30) + gap + noise * rng.standard_normal(num)
    spectral = torch.from_numpy(rng.standard_normal((num, 1)))
    return Early(torch.from_numpy(gap), torch.from_numpy(log_batch), None, spectral), torch.from_numpy(np.exp(y))


def one(early: Early, index: int) -> Early:
    return Early(*(None if each is None else each[index : index + 1] for each in early))


def without(early: Early, index: int) -> Early:
    kept = torch.arange(len(early.log_gap)) != index
    return Early(*(None if each is None else each[kept] for each in early))


def test_ridge_is_that_of_the_normal_equations(rng: np.random.Generator) -> None:
    x, y = rng.standard_normal((9, 2)) * [3, 0.1] + 5, rng.standard_normal(9)
    weights = np.array([1, 0.5, 0.5, 0, 1, 1, 1, 0.5, 0.5])
    found = ridge(*map(torch.from_numpy, (weights, y, x)))
    mean = np.average(x, axis=0, weights=weights)
    z = (x - mean) / np.sqrt(np.average((x - mean) ** 2, axis=0, weights=weights))
    # As rows of their own: the penalty is that of points at zero.
    rows = np.vstack([np.sqrt(weights)[:, None] * z, math.sqrt(RIDGE) * np.eye(2)])
    middle = np.average(y, weights=weights)
    slopes = np.linalg.lstsq(rows, np.concatenate([np.sqrt(weights) * (y - middle), [0, 0]]), rcond=None)[0]
    np.testing.assert_allclose(found, middle + z @ slopes, atol=1e-12)


@pytest.mark.parametrize("has_feature", [False, True])
def test_batch_law_is_the_best_of_all_that_are_tried(rng: np.random.Generator, has_feature: bool) -> None:
    early, tokens = family(rng, 10)
    weights, y = torch.ones(10).double(), tokens.log()
    features = early.log_gap[:, None]
    found = batch_law(weights, y, early.log_batch, features if has_feature else None)
    losses, values = [], []
    ends = float(early.log_batch.min()) - MARGIN, float(early.log_batch.max()) + MARGIN
    for critical in np.linspace(*ends, NUM_BATCHES):
        law = torch.log1p((early.log_batch - critical).exp())
        rest = ridge(weights, y - law, features) if has_feature else (y - law).mean().expand(10)
        values.append(law + rest)
        slope = float((rest - rest.mean()).norm() / math.sqrt(10))
        losses.append(float((y - values[-1]).square().sum()) + RIDGE * slope**2)
    torch.testing.assert_close(found, values[int(np.argmin(losses))])


def test_gaussian_process_is_that_of_the_equations_at_its_likeliest(rng: np.random.Generator) -> None:
    """Values for hyperparameters found by a search of its own, over a fine grid about them."""
    x, y = rng.standard_normal((12, 1)), rng.standard_normal(12)
    y = np.sin(2 * x[:, 0]) + 0.1 * y
    weights = np.ones((1, 2, 12))
    weights[0, 1, 3] = 0
    found, variances = gaussian_process(*map(torch.from_numpy, (weights, x, y)))
    z = (x - x.mean()) / x.std()
    target = (y - y.mean()) / y.std()

    def kernel(length: float, signal: float) -> np.ndarray:
        return 4 * z @ z.T + signal**2 * np.exp(-((z - z.T) ** 2) / (2 * length**2))

    def energy(logs: np.ndarray) -> float:
        length, signal, noise = np.exp(logs) * [LENGTH, SIGNAL, NOISE]
        covariance = kernel(length, signal) + noise**2 * np.eye(12)
        return float(target @ np.linalg.solve(covariance, target) + np.linalg.slogdet(covariance)[1] + logs @ logs) / 2

    from scipy.optimize import minimize

    logs = minimize(energy, np.zeros(3), method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-10}).x
    length, signal, noise = np.exp(logs) * [LENGTH, SIGNAL, NOISE]
    for fold, present in enumerate(weights[0] > 0):
        among = np.ix_(present, present)
        covariance = kernel(length, signal)[among] + noise**2 * np.eye(int(present.sum()))
        level = target[present].mean()
        solved = np.linalg.solve(covariance, target[present] - level)
        expected = level + kernel(length, signal)[:, present] @ solved
        np.testing.assert_allclose(found[0, fold], y.mean() + y.std() * expected, atol=2e-3)
    covariance = kernel(length, signal) + noise**2 * np.eye(12)
    left = kernel(length, signal) - kernel(length, signal) @ np.linalg.solve(covariance, kernel(length, signal))
    np.testing.assert_allclose(variances[0], y.var() * np.diag(left), rtol=2e-2)


@pytest.mark.parametrize("num", [5, 9, 12])
def test_nested_forecasts_are_those_of_stacks_without_the_setting(rng: np.random.Generator, num: int) -> None:
    early, tokens = family(rng, num)
    early = early._replace(spectral=None)
    whole = stack(early, tokens)
    for index in range(num):
        kept = torch.arange(num) != index
        alone = stack(without(early, index), tokens[kept], one(early, index))
        for found, expected in ((whole.predictions, alone.value), (whole.lows, alone.low), (whole.highs, alone.high)):
            assert float(found[index]) == pytest.approx(expected, rel=1e-6, nan_ok=True)


def test_seeds_of_a_setting_weigh_as_much_as_one_run(rng: np.random.Generator) -> None:
    """But for the Gaussian process, to which the noise of each run is one of its own."""
    early, tokens = family(rng, 8)
    simple = tuple(name for name in PREDICTORS if name not in ("Gaussian process", "loss curve"))
    twice = Early(*(None if each is None else torch.cat([each, each[:3], each[:3]]) for each in early))
    settings = torch.cat([torch.arange(8), torch.arange(3), torch.arange(3)])
    query = Early(torch.zeros(1), torch.full((1,), 3.0), None, torch.zeros(1, 1))
    once = stack(early, tokens, query, predictors=simple)
    more = stack(twice, torch.cat([tokens, tokens[:3], tokens[:3]]), query, settings, predictors=simple)
    assert more[:3] == pytest.approx(once[:3])
    assert (more.num_references, more.num_settings) == (14, 8)
    assert more.median_error == pytest.approx(once.median_error)
    assert more.spectral_gain == pytest.approx(once.spectral_gain)


def test_law_is_found_and_its_number_of_no_use_is_not_used(rng: np.random.Generator) -> None:
    early, tokens = family(rng, 20)
    query = Early(torch.zeros(1), torch.tensor([3.0]), None, torch.zeros(1, 1))
    found = stack(early, tokens, query)
    truth = math.exp(12) * (1 + math.exp(3.0) / 30)
    assert found.value == pytest.approx(truth, rel=0.1)
    assert found.low < truth < found.high
    assert sum(found.weights.values()) == pytest.approx(1)
    assert not found.uses_spectra
    assert found.spectral_gain < 0.05
    assert found.skill > 0.9
    assert found.p_value < 0.001


def test_number_that_says_all_is_used(rng: np.random.Generator) -> None:
    early, _ = family(rng, 12)
    tokens = (12 + 2 * early.spectral[:, 0]).exp()
    found = stack(early, tokens, one(early, 4))
    assert found.uses_spectra
    assert found.spectral_gain > 0.7
    assert found.spectral_gain_low < found.spectral_gain < found.spectral_gain_high
    assert found.value == pytest.approx(float(tokens[4]), rel=0.1)


@pytest.mark.parametrize(("beyond", "is_number"), [(0.0, True), (0.4, True), (0.6, False)])
def test_beyond_the_references_it_widens_and_then_ends(
    rng: np.random.Generator, beyond: float, is_number: bool
) -> None:
    early, tokens = family(rng, 12)
    low, high = float(early.log_batch.min()), float(early.log_batch.max())
    inside = stack(early, tokens, Early(torch.zeros(1), torch.tensor([high])))
    found = stack(early, tokens, Early(torch.zeros(1), torch.tensor([high + beyond * (high - low)])))
    assert found.extrapolated == (beyond > 0)
    assert math.isfinite(found.value) == is_number
    if not is_number:
        assert "beyond its references by 0.60 times their range" in str(found.reason)
    elif beyond:
        assert found.high / found.low > inside.high / inside.low


def nan_at(early: Early, **where: list[int]) -> Early:
    changed = {name: getattr(early, name).clone() for name in where}
    for name, indices in where.items():
        changed[name][indices] = math.nan
    return early._replace(**changed)


@pytest.mark.parametrize(
    ("references", "query", "num", "names"),
    [
        (
            {"log_batch": [1, 2]},
            {},
            10,
            {"mean", "loss", "batch law", "batch law and loss", "Gaussian process", "quadratic"},
        ),
        ({"log_batch": list(range(12))}, {}, 12, {"mean", "loss"}),
        ({}, {"log_gap": [0]}, 12, {"mean", "batch law"}),
    ],
    ids=["some without a batch", "none has a batch", "query without a loss"],
)
def test_what_is_not_known_is_done_without(
    rng: np.random.Generator, references: dict, query: dict, num: int, names: set[str]
) -> None:
    early, tokens = family(rng, 12)
    asked = nan_at(Early(torch.zeros(1), torch.full((1,), 3.0)), **query)
    found = stack(nan_at(early, **references), tokens, asked)
    assert found.num_references == num
    assert set(found.weights) == names
    assert math.isfinite(found.value)


def test_nothing_known_is_said(rng: np.random.Generator) -> None:
    early, tokens = family(rng, 6)
    found = stack(early, tokens, Early(torch.full((1,), math.nan), torch.full((1,), math.nan)))
    assert math.isnan(found.value)
    assert "neither its loss nor its batch is known" in str(found.reason)
    few = stack(Early(*(None if each is None else each[:3] for each in early)), tokens[:3])
    assert few.reason == "it needs 4 references and has 3"
    alike = stack(early, tokens, settings=torch.tensor([0, 0, 0, 1, 1, 1]))
    assert alike.reason == "its references are of 2 settings, and seeds of 3 are the fewest"
    assert isinstance(alike, StackedForecast)


def test_units_do_not_matter(rng: np.random.Generator) -> None:
    early, tokens = family(rng, 12)
    other = early._replace(log_batch=early.log_batch + 7, log_gap=early.log_gap - 2, spectral=1e3 * early.spectral + 5)
    here, there = stack(early, tokens), stack(other, 1e6 * tokens)
    torch.testing.assert_close(1e6 * here.predictions, there.predictions, rtol=1e-4, atol=0, equal_nan=True)
    assert here.spectral_gain == pytest.approx(there.spectral_gain, abs=1e-4)


def test_exact_law_has_an_interval_of_its_own_size(rng: np.random.Generator) -> None:
    gap = torch.linspace(-1, 1, 8).double()
    found = stack(Early(gap, torch.zeros(8)), (14 + gap).exp(), Early(torch.zeros(1), torch.zeros(1)))
    assert found.value == pytest.approx(math.exp(14), rel=0.01)
    same = stack(Early(gap, torch.zeros(8)), torch.full((8,), 5e5), Early(torch.zeros(1), torch.zeros(1)))
    assert same[:3] == pytest.approx((5e5, 5e5, 5e5), rel=1e-4)


def test_gain_is_of_settings_that_both_forecast() -> None:
    without = torch.tensor([0.2, -0.2, 0.4, 0.1, 0.3, math.nan])
    errors = torch.tensor([0.1, 0.1, -0.2, 0.05, math.nan, 0.3])
    settings = torch.arange(6)
    gain = spectral_gain(errors, without, settings)
    assert gain.value == pytest.approx(0.5)
    assert gain.stderr == pytest.approx(0, abs=1e-9)
    assert math.isnan(spectral_gain(errors[:3], without[:3], settings[:3]).value)


@pytest.mark.parametrize(
    ("tokens", "losses", "expected"),
    [
        ([1e5], [3.0], math.nan),
        ([1e5, 2e5], [3.0, 3.1], math.nan),
        ([1e5, 2e5], [3.0, 1.9], math.nan),
        ([1e5, 4e5], [8.0, 4.0], 1.6e6),
    ],
    ids=["one point", "rising", "there", "halved in two octaves"],
)
def test_anchored_power_law(tokens: list[float], losses: list[float], expected: float) -> None:
    found = anchored_power_law(torch.tensor(tokens), torch.tensor(losses), target=2.0)
    assert found == pytest.approx(expected, rel=1e-6, nan_ok=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"predictors": ("trend",)}, "predictors must be among mean, loss, .*, got trend"),
        ({"level": 1.5}, "level must be between 0 and 1, got 1.5"),
        ({"tokens": torch.zeros(6)}, "tokens must be positive, got 0.0"),
        ({"settings": torch.arange(5)}, "must be vectors of one length"),
        ({"query": Early(torch.zeros(2), torch.zeros(1))}, "log_gap of the query must be a vector of one"),
        ({"query": Early(torch.zeros(1), torch.zeros(1), None, torch.zeros(1, 3))}, r"spectral must be of the shapes"),
    ],
)
def test_bad_input_is_one_line(rng: np.random.Generator, change: dict, message: str) -> None:
    early, tokens = family(rng, 6)
    with pytest.raises(ValueError, match=message) as raised:
        stack(**{"references": early, "tokens": tokens} | change)
    assert "\n" not in str(raised.value)
