"""Learning curves of linear regression on fixed features by gradient flow: each mode decays at its own rate."""

import math

import torch
from torch import Tensor

from lightning_spectral.theory.checks import check_positive, power_of, spectrum_of, steps_of


def gradient_flow_risk(spectrum: Tensor, power: Tensor, rate: float, steps: Tensor | float) -> Tensor:
    r"""Risk after gradient flow on features of fixed covariance.

    Of rows h with covariance eigenvalues :math:`\lambda_j` and labels :math:`w^{*\top} h`, gradient flow
    :math:`\dot w = -\eta \, E[h h^\top] (w - w^*)` from zero shrinks the error along each eigenvector by
    :math:`e^{-\eta \lambda_j t}`, so that the risk :math:`r = E[((w - w^*)^\top h)^2]` is
    :math:`r(t) = \sum_j c_j e^{-2 \eta \lambda_j t}`, with :math:`c_j = \lambda_j (w^*_j)^2`.
    Assumed: features that do not move, infinitely many rows, squared loss :math:`r / 2`.

    Args:
        spectrum: ``(d,)`` eigenvalues, descending.
        power: ``(d,)`` task power c_j: which part of the risk at the start lies in which mode.
        rate: Learning rate.
        steps: ``(...)`` times t, in steps; need not be whole.

    Returns:
        ``(...)`` float64.

    Raises:
        ValueError: If an argument is negative, not finite or of another shape.

    References:
        Advani, Saxe, *High-dimensional dynamics of generalization error in neural networks*, arXiv 1710.03667 (2017).

    Example:
        >>> import torch
        >>> gradient_flow_risk(torch.tensor([1.0, 0.5]), torch.tensor([1.0, 1.0]), 0.5, torch.tensor([0.0, 2.0]))
        tensor([2.0000, 0.5032], dtype=torch.float64)
    """
    spectrum = spectrum_of(spectrum)
    power = power_of(power, spectrum)
    check_positive(rate=rate)
    times = steps_of(steps, spectrum)
    return torch.exp(-2 * float(rate) * times.unsqueeze(-1) * spectrum) @ power


def power_law_risk(alpha: float, beta: float, rate: float, steps: Tensor | float, top: float = 1.0) -> Tensor:
    r"""What :func:`gradient_flow_risk` tends to where spectrum and task power are power laws.

    Of :math:`\lambda_j = \lambda_1 j^{-\alpha}` and :math:`c_j = c_1 j^{-\beta}`, the sum over j becomes an integral
    over :math:`u = 2 \eta \lambda_1 t \, j^{-\alpha}`:
    :math:`\frac{r(t)}{c_1} \to \frac{1}{\alpha} \Gamma\!\left(\frac{\beta - 1}{\alpha}\right)
    (2 \eta \lambda_1 t)^{-(\beta - 1) / \alpha}`.
    Assumed: an endless spectrum, and modes that are many enough to be an integral. Of d modes the tail that is missing
    comes to 5.0%, and before to less, at
    :math:`2 \eta \lambda_1 t = d^\alpha (0.05 \, \Gamma(1 + \nu))^{1 / \nu}` with :math:`\nu = (\beta - 1) / \alpha`,
    and the sum is within 5% of the integral from :math:`2 \eta \lambda_1 t = 3` on, for alpha from .8 to 2 and beta
    from 1.5 to 2.5. For beta near 1 no time is left between the two.

    Args:
        alpha: Exponent of the eigenvalues, above 0.
        beta: Exponent of the task power, above 1: else its sum has no limit.
        rate: Learning rate.
        steps: ``(...)`` times t, in steps, above 0.
        top: Largest eigenvalue.

    Returns:
        ``(...)`` float64, in units of c_1; infinite or 0 where the law passes what float64 holds, and NaN where
        :math:`(\beta - 1) / \alpha` does.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Velikanov, Yarotsky, *Explicit loss asymptotics in the gradient descent training of neural networks*, arXiv
        2105.00507 (2021), for such laws of wide networks.

    Example:
        >>> round(float(power_law_risk(1.0, 2.0, 0.5, 100.0)), 6)  # 1 / t
        0.01
    """
    check_positive(alpha=alpha, rate=rate, top=top)
    check_positive(beta=beta)
    if beta <= 1:
        raise ValueError(f"beta must be above 1, got {beta}: below, the task power has no finite sum")
    times = steps_of(steps, torch.empty(0))
    order = (float(beta) - 1) / float(alpha)
    # By logarithms: the gamma function alone passes what float64 holds from 171.6 on.
    log_time = math.log(2) + math.log(rate) + math.log(top) + times.log()
    return torch.exp(torch.lgamma(times.new_tensor(order)) - math.log(alpha) - order * log_time)
