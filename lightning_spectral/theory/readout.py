"""How much of a model's loss its last layer could still take away, mode by mode of the features that it reads."""

from dataclasses import dataclass
from math import nan

import torch
from torch import Tensor

from lightning_spectral.functional.arguments import check_int, check_number, check_real
from lightning_spectral.theory.checks import check_positive, power_of, spectrum_of, steps_of


def task_power(eigenvalues: Tensor, basis: Tensor, readout_gradient: Tensor) -> Tensor:
    r"""Which part of the loss that is still to be had lies in which mode of the features.

    With logits :math:`z = W h`, predictions p, targets y and :math:`G = E[(p - y) h^\top]`, the gradient of the
    cross-entropy with respect to W, mode j of :math:`E[h h^\top]` holds
    :math:`c_j = |G u_j|^2 / \lambda_j`. For the squared error :math:`E|W h - y|^2` (where G is half the gradient)
    :math:`G u_j = \lambda_j (W - W^*) u_j`, and c_j is exactly what moving W along u_j takes off it. For the
    cross-entropy the curvature in the logits is at most one half, so that a step to the minimum of the quadratic of
    unit curvature, :math:`W - G E[h h^\top]^{-1}`, takes off at least half their sum.

    Args:
        eigenvalues: ``(k,)`` of the features' covariance, descending: of the same rows as ``readout_gradient``, about
            their mean where the readout has a bias and h there is centred too, about zero where it has none.
        basis: ``(d, k)`` their eigenvectors, in columns.
        readout_gradient: ``(classes, d)`` G.

    Returns:
        ``(k,)`` float64; 0 for modes without variance.

    Raises:
        ValueError: If shapes do not fit, or the eigenvalues are no descending spectrum.

    References:
        Derived above; Böhning, *Multinomial logistic regression algorithm*, Ann. Inst. Stat. Math. 44 (1992), for the
        bound of the curvature.

    Example:
        >>> import torch
        >>> error = torch.tensor([[0.5, 2.0]])  # W - W*, features with variances 4 and 1
        >>> task_power(torch.tensor([4.0, 1.0]), torch.eye(2), error * torch.tensor([4.0, 1.0]))
        tensor([1., 4.], dtype=torch.float64)
    """
    spectrum = spectrum_of(eigenvalues, "eigenvalues")
    check_real(basis=basis, readout_gradient=readout_gradient)
    if basis.ndim != 2 or basis.shape[1] != len(spectrum):
        raise ValueError(f"basis must be (d, {len(spectrum)}), a column an eigenvalue, got {tuple(basis.shape)}")
    if readout_gradient.ndim != 2 or readout_gradient.shape[1] != basis.shape[0]:
        raise ValueError(f"readout_gradient must be (classes, {basis.shape[0]}), got {tuple(readout_gradient.shape)}")
    along = readout_gradient.to(torch.float64) @ basis.to(torch.float64)
    has_variance = spectrum > spectrum[0] * torch.finfo(torch.float64).eps * basis.shape[0]
    return torch.where(has_variance, along.square().sum(0) / torch.where(has_variance, spectrum, 1.0), 0.0)


def readout_loss(loss: float, eigenvalues: Tensor, power: Tensor, rate: float, steps: Tensor | float) -> Tensor:
    r"""The loss that training the last layer alone is to reach, as a diagnostic: all other learning comes on top.

    Gradient flow of W at rate :math:`\eta` on the quadratic of unit curvature takes off
    :math:`\tfrac 12 \sum_j c_j (1 - e^{-2 \eta \lambda_j t})`. At the start its slope,
    :math:`-\eta |G|^2 = -\eta \sum_j \lambda_j c_j`, is that of the true loss. Features are held still, so this is a
    lower bound in spirit on what a run gains, not a forecast of it.

    Args:
        loss: Cross-entropy now, in nats.
        eigenvalues: ``(k,)`` descending.
        power: ``(k,)`` of :func:`task_power`.
        rate: Learning rate of plain gradient descent.
        steps: ``(...)`` times, in steps.

    Returns:
        ``(...)`` float64, nats.

    Raises:
        ValueError: If an argument is negative, not finite or of another shape.

    Example:
        >>> import torch
        >>> eigenvalues, power = torch.tensor([1.0, 0.5]), torch.tensor([1.0, 0.4])
        >>> readout_loss(2.0, eigenvalues, power, 0.1, torch.tensor([0.0, 1000.0]))  # 2 - 1.4 / 2 at last
        tensor([2.0000, 1.3000], dtype=torch.float64)
    """
    spectrum = spectrum_of(eigenvalues, "eigenvalues")
    power = power_of(power, spectrum)
    check_number(loss=loss)
    check_positive(rate=rate)
    times = steps_of(steps, spectrum)
    return float(loss) + torch.expm1(-2 * float(rate) * times.unsqueeze(-1) * spectrum) @ power / 2


@dataclass(frozen=True)
class Readout:
    """A model's last linear layer at one moment: what of its loss it could still take away, by mode of its input."""

    eigenvalues: Tensor
    """``(d,)`` float64, of the covariance of its input, descending; empty where it could not be measured."""
    power: Tensor
    """``(d,)`` float64, of :func:`task_power`."""
    loss: float = nan
    """Mean over the rows, in nats; NaN where it is not known."""
    num_rows: int = 0
    """Rows n behind it. Their sampling adds about E|p - y|^2 / n to the power of each mode, of which most is seen where
    little is left to learn."""
    failure: str | None = None
    """Why there is none."""

    @classmethod
    def missing(cls, failure: str) -> "Readout":
        """What stands for one that could not be measured."""
        nothing = torch.empty(0, dtype=torch.float64)
        return cls(nothing, nothing, failure=failure)

    @property
    def cumulative(self) -> Tensor:
        """``(d,)`` share of the task power in the modes up to each; NaN where there is none."""
        return self.power.cumsum(0) / self.power.sum()

    def head_share(self, k: int) -> float:
        """Share of the task power in the modes of most variance.

        Args:
            k: How many modes.

        Returns:
            From 0 to 1; NaN where there is no power.

        Raises:
            ValueError: If there are not so many modes.
        """
        if self.failure is not None:
            return nan
        check_int(1, len(self.power), k=k)
        return float(self.cumulative[k - 1])

    def lower_bound(self, rate: float, steps: Tensor | float) -> Tensor:
        """The loss that training this layer alone is to reach, of :func:`readout_loss`: a diagnostic, no forecast.

        Args:
            rate: Learning rate of plain gradient descent.
            steps: ``(...)`` times, in steps.

        Returns:
            ``(...)`` float64, nats; NaN where it could not be measured.

        Raises:
            ValueError: If an argument is negative or not finite.
        """
        if self.failure is not None:
            return torch.full(torch.as_tensor(steps).shape, nan, dtype=torch.float64)
        return readout_loss(self.loss, self.eigenvalues, self.power, rate, steps)
