"""Eigenvalues against singular values of the rows, spectra's summaries against slow twins and closed forms."""

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial.distance
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lightning_spectral.functional import (
    Moments,
    covariance_spectrum,
    eigenvalues,
    head_share,
    js_divergence,
    moments,
    normalize,
    pool,
    rankme,
)
from lightning_spectral.functional.spectrum import beyond_rank, eigenvectors, spectrum
from tests import _reference

SPECTRA = arrays.arrays(
    np.float64, st.shared(st.integers(1, 20), key="width"), elements=st.floats(0, 1e6, allow_subnormal=False)
).filter(lambda values: values.max() > 1e-6)
"""Two draws of one example have the same length."""


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def make_rows(rng):
    """Rows whose covariance has about the given eigenvalues, in random directions and about a far mean."""

    def make(num_rows, variances, mean=0.0):
        variances = torch.as_tensor(variances, dtype=torch.float64)
        basis = torch.linalg.qr(torch.randn(len(variances), len(variances), dtype=torch.float64, generator=rng)).Q
        rows = torch.randn(num_rows, len(variances), dtype=torch.float64, generator=rng) * variances.sqrt()
        return rows @ basis.T + mean

    return make


@pytest.mark.parametrize("mean", [0.0, 1e3], ids=["centred", "mean_1e3_spreads"])
@pytest.mark.parametrize("smallest", [1e-2, 1e-8], ids=["short_tail", "tail_1e-8"])
def test_spectrum_equals_squared_singular_values(make_rows, smallest, mean):
    rows = make_rows(300, np.geomspace(1, smallest, 24), mean)
    actual, expected = covariance_spectrum(rows).numpy(), _reference.covariance_spectrum(rows)
    large = expected > 1e-6 * expected[0]
    np.testing.assert_allclose(actual[large], expected[large], rtol=1e-8)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_spectrum_of_any_dtype_is_that_of_its_values(make_rows, dtype):
    rows = make_rows(100, np.geomspace(1, 1e-2, 6), 3.0).to(dtype)
    actual = covariance_spectrum(rows)
    assert actual.dtype == torch.float64
    np.testing.assert_allclose(actual, _reference.covariance_spectrum(rows.double()), rtol=1e-9)


def test_all_leading_axes_are_rows(make_rows):
    rows = make_rows(60, [3.0, 2.0, 1.0])
    torch.testing.assert_close(covariance_spectrum(rows.view(3, 4, 5, 3)), covariance_spectrum(rows), rtol=0, atol=0)


@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(1e-6, 1e6))
def test_spectrum_knows_neither_order_nor_offset_and_squares_scale(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(12, 4, dtype=torch.float64, generator=generator)
    moved = (rows[torch.randperm(12, generator=generator)] + 5) * scale
    torch.testing.assert_close(covariance_spectrum(moved) / scale**2, covariance_spectrum(rows), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("num_rows", [2, 3, 8], ids="{}_rows".format)
def test_fewer_rows_than_features_leave_exact_zeros(make_rows, num_rows):
    values = covariance_spectrum(make_rows(num_rows, torch.ones(8), mean=1e3))
    assert (values[: num_rows - 1] > 0).all()
    assert (values[num_rows - 1 :] == 0).all()


def test_rounding_beyond_the_rank_is_zero_whatever_the_tolerance(make_rows):
    values = spectrum(moments(make_rows(4, torch.ones(8), mean=1e3)), rtol=0.0)
    assert (values[:3] > 0).all()
    assert (values[3:] == 0).all()


def test_rows_in_a_subspace_leave_exact_zeros(make_rows):
    values = covariance_spectrum(make_rows(100, [3.0, 2.0, 1.0, 0, 0, 0, 0, 0]))
    assert (values[:3] > 0.1).all()
    assert (values[3:] == 0).all()


@pytest.mark.parametrize("value", [0.0, 0.1, 1e8])
def test_equal_rows_have_no_variance(value):
    assert (covariance_spectrum(torch.full((50, 3), value, dtype=torch.float64)) == 0).all()


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (torch.ones(0, 3), "at least 2 rows, got 0"),
        (torch.ones(1, 3), "at least 2 rows, got 1"),
        (torch.tensor([[1.0, torch.nan], [1.0, 2.0]]), "NaN or infinity"),
        (torch.tensor([[1.0, torch.inf], [1.0, 2.0]]), "NaN or infinity"),
    ],
    ids=["none", "one", "nan", "inf"],
)
def test_rows_without_a_spectrum_give_nan_and_the_reason(rows, reason):
    with pytest.warns(UserWarning, match=f"covariance_spectrum returns NaN: .*{reason}") as caught:
        values = covariance_spectrum(rows)
    assert values.shape == (rows.shape[-1],)
    assert values.isnan().all()
    assert caught[0].filename == __file__


@pytest.mark.parametrize(("rows", "what"), [(torch.tensor(1.0), "at least one axis"), (torch.ones(3, 0), "features")])
def test_rows_without_features_are_refused(rows, what):
    with pytest.raises(ValueError, match=f"rows must have {what}.*, got shape"):
        covariance_spectrum(rows)


