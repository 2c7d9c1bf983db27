"""Learning curves of linear regression on fixed Gaussian features by stochastic gradient descent, exact in the mean."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_spectral.theory.checks import check_not_negative, check_positive, power_of, spectrum_of, steps_of

_EVERY_STEP = 1024
_STRIDE = 1.02
_MOST_STEPS = 1e15


class _Recursion:
    """The linear recursion of the second moments of the error, solved by the eigenvectors of its symmetric matrix.

    In the covariance's eigenbasis the squared errors m obey m <- A m + b with
    A = diag((1 - eta l)^2 + eta^2 l^2 / B) + (eta^2 / B) l l' and b = (eta^2 / B) sigma^2 l. A is symmetric and
    positive semidefinite, so m after t steps, for real t, is a sum of powers of its eigenvalues.
    """

    def __init__(self, spectrum: Tensor, power: Tensor, rate: float, batch_size: float, noise: float) -> None:
        kick = rate * rate / batch_size
        diagonal = (1 - rate * spectrum) ** 2 + kick * spectrum**2
        matrix = diagonal.diag() + kick * torch.outer(spectrum, spectrum)
        if not bool(matrix.isfinite().all()):
            raise ValueError(
                f"rate must keep (rate * spectrum)^2 / batch_size within the floating-point range, got {rate:g} with "
                f"spectrum to {float(spectrum[0]):g} and batch_size={batch_size:g}: lower it"
            )
        growth, vectors = torch.linalg.eigh(matrix)
        self._log_growth = growth.clamp(min=0.0).log()
        seen = vectors.mT @ spectrum
        is_used = spectrum > 0
        start = torch.where(is_used, power / torch.where(is_used, spectrum, 1.0), 0.0)
        self._decaying = seen * (vectors.mT @ start)
        # Sums of a geometric series, (1 - a^t) / (1 - a), by expm1 for a near 1.
        self._driven = kick * noise * seen**2
        # A direction without variance neither learns nor is seen.
        self._unseen = float(power[~is_used].sum())

    def risk(self, steps: Tensor) -> Tensor:
        """Risk at real times ``(...)``; infinite where it passes what float64 holds."""
        exponent = steps.unsqueeze(-1) * self._log_growth
        # A growth of exactly 0 forgets the start in one step; 0 * -inf at the start itself is 1.
        exponent = torch.where(exponent.isnan(), 0.0, exponent)
        fresh = torch.where(
            self._log_growth.abs() < 1e-14,
            steps.unsqueeze(-1),
            torch.expm1(exponent) / torch.expm1(self._log_growth),
        )
        return exponent.exp() @ self._decaying + (fresh * self._driven).sum(-1) + self._unseen


def sgd_risk(
    spectrum: Tensor, power: Tensor, rate: float, batch_size: float, noise: float, steps: Tensor | int
) -> Tensor:
    r"""Mean risk of stochastic gradient descent on Gaussian rows, drawn anew at each step.

    With :math:`m_j` the mean squared error along eigenvector j, :math:`r = \sum_j \lambda_j m_j` the risk
    :math:`E[((w - w^*)^\top h)^2]`, a batch of B rows and labels with noise of variance :math:`\sigma^2`, one step of
    the squared loss's half takes
    :math:`m_j \leftarrow [1 - 2 \eta \lambda_j + \eta^2 \lambda_j^2 (1 + \tfrac 1B)] m_j
    + \tfrac{\eta^2}{B} \lambda_j (r + \sigma^2)`,
    by :math:`E[h h^\top \Delta h h^\top] = 2 \Lambda \Delta \Lambda + \Lambda \operatorname{tr}(\Lambda \Delta)` of
    Gaussian rows. It is exact, at every batch size. Assumed: features that do not move, Gaussian rows, constant rate.

    Args:
        spectrum: ``(d,)`` eigenvalues, descending.
        power: ``(d,)`` task power c_j = lambda_j m_j at the start: which part of the risk lies in which mode.
        rate: Learning rate.
        batch_size: Rows a step.
        noise: Variance of the labels' noise; the risk is without it.
        steps: ``(...)`` numbers of steps.

    Returns:
        ``(...)`` float64; NaN once the risk has grown beyond float64, as it does where :func:`stability` says so.

    Raises:
        ValueError: If an argument is negative, not finite or of another shape.

    References:
        Bordelon, Pehlevan, *Learning Curves for SGD on Structured Features*, arXiv 2106.02713 (2021).

    Example:
        >>> import torch
        >>> sgd_risk(torch.tensor([1.0]), torch.tensor([1.0]), 0.5, 1, 0.0, torch.tensor([0, 1]))  # 1 - 1 + 3 / 4
        tensor([1.0000, 0.7500], dtype=torch.float64)
    """
    spectrum, power, recursion = _checked(spectrum, power, rate, batch_size, noise)
    risk = recursion.risk(steps_of(steps, spectrum))
    return torch.where(risk.isfinite(), risk, torch.nan)


@dataclass(frozen=True)
class Stability:
    """Whether stochastic gradient descent settles, and where."""

    kappa: float
    """What part of the risk the noise of its own batches puts back; at one it never settles."""
    sharpness: float
    """The largest mode's step, eta lambda_1 (1 + 1/B); at two it overshoots."""
    floor: float
    """Risk where it settles, :math:`\\sigma^2 \\kappa / (1 - \\kappa)`; infinite where it does not."""

    @property
    def is_stable(self) -> bool:
        """Whether the risk stays bounded."""
        return self.kappa < 1 and self.sharpness < 2


