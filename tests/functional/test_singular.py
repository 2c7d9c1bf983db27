"""Singular values by way of the Gram matrix are those of a decomposition of the rows in float64."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_spectral.functional import singular, singular_spectrum, singular_values
from lightning_spectral.functional.singular import centred_gram, gram, rounding_floor, without_groups


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


@given(num_rows=st.integers(1, 12), num_columns=st.integers(1, 40), seed=st.integers(0, 99))
def test_spectrum_is_scipys_for_any_shape(num_rows: int, num_columns: int, seed: int) -> None:
    rows = rows_of("plain", num_rows, num_columns, seed)
    found = singular_spectrum(torch.tensor(rows)).numpy()
    np.testing.assert_allclose(found, svd(rows), rtol=1e-6, atol=1e-6)


def test_blocks_of_columns_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(5, 103, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(singular, "BLOCK_NUMBERS", 35)
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


def test_floor_lies_just_above_the_rounding_of_the_rows() -> None:
    rows = torch.tensor(rows_of("low rank", 40, 5000))
    rounded = rows.bfloat16()
    noise = singular_spectrum(rounded)[3:]
    floor = rounding_floor(gram(rounded), torch.bfloat16)
    assert 0.2 * floor < noise.max() < floor


def test_rows_that_are_not_finite_give_nan_with_the_reason() -> None:
    with pytest.warns(UserWarning, match="singular_spectrum returns NaN: the rows hold NaN or infinity"):
        assert singular_spectrum(torch.tensor([[1.0, torch.inf]])).isnan().all()


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (0, 3), (3, 0)])
def test_what_is_no_matrix_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"rows must be a matrix \(samples, P\)"):
        singular_spectrum(torch.zeros(shape))
