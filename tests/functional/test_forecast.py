"""Forecasts against families with a known law and with none, SciPy, and twins written out in NumPy."""

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.findings.promises import INTERCEPT, SLOPE, family
from lightning_spectral.functional import (
    backtest,
    extrapolate_loss,
    forecast_tokens,
    partial_spearman,
    spearman,
    spearman_interval,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def runs(rng):
    return family(rng, 9)


def interval_twin(alpha, tokens, at, level):
    line = scipy.stats.linregress(alpha, np.log(tokens))
    n, centre = len(alpha), line.intercept + line.slope * at
    s = np.sqrt(np.sum((np.log(tokens) - line.intercept - line.slope * alpha) ** 2) / (n - 2))
    spread = s * np.sqrt(1 + 1 / n + (at - np.mean(alpha)) ** 2 / np.sum((alpha - np.mean(alpha)) ** 2))
    t = scipy.stats.t.ppf((1 + level) / 2, n - 2)
    return tuple(np.exp([centre, centre - t * spread, centre + t * spread]))


@pytest.mark.parametrize("num_runs", [4, 5, 30])
def test_a_law_without_noise_is_recovered(rng, num_runs):
    alpha, tokens = family(rng, num_runs, noise=0)
    for at in (float(alpha.mean()), float(alpha.max()) + 0.02):
        truth = math.exp(INTERCEPT + SLOPE * at)
        assert forecast_tokens(alpha, tokens, at)[:3] == pytest.approx([truth] * 3, rel=1e-9)


def test_the_law_is_recovered_the_better_the_more_runs(rng):
    truth = math.exp(INTERCEPT + SLOPE * 1.1)
    assert forecast_tokens(*family(rng, 20_000), 1.1).value == pytest.approx(truth, rel=0.01)


@pytest.mark.parametrize("num_runs", [5, 8, 12])
def test_80_percent_intervals_cover_80_percent_of_new_runs(rng, num_runs):
    covered, num = 0, 0
    while num < 1000:
        alpha, tokens = family(rng, num_runs + 1)
        forecast = forecast_tokens(alpha[:-1], tokens[:-1], float(alpha[-1]))
        if math.isfinite(forecast.value) and not forecast.extrapolated:
            num += 1
            covered += forecast.low <= float(tokens[-1]) <= forecast.high
    assert 750 <= covered <= 850


@pytest.mark.parametrize("num_runs", [4, 7, 25])
@pytest.mark.parametrize("level", [0.5, 0.8, 0.99])
@pytest.mark.parametrize("share", [0.1, 0.6])
def test_the_interval_equals_its_twin(rng, num_runs, level, share):
    alpha, tokens = family(rng, num_runs)
    at = float(torch.lerp(alpha.min(), alpha.max(), share))
    expected = interval_twin(alpha.numpy(), tokens.numpy(), at, level)
    found = forecast_tokens(alpha, tokens, at, level)
    assert found[:3] == pytest.approx(expected, rel=1e-9)
    assert found[3:] == (False, None)


@pytest.mark.parametrize("share", [-0.5, -0.01, 1.2, 1.5])
@pytest.mark.parametrize("num_runs", [4, 7, 25])
def test_beyond_the_references_the_interval_holds_the_curvature_that_they_leave_open(rng, num_runs, share):
    """Curvature and its standard error from NumPy's fit of a parabola, orthogonal to the line by a QR decomposition."""
    alpha, tokens = family(rng, num_runs)
    at = float(alpha.min() + share * (alpha.max() - alpha.min()))
    found = forecast_tokens(alpha, tokens, at)
    x, y = alpha.numpy(), tokens.log().numpy()
    basis, scale = np.linalg.qr(np.vander(x, 3, increasing=True))
    row = np.linalg.solve(scale.T, np.array([1, at, at**2]))  # of the orthonormal basis, at the new point
    coefficients = basis.T @ y
    variance = ((y - basis[:, :2] @ coefficients[:2]) ** 2).sum() / (num_runs - 2)
    curved = (coefficients[2] ** 2 + variance) * row[2] ** 2
    reach = scipy.stats.t.ppf(0.9, num_runs - 2) * np.sqrt(variance * (1 + row[:2] @ row[:2]) + curved)
    centre = row[:2] @ coefficients[:2]
    assert found[:3] == pytest.approx(np.exp([centre, centre - reach, centre + reach]), rel=1e-6)
    assert found.extrapolated
    assert found.high / found.low > np.divide(*interval_twin(x, tokens.numpy(), at, 0.8)[:0:-1])


@pytest.mark.parametrize("at", [-0.8, 4.0, 1e6])
def test_past_half_the_range_there_is_no_number(runs, at):
    found = forecast_tokens(*runs, at)
    assert all(map(math.isnan, found[:3]))
    assert found.extrapolated
    assert "lies beyond its references by" in found.reason


def test_two_values_exclude_no_curvature(rng):
    alpha = torch.tensor([1.0, 1.0, 2.0, 2.0]).double()
    tokens = torch.exp(14 + alpha + 0.1 * torch.tensor(rng.standard_normal(4)))
    assert math.isfinite(forecast_tokens(alpha, tokens, 1.5).high)
    assert forecast_tokens(alpha, tokens, 2.1)[1:4] == (0.0, math.inf, True)


def test_seeds_of_a_setting_share_its_weight(rng):
    """A twin by NumPy: weighted least squares, and the mean square of residuals, each of a setting's, over n - 2."""
    alpha, tokens = family(rng, 9)
    settings = torch.tensor([5, 5, 5, 1, 2, 2, 7, 8, 8])
    weights = 1 / np.array([3, 3, 3, 1, 2, 2, 1, 2, 2])
    x, y = alpha.numpy(), tokens.log().numpy()
    slope, intercept = np.polyfit(x, y, 1, w=np.sqrt(weights))
    mean = weights @ x / 5
    at = float(alpha.median())
    variance = weights @ (y - intercept - slope * x) ** 2 / 3
    spread = np.sqrt(variance * (1 + 1 / 5 + (at - mean) ** 2 / (weights @ (x - mean) ** 2)))
    reach, centre = scipy.stats.t.ppf(0.9, 3) * spread, intercept + slope * at
    found = forecast_tokens(alpha, tokens, at, settings=settings)
    assert found[:3] == pytest.approx(np.exp([centre, centre - reach, centre + reach]), rel=1e-9)


@pytest.mark.parametrize("at", [1.0, 1.9])
def test_settings_of_one_run_each_are_runs(rng, at):
    alpha, tokens = family(rng, 9)
    settings = torch.tensor(rng.permutation(9))
    assert forecast_tokens(alpha, tokens, at, settings=settings)[:3] == pytest.approx(
        forecast_tokens(alpha, tokens, at)[:3], rel=1e-12, nan_ok=True
    )
    found, plain = backtest(alpha, tokens, settings), backtest(alpha, tokens)
    assert found[:3] == pytest.approx(plain[:3], rel=1e-9)
    torch.testing.assert_close(found.predictions, plain.predictions)


@pytest.mark.parametrize("num_settings", [1, 2])
def test_fewer_than_three_settings_give_no_forecast(runs, num_settings):
    found = forecast_tokens(*runs, 1.0, settings=torch.arange(9) % num_settings)
    assert all(map(math.isnan, found[:3]))
    assert found.reason == f"its references are of {num_settings} settings, and seeds of 3 are the fewest"


def test_each_setting_is_forecast_from_the_others(runs):
    alpha, tokens = runs
    settings = torch.tensor([0, 0, 1, 1, 2, 3, 4, 4, 4])
    skill = backtest(alpha, tokens, settings)
    for run in range(9):
        rest = settings != settings[run]
        at = float(alpha[run].clamp(alpha[rest].min(), alpha[rest].max()))
        if at == float(alpha[run]):
            expected = forecast_tokens(alpha[rest], tokens[rest], at, settings=settings[rest]).value
            assert float(skill.predictions[run]) == pytest.approx(expected, rel=1e-12)
    errors = (skill.predictions / tokens - 1).abs()
    assert skill.median_error == pytest.approx(np.median([errors[settings == one].mean() for one in range(5)]))
    means = [[float(values[settings == one].mean()) for one in range(5)] for values in (alpha, tokens.log())]
    expected = scipy.stats.permutation_test(
        (means[0],),
        lambda x: scipy.stats.spearmanr(x, means[1]).statistic,
        permutation_type="pairings",
        n_resamples=np.inf,
    )
    assert skill.p_value == pytest.approx(expected.pvalue, abs=1e-12)


@pytest.mark.parametrize("num_settings", [1, 2, 3])
def test_of_few_settings_no_skill_is_told(runs, num_settings):
    skill = backtest(*runs, torch.arange(9) % num_settings)
    assert math.isnan(skill.p_value)
    assert math.isnan(skill.rank_correlation)
    assert math.isnan(skill.median_error) == (num_settings == 1)


def test_float32_and_integer_tokens_are_read_in_float64(runs):
    alpha, tokens = runs[0].float(), runs[1].long()
    assert forecast_tokens(alpha, tokens, 1.0) == forecast_tokens(alpha.double(), tokens.double(), 1.0)


@pytest.mark.parametrize("num_runs", [0, 1, 3])
def test_fewer_than_four_references_give_no_forecast(runs, num_runs):
    assert all(map(math.isnan, forecast_tokens(runs[0][:num_runs], runs[1][:num_runs], 1.0)[:3]))


@pytest.mark.parametrize("alpha", [1.0, 0.1, 1 / 3, 1.7, 1e-20])
@pytest.mark.parametrize("num_runs", [4, 6, 7, 9])
def test_equal_exponents_give_no_forecast(runs, alpha, num_runs):
    alphas = torch.full((num_runs,), alpha, dtype=torch.float64)
    assert all(map(math.isnan, forecast_tokens(alphas, runs[1][:num_runs], 1.0)[:3]))


@pytest.mark.parametrize("at", [math.nan, math.inf])
def test_no_exponent_gives_no_forecast(runs, at):
    assert all(map(math.isnan, forecast_tokens(*runs, at)[:3]))


def test_an_interval_beyond_the_floating_point_range_is_infinite(rng):
    alpha, tokens = family(rng, 5, slope=0, noise=1)
    forecast = forecast_tokens(alpha, tokens.clamp(1e-300, 1e300) ** 40, float(alpha.mean()), level=1 - 1e-9)
    assert forecast.low == 0
    assert forecast.high == math.inf


@given(
    alpha=st.lists(st.floats(-5, 5), min_size=4, max_size=12, unique=True),
    bad=st.lists(st.sampled_from([(math.nan, 1.0), (-math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)]), max_size=3),
    data=st.data(),
)
def test_neither_order_nor_runs_without_a_number_matter(alpha, bad, data):
    good = [(value, math.exp(index % 3)) for index, value in enumerate(alpha)]
    mixed = data.draw(st.permutations(good + bad))
    first, second = (torch.tensor(pairs, dtype=torch.float64).T for pairs in (good, mixed))
    if first[0].var() < 1e-6:  # a line through what is hardly a spread magnifies rounding
        return
    at = float(first[0].mean())
    assert forecast_tokens(*second, at)[:3] == pytest.approx(forecast_tokens(*first, at)[:3], rel=1e-5)
    skill, shuffled = backtest(*first), backtest(*second)
    assert shuffled.p_value == pytest.approx(skill.p_value, rel=1e-9, nan_ok=True)
    assert shuffled.predictions.shape == (len(mixed),)
    dropped = torch.tensor([pair in bad for pair in mixed])
    assert shuffled.predictions[dropped].isnan().all()


def test_each_run_is_forecast_from_the_others(runs):
    alpha, tokens = runs
    skill = backtest(alpha, tokens)
    for run in range(9):
        others = torch.arange(9) != run
        slope, intercept = np.polyfit(alpha[others], tokens[others].log(), 1)
        expected = math.exp(intercept + slope * float(alpha[run]))
        assert float(skill.predictions[run]) == pytest.approx(expected, rel=1e-9)
    errors = (skill.predictions / tokens - 1).abs()
    assert skill.median_error == pytest.approx(float(errors.median()), rel=1e-9)
    mean_of_others = (tokens.log().sum() - tokens.log()) / 8
    expected = scipy.stats.spearmanr(skill.predictions.log() - mean_of_others, tokens.log() - mean_of_others)
    assert skill.rank_correlation == pytest.approx(expected.statistic, rel=1e-12)


@pytest.mark.parametrize("slope", [-2.0, 2.0])
@pytest.mark.parametrize("num_runs", [4, 8, 9])
def test_a_law_without_noise_is_all_skill(rng, num_runs, slope):
    skill = backtest(*family(rng, num_runs, slope=slope, noise=0))
    assert skill.rank_correlation == pytest.approx(1)
    assert skill.median_error == pytest.approx(0, abs=1e-9)
    # Of n! arrangements two are as extreme, where all are tried; t is cut off there.
    assert skill.p_value == pytest.approx(2 / math.factorial(num_runs))


def test_forecasts_not_taken_relative_to_the_others_would_go_against_the_truth(rng):
    plain = []
    for _ in range(200):
        alpha, tokens = family(rng, 8, slope=0)
        plain.append(spearman(backtest(alpha, tokens).predictions, tokens))
    assert np.mean(plain) < -0.3


@pytest.mark.parametrize("num_runs", [4, 5])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_small_p_values_equal_scipys_permutation_test(rng, num_runs, ties):
    alpha, tokens = family(rng, num_runs)
    if ties:
        alpha = (alpha * 5).round()

    def rho(x):
        return scipy.stats.spearmanr(x, tokens).statistic

    expected = scipy.stats.permutation_test((alpha.numpy(),), rho, permutation_type="pairings", n_resamples=np.inf)
    assert backtest(alpha, tokens).p_value == pytest.approx(expected.pvalue, abs=1e-12)


def test_large_p_values_equal_scipys(rng):
    alpha, tokens = family(rng, 20)
    assert backtest(alpha, tokens).p_value == pytest.approx(scipy.stats.spearmanr(alpha, tokens).pvalue, rel=1e-9)


@pytest.mark.parametrize("num_runs", [0, 1, 3])
def test_fewer_than_four_references_have_no_skill(runs, num_runs):
    skill = backtest(runs[0][:num_runs], runs[1][:num_runs])
    assert all(map(math.isnan, skill[:3]))
    assert skill.predictions.shape == (num_runs,)
    assert skill.predictions.isnan().all()


def test_a_run_whose_others_are_all_alike_has_no_forecast(runs):
    alpha = torch.ones(9)
    alpha[3] = 2
    assert backtest(alpha, runs[1]).predictions.isnan().nonzero().flatten().tolist() == [3]
    assert math.isnan(backtest(torch.ones(9), runs[1]).p_value)


NUMBERS = st.lists(st.integers(-3, 3), min_size=4, max_size=15)


@given(x=NUMBERS, seed=st.integers(0, 1000))
def test_rank_correlation_equals_scipys_ties_and_all(x, seed):
    y = np.random.default_rng(seed).integers(-3, 3, len(x))
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert math.isnan(spearman(torch.tensor(x), torch.tensor(y)))
        return
    assert spearman(torch.tensor(x), torch.tensor(y)) == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-12)


