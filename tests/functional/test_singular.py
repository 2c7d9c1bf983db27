"""Singular values by way of the Gram matrix are those of a decomposition of the rows in float64."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_spectral.functional import singular, singular_spectrum, singular_values
from lightning_spectral.functional.singular import centred_gram, gram, roots_of_gram, rounding_floor, without_groups


def rows_of(kind: str, num_rows: int, num_columns: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    rows = random.standard_normal((num_rows, num_columns))
    if kind == "large mean":
        return rows + 1e3 * random.standard_normal(num_columns)
    if kind == "low rank":
        return random.standard_normal((num_rows, 3)) @ random.standard_normal((3, num_columns))
    if kind == "tiny tail":
        u, _, v = np.linalg.svd(rows, full_matrices=False)
        return u * np.logspace(0, -4, u.shape[1]) @ v
    return rows


def svd(rows: np.ndarray) -> np.ndarray:
    return scipy.linalg.svdvals(rows.astype(np.float64))


SHAPES = [(16, 300), (33, 32), (40, 7), (1, 9), (9, 1), (2, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["plain", "large mean", "low rank", "tiny tail"])
@pytest.mark.parametrize("centred", [False, True])
def test_spectrum_is_scipys(kind: str, shape: tuple[int, int], centred: bool) -> None:
    rows = rows_of(kind, *shape)
    found = singular_spectrum(torch.tensor(rows), centred)
    expected = svd(rows - rows.mean(0) if centred else rows)
    assert found.dtype == torch.float64
    assert found.shape == (min(shape),)
    # 1e-7 of the largest is what the root of float64's rounding leaves.
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=5e-7 * np.abs(rows).max() * len(rows) ** 0.5)


def test_values_down_to_a_ten_thousandth_are_exact_to_a_ten_thousandth() -> None:
    rows = rows_of("tiny tail", 64, 2000).astype(np.float32)
    expected = svd(rows)
    assert expected[-1] < 1.2e-4 * expected[0]
    np.testing.assert_allclose(singular_spectrum(torch.tensor(rows)).numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize("kind", ["plain", "tiny tail"])
@pytest.mark.parametrize("shape", [*SHAPES, (1, 1), (64, 2000), (300, 16)], ids=str)
def test_about_a_large_mean_centred_values_keep_four_digits(kind: str, shape: tuple[int, int]) -> None:
    rows = rows_of(kind, *shape) + 1e3 * np.random.default_rng(1).standard_normal(shape[1])
    found, expected = singular_spectrum(torch.tensor(rows), centred=True).numpy(), svd(rows - rows.mean(0))
    large = expected > 1e-4 * expected[0]
    np.testing.assert_allclose(found[large], expected[large], rtol=1e-4)
    assert (found[~large] <= 1.01e-4 * expected[0]).all()


@pytest.mark.parametrize("shape", [(64, 2000), (300, 16)], ids=["wide", "tall"])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_beyond_the_rank_nothing_but_rounding_is_left(shape: tuple[int, int], scale: float) -> None:
    rows = rows_of("low rank", *shape) * scale
    found = singular_spectrum(torch.tensor(rows)).numpy()
    np.testing.assert_allclose(found[:3], svd(rows)[:3], rtol=1e-10)
    assert (found[3:] < 1e-6 * found[0]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_rows_of_any_dtype_are_squared_in_float64(dtype: torch.dtype) -> None:
    # Squared, 6e4 is beyond float16.
    rows = (torch.tensor(rows_of("plain", 6, 90)) * 1e4).to(dtype)
    np.testing.assert_allclose(singular_spectrum(rows).numpy(), svd(rows.double().numpy()), rtol=1e-10)


@pytest.mark.parametrize("centred", [False, True])
def test_rows_of_zeros_have_zeros(centred: bool) -> None:
    assert singular_spectrum(torch.zeros(3, 5), centred).tolist() == [0, 0, 0]


@given(num_rows=st.integers(1, 12), num_columns=st.integers(1, 40), seed=st.integers(0, 99))
def test_spectrum_is_scipys_for_any_shape(num_rows: int, num_columns: int, seed: int) -> None:
    rows = rows_of("plain", num_rows, num_columns, seed)
    found = singular_spectrum(torch.tensor(rows)).numpy()
    np.testing.assert_allclose(found, svd(rows), rtol=1e-6, atol=1e-6)


@given(
    kind=st.sampled_from(["plain", "large mean", "low rank", "tiny tail"]),
    num_rows=st.integers(1, 12),
    num_columns=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_large_values_keep_four_digits_for_any_shape(kind: str, num_rows: int, num_columns: int, seed: int) -> None:
    rows = rows_of(kind, num_rows, num_columns, seed)
    found, expected = singular_spectrum(torch.tensor(rows)).numpy(), svd(rows)
    large = expected > 1e-4 * expected[0]
    np.testing.assert_allclose(found[large], expected[large], rtol=1e-4)
    assert (np.diff(found) <= 0).all()


@given(num_rows=st.integers(2, 10), num_columns=st.integers(1, 30), seed=st.integers(0, 99))
def test_spectrum_knows_neither_order_nor_sign_of_rows(num_rows: int, num_columns: int, seed: int) -> None:
    rows = rows_of("plain", num_rows, num_columns, seed)
    moved = np.random.default_rng(seed).permutation(rows) * np.where(np.arange(num_rows) % 2, 1, -1)[:, None]
    found, expected = singular_spectrum(torch.tensor(moved)), singular_spectrum(torch.tensor(rows))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("numbers", [1, 5, 35, 515, 10**6], ids="{}_numbers".format)
def test_blocks_of_columns_add_up(monkeypatch: pytest.MonkeyPatch, numbers: int) -> None:
    rows = torch.randn(5, 103, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(singular, "BLOCK_NUMBERS", numbers)
    torch.testing.assert_close(gram(rows), rows.double() @ rows.double().T, rtol=1e-14, atol=1e-14)


def test_centred_gram_is_that_of_centred_rows() -> None:
    rows = torch.tensor(rows_of("large mean", 12, 50))
    centred = rows - rows.mean(0)
    torch.testing.assert_close(centred_gram(rows @ rows.T), centred @ centred.T, rtol=1e-6, atol=1e-6)


def test_without_groups_deletes_the_rows_of_each_group() -> None:
    rows = torch.randn(11, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    groups = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 0, 1, 0])
    found = singular_values(without_groups(torch.stack([rows @ rows.T, 4 * rows @ rows.T]), groups, 3))
    assert found.shape == (2, 3, 11 - 2)
    for group in range(3):
        left = svd(rows[groups != group].numpy())
        for factor, values in zip((1, 2), found[:, group].numpy(), strict=True):
            np.testing.assert_allclose(values[: len(left)], factor * left, rtol=1e-10)
            assert not values[len(left) :].any()


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (-torch.eye(3, dtype=torch.float64), "have squared norms on its diagonal, got -1: give rows @ rows.T"),
        (torch.tensor([[1.0, 5.0], [0.0, 1.0]]), "be symmetric, got entries that differ by 5: give rows @ rows.T"),
        (torch.tensor([[1.0, 5.0], [5.0, 1.0]]), "have no negative eigenvalues, got -4: give rows @ rows.T"),
    ],
)
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_what_are_products_of_no_rows_is_refused(matrix: torch.Tensor, message: str, scale: float) -> None:
    with pytest.raises(ValueError, match=f"^gram must {message.partition(' got')[0]}"):
        singular_values(matrix * scale)
    for beside in (torch.full_like(matrix, torch.nan), 1e9 * scale * torch.eye(len(matrix)).to(matrix)):
        with pytest.raises(ValueError, match=f"^gram must {message}$"):
            singular_values(torch.stack([beside, matrix]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mean", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(40, 20), (64, 10), (30, 300)])
def test_products_of_rows_are_taken_with_the_rounding_of_their_type(
    shape: tuple[int, int], mean: float, dtype: torch.dtype
) -> None:
    rows = (torch.tensor(rows_of("plain", *shape)) / 10 + mean).to(dtype)
    products = rows @ rows.T
    assert singular_values(products).equal(roots_of_gram(products))


@pytest.mark.parametrize("row", [torch.full((5,), 0.1), torch.linspace(-1, 2, 300)], ids=["short", "long"])
@pytest.mark.parametrize("num_rows", [2, 3, 7])
def test_equal_rows_that_are_centred_have_no_more_than_rounding(row: torch.Tensor, num_rows: int) -> None:
    values = singular_values(centred_gram(gram(row.expand(num_rows, -1))))
    assert (values <= 1e-6 * row.norm()).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", [(0, 0), (0, 1)], ids=["diagonal", "beside it"])
def test_products_that_are_not_finite_have_nan_and_cost_others_nothing(value: float, where: tuple[int, int]) -> None:
    products = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    products[0][where] = products[0][where[::-1]] = value
    found = singular_values(products)
    assert found[0].isnan().all()
    assert found[1].tolist() == [1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
def test_floor_lies_just_above_the_rounding_of_the_rows(dtype: torch.dtype, scale: float) -> None:
    rounded = torch.tensor(rows_of("low rank", 40, 5000) * scale).to(dtype)
    noise = singular_spectrum(rounded)[3:]
    floor = rounding_floor(gram(rounded), dtype)
    assert 0.2 * floor < noise.max() < floor
    assert noise.median() > 0.1 * floor


def test_floor_is_the_unit_roundoff_of_the_typical_norm_of_each_matrix() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.0, 5.0]], dtype=torch.float64)
    grams = torch.stack([rows @ rows.T, 4 * rows @ rows.T])
    assert rounding_floor(grams, torch.bfloat16).tolist() == pytest.approx([5 * 2.0**-8, 10 * 2.0**-8])
    assert rounding_floor(grams, torch.float32).tolist() == pytest.approx([5 * 2.0**-24, 10 * 2.0**-24])


def test_a_group_without_rows_deletes_nothing() -> None:
    rows = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = singular_values(without_groups(rows @ rows.T, torch.tensor([0, 2, 0, 0]), 3)).numpy()
    for group, left in enumerate((rows[[1]], rows, rows[[0, 2, 3]])):
        np.testing.assert_allclose(found[group], np.pad(svd(left.numpy()), (0, 4 - len(left))), rtol=1e-10)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("shape", [(2, 5), (5, 2)], ids=["wide", "tall"])
@pytest.mark.parametrize("centred", [False, True])
def test_rows_that_are_not_finite_give_nan_with_the_reason(value: float, shape: tuple[int, int], centred: bool) -> None:
    rows = torch.ones(shape)
    rows[1, 1] = value
    message = "singular_spectrum returns NaN: the rows hold NaN or infinity"
    with pytest.warns(UserWarning, match=message) as caught:
        values = singular_spectrum(rows, centred)
    assert values.shape == (2,)
    assert values.isnan().all()
    assert caught[0].filename == __file__


def test_a_failed_solve_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: torch.Tensor) -> None:
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigvalsh", fail)
    with pytest.warns(UserWarning, match="singular_spectrum returns NaN: the eigensolver did not converge"):
        assert singular_spectrum(torch.ones(2, 3)).isnan().all()


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (0, 3), (3, 0)])
def test_what_is_no_matrix_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"rows must be a matrix \(samples, P\)") as caught:
        singular_spectrum(torch.zeros(shape))
    assert "\n" not in str(caught.value)


def test_a_weight_can_be_given_as_it_is_and_its_gradient_comes_back() -> None:
    weight = torch.nn.Parameter(torch.randn(140, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    singular_spectrum(weight).sum().backward()
    # The gradient of the nuclear norm is the polar factor.
    left, _, right = torch.linalg.svd(weight.detach(), full_matrices=False)
    torch.testing.assert_close(weight.grad, left @ right, rtol=1e-7, atol=1e-9)
