"""A stack of predictors fitted to references, and to those without each setting in turn, all in one pass."""

import math
from typing import NamedTuple

import torch
from scipy.special import stdtrit
from torch import Tensor

from lightning_spectral.functional.early import NEEDS, PREDICTORS, Known
from lightning_spectral.functional.forecast import MIN_SETTINGS
from lightning_spectral.functional.gaussian_process import gaussian_process
from lightning_spectral.functional.line import FARTHEST, fit_line, setting_means
from lightning_spectral.functional.predictors import batch_law, mean, offset, ridge

_SMALLEST = 1e-12
"""Mean squared errors below count as this: of references that follow a law exactly only rounding is left."""

_LEAST_SHARE = 0.5625


class NestedStack(NamedTuple):
    """Stacks: the first of all references, the others each without one setting."""

    names: list[str]
    num_settings: Tensor
    """``(stacks,)``."""
    weights: Tensor
    """``(predictors, stacks)``, which sum to one."""
    values: Tensor
    """``(stacks, n + 1)`` of ln tokens."""
    variances: Tensor
    """``(stacks,)`` of a new run inside the references."""
    residuals: Tensor
    """``(stacks, n)`` of the runs in a stack, each with its setting left out."""
    spread: Tensor
    """``(stacks, n + 1)`` variances that the Gaussian process leaves open, as far as it weighs."""
    features: Tensor
    """``(n + 1, d)`` what the predictors go by."""
    settings: Tensor
    """``(n,)``."""
    has_spectra: bool
    """Whether spectral numbers are among the features."""

    def forecasts(self, level: float) -> tuple[Tensor, Tensor, list[float]]:
        """Of the run to forecast from all references, and of each reference from those of other settings.

        Args:
            level: Share of new runs within the intervals.

        Returns:
            ``(n + 1,)`` ln tokens, the run first, and half the widths of their intervals, both NaN too far beyond the
            references; and how far each lies beyond, in shares of their range.
        """
        runs = [(0, len(self.settings)), *((int(s) + 1, run) for run, s in enumerate(self.settings))]
        values, reaches, beyond = [], [], []
        for stack, run in runs:
            far, unseen = self._beyond(stack, run)
            degrees = float(self.num_settings[stack]) - 1
            is_number = far <= FARTHEST and degrees >= MIN_SETTINGS - 1
            values.append(float(self.values[stack, run]) if is_number else math.nan)
            variance = float(self.variances[stack]) + unseen
            reaches.append(float(stdtrit(degrees, (1 + level) / 2)) * math.sqrt(variance) if is_number else math.nan)
            beyond.append(far)
        return torch.tensor(values).double(), torch.tensor(reaches).double(), beyond

    def _beyond(self, stack: int, run: int) -> tuple[float, float]:
        """How far a run lies beyond the references of a stack, and the variance that curvature there may add."""
        rest = self.settings != stack - 1
        settings, residuals = self.settings[rest], self.residuals[stack][rest]
        farthest, unseen = 0.0, 0.0
        for column in self.features.mT:
            x, at = column[:-1][rest], float(column[run])
            line = fit_line(x, residuals, settings)
            if line is None:
                far = 0.0 if math.isclose(at, float(x[0]), rel_tol=1e-9, abs_tol=1e-9) else math.inf
            else:
                far = line.beyond(at)
                unseen += float(line.unseen(at))
            farthest = max(farthest, far)
        if farthest > 0:
            inside = setting_means(self.spread[stack][:-1][rest], settings).mean()
            unseen += max(0.0, float(self.spread[stack, run] - inside))
        return farthest, unseen