def stability(spectrum: Tensor, rate: float, batch_size: float, noise: float = 0.0) -> Stability:
    r"""Whether :func:`sgd_risk` settles.

    At rest :math:`m_j = \frac{\eta}{B} \frac{r + \sigma^2}{2 - \eta \lambda_j (1 + 1/B)}`; summed with
    :math:`\lambda_j` this is :math:`r = \kappa (r + \sigma^2)` with
    :math:`\kappa = \frac 1B \sum_j \frac{\eta \lambda_j}{2 - \eta \lambda_j (1 + 1/B)}`. It settles if and only if
    :math:`\kappa < 1` and :math:`\eta \lambda_1 (1 + 1/B) < 2`.

    Args:
        spectrum: ``(d,)`` eigenvalues, descending.
        rate: Learning rate.
        batch_size: Rows a step.
        noise: Variance of the labels' noise.

    Returns:
        The two numbers that decide, and the floor.

    Raises:
        ValueError: If an argument is negative, not finite or of another shape.

    References:
        Bordelon, Pehlevan, arXiv 2106.02713 (2021), for the recursion; where it is at rest is above.

    Example:
        >>> import torch
        >>> found = stability(torch.tensor([1.0]), 0.5, 1, noise=0.1)
        >>> found.is_stable, found.kappa, round(found.floor, 6)
        (True, 0.5, 0.1)
    """
    spectrum = spectrum_of(spectrum)
    check_positive(rate=rate, batch_size=batch_size)
    check_not_negative(noise=noise)
    rate, batch_size = float(rate), float(batch_size)
    step = rate * spectrum
    sharpness = float(step[0] * (1 + 1 / batch_size))
    if sharpness >= 2:
        return Stability(math.inf, sharpness, math.inf)
    kappa = float((step / (2 - step * (1 + 1 / batch_size))).sum() / batch_size)
    return Stability(kappa, sharpness, noise * kappa / (1 - kappa) if kappa < 1 else math.inf)


def steps_to_risk(
    spectrum: Tensor, power: Tensor, rate: float, batch_size: float, noise: float, target: float
) -> float:
    """Steps until the mean risk of :func:`sgd_risk` first reaches a target, interpolated between steps.

    Every step is looked at up to 1,024, beyond those each 2% further on: a risk that dips below the target for less
    than that is not seen.

    Args:
        spectrum: ``(d,)`` eigenvalues, descending.
        power: ``(d,)`` task power.
        rate: Learning rate.
        batch_size: Rows a step; ``math.inf`` is gradient descent on all there are.
        noise: Variance of the labels' noise.
        target: Risk.

    Returns:
        Steps, 0 where the risk starts at the target or below; infinite where it is never reached.

    Raises:
        ValueError: If an argument is negative, not finite or of another shape.

    Example:
        >>> import torch
        >>> steps_to_risk(torch.tensor([1.0]), torch.tensor([1.0]), 0.5, 1, 0.0, target=0.75**2)
        2.0
    """
    check_positive(target=target)
    spectrum, _, recursion = _checked(spectrum, power, rate, batch_size, noise)
    every = torch.arange(_EVERY_STEP, dtype=torch.float64, device=spectrum.device)
    last, start = -1.0, 0.0
    while start < _MOST_STEPS:
        times = every if start == 0 else start * _STRIDE ** every[:64]
        risk = recursion.risk(times)
        if bool((reached := risk <= target * (1 + 1e-12)).any()):
            first = int(reached.nonzero()[0])
            low = float(times[first - 1]) if first else last
            return 0.0 if low < 0 else _crossing(recursion, low, float(times[first]), target, spectrum)
        if not bool(risk.isfinite().all()):
            return math.inf
        last = float(times[-1])
        start = last * _STRIDE
    return math.inf