def partial_twin(x, y, given_):
    """Off the inverse of the correlation matrix of ranks."""
    inverse = np.linalg.inv(np.corrcoef([scipy.stats.rankdata(values) for values in (x, y, given_)]))
    return -inverse[0, 1] / np.sqrt(inverse[0, 0] * inverse[1, 1])


@pytest.mark.parametrize("num_runs", [5, 7, 40])
def test_partial_correlation_equals_that_of_the_inverse_and_the_textbook(rng, num_runs):
    x, y, z = rng.standard_normal((3, num_runs)) + rng.standard_normal(num_runs)
    found = partial_spearman(*map(torch.tensor, (x, y, z)))
    assert found == pytest.approx(partial_twin(x, y, z), abs=1e-9)
    xy, xz, yz = (scipy.stats.spearmanr(a, b).statistic for a, b in ((x, y), (x, z), (y, z)))
    assert found == pytest.approx((xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2)), abs=1e-9)


def test_partial_correlation_takes_out_what_two_share(rng):
    shared, x, y = torch.tensor(rng.standard_normal((3, 5000)))
    assert spearman(shared + x, shared + y) == pytest.approx(0.48, abs=0.03)
    assert partial_spearman(shared + x, shared + y, shared) == pytest.approx(0, abs=0.05)