def test_spectra_of_moments_are_batched(make_rows):
    groups = make_rows(40, torch.ones(6)).view(4, 10, 6)
    without_each = 1 - torch.eye(4)
    values = spectrum(pool(moments(groups), without_each))
    for deleted in range(4):
        kept = groups[[group for group in range(4) if group != deleted]]
        torch.testing.assert_close(values[deleted], covariance_spectrum(kept), rtol=1e-10, atol=0)


def test_rank_is_counted_for_each_set_of_rows():
    counts = torch.tensor([0.0, 1.0, 3.0, 9.0], dtype=torch.float64)
    sample = Moments(counts, torch.zeros(4, 4), torch.zeros(4, 4, 4))
    assert (~beyond_rank(sample)).sum(-1).tolist() == [0, 0, 2, 4]


@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_eigenvalues_equal_scipy(make_rows, size):
    rows = make_rows(50, torch.linspace(1, 2, size))
    matrix = rows.T @ rows
    expected = scipy.linalg.eigh(matrix.numpy(), eigvals_only=True, driver="ev")[::-1]
    np.testing.assert_allclose(eigenvalues(matrix), expected, rtol=1e-11)


@pytest.mark.parametrize("rtol", [None, 1e-3, 0.0], ids=["default", "1e-3", "zero"])
def test_values_below_the_tolerance_are_zero(rtol):
    tail = torch.tensor([1.0, 1e-2, 1e-4, 1e-15, 0.0, -1e-17], dtype=torch.float64)
    smallest = 6 * 2.0**-52 if rtol is None else rtol
    expected = torch.where((tail >= smallest) & (tail > 0), tail, 0.0)
    torch.testing.assert_close(eigenvalues(tail.diag(), rtol), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (4, 3, 2)], ids=str)
def test_matrices_must_be_square(shape):
    with pytest.raises(ValueError, match="matrices must be square"):
        eigenvalues(torch.ones(shape))


def test_no_matrices_have_no_eigenvalues():
    assert eigenvalues(torch.ones(0, 3, 3)).shape == (0, 3)


def test_leading_eigenvectors_diagonalise(make_rows):
    rows = make_rows(200, [9.0, 5.0, 2.0, 1.0, 0.5]).view(2, 100, 5)
    matrices = rows.mT @ rows
    values, vectors = eigenvectors(matrices, 3)
    torch.testing.assert_close(values, eigenvalues(matrices), rtol=1e-12, atol=0)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(3).double().expand(2, 3, 3), rtol=0, atol=1e-13)
    torch.testing.assert_close(matrices @ vectors, vectors * values[:, None, :3], rtol=0, atol=1e-11)


def solver_that_fails(solver, fails):
    def solve(matrices):
        if fails(matrices):
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return solver(matrices)

    return solve


@pytest.fixture
def matrices(make_rows):
    rows = make_rows(60, torch.ones(4)).view(2, 3, 10, 4)
    return rows.mT @ rows


def decompose(matrices, num_vectors):
    return eigenvectors(matrices, num_vectors) if num_vectors else (eigenvalues(matrices),)


