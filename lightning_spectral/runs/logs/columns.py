"""Which column of a log is what: by stated rules, or as the user says; never by a guess that nobody sees."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from itertools import permutations
from math import inf, isfinite, nan, prod
from typing import Any

import numpy as np

from lightning_spectral.functional.arguments import describe, is_finite_number, is_one_line
from lightning_spectral.runs.history import History
from lightning_spectral.runs.logs.csv_logger import number_of
from lightning_spectral.runs.logs.log import Column, Log
from lightning_spectral.runs.loss_names import is_usual_of_training, loss_of_training, loss_of_validation
from lightning_spectral.runs.record_checks import MAX_SECONDS, MAX_STEP
from lightning_spectral.runs.swept import OF_A_SEED, OF_THE_RUN

TOKENS = ("tokens", "train/tokens", "train_tokens", "tokens_seen", "total_tokens")
"""Names of a column of the training tokens so far."""
BATCH_TOKENS = "batch_tokens"
"""The hyperparameter that is the tokens of a step."""
MAX_TOKENS = 1e30
NO_FAMILY = "logs without a family"
"""Of all logs of which nobody said one."""


@dataclass(frozen=True)
class Columns:
    """What a user says of logs; None leaves it to the rules.

    Args:
        loss: Name of the column of the loss: of training if the name says so, of validation otherwise.
        step: That of the optimizer steps that were done.
        tokens: That of the training tokens so far, over all ranks.
        seconds: That of the seconds of training so far.
        batch_tokens: Tokens of an optimizer step over all ranks, where there is no column of tokens: a number, or a
            product of numbers and hyperparameters, such as ``"batch_size*256"``.
        family: Name of the family of runs.

    Raises:
        ValueError: For what can be no name, or no number of tokens.
    """

    loss: str | None = None
    step: str | None = None
    tokens: str | None = None
    seconds: str | None = None
    batch_tokens: float | str | None = None
    family: str | None = None

    def __post_init__(self) -> None:
        for name, value in self.given().items():
            if name != BATCH_TOKENS and not (is_one_line(value) and value):
                raise ValueError(f"{name} must be a name of one line, or None, got {describe(value)}")
        batch: Any = self.batch_tokens
        is_product = is_one_line(batch) and batch
        if not (batch is None or is_product or (is_finite_number(batch) and batch > 0)):
            raise ValueError(
                f"batch_tokens must be a positive number, or a product such as 'batch_size*256', got {describe(batch)}"
            )
        if self.tokens is not None and batch is not None:
            raise ValueError(
                f"batch_tokens must be left out where tokens is given, got {describe(batch)} beside {self.tokens!r}"
            )

    def given(self) -> dict[str, Any]:
        """Those that are said."""
        # Not by asdict, which copies, and not everything that can be given can be copied.
        every = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in every.items() if value is not None}


class _Reading:
    """One log, as the rules and the user have it; ValueError for what is not there."""

    def __init__(self, log: Log, told: Columns) -> None:
        self.log, self.told = log, told
        self.words: dict[str, str] = {}
        """What was taken for what."""
        self._numbers = {name: column for name, column in log.columns.items() if len(column.rows)}
        first = next((name for name in log.steps if name in self._numbers), None)
        if told.step is None and first is None:
            raise ValueError(f"step must be named, for it has none of {', '.join(log.steps)}{self._there()}")
        self._steps = self._named("step", told.step or str(first))
        # Lightning counts batches from 0, and logs the number of the last one; its column of epochs tells its logs.
        epochs = self._numbers.get("epoch")
        is_of_lightning = epochs is not None and bool((epochs.values % 1 == 0).all())
        self._first = int(told.step is None and is_of_lightning and first != "_step")
        self.words["step"] = f"{told.step or first}{' + 1 (Lightning counts from 0)' if self._first else ''}"

    def history(self) -> History:
        """Entries wherever there is a loss."""
        usual = {"val_loss": loss_of_validation(self.log.columns), "train_loss": loss_of_training(self.log.columns)}
        names = {kind: name for kind, name in usual.items() if name is not None}
        if self.told.loss is not None:
            kind = "train_loss" if is_usual_of_training(self.told.loss) else "val_loss"
            names = {kind: self.told.loss}
        for name, other in permutations(names.values(), 2):
            self._check_is_by_step(name, other)
        found = {kind: self._by_step(_with_lost(self._named("loss", name))) for kind, name in names.items()}
        found = {kind: series for kind, series in found.items() if len(series[0])}
        if not found:
            raise ValueError(f"loss must be named, for it has no column that is called one usually{self._there()}")
        self.loss = next(iter(found))
        self._rows = np.concatenate([_with_lost(self.log.columns[name]).rows for name in names.values()])
        self.words["loss"] = names[self.loss]
        steps = np.unique(np.concatenate([series[0] for series in found.values()]))
        columns = [steps, self._tokens(steps), self._seconds(steps)]
        for kind in ("train_loss", "val_loss"):
            column = np.full(len(steps), nan)
            if kind in found:
                column[np.searchsorted(steps, found[kind][0])] = found[kind][1]
            columns.append(column)
        return History(*columns)

    def _check_is_by_step(self, name: str, other: str) -> None:
        """Refuse a loss whose steps are others than those of the other, such as epochs; ValueError.

        That is seen where training had passed its next step, too, when it was logged, and went on from there.
        """
        (rows, steps), (other_rows, other_steps) = map(self._rows_and_steps, (name, other))
        if len(other_rows) < 2:
            return
        last = np.searchsorted(other_rows, rows[:-1]) - 1
        between = np.flatnonzero((last >= 0) & (last < len(other_rows) - 1))
        last, at, following = last[between], steps[between], steps[between + 1]
        goes_on = (other_steps[last + 1] >= other_steps[last]) & (following > at)
        behind = np.flatnonzero(goes_on & (following <= other_steps[last]))
        if len(behind) > max(1, len(between) / 2):
            where = behind[0]
            raise ValueError(
                f"loss must be named, for {name!r} and {other!r} count different steps, epochs perhaps: the one at "
                f"{at[where]:.0f} came after the other at {other_steps[last[where]]:.0f}"
            )

    def _rows_and_steps(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        rows, _, theirs = np.intersect1d(
            self.log.columns[name].rows, self._steps.rows, assume_unique=True, return_indices=True
        )
        return rows, self._steps.values[theirs]

    def _tokens(self, steps: np.ndarray) -> np.ndarray:
        name = self.told.tokens or next((name for name in TOKENS if name in self._numbers), None)
        self.batch_tokens = nan
        if self.told.batch_tokens is None and name is not None:
            at, tokens = self._by_step(self._named("tokens", name))
            self._check_amounts("tokens", name, tokens)
            if len(tokens) < 2 or not (np.diff(tokens) > 0).all():
                raise ValueError(
                    f"tokens must be those of all training so far, got {name!r}, which does not grow with every step: "
                    "name another, or give batch_tokens"
                )
            self.batch_tokens = float((tokens[-1] - tokens[0]) / (at[-1] - at[0]))
            self.words["tokens"] = f"{name} ({self.batch_tokens:,.6g} a step)"
            if at[0] > 0:  # before the first step there were none
                at, tokens = np.append(0.0, at), np.append(0.0, tokens)
            return np.interp(steps, at, tokens, left=nan, right=nan)
        told = self.told.batch_tokens
        if told is None and BATCH_TOKENS in self.log.hyperparameters:
            told = BATCH_TOKENS
        if told is not None:
            self.batch_tokens = self._product(told)
            said = f"{told} = " if number_of(told) != self.batch_tokens else ""
            self.words["tokens"] = f"{said}{self.batch_tokens:,.6g} a step"
        return steps * self.batch_tokens

    def _product(self, told: float | str) -> float:
        factors = []
        for part in str(told).split("*"):
            word = part.strip()
            value: Any = self.log.hyperparameters.get(word)
            if value is None:
                try:
                    value = float(word)
                except ValueError:
                    known = _some([name for name, one in self.log.hyperparameters.items() if is_finite_number(one)])
                    raise ValueError(
                        f"batch_tokens must be a product of numbers and hyperparameters, got {describe(word)}: it has "
                        f"{known or 'none'}"
                    ) from None
            if not is_finite_number(value) or value <= 0:
                raise ValueError(f"batch_tokens must be of positive factors, got {describe(word)} = {describe(value)}")
            factors.append(float(value))
        if not isfinite(product := prod(factors)):
            raise ValueError(f"batch_tokens must be finite, got {describe(told)}")
        return product

    def _seconds(self, steps: np.ndarray) -> np.ndarray:
        name = self.told.seconds or self.log.clock
        if not name:
            return np.full(len(steps), nan)
        column = self._named("seconds", name)
        if not self.told.seconds:
            # Every row has a time on the wall, also those of metrics that are logged by some other step.
            of_loss = np.isin(column.rows, self._rows)
            column = column._replace(rows=column.rows[of_loss], values=column.values[of_loss])
        at, seconds = self._by_step(column)
        self._check_amounts("seconds", name, seconds)
        paused = f", {self.log.pauses} pause{'s' * (self.log.pauses > 1)} left out" * bool(self.log.pauses)
        by_clock = "" if self.told.seconds else f" (the clock on the wall{paused})"
        if (np.diff(seconds) < 0).any():
            why = f"{describe(name)}, which begins anew, as in a run that was resumed"
            if self.told.seconds:
                raise ValueError(f"seconds must be those of all training so far, got {why}: leave them out")
            self.words["seconds"] = f"left out: {why}"
            return np.full(len(steps), nan)
        self.words["seconds"] = f"{name}{by_clock}"
        return np.interp(steps, at, seconds, left=nan, right=nan) if len(at) else np.full(len(steps), nan)

    def _named(self, what: str, name: str) -> Column:
        if name not in self.log.columns:
            raise ValueError(f"{what} must be one of its columns of numbers, got {describe(name)}{self._there()}")
        return self.log.columns[name]

    def _there(self) -> str:
        return f": it has {_some(list(self._numbers)) or 'no numbers'}"

    def _by_step(self, column: Column) -> tuple[np.ndarray, np.ndarray]:
        """Steps, ascending, and what the column holds there, of rows that have both.

        Where steps go back, as in a run that was resumed, what was logged later counts.
        """
        _, mine, theirs = np.intersect1d(column.rows, self._steps.rows, assume_unique=True, return_indices=True)
        steps, values = self._steps.values[theirs], column.values[mine]
        if not ((steps >= 0) & (steps <= MAX_STEP) & (steps % 1 == 0)).all():
            raise ValueError(f"step must be whole and from 0 to {MAX_STEP:,}, got {_odd(steps):.6g} in a row")
        later = np.minimum.accumulate(np.append(steps[1:], np.inf)[::-1])[::-1]
        keep = steps < later
        return steps[keep] + self._first, values[keep]

    def _check_amounts(self, what: str, name: str, values: np.ndarray) -> None:
        most = MAX_SECONDS if what == "seconds" else MAX_TOKENS
        wrong = values[~((values >= 0) & (values <= most))]
        if len(wrong):
            raise ValueError(f"{what} must be from 0 to {most:.0e}, got {wrong[0]:.6g} in {describe(name)}")


def _with_lost(column: Column) -> Column:
    """A column of losses, infinite where one was no number."""
    rows = np.concatenate([column.rows, column.lost])
    values = np.concatenate([column.values, np.full(len(column.lost), inf)])
    order = np.argsort(rows)
    return column._replace(rows=rows[order], values=values[order])


def read_columns(log: Log, told: Columns) -> tuple[History, dict[str, Any], dict[str, str]]:
    """The history in a log, what it says of its run, as records have it, and in words what was taken for what.

    ValueError, in words about "it", where the rules find no step or no loss, or what the user says is not there.
    """
    reading = _Reading(log, told)
    history = reading.history()
    about: dict[str, Any] = {"series": {}, "family": told.family or NO_FAMILY}
    about["val_loss"] = reading.words["loss"] if reading.loss == "val_loss" else None
    if isfinite(reading.batch_tokens):
        about["batch_tokens"] = reading.batch_tokens
    if log.hyperparameters:
        about["setting"] = {"hyperparameters": _swept(log.hyperparameters)}
    if log.started is not None and 0 <= log.started < 1e11:
        about["started"] = datetime.fromtimestamp(log.started, timezone.utc).isoformat(timespec="milliseconds")
    if log.machine:
        about["machines"] = [log.machine]
    missing = {"tokens": "not known", "seconds": "not known"}
    return (
        history,
        about,
        {"tool": log.tool}
        | {name: reading.words.get(name, missing.get(name, "")) for name in ("loss", "step", "tokens", "seconds")},
    )


def _swept(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    last = {name: name.rpartition(".")[2].rpartition("/")[2] for name in hyperparameters}
    return {
        name: value
        for name, value in hyperparameters.items()
        if OF_THE_RUN.search(last[name]) and not OF_A_SEED.search(last[name])
    }


def _odd(steps: np.ndarray) -> float:
    return float(steps[~((steps >= 0) & (steps <= MAX_STEP) & (steps % 1 == 0))][0])


def _some(names: Sequence[str]) -> str:
    shown = [name if len(name) <= 40 else f"{name[:36]} ..." for name in names[:12]]
    return ", ".join(shown) + (", ..." if len(names) > 12 else "")