def fit_stack(known: Known, with_spectra: bool) -> NestedStack:
    """Fit all there is to be fitted.

    Args:
        known: References of three settings or more.
        with_spectra: Whether predictors that go by the loss also go by all spectral numbers.

    Returns:
        The stacks.
    """
    y, of_run = known.y, known.settings
    num_runs, num = len(y), int(of_run.max()) + 1
    own = 1 / of_run.bincount()[of_run].double()
    present = torch.ones(num + 1, num_runs, dtype=torch.float64)
    present[1:] = (torch.arange(num)[:, None] != of_run).double()
    # Of each stack (those present) the weights with nothing left out, and with each setting left out.
    weights = torch.nn.functional.pad(own * present[:, None] * present, (0, 1))
    num_settings = torch.tensor([num] + [num - 1] * num)
    added = known.spectral if with_spectra else None
    fitted = [_values(name, weights, torch.cat([y, y.new_zeros(1)]), known, added) for name in known.names]
    values = torch.stack([each for each, _ in fitted])
    takes_part = torch.stack([num_settings >= PREDICTORS[name] for name in known.names])
    left_out = values[:, :, of_run + 1, torch.arange(num_runs)]
    residuals = y - left_out
    shares = own * present / num_settings[:, None]
    errors = (shares * residuals.square()).sum(-1).clamp(min=_SMALLEST)
    errors = torch.where(takes_part, errors, math.inf)
    likelihoods = -num_settings / 2 * (errors / errors.amin(0)).log()
    of_predictors = likelihoods.softmax(0)
    combined = (of_predictors[..., None] * residuals).sum(0)
    together = (of_predictors[..., None] * values[:, :, 0]).sum(0)
    variances = (shares * combined.square()).sum(-1) * _of_all(num_settings)
    spread = sum(
        (of_predictors[index, :, None] * each for index, (_, each) in enumerate(fitted) if each is not None),
        y.new_zeros(num + 1, num_runs + 1),
    )
    names = {need for name in known.names for need in NEEDS[name] if need in ("log_gap", "log_batch")}
    columns = [known.columns[name][:, None] for name in sorted(names)] + ([] if added is None else [added])
    features = torch.cat([y.new_zeros(num_runs + 1, 0), *columns], 1)
    return NestedStack(
        known.names, num_settings, of_predictors, together, variances, combined, spread, features, of_run, with_spectra
    )


def _of_all(num_settings: Tensor) -> Tensor:
    """The squared error of a stack in shares of what it shows with a setting left out."""
    # Fitted to one setting more it errs by less: a line through m normal points has an error of (m + 1)(m - 2) /
    # (m (m - 3)) at a new one, here for m = n over m = n - 1, and no less than slopes with a ridge showed for four and
    # three. Weighing costs it one degree of freedom.
    n = num_settings.double()
    share = (n + 1) * (n - 1) * (n - 2) * (n - 4) / (n * (n - 3)).square()
    return torch.where(n > 4, share, 0.0).clamp(min=_LEAST_SHARE) * n / (n - 1)


def _values(name: str, weights: Tensor, y: Tensor, known: Known, added: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``(stacks, folds, n + 1)`` of one predictor."""
    if name == "mean":
        return mean(weights, y), None
    if name == "loss curve":
        return offset(weights, y, known.columns["log_curve"]), None
    if name == "batch law":
        return batch_law(weights, y, known.columns["log_batch"]), None
    features = [known.columns["log_gap"][:, None]] + ([] if added is None else [added])
    if name == "batch law and loss":
        return batch_law(weights, y, known.columns["log_batch"], torch.cat(features, 1)), None
    if name == "loss":
        return ridge(weights, y, torch.cat(features, 1)), None
    batch = known.columns["log_batch"]
    features = [batch[:, None], *features]
    if name == "Gaussian process":
        return gaussian_process(weights, torch.cat(features, 1), y)
    # About the mean of a stack, so that the square is none of the line's.
    whole = weights[:, 0]
    middle = batch - (whole @ batch / whole.sum(-1))[:, None]
    plane = torch.cat(features, 1).expand(len(whole), -1, -1)
    return ridge(weights, y, torch.cat([plane, middle.square()[..., None]], -1)[:, None]), None
