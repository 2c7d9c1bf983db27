"""Single numbers that runs show early, of their spectra, their loss and their batch, and when each is known."""

from collections.abc import Callable, Sequence
from math import nan
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_spectral.functional.powerlaw import Band
from lightning_spectral.runs.logarithms import log_of
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


def curve_until(run: Run, tokens: float) -> tuple[Tensor, Tensor]:
    """Tokens and losses of a run up to a number of tokens, those of before the first token left out."""
    entries, losses = run.history.with_loss()
    at = run.history.tokens[entries]
    seen = (at <= tokens * (1 + 1e-12)) & (at > 0)
    return torch.from_numpy(at[seen]), torch.from_numpy(losses[seen])


def _reported(run: Run, tokens: float) -> list[float]:
    return run.course(KIND).tokens_until(tokens)


def log_batch(run: Run) -> float:
    """Logarithm of the tokens in a batch; NaN where a record does not say."""
    return log_of(float(run.about.get("batch_tokens") or nan))