@pytest.mark.parametrize("num_vectors", [0, 2], ids=["values", "vectors"])
def test_a_failed_batch_is_solved_one_by_one(monkeypatch, matrices, num_vectors):
    expected = decompose(matrices, num_vectors)
    for name in ("eigvalsh", "eigh"):
        solver = getattr(torch.linalg, name)
        monkeypatch.setattr(torch.linalg, name, solver_that_fails(solver, lambda a: a.ndim > 2))
    for mine, theirs in zip(decompose(matrices, num_vectors), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_vectors", [0, 2], ids=["values", "vectors"])
def test_only_the_matrix_that_cannot_be_solved_is_nan(monkeypatch, matrices, num_vectors):
    bad = matrices[1, 1]
    for name in ("eigvalsh", "eigh"):
        solver = getattr(torch.linalg, name)
        monkeypatch.setattr(
            torch.linalg, name, solver_that_fails(solver, lambda a: a.ndim > 2 or bool((a == bad).all()))
        )
    solved = torch.ones(2, 3, dtype=torch.bool)
    solved[1, 1] = False
    for part in decompose(matrices, num_vectors):
        assert torch.equal(part.flatten(2).isfinite().all(-1), solved)
        assert part[1, 1].isnan().all()


@pytest.mark.parametrize("num_vectors", [0, 2], ids=["values", "vectors"])
def test_only_the_matrix_that_is_not_finite_is_nan(matrices, num_vectors):
    expected = decompose(matrices, num_vectors)
    matrices[0, 2, 1, 1] = torch.inf
    for mine, theirs in zip(decompose(matrices, num_vectors), expected, strict=True):
        assert mine[0, 2].isnan().all()
        mine[0, 2] = theirs[0, 2]
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_a_failed_solve_says_so(monkeypatch, make_rows):
    monkeypatch.setattr(torch.linalg, "eigvalsh", solver_that_fails(torch.linalg.eigvalsh, lambda _: True))
    with pytest.warns(UserWarning, match="covariance_spectrum returns NaN: the eigensolver did not converge"):
        assert covariance_spectrum(make_rows(9, torch.ones(3))).isnan().all()


@given(values=SPECTRA)
def test_rankme_equals_its_twin_within_its_bounds(values):
    actual = float(rankme(torch.tensor(values)))
    assert actual == pytest.approx(_reference.rankme(values), rel=1e-10)
    assert actual == pytest.approx(math.exp(scipy.stats.entropy(values)), rel=1e-10)
    assert 1 - 1e-12 <= actual <= len(values) * (1 + 1e-12)


@pytest.mark.parametrize("rank", [1, 3, 64])
def test_rankme_of_equal_values_is_their_number(rank):
    values = torch.zeros(64)
    values[:rank] = 0.7
    assert float(rankme(values)) == pytest.approx(rank)


@given(values=SPECTRA, scale=st.floats(1e-3, 1e3))
def test_summaries_do_not_know_the_scale(values, scale):
    values = torch.tensor(values)
    torch.testing.assert_close(rankme(values * scale), rankme(values), rtol=1e-9, atol=0)
    torch.testing.assert_close(normalize(values * scale), normalize(values), rtol=1e-9, atol=0)


@given(values=SPECTRA)
def test_head_share_equals_its_twin_and_grows_to_one(values):
    values = np.sort(values)[::-1].copy()
    shares = [float(head_share(torch.tensor(values), k)) for k in range(1, len(values) + 1)]
    assert shares == pytest.approx([_reference.head_share(values, k) for k in range(1, len(values) + 1)], rel=1e-12)
    assert all(lo <= hi + 1e-12 for lo, hi in itertools.pairwise(shares))
    assert shares[-1] == pytest.approx(1)


@pytest.mark.parametrize("k", [0, -1, 6])
def test_head_share_refuses_a_head_that_is_not_there(k):
    with pytest.raises(ValueError, match=f"k must be an int from 1 to 5, got {k}"):
        head_share(torch.ones(5), k)


@given(p=SPECTRA, q=SPECTRA)
def test_js_divergence_equals_its_twin(p, q):
    actual = float(js_divergence(torch.tensor(p), torch.tensor(q)))
    assert actual == pytest.approx(_reference.js_divergence(p, q), rel=1e-9, abs=1e-14)


def test_js_divergence_is_the_square_of_scipys_distance(rng):
    p, q = torch.rand(2, 20, 9, dtype=torch.float64, generator=rng)
    expected = scipy.spatial.distance.jensenshannon(p, q, axis=1) ** 2
    np.testing.assert_allclose(js_divergence(p, q), expected, rtol=1e-10)


@given(p=SPECTRA, q=SPECTRA)
def test_js_divergence_is_symmetric_bounded_and_zero_for_equal(p, q):
    p, q = torch.tensor(p), torch.tensor(q)
    assert js_divergence(p, q) == js_divergence(q, p)
    assert 0 <= js_divergence(p, q) <= math.log(2)
    assert js_divergence(p, p) == 0
    assert js_divergence(p, 4 * p) == 0


def test_js_divergence_of_spectra_that_share_nothing_is_ln_2(rng):
    p, q = torch.zeros(2, 50, 200, dtype=torch.float64)
    p[:, :97], q[:, 97:] = torch.rand(50, 97, generator=rng).double(), torch.rand(50, 103, generator=rng).double()
    torch.testing.assert_close(
        js_divergence(p, q), torch.full((50,), math.log(2), dtype=torch.float64), rtol=1e-14, atol=0
    )
    assert (js_divergence(p, q) <= math.log(2)).all()


def test_js_divergence_refuses_unequal_lengths():
    with pytest.raises(ValueError, match="same number of values, got 3 and 4"):
        js_divergence(torch.ones(3), torch.ones(4))


SUMMARIES = {
    "normalize": normalize,
    "rankme": rankme,
    "head_share": lambda values: head_share(values, 2),
    "js_left": lambda values: js_divergence(values, torch.ones(values.shape[-1])),
    "js_right": lambda values: js_divergence(torch.ones(values.shape[-1]), values),
}


@pytest.mark.parametrize("summary", SUMMARIES.values(), ids=SUMMARIES.keys())
@pytest.mark.parametrize("values", [torch.zeros(4), torch.full((4,), torch.nan)], ids=["zeros", "nan"])
def test_nothing_is_said_of_a_spectrum_of_nothing(summary, values):
    assert summary(values).isnan().all()


@pytest.mark.parametrize("summary", SUMMARIES.values(), ids=SUMMARIES.keys())
def test_batched_summaries_equal_a_loop(rng, summary):
    values = torch.rand(2, 3, 5, generator=rng).sort(descending=True).values
    looped = torch.stack([torch.stack([summary(row) for row in matrix]) for matrix in values])
    assert looped.dtype == torch.float64
    torch.testing.assert_close(summary(values), looped, rtol=1e-14, atol=0)