def tokens_to_risk(
    spectrum: Tensor,
    power: Tensor,
    rate: float,
    batch_size: float,
    noise: float,
    target: float,
    tokens_per_row: float = 1.0,
) -> float:
    """Tokens until a target risk: :func:`steps_to_risk` times the tokens of a batch.

    Args:
        spectrum: ``(d,)`` eigenvalues, descending.
        power: ``(d,)`` task power.
        rate: Learning rate.
        batch_size: Rows a step.
        noise: Variance of the labels' noise.
        target: Risk.
        tokens_per_row: Tokens a row stands for.

    Returns:
        Tokens; infinite where the target is never reached.

    Raises:
        ValueError: If an argument is negative, not finite or of another shape.

    Example:
        >>> import torch
        >>> one = torch.tensor([1.0])
        >>> tokens_to_risk(one, one, 0.5, 1, 0.0, target=0.75**2, tokens_per_row=128.0)  # two steps of one row
        256.0
    """
    check_positive(tokens_per_row=tokens_per_row, batch_size=batch_size)
    return steps_to_risk(spectrum, power, rate, batch_size, noise, target) * batch_size * tokens_per_row


def critical_batch_size(spectrum: Tensor, power: Tensor, rate: float, noise: float, target: float) -> float:
    r"""The batch size at which a target takes twice the steps that it takes on all rows there are.

    McCandlish et al. (arXiv 1812.06162, 2018, equation 2.11) write :math:`S / S_{min} = 1 + B_{crit} / B`: at
    :math:`B = B_{crit}` a run takes twice the fewest steps (and twice the fewest tokens). Here the rate is the same at
    every batch size.

    Args:
        spectrum: ``(d,)`` eigenvalues, descending.
        power: ``(d,)`` task power.
        rate: Learning rate.
        noise: Variance of the labels' noise.
        target: Risk.

    Returns:
        Rows, seldom a whole number; NaN where all rows do not reach the target either, or it is reached at the start;
        at least 1e-6, where even that takes fewer than twice the steps.

    Raises:
        ValueError: If an argument is negative, not finite or of another shape.

    Example:
        >>> import torch
        >>> one = torch.tensor([1.0])
        >>> round(critical_batch_size(one, one, 0.5, 0.0, target=0.1), 6)  # (1/4 + 1/(2 B))^2 = 1/4
        2.0
    """
    fewest = steps_to_risk(spectrum, power, rate, math.inf, noise, target)
    if not 0 < fewest < math.inf:
        return math.nan
    low, high = math.log(1e-6), math.log(1e12)
    for _ in range(60):
        middle = (low + high) / 2
        is_slow = steps_to_risk(spectrum, power, rate, math.exp(middle), noise, target) > 2 * fewest
        low, high = (middle, high) if is_slow else (low, middle)
    return math.exp((low + high) / 2)


def noise_scale(spectrum: Tensor, power: Tensor, noise: float) -> float:
    r"""The simple noise scale of the model's own per-row gradients, what `GradientSpectrum` would measure on it.

    Of :math:`g = h (\delta^\top h - \epsilon)` with Gaussian h, :math:`E g = \Lambda \delta` and
    :math:`\operatorname{tr} \operatorname{Cov} g = \operatorname{tr} \Lambda \, (r + \sigma^2)
    + |\Lambda \delta|^2`, by the same moments as :func:`sgd_risk`; with
    :math:`|\Lambda \delta|^2 = \sum_j \lambda_j c_j` their ratio is
    :math:`1 + \operatorname{tr} \Lambda (r + \sigma^2) / \sum_j \lambda_j c_j`.

    Args:
        spectrum: ``(d,)`` eigenvalues, descending.
        power: ``(d,)`` what of the risk lies in which mode, now.
        noise: Variance of the labels' noise.

    Returns:
        Rows; infinite where no gradient is left.

    Raises:
        ValueError: If an argument is negative, not finite or of another shape.

    References:
        McCandlish, Kaplan, Amodei et al., *An Empirical Model of Large-Batch Training*, arXiv 1812.06162 (2018), for
        the ratio; its value in this model is above.

    Example:
        >>> import torch
        >>> noise_scale(torch.tensor([1.0]), torch.tensor([1.0]), 0.0)
        2.0
    """
    spectrum = spectrum_of(spectrum)
    power = power_of(power, spectrum)
    check_not_negative(noise=noise)
    squared_norm = float(spectrum @ power)
    if squared_norm == 0:
        return math.inf
    return 1 + float(spectrum.sum()) * (float(power.sum()) + noise) / squared_norm


def _checked(
    spectrum: Tensor, power: Tensor, rate: float, batch_size: float, noise: float
) -> tuple[Tensor, Tensor, _Recursion]:
    spectrum = spectrum_of(spectrum)
    power = power_of(power, spectrum)
    check_positive(rate=rate)
    check_not_negative(noise=noise)
    if not (isinstance(batch_size, float) and batch_size == math.inf):
        check_positive(batch_size=batch_size)
    return spectrum, power, _Recursion(spectrum, power, float(rate), float(batch_size), noise)


def _crossing(recursion: _Recursion, low: float, high: float, target: float, like: Tensor) -> float:
    """Where the risk falls to the target between a time above it and one at it or below."""
    for _ in range(80):
        middle = (low + high) / 2
        is_above = float(recursion.risk(like.new_tensor(middle))) > target
        low, high = (middle, high) if is_above else (low, middle)
        if high - low <= 1e-12 * high:
            break
    return high