def test_nothing_is_left_where_the_third_says_it_all(rng):
    x, y = torch.tensor(rng.standard_normal((2, 9)))
    assert math.isnan(partial_spearman(x, y, x.exp()))
    assert math.isnan(partial_spearman(x, y, -y))


def test_a_third_that_does_not_vary_explains_nothing(rng):
    x, y = torch.tensor(rng.standard_normal((2, 9)))
    assert partial_spearman(x, y, torch.ones(9)) == pytest.approx(spearman(x, y), abs=1e-15)


@pytest.mark.parametrize(
    "correlate", [spearman, lambda x, y: partial_spearman(x, y, x.square())], ids=["plain", "partial"]
)
def test_pairs_with_a_nan_are_dropped_and_infinities_rank_last(rng, correlate):
    x, y = torch.tensor(rng.standard_normal((2, 8)))
    x[2], y[5] = math.nan, math.nan
    kept = ~(x.isnan() | y.isnan())
    assert correlate(x, y) == correlate(x[kept], y[kept])
    largest, infinite = y.clone(), y.clone()
    largest[0], infinite[0] = 100, math.inf
    assert correlate(x, infinite) == correlate(x, largest)


def test_fewer_than_four_pairs_have_no_correlation():
    x = torch.tensor([1.0, 2.0, 3.0, math.nan])
    assert math.isnan(spearman(x, x))
    assert math.isnan(partial_spearman(x, x, x))
    assert all(map(math.isnan, spearman_interval(x, x)))


