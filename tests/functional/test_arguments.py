"""What is no spectrum, no rows, no band or no number is refused by name, in one line."""

import pytest
import torch

from lightning_spectral import functional as f

ROWS = torch.linspace(-1, 1, 24).reshape(6, 4).sin()
VALUES = torch.tensor([4.0, 2.0, 1.0, 0.5])
BAD_VALUES = {
    "negative": (torch.tensor([3.0, 1.0, -1.0]), "must not be negative, got -1"),
    "complex": (torch.tensor([3.0, 1.0]) * 1j, "must hold real numbers, got complex64"),
    "bool": (torch.ones(3, dtype=torch.bool), "must hold real numbers, got bool"),
    "a list": ([3.0, 1.0], r"must be a tensor, got \[3.0, 1.0\]"),
    "a scalar": (torch.tensor(1.0), "must hold at least one value"),
    "empty": (torch.ones(0), "must hold at least one value"),
    "sparse": (torch.ones(3).to_sparse(), "must be a dense tensor"),
    "meta": (torch.ones(3, device="meta"), "must be a dense tensor"),
}
RISING = torch.tensor([1.0, 2.0, 3.0, 4.0])
TAKERS = {
    "rankme": f.rankme,
    "normalize": f.normalize,
    "js_divergence": lambda values: f.js_divergence(values, VALUES),
    "head_share": lambda values: f.head_share(values, 1),
    "power_law": lambda values: f.power_law(values, (1, 3)),
    "Spectrum": f.Spectrum,
}


def refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize("bad", BAD_VALUES)
def test_what_is_no_spectrum_is_refused(taker: str, bad: str) -> None:
    values, message = BAD_VALUES[bad]
    if (taker, bad) == ("Spectrum", "empty"):
        return  # stands for a spectrum that could not be had
    refused(lambda: TAKERS[taker](values), message)


@pytest.mark.parametrize("taker", ["head_share", "power_law", "Spectrum"])
def test_values_that_rise_are_refused_where_their_rank_counts(taker: str) -> None:
    refused(lambda: TAKERS[taker](RISING), "values must descend, got values that rise")
    TAKERS[taker](torch.tensor([4.0, 1.0, 1.0 + 1e-7, 0.5]))  # as interpolation rounds


@pytest.mark.parametrize("taker", TAKERS)
def test_a_spectrum_that_could_not_be_had_is_no_error(taker: str) -> None:
    TAKERS[taker](torch.full((4,), torch.nan))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.ones(4, 3, dtype=torch.int64), "floating type, got int64"),
        (torch.ones(4, 3) * 1j, "real numbers, got complex64"),
        (torch.ones(4, 3, dtype=torch.bool), "real numbers, got bool"),
        (torch.eye(3).to_sparse(), "dense"),
        ([[1.0]], "tensor, got"),
    ],
)
@pytest.mark.parametrize("taker", [f.covariance_spectrum, f.moments, f.gram, f.singular_spectrum])
def test_what_are_no_rows_is_refused(taker, rows, message: str) -> None:
    refused(lambda: taker(rows), f"rows must .*{message}")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: f.moments(ROWS[0]), "rows must have the axes"),
        (lambda: f.gram(ROWS[0]), "rows must have 2 axes"),
        (lambda: f.singular_spectrum(ROWS, centred="no"), "centred must be True or False, got 'no'"),
        (lambda: f.eigenvalues(-torch.eye(3)), "matrices must have no negative eigenvalues, got -1"),
        (lambda: f.eigenvalues(torch.tensor([[1.0, 2.0], [0.0, 1.0]])), "matrices must be symmetric"),
        (lambda: f.singular_values(ROWS), "gram must be square"),
        (lambda: f.covariance(ROWS), "sample must be Moments, got float32 of shape"),
        (lambda: f.covariance(f.Moments(ROWS, ROWS, ROWS)), "sample must have the shapes"),
        (lambda: f.pool(f.moments(ROWS)), "parts must have the shapes"),
        (lambda: f.pool(f.moments(ROWS[None]), torch.ones(2, 2)), r"subsets must have the shape \(K, 1\)"),
        (lambda: f.head_share(VALUES, "3"), "k must be an int from 1 to 4, got '3'"),
        (lambda: f.head_share(VALUES, True), "k must be an int"),
        (lambda: f.js_divergence(VALUES.expand(2, 4), VALUES.expand(3, 4)), "p and q must have leading axes"),
        (lambda: f.jackknife(torch.ones(3), torch.ones(6, 2)), "estimate and leave_one_out must have leading axes"),
        (lambda: f.jackknife("x", torch.ones(2)), "estimate must hold real numbers, got 'x'"),
        (lambda: f.jackknife(1.0, 2.0), "leave_one_out must have an axis of groups"),
        (lambda: f.principal_angles(torch.eye(3, dtype=torch.int64), ROWS), "u must be of a floating type"),
        (lambda: f.subspace_overlap(ROWS, None), "v must be a tensor, got None"),
        (lambda: f.resolve_band((1, 3), 2.5), "num_values must be an int"),
        (lambda: f.resolve_band("ab", 5), "band must be two ranks or two fractions, got 'ab'"),
        (lambda: f.js_floor(), "samples must be one Spectrum or more"),
        (lambda: f.js_floor(VALUES), "samples must be one Spectrum or more"),
        (lambda: f.js_floor(f.Spectrum(VALUES), f.Spectrum(VALUES[:2])), "samples must have values .* of one shape"),
        (lambda: f.forecast_tokens(VALUES, VALUES, "x"), "at must be a number, got 'x'"),
        (lambda: f.forecast_tokens(VALUES, VALUES, 1.0, level="x"), "level must be a number"),
        (lambda: f.forecast_tokens(VALUES, [1.0], 1.0), "tokens must be a tensor"),
        (lambda: f.extrapolate_loss(VALUES, VALUES, None), "target must be a number, got None"),
        (lambda: f.spearman(VALUES * 1j, VALUES), "x must hold real numbers"),
        (lambda: f.spearman_interval(VALUES, VALUES, num_draws=10**9), "num_draws must be an int from 1 to 100000"),
        (lambda: f.Spectrum(VALUES, VALUES), "values and leave_one_out must have the shapes"),
        (lambda: f.Spectrum(VALUES, vectors=torch.ones(3, 2)), "vectors must have the shape"),
        (lambda: f.Spectrum(VALUES / 0), "values must be finite"),
        (lambda: f.Spectrum(VALUES, count=-1), "count must be an int from 0"),
    ],
)
def test_other_arguments_are_refused_by_name(call, message: str) -> None:
    refused(call, message)


def test_tensors_that_require_gradients_are_measured_all_the_same() -> None:
    leaf = VALUES.clone().requires_grad_()
    groups = VALUES * torch.tensor([[1.0], [1.1]])
    assert float(f.js_floor(f.Spectrum(leaf, groups))) == float(f.js_floor(f.Spectrum(VALUES, groups)))
    assert f.spearman(leaf, VALUES) == 1
    assert f.forecast_tokens(leaf, leaf.exp(), 2.0) == f.forecast_tokens(VALUES, VALUES.exp(), 2.0)
