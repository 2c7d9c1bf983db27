"""The noise scale: closed forms, and estimates whose mean over many draws is the truth."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from lightning_spectral.functional import (
    gradient_moments,
    gradient_noise_scale,
    noise_sums,
    singular_spectrum,
    singular_values,
)
from lightning_spectral.functional.noise import mean_row_norm
from tests import _reference


def test_linear_model_has_the_analytic_spectrum_and_noise_scale() -> None:
    # y = w.x with loss (w.x - y)^2 / 2: the gradient of sample i is r_i x_i. With orthogonal inputs a_i e_i the
    # singular values are |r_i a_i| = 6, 4, 3, 2.
    lengths, residuals = torch.tensor([2.0, 2.0, 3.0, 1.0]), torch.tensor([3.0, -2.0, 1.0, 2.0])
    inputs = torch.diag(lengths)
    weight = torch.zeros(4, requires_grad=True)
    rows = []
    for x, residual in zip(inputs, residuals, strict=True):
        loss = (weight @ x + residual).square() / 2
        rows.append(torch.autograd.grad(loss, weight)[0])
    rows = torch.stack(rows)
    torch.testing.assert_close(singular_spectrum(rows), torch.tensor([6.0, 4.0, 3.0, 2.0], dtype=torch.float64))
    # Orthogonal gradients: no two have anything in common, so that the unbiased estimate of |mu|^2 is 0.
    squared_norm, trace = gradient_moments(rows @ rows.T)
    assert float(squared_norm) == 0
    # |g|^2 sum to 65, |mean|^2 = 65 / 16: trace = (65 - 4 * 65 / 16) / 3.
    assert float(trace) == pytest.approx(65 / 4)
    assert gradient_noise_scale(rows @ rows.T) == math.inf
    assert float(mean_row_norm(rows.double() @ rows.double().T)) == pytest.approx(math.sqrt(65) / 4)


def test_linear_model_with_each_input_twice_has_the_analytic_spectrum_and_noise_scale() -> None:
    # Orthogonal inputs 2 e_1 and 3 e_2, each with two residuals: (3, 4) and (1, 2).
    inputs = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 3.0], [0.0, 3.0]])
    residuals, true = torch.tensor([3.0, 4.0, 1.0, 2.0]), torch.tensor([0.5, -1.0])
    targets, rows = inputs @ true - residuals, []
    for x, y in zip(inputs, targets, strict=True):
        weight = true.clone().requires_grad_()
        rows.append(torch.autograd.grad((weight @ x - y).square() / 2, weight)[0])
    rows = torch.stack(rows)
    torch.testing.assert_close(rows, residuals.unsqueeze(1) * inputs)
    # Columns of gradients (6, 8, 0, 0) and (0, 0, 3, 6): lengths 10 and the root of 45.
    assert singular_spectrum(rows).tolist() == pytest.approx([10, math.sqrt(45)])
    # Pairs that differ: 2 * (6 * 8 + 3 * 6) of 4 * 3. Columns have means 3.5 and 2.25, squares sum to 100 and 45.
    squared_norm, trace = gradient_moments(rows @ rows.T)
    assert float(squared_norm) == pytest.approx(11)
    assert float(trace) == pytest.approx((100 - 4 * 3.5**2 + 45 - 4 * 2.25**2) / 3)
    assert float(gradient_noise_scale(rows @ rows.T)) == pytest.approx((145 - 49 - 20.25) / 33)
    assert float(mean_row_norm(rows.double() @ rows.double().T)) == pytest.approx(math.hypot(3.5, 2.25))


def test_common_input_has_the_analytic_noise_scale() -> None:
    # All inputs x with |x| = 5: gradients r_i x. Residuals 1, 2, 3, 6: mean 3, variance 14 / 3.
    rows = torch.tensor([1.0, 2.0, 3.0, 6.0]).unsqueeze(1) * torch.tensor([3.0, 0.0, 4.0])
    squared_norm, trace = gradient_moments(rows @ rows.T)
    assert float(trace) == pytest.approx(25 * 14 / 3)
    assert float(squared_norm) == pytest.approx(25 * (9 - 14 / 12))
    assert float(gradient_noise_scale(rows @ rows.T)) == pytest.approx((14 / 3) / (9 - 14 / 12))
    assert float(singular_spectrum(rows)[0]) == pytest.approx(5 * math.sqrt(50))


def test_moments_are_unbiased() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, spread = torch.tensor([0.3, -0.2, 0.0, 0.1]), torch.tensor([1.0, 0.5, 2.0, 0.1])
    rows = mean + spread * torch.randn(20_000, 6, 4, dtype=torch.float64, generator=generator)
    squared_norm, trace = gradient_moments(rows @ rows.mT)
    for found, truth in ((squared_norm, float(mean.square().sum())), (trace, float(spread.square().sum()))):
        assert abs(float(found.mean()) - truth) < 4 * float(found.std()) / math.sqrt(len(found))


def test_moments_of_correlated_gradients_are_unbiased() -> None:
    generator = torch.Generator().manual_seed(1)
    mean, mixing = torch.tensor([1.0, -0.5, 0.2]), torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.4, 0.0], [-2.0, 0.3, 0.1]])
    rows = mean + torch.randn(20_000, 4, 3, dtype=torch.float64, generator=generator) @ mixing.T.double()
    squared_norm, trace = gradient_moments(rows @ rows.mT)
    truths = (float(mean.square().sum()), float((mixing @ mixing.T).trace()))
    for found, truth in zip((squared_norm, trace), truths, strict=True):
        assert abs(float(found.mean()) - truth) < 4 * float(found.std()) / math.sqrt(len(found))


@pytest.mark.parametrize("num_rows", [2, 3, 10])
def test_batched_moments_equal_a_naive_twin(num_rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 3, num_rows, 20, dtype=torch.float64, generator=generator) + 0.5
    grams = rows @ rows.mT
    found = torch.stack(tuple(gradient_moments(grams)), -1)
    expected = [_reference.gradient_moments(matrix) for matrix in rows.flatten(0, 1)]
    np.testing.assert_allclose(found.flatten(0, 1), expected, rtol=1e-10)
    norms = np.linalg.norm(rows.mean(-2).numpy(), axis=-1)
    np.testing.assert_allclose(mean_row_norm(grams), norms, rtol=1e-10)


def test_noise_scale_is_infinite_only_where_the_gradient_is_hidden() -> None:
    rows = torch.tensor([[[2.0, 1.0], [2.0, -1.0]], [[1.0, 0.0], [-1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
    found = gradient_noise_scale(rows @ rows.mT)
    assert found.dtype == torch.float64
    assert float(found[0]) == pytest.approx(2 / 3)
    assert found[1:].isposinf().all()


def test_gradients_of_zero_have_no_noise_scale() -> None:
    assert gradient_noise_scale(torch.zeros(4, 4)).isnan()


def test_equal_gradients_have_no_noise() -> None:
    assert float(gradient_noise_scale(torch.full((4, 4), 9.0))) == 0


def test_noise_scale_does_not_know_the_scale_of_gradients() -> None:
    rows = torch.randn(6, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1
    torch.testing.assert_close(gradient_noise_scale(1e-12 * rows @ rows.T), gradient_noise_scale(rows @ rows.T))


def test_moments_add_up_over_parameters() -> None:
    rows = torch.randn(7, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    left, right = rows[:, :11], rows[:, 11:]
    whole, *parts = (gradient_moments(part @ part.T) for part in (rows, left, right))
    torch.testing.assert_close(whole.squared_norm, sum(part.squared_norm for part in parts))
    torch.testing.assert_close(whole.trace, sum(part.trace for part in parts))


@pytest.mark.parametrize("num_rows", [0, 1])
def test_fewer_than_two_samples_have_no_moments(num_rows: int) -> None:
    gram = torch.ones(3, num_rows, num_rows)
    assert gradient_noise_scale(gram).shape == (3,)
    for values in (gradient_noise_scale(gram), *gradient_moments(gram)):
        assert values.isnan().all()


def test_the_mean_of_no_rows_has_no_norm() -> None:
    assert mean_row_norm(torch.ones(3, 0, 0)).isnan().all()
    assert mean_row_norm(torch.full((1, 1), 9.0)) == 3


@pytest.mark.parametrize(
    ("gram", "reason"),
    [
        *((torch.zeros(shape), "be square in their last two axes") for shape in ((), (3,), (3, 4), (3, 3, 4))),
        (torch.tensor([[1.0, 2.0], [-2.0, 1.0]]), "be symmetric, got entries that differ by 4: give rows @ rows.T"),
        # Beside a far larger one, whose rounding it is not.
        (torch.tensor([[[1.0, 2.0], [-2.0, 1.0]], [[1e6, 0.0], [0.0, 1e6]]]), "be symmetric, got entries that differ"),
        (torch.tensor([[1.0, 0.0], [0.0, -3.0]]), "have squared norms on its diagonal, got -3"),
        (torch.eye(3, dtype=torch.complex64), "hold real numbers, got complex64"),
        *((value, "be a tensor, got ") for value in ([[1.0, 0.0], [0.0, 1.0]], None, "gram", True)),
        (torch.eye(3).to_sparse(), "be a dense tensor with data, got a torch.sparse_coo one"),
        (torch.empty(3, 3, device="meta"), "be a dense tensor with data, got a meta one"),
    ],
)
@pytest.mark.parametrize("function", [gradient_noise_scale, gradient_moments, noise_sums, singular_values])
def test_what_is_no_gram_matrix_is_refused(gram: Any, reason: str, function) -> None:
    with pytest.raises(ValueError, match=f"gram must {reason}") as caught:
        function(gram)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_matrix_that_is_symmetric_but_for_rounding_is_taken(dtype: torch.dtype) -> None:
    rows = torch.randn(40, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert gradient_noise_scale(rows @ rows.T) > 0


@pytest.mark.parametrize("spoil", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_come_to_nan(spoil: float) -> None:
    gram = torch.eye(6)
    gram[2, 2] = spoil
    sums = noise_sums(gram)
    assert all(number.isnan() for number in (sums.noise_scale, *sums.moments_between, *sums.interval))