def test_the_interval_equals_a_loop_over_draws(rng):
    x, y = torch.tensor(rng.standard_normal((2, 10)) + rng.standard_normal(10))
    drawn = torch.randint(10, (200, 10), generator=torch.Generator().manual_seed(3))
    correlations = [scipy.stats.spearmanr(x[draw], y[draw]).statistic for draw in drawn]
    expected = np.quantile(correlations, [0.1, 0.9])
    for three in (3, np.int64(3), np.uint8(3)):
        assert spearman_interval(x, y, 0.8, num_draws=200, seed=three) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("correlation", [0.0, 0.8])
def test_95_percent_intervals_cover_the_correlation(rng, correlation):
    truth = 6 / math.pi * math.asin(correlation / 2)  # of normal pairs
    covered = 0
    for seed in range(200):
        x, noise = torch.tensor(rng.standard_normal((2, 12)))
        y = correlation * x + math.sqrt(1 - correlation**2) * noise
        low, high = spearman_interval(x, y, num_draws=300, seed=seed)
        covered += low <= truth <= high
    assert covered >= 180


def test_draws_leave_the_global_random_stream_alone(rng):
    x, y = torch.tensor(rng.standard_normal((2, 10)))
    state = torch.get_rng_state()
    first = spearman_interval(x, y)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert spearman_interval(x, y) == first
    assert spearman_interval(x, y, seed=1) != first


