"""The runs that a forecast rests on: those of one family that reached the target, and why others do not serve."""

from collections.abc import Sequence
from math import isnan, log, nan
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lightning_spectral.functional.powerlaw import Band
from lightning_spectral.runs.run import Run, folders_of_runs

KIND = "activation"


class Reference(NamedTuple):
    """A run that reached the target."""

    run: Run
    tokens_to_target: float


class References(NamedTuple):
    """What was found where references were said to be."""

    usable: list[Reference]
    skipped: dict[str, str]
    """Why others do not serve, by path."""

    @property
    def best(self) -> float:
        """Fewest tokens to the target; NaN without a reference."""
        return min((reference.tokens_to_target for reference in self.usable), default=nan)

    def reasons(self) -> str:
        """The reasons, each with how often it holds.

        Returns:
            A clause; empty where all serve.
        """
        counts: dict[str, int] = {}
        for reason in self.skipped.values():
            counts[reason] = counts.get(reason, 0) + 1
        return "; ".join(f"{count} {reason}" for reason, count in counts.items())


class Wanted(NamedTuple):
    """What a run must have reached and measured to serve as a reference for another."""

    family: str
    target: float
    monitor: str
    """Key of the loss that the target is of."""

    stage: str
    normalize: bool
    num_tokens: int
    layer: str

    def why_not(self, run: Run) -> str | None:
        """Why a run does not serve.

        Args:
            run: The run.

        Returns:
            A clause; None if it does.
        """
        series = f"{KIND}-{self.stage}"
        if not run.steps(series):
            return f"that did not measure activations with stage={self.stage!r}"
        settings = run.settings(series)
        for name in ("normalize", "num_tokens"):
            if settings.get(name) != getattr(self, name):
                return f"measured with {name}={settings.get(name)} and not {getattr(self, name)}"
        if self.layer not in run.names(series):
            return f"that did not measure {self.layer}"
        return None


def find_references(paths: Sequence[str | Path], wanted: Wanted, own_id: str | None = None) -> References:
    """The runs among those at some paths that a forecast can rest on.

    Args:
        paths: Log directories, or glob patterns of them. A pattern that matches nothing is no error: the first run of
            a family has no references.
        wanted: What they must have reached and measured.
        own_id: Of the run that is forecast, which is no reference for itself.

    Returns:
        Those, and why others are not.
    """
    usable: dict[Path, Reference] = {}
    skipped: dict[str, str] = {}
    for pattern in map(str, paths):
        folders = folders_of_runs(pattern)
        if not folders:
            skipped[pattern] = f"pattern that matches no run ({pattern})"
        for folder in folders:
            try:
                run = Run(folder)
                if run.about.get("id") == own_id:
                    continue
                reason, tokens = _judge(run, wanted)
            except ValueError as error:
                skipped[str(folder)] = f"that cannot be read ({error})"
                continue
            if reason is None:
                usable[run.folder.resolve()] = Reference(run, tokens)
            else:
                skipped[str(run.path)] = reason
    return References(list(usable.values()), skipped)


def _judge(run: Run, wanted: Wanted) -> tuple[str | None, float]:
    if run.family != wanted.family:
        return f"of another family ({run.family}, not {wanted.family})", nan
    tokens = _tokens_to_target(run, wanted)
    if isnan(tokens):
        return f"that never came down to {wanted.target:g}", nan
    return wanted.why_not(run), tokens


def _tokens_to_target(run: Run, wanted: Wanted) -> float:
    noted = run.about.get("forecast", {})
    # A forecaster that watched the very same loss knows better than the history, which holds the usual one.
    is_same = noted.get("monitor") == wanted.monitor and noted.get("target_loss") == wanted.target
    actual = noted.get("actual") if is_same else None
    return run.tokens_to(wanted.target) if actual is None else float(actual)


def alpha_at(run: Run, series: str, layer: str, band: Band, tokens: float) -> float:
    """The exponent of a layer's tail at a number of training tokens.

    Args:
        run: The run.
        series: Of activations.
        layer: The layer.
        band: Of ranks.
        tokens: How many.

    Returns:
        Interpolated between the reports on both sides, by log tokens; NaN where there are none.
    """
    return run.spectrum_at(series, layer, tokens).exponent(band)[0]


def loss_at(run: Run, tokens: float) -> float:
    """The loss at a number of training tokens.

    Args:
        run: The run.
        tokens: How many.

    Returns:
        Interpolated between the entries on both sides, by log tokens; NaN where there are none.
    """
    entries, losses = run.history.with_loss()
    at = run.history.tokens[entries]
    inside = len(at) and at[0] * (1 - 1e-12) <= tokens <= at[-1] * (1 + 1e-12)
    return float(np.interp(log(tokens), np.log(at), losses)) if inside else nan
