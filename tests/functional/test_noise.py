"""The noise scale: closed forms, and estimates whose mean over many draws is the truth."""

import math

import pytest
import torch

from lightning_spectral.functional import gradient_moments, gradient_noise_scale, singular_spectrum
from lightning_spectral.functional.noise import mean_row_norm


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
    assert math.isnan(gradient_noise_scale(rows @ rows.T))
    assert float(mean_row_norm(rows.double() @ rows.double().T)) == pytest.approx(math.sqrt(65) / 4)


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


def test_moments_add_up_over_parameters() -> None:
    rows = torch.randn(7, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    left, right = rows[:, :11], rows[:, 11:]
    whole, *parts = (gradient_moments(part @ part.T) for part in (rows, left, right))
    torch.testing.assert_close(whole.squared_norm, sum(part.squared_norm for part in parts))
    torch.testing.assert_close(whole.trace, sum(part.trace for part in parts))


def test_one_sample_has_no_noise_scale() -> None:
    assert gradient_noise_scale(torch.ones(3, 1, 1)).isnan().all()


@pytest.mark.parametrize("shape", [(3,), (3, 4)])
def test_what_is_no_gram_matrix_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="gram must be square in its last two axes, got shape"):
        gradient_noise_scale(torch.zeros(shape))
