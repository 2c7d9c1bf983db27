"""What runs showed early, as a forecast is given it, and which of it predictors can go by."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_spectral.functional.arguments import check_real, describe
from lightning_spectral.functional.forecast import MIN_REFERENCES, check_positive
from lightning_spectral.functional.rank_correlation import check_pair

PREDICTORS = {
    "mean": 0,
    "loss": 0,
    "batch law": 0,
    "loss curve": 0,
    "batch law and loss": 6,
    "Gaussian process": 8,
    "quadratic": 10,
}
"""What a stack is made of, each with the fewest settings from which on it takes part."""

NEEDS: dict[str, tuple[str, ...]] = {
    "mean": (),
    "loss": ("log_gap",),
    "batch law": ("log_batch",),
    "loss curve": ("log_curve",),
    "batch law and loss": ("log_gap", "log_batch"),
    "Gaussian process": ("log_gap", "log_batch"),
    "quadratic": ("log_gap", "log_batch"),
}
"""Which numbers of a run each asks for."""


class Early(NamedTuple):
    """What runs showed at one number of training tokens; NaN for what is not known."""

    log_gap: Tensor
    """``(n,)`` ln(loss - target)."""
    log_batch: Tensor
    """``(n,)`` ln of the tokens in a batch."""
    log_curve: Tensor | None = None
    """``(n,)`` ln of the tokens to the target by a run's own loss curve (:func:`anchored_power_law`)."""
    spectral: Tensor | None = None
    """``(n, k)`` numbers of spectra, one a column."""


class Known(NamedTuple):
    """References without gaps, and the run to forecast as one more that weighs nothing."""

    columns: dict[str, Tensor]
    """``(n + 1,)`` by name: of the references, then of the run to forecast."""
    spectral: Tensor | None
    """``(n + 1, k)``."""
    y: Tensor
    """``(n,)`` ln tokens."""
    settings: Tensor
    """``(n,)`` from zero on, without gaps."""
    kept: Tensor
    """Which of the references that were given these are."""
    names: list[str]
    """Of the predictors that have what they need."""


def known_of(
    references: Early, tokens: Tensor, query: Early | None, settings: Tensor | None, predictors: tuple[str, ...]
) -> Known:
    """What there is to go by.

    Args:
        references: What the references showed.
        tokens: ``(n,)`` they took to the target.
        query: What the run to forecast showed; None for none.
        settings: ``(n,)``; None where each run is one.
        predictors: Which are wanted.

    Returns:
        The references that have all that the predictors which are left ask for.

    Raises:
        ValueError: As :func:`lightning_spectral.functional.stack`.
    """
    unknown = [name for name in predictors if name not in PREDICTORS]
    if unknown or not predictors:
        raise ValueError(f"predictors must be among {', '.join(PREDICTORS)}, got {', '.join(unknown) or 'none'}")
    vectors = {"tokens": tokens, "log_gap": references.log_gap, "log_batch": references.log_batch}
    vectors |= {} if references.log_curve is None else {"log_curve": references.log_curve}
    check_pair(**vectors if settings is None else vectors | {"settings": settings})
    check_positive(tokens)
    settings = torch.arange(len(tokens)) if settings is None else settings.detach().cpu()
    y = tokens.detach().to("cpu", torch.float64).log()
    columns = {
        name: _column(name, getattr(references, name), None if query is None else getattr(query, name), len(y))
        for name in ("log_gap", "log_batch", "log_curve")
    }
    has = {name: bool(column[-1].isfinite()) for name, column in columns.items()}
    for name in ("log_gap", "log_batch"):
        has[name] &= int((columns[name][:-1].isfinite() & y.isfinite()).sum()) >= MIN_REFERENCES
    names = [name for name in predictors if all(has[need] for need in NEEDS[name])]
    kept = y.isfinite()
    for name in ("log_gap", "log_batch"):
        if any(name in NEEDS[predictor] for predictor in names):
            kept &= columns[name][:-1].isfinite()
    rows = torch.cat([kept, torch.ones(1, dtype=torch.bool)])
    columns = {name: column[rows] for name, column in columns.items()}
    if not bool(columns["log_curve"].isfinite().all()):
        names = [name for name in names if "log_curve" not in NEEDS[name]]
    if names == ["mean"] and list(predictors) != ["mean"]:
        names = []
    spectral = _spectral(references, query, len(y))[rows]
    spectral = spectral[:, spectral.isfinite().all(0)]
    is_used = spectral.shape[1] > 0 and any("log_gap" in NEEDS[name] for name in names)
    of_run = settings[kept].unique(return_inverse=True)[1]
    return Known(columns, spectral if is_used else None, y[kept], of_run, kept, names)


def _column(name: str, values: Tensor | None, own: Tensor | None, num: int) -> Tensor:
    """``(n + 1,)``, NaN for what is not there; a mean takes the place of a run to forecast where there is none."""
    column = torch.full((num + 1,), math.nan, dtype=torch.float64)
    if values is not None:
        column[:-1] = values.detach().to("cpu", torch.float64)
        column[-1] = column[:-1][column[:-1].isfinite()].mean()
    if own is not None:
        check_real(**{name: own})
        if own.numel() != 1:
            raise ValueError(f"{name} of the query must be a vector of one, got {describe(own)}: give one run")
        column[-1] = own.detach().to("cpu", torch.float64).reshape(())
    return column


def _spectral(references: Early, query: Early | None, num: int) -> Tensor:
    """``(n + 1, k)``, likewise."""
    given, own = references.spectral, None if query is None else query.spectral
    if given is None or (query is not None and own is None):
        return torch.zeros(num + 1, 0, dtype=torch.float64)
    check_real(spectral=given, **({} if own is None else {"spectral of the query": own}))
    if given.ndim != 2 or len(given) != num or (own is not None and tuple(own.shape) != (1, given.shape[1])):
        shapes = f"{tuple(given.shape)} and {None if own is None else tuple(own.shape)}"
        raise ValueError(f"spectral must be of the shapes ({num}, k) and (1, k) for the query, got {shapes}")
    columns = [
        _column("spectral", given[:, index], None if own is None else own[:, index], num)
        for index in range(given.shape[1])
    ]
    return torch.stack(columns, 1) if columns else torch.zeros(num + 1, 0, dtype=torch.float64)
