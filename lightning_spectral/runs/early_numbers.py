"""What runs show early: numbers of their spectra, their loss and their batch, and when each is known."""

from collections.abc import Callable, Sequence
from math import log, nan
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_spectral.functional.early import Early
from lightning_spectral.functional.forecast import anchored_power_law
from lightning_spectral.functional.powerlaw import Band
from lightning_spectral.runs.measured import bands_of
from lightning_spectral.runs.references import KIND, alpha_at, loss_at
from lightning_spectral.runs.run import Run


class Measure(NamedTuple):
    """An early number of a run."""

    name: str
    value: Callable[[Run, float], float]
    """At some tokens, between the points at which it is known; NaN where it is not."""
    known_at: Callable[[Run, float], Sequence[float]]
    """Tokens at which it is known, up to a number of them."""
    is_spectral: bool = False

    def latest(self, run: Run, tokens: float) -> float:
        """Tokens at which it was known last of a run that has come so far; NaN where it was not known yet."""
        return max((there for there in self.known_at(run, tokens) if there <= tokens), default=nan)


def tail_of(layer: str, band: Band) -> Measure:
    """The exponent of a layer's tail."""
    return Measure("alpha_tail", lambda run, tokens: alpha_at(run, KIND, layer, band, tokens), _reported, True)


def spectral_measures(layer: str, band: Band) -> list[Measure]:
    """Tail, head and RankMe of a layer."""

    def head(run: Run, tokens: float) -> float:
        return run.course(KIND).exponent(layer, bands_of(run, KIND)["head"], tokens)

    return [
        tail_of(layer, band),
        Measure("alpha_head", head, _reported, True),
        Measure("RankMe", lambda run, tokens: run.course(KIND).rankme(layer, tokens), _reported, True),
    ]


EARLY_LOSS = Measure("early loss", loss_at, lambda run, _: run.history.tokens[run.history.with_loss()[0]].tolist())
LOG_BATCH = Measure("log batch size", lambda run, _: log_batch(run), lambda _, tokens: [tokens])


def early_of(
    runs: Sequence[Run], target: float, tokens: float, spectral: Sequence[Measure] = (), reported: float = nan
) -> Early:
    """What runs showed, as :func:`lightning_spectral.functional.stack` is given it.

    Args:
        runs: Any.
        target: The loss.
        tokens: At which the losses are taken.
        spectral: Measures of spectra that all the runs have; none for none.
        reported: Tokens at which these are taken.
    """
    return Early(
        log_gap=vector([log_of(loss_at(run, tokens) - target) for run in runs]),
        log_batch=vector([log_batch(run) for run in runs]),
        log_curve=vector([log_of(_curve(run, target, tokens)) for run in runs]),
        spectral=torch.stack([vector([one.value(run, reported) for run in runs]) for one in spectral], 1)
        if spectral
        else None,
    )


def curve_until(run: Run, tokens: float) -> tuple[Tensor, Tensor]:
    """Tokens and losses of a run up to a number of tokens, those of before the first token left out."""
    entries, losses = run.history.with_loss()
    at = run.history.tokens[entries]
    seen = (at <= tokens * (1 + 1e-12)) & (at > 0)
    return torch.from_numpy(at[seen]), torch.from_numpy(losses[seen])


def _curve(run: Run, target: float, tokens: float) -> float:
    return anchored_power_law(*curve_until(run, tokens), target)


def _reported(run: Run, tokens: float) -> list[float]:
    return run.course(KIND).tokens_until(tokens)


def log_batch(run: Run) -> float:
    """Logarithm of the tokens in a batch; NaN where a record does not say."""
    return log_of(float(run.about.get("batch_tokens") or nan))


def log_of(value: float) -> float:
    """The logarithm; NaN of what has none."""
    return log(value) if value > 0 else nan


def vector(values: Sequence[float]) -> Tensor:
    """Numbers as a tensor, float64."""
    return torch.as_tensor(np.asarray(values, dtype=np.float64))
