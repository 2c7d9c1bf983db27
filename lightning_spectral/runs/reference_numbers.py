"""What runs showed at any number of tokens: loss, batch and loss curve, tail, head, RankMe and noise scale."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isnan, nan
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_spectral.functional.early import Early
from lightning_spectral.functional.powerlaw import Band
from lightning_spectral.runs.course import Course
from lightning_spectral.runs.early_numbers import log_batch
from lightning_spectral.runs.logarithms import log_of, vector
from lightning_spectral.runs.loss_curve import LossCurve
from lightning_spectral.runs.noise_course import NoiseCourse
from lightning_spectral.runs.references import Reference, loss_at

_MOST_REPORTS = 64
"""That are read to find where a tail is steepest, evenly among all."""

NOISE_SCALE = "noise_scale"
OF_ACTIVATIONS = ("alpha_tail", "alpha_head", "rankme")
SPECTRAL = (*OF_ACTIVATIONS, NOISE_SCALE)
"""Numbers of spectra that forecasts may go by, RankMe and the noise scale by their logarithms."""


class Look(NamedTuple):
    """At what of spectra is looked."""

    layer: str
    tail: Band
    head: Band


class ReferenceNumbers:
    """Reads each report of each run once, as far as it is asked.

    Args:
        references: Runs that reached the target.
        look: Whose spectra are read, and by which bands; None where none have any.
        target: The loss.
        warn: Told of what cannot be read, and whether only this rank knows; None to have it raised as a ValueError.
        keep: How many reports' spectra stay in memory; None for all, which others who ask the runs then share.
    """

    def __init__(
        self,
        references: Sequence[Reference],
        look: Look | None,
        target: float,
        warn: Callable[[str, bool], None] | None = None,
        keep: int | None = None,
    ) -> None:
        self._references, self._look, self._target, self._warn = references, look, target, warn
        self._keep = keep
        self._courses: dict[int, Course] = {}
        self._noise: dict[int, NoiseCourse] = {}
        self._curves: dict[int, tuple[int, LossCurve]] = {}
        self._peaks: dict[int, float] = {}
        self.tokens = vector([reference.tokens_to_target for reference in references])
        """``(n,)`` each took to the target."""
        self.log_batch = vector([log_batch(reference.run) for reference in references])
        """``(n,)`` ln of the tokens in a batch."""

    def __len__(self) -> int:
        return len(self._references)

    def early(self, tokens: float, spectral: Mapping[str, float]) -> Early:
        """What all showed, as :func:`lightning_spectral.functional.stack` is given it.

        Args:
            tokens: At which losses are taken, and up to which loss curves.
            spectral: Tokens at which numbers of spectra are taken, by name; those that are not there are left out.
        """
        columns = [self.spectral(name, spectral[name]) for name in SPECTRAL if name in spectral]
        return Early(
            self.log_gap(tokens), self.log_batch, self.log_curve(tokens), torch.stack(columns, 1) if columns else None
        )

    def log_gap(self, tokens: float) -> Tensor:
        """``(n,)`` ln of what the loss lies above the target."""
        return vector([log_of(loss_at(one.run, tokens) - self._target) for one in self._references])

    def log_curve(self, tokens: float) -> Tensor:
        """``(n,)`` ln of tokens to the target by their own loss curves, which end there and not at the entry before."""
        return vector([self._curve(index, tokens).log_tokens_to(self._target) for index in range(len(self))])

    def spectral(self, name: str, tokens: float) -> Tensor:
        """``(n,)`` a number of spectra, between the reports on both sides; NaN where there are none."""
        return vector([self._spectral(index, name, tokens) for index in range(len(self))])

    def latest(self, tokens: float) -> dict[str, float]:
        """Tokens at which all knew numbers of spectra when they had come so far, by name; without what nobody knew."""
        latest: dict[str, float] = {}
        for names, ask in ((OF_ACTIVATIONS, self._reported), ((NOISE_SCALE,), self._noted)):
            reported = [ask(index, tokens) for index in range(len(self))]
            if known := [there for there in reported if not isnan(there)]:
                latest |= dict.fromkeys(names, min(known))
        return latest

    def is_past_peak(self, tokens: float) -> list[bool | None]:
        """Of each, whether its tail has been at its steepest by then; None where that is not known."""
        tails = [self._spectral(index, "alpha_tail", tokens) for index in range(len(self))]
        peaks = [nan if isnan(value) else self._peak(index) for index, value in enumerate(tails)]
        return [None if isnan(peak) else tokens >= peak for peak in peaks]

    def _curve(self, index: int, tokens: float) -> LossCurve:
        run = self._references[index].run
        entries, losses = run.history.with_loss()
        at = run.history.tokens[entries]
        before = int((at < tokens).sum())
        num, curve = self._curves.get(index, (0, LossCurve()))
        if num > before:
            num, curve = 0, LossCurve()
        for step, there, loss in zip(
            run.history.step[entries][num:before], at[num:before], losses[num:before], strict=True
        ):
            curve.add(float(step), float(there), float(loss))
        self._curves[index] = before, curve
        return curve.until(tokens, loss_at(run, tokens))

    def _spectral(self, index: int, name: str, tokens: float) -> float:
        look = self._look
        if name == NOISE_SCALE:
            return self._read_noise(index, lambda course: course.log_noise_scale(tokens))
        if look is None:
            return nan
        if name == "rankme":
            return log_of(self._read(index, lambda course: course.rankme(look.layer, tokens)))
        return self._exponent(index, look.layer, look.tail if name == "alpha_tail" else look.head, tokens)

    def _exponent(self, index: int, layer: str, band: Band, tokens: float) -> float:
        def read(course: Course) -> float:
            exponent = course.exponent(layer, band, tokens)
            if isnan(exponent) and self._warn and (why := course.why_unknown(layer, band, tokens)) is not None:
                path = self._references[index].run.path
                self._warn(f"goes without {path} at {tokens:,.0f} tokens, because at {why}", False)
            return exponent

        return self._read(index, read)

    def _reported(self, index: int, tokens: float) -> float:
        return self._read(index, lambda course: max(course.tokens_until(tokens), default=nan))

    def _noted(self, index: int, tokens: float) -> float:
        return self._read_noise(index, lambda course: course.latest(tokens))

    def _read(self, index: int, read: Callable[[Course], float]) -> float:
        reference = self._references[index]
        if not reference.series:
            return nan
        with self._without(reference):
            if index not in self._courses:
                self._courses[index] = self._open(reference)
            return read(self._courses[index])
        return nan

    def _read_noise(self, index: int, read: Callable[[NoiseCourse], float]) -> float:
        reference = self._references[index]
        if not reference.gradients:
            return nan
        with self._without(reference):
            if index not in self._noise:
                self._noise[index] = NoiseCourse(reference.run, reference.gradients)
            return read(self._noise[index])
        return nan

    @contextmanager
    def _without(self, reference: Reference) -> Iterator[None]:
        """Go on without what cannot be read, and say so."""
        try:
            yield
        except ValueError as error:
            if self._warn is None:
                raise
            self._warn(f"goes without {reference.run.path}: {error}", True)

    def _open(self, reference: Reference) -> Course:
        if self._keep is None:
            return reference.run.course(reference.series)
        # Training moves on, and what lies behind is not asked for again.
        return Course(reference.run, reference.series, self._keep)

    def _peak(self, index: int) -> float:
        """Tokens at which a tail is steepest."""
        if index not in self._peaks:
            self._peaks[index] = self._read(index, lambda _: _steepest(self._references[index], self._look))
        return self._peaks[index]


def _steepest(reference: Reference, look: Look | None) -> float:
    run, series = reference.run, reference.series
    steps = run.steps(series)
    steps = steps[:: -(-len(steps) // _MOST_REPORTS)] if steps else []
    course = Course(run, series, keep=2)
    at = [run.tokens_at(series, step) for step in steps]
    exponents = [(course.exponent(look.layer, look.tail, tokens), tokens) for tokens in at] if look else []
    known = [one for one in exponents if not isnan(one[0])]
    return max(known)[1] if known else nan