def test_draws_without_variation_are_passed_over():
    x = torch.tensor([0.0, 0.0, 0.0, 1.0])  # a third of the draws lacks the one
    assert spearman_interval(x, x) == pytest.approx((1.0, 1.0))


def curve(tokens, b, c):
    return 3 * (tokens / 1e5) ** -b + c


@pytest.mark.parametrize("num_points", [4, 10, 100])
@pytest.mark.parametrize("b", [0.05, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("c", [0.0, 1.5])
def test_a_loss_curve_without_noise_is_continued_exactly(num_points, b, c):
    tokens = torch.linspace(1e5, 2e6, num_points, dtype=torch.float64)
    assert extrapolate_loss(tokens, curve(tokens, b, c), float(curve(7e6, b, c))) == pytest.approx(7e6, rel=1e-9)


@pytest.mark.parametrize("b", [0.1, 0.3, 0.5])
def test_a_noisy_loss_curve_is_continued_to_a_few_percent(rng, b):
    tokens = torch.linspace(1e5, 2e6, 40, dtype=torch.float64)
    errors = [
        extrapolate_loss(tokens, curve(tokens, b, 1.5) + 0.003 * torch.tensor(rng.standard_normal(40)), target) / 6e6
        - 1
        for target in [float(curve(6e6, b, 1.5))] * 50
    ]
    assert np.median(np.abs(errors)) < 0.03


@pytest.mark.parametrize("c", [0.0, 1.5])
@pytest.mark.parametrize("seed", range(6))
def test_the_fit_is_the_best_that_scipy_finds_within_the_bounds(c, seed):
    noise = 0.01 * np.random.default_rng(seed).standard_normal(12)
    tokens = np.linspace(1, 20, 12)
    losses = 3 * tokens**-0.3 + c + noise

    def residual(parameters):
        a, b, floor = parameters
        return a * tokens**-b + floor - losses

    # From the truth, so that SciPy cannot miss it; with c = 0 half of the fits end at the bound.
    fit = scipy.optimize.least_squares(
        residual, (3, 0.3, c + 1e-3), bounds=((0, 1e-3, 0), (np.inf, 10, np.inf)), xtol=1e-14, ftol=1e-14, gtol=1e-14
    )
    a, b, floor = fit.x
    target = 3 * 200**-0.3 + c
    expected = ((target - floor) / a) ** (-1 / b)
    assert extrapolate_loss(torch.tensor(tokens), torch.tensor(losses), target) == pytest.approx(expected, rel=1e-5)


@given(scale=st.floats(1e-3, 1e9), seed=st.integers(0, 100))
def test_neither_the_unit_of_tokens_nor_the_order_of_points_matters(scale, seed):
    rng = np.random.default_rng(seed)
    tokens = torch.linspace(1, 20, 15, dtype=torch.float64)
    losses = 3 * tokens**-0.4 + 1 + 0.01 * torch.tensor(rng.standard_normal(15))
    expected = extrapolate_loss(tokens, losses, 1.8)
    order = torch.tensor(rng.permutation(15))
    assert extrapolate_loss((tokens * scale)[order], losses[order], 1.8) == pytest.approx(expected * scale, rel=1e-5)


def test_points_that_are_not_finite_are_dropped():
    tokens = torch.linspace(1e5, 1e6, 8, dtype=torch.float64)
    losses = curve(tokens, 0.3, 1.5)
    more_tokens = torch.cat([tokens, torch.tensor([2e6, math.inf, math.nan])])
    more_losses = torch.cat([losses, torch.tensor([math.nan, 1.0, 1.0])])
    assert extrapolate_loss(more_tokens, more_losses, 2.5) == extrapolate_loss(tokens, losses, 2.5)


def test_the_fit_is_read_even_where_the_target_was_crossed():
    tokens = torch.linspace(1e5, 1e6, 8, dtype=torch.float64)
    assert extrapolate_loss(tokens, curve(tokens, 0.3, 1.5), float(curve(3e5, 0.3, 1.5))) == pytest.approx(3e5)


def test_a_target_below_the_floor_of_the_fit_is_never_reached():
    tokens = torch.linspace(1e5, 1e6, 8, dtype=torch.float64)
    assert extrapolate_loss(tokens, curve(tokens, 0.5, 1.5), 1.4) == math.inf
    assert extrapolate_loss(tokens, curve(tokens, 0.5, 1.5), -1.0) == math.inf


@pytest.mark.parametrize("losses", [[0.1] * 6, [0.7] * 7, [2.0, 2.2, 2.4, 2.6, 2.8]], ids=["0.1", "0.7", "rising"])
def test_a_loss_that_does_not_fall_never_reaches_what_is_below_it(losses):
    losses = torch.tensor(losses, dtype=torch.float64)
    tokens = torch.arange(1, len(losses) + 1) * 1e5
    assert extrapolate_loss(tokens, losses, 0.05) == math.inf
    assert extrapolate_loss(tokens, losses, float(losses[0])) == math.inf
    assert math.isnan(extrapolate_loss(tokens, losses, 4.0))


@pytest.mark.parametrize("tokens", [[], [1.0, 2.0, 3.0], [1.0, 1.0, 2.0, 2.0, 3.0]], ids=str)
def test_fewer_than_four_different_points_are_not_continued(tokens):
    tokens = torch.tensor(tokens)
    assert math.isnan(extrapolate_loss(tokens, tokens**-0.5, 0.1))


def test_no_target_is_not_reached():
    tokens = torch.arange(1.0, 9.0)
    assert math.isnan(extrapolate_loss(tokens, tokens**-0.5, math.nan))


@pytest.mark.parametrize("function", [lambda x, y: forecast_tokens(x, y, 1.0), backtest], ids=["forecast", "skill"])
@pytest.mark.parametrize("bad", [0.0, -5.0])
def test_tokens_that_are_not_positive_are_refused(function, bad):
    with pytest.raises(ValueError, match=f"tokens must be positive, got {bad}: leave such runs or points out"):
        function(torch.arange(5.0), torch.tensor([1.0, 2.0, bad, 4.0, 5.0]))


def test_points_at_no_tokens_are_refused():
    with pytest.raises(ValueError, match=r"tokens must be positive, got 0\.0"):
        extrapolate_loss(torch.arange(5.0), torch.ones(5), 1.0)


@pytest.mark.parametrize(
    "function",
    [lambda x, y: forecast_tokens(x, y, 1.0), backtest, spearman, spearman_interval],
    ids=["forecast", "skill", "spearman", "interval"],
)
@pytest.mark.parametrize("shapes", [((4,), (5,)), ((2, 4), (2, 4)), ((), ())], ids=str)
def test_what_is_not_two_vectors_of_one_length_is_refused(function, shapes):
    with pytest.raises(ValueError, match="must be vectors of one length, got shapes"):
        function(*(torch.ones(shape) for shape in shapes))


@pytest.mark.parametrize("level", [0, 1, 80, math.nan])
def test_levels_out_of_range_are_refused(runs, level):
    with pytest.raises(ValueError, match="level must be between 0 and 1, got"):
        forecast_tokens(*runs, 1.0, level=level)
    with pytest.raises(ValueError, match="level must be between 0 and 1, got"):
        spearman_interval(*runs, level=level)


def test_no_draws_are_refused(runs):
    with pytest.raises(ValueError, match="num_draws must be an int from 1 to 100000, got 0"):
        spearman_interval(*runs, num_draws=0)
