"""From what a run shows and what its references showed to the values that are logged under ``forecast/``."""

import math
from collections.abc import Callable
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_spectral.callbacks.host import Host
from lightning_spectral.functional.forecast import MIN_REFERENCES, NO_SKILL
from lightning_spectral.functional.stacking import StackedForecast
from lightning_spectral.runs import predicting
from lightning_spectral.runs.predicting import Shown, from_now_on, predict
from lightning_spectral.runs.reference_numbers import Look, ReferenceNumbers
from lightning_spectral.runs.references import References, Wanted, find_references
from lightning_spectral.runs.settings import settings_of
from lightning_spectral.runs.tables import from_log
from lightning_spectral.runs.validation_data import ValidationData


class Forecaster:
    """Sets what a run shows against its references, and warns of what a forecast is not to be trusted for.

    Args:
        references: Of the run.
        look: At what of spectra is looked.
        target: The loss.
        predictor: What to go by.
        warn: Told of what to know before a forecast is believed, and whether only this rank knows.
        awaits_data: Whether a validation run is to come that tells which of them are of other data than the run: until
            :meth:`take_data` there are no forecasts.
    """

    def __init__(
        self,
        references: References,
        look: Look | None,
        target: float,
        predictor: str,
        warn: Callable[[str, bool], None],
        awaits_data: bool = False,
    ) -> None:
        self._look, self._target, self._predictor, self._warn = look, target, predictor, warn
        self._awaits_data = awaits_data and any(reference.data.fingerprints for reference in references.usable)
        self._use(references)
        self.low, self.p_value = math.nan, math.nan
        """Of the last forecast: the least that the run is to take, relative to the best reference, and how likely
        references that do not forecast each other do so well."""

    def _use(self, references: References) -> None:
        self.references = references
        self._settings = settings_of([reference.run for reference in references.usable])
        self._numbers = ReferenceNumbers(references.usable, self._look, self._target, self._warn, keep=2)

    @classmethod
    def find(
        cls,
        host: Host,
        asked: Any,
        wanted: Wanted,
        look: Look,
        predictor: str,
        warn: Callable[[str, bool], None],
    ) -> "Forecaster":
        """With the references that were asked for, the same on all ranks; says what it found."""
        found = References([], {})
        if host.is_global_zero:
            found = find_references(asked, wanted, host.session.recorder.run_id)
        # Ranks that look by themselves, while other runs come to their end, might find different ones.
        found = host.broadcast(found)
        num, num_without = len(found.usable), sum(not reference.series for reference in found.usable)
        for log in (reference.run for reference in found.usable if reference.run.columns):
            rank_zero_info(
                f"TailForecaster takes {from_log(log)}, as a run of {wanted.family}, for it was given as one"
            )
        if num < MIN_REFERENCES:
            reasons = found.reasons()
            warn(
                f"makes no forecast: it needs {MIN_REFERENCES} reference runs and has {num}"
                f"{f', besides {reasons}' if reasons else ''}. Train runs of this family to a loss of "
                f"{wanted.target:g}, with this callback or an ActivationSpectrum of the same settings, and give "
                "their log directories as references",
                False,
            )
        elif found.skipped:
            rank_zero_info(f"TailForecaster uses {num} references, and not: {found.reasons()}")
        if num_without and predictor == "stack" and num >= MIN_REFERENCES:
            rank_zero_info(
                f"TailForecaster goes by loss and batch alone: {num_without} references have no such spectra"
            )
        return cls(found, look, wanted.target, predictor, warn, host.has_validation)

    def take_data(self, data: ValidationData | None) -> None:
        """Go on without references that were validated on other data than the run, and warn of them.

        Args:
            data: Of the run, the same on all ranks; None where even after a validation run nobody knows.
        """
        self._awaits_data = False
        if data is None:
            return
        if any(reference.is_near(data) for reference in self.references.usable):
            self._tell(
                "goes by runs that the package carries, validated on the sources of another Python than this run: "
                "losses may differ a little, and forecasts by more; give references= of your own to rely on"
            )
        before, found = self.references.usable, self.references.for_data(data)
        if found.usable == before:
            return
        self._use(found)
        if found.aside:
            left, paths = len(found.usable), [str(reference.run.path) for reference in found.aside]
            what = (
                f"goes by {left} references" if left >= MIN_REFERENCES else f"makes no forecast with {left} references"
            )
            self._tell(
                f"{what}, and without {len(paths)} that were validated on other data than this run ({_first(paths)}): "
                "give references= that were validated on the same samples in the same order"
            )

    def forecast(
        self, shown: Shown, step: int, tokens: float, tokens_per_step: float, is_there: bool
    ) -> dict[str, float]:
        """What the references make of what a run shows.

        Args:
            shown: That.
            step: Optimizer steps so far.
            tokens: Training tokens so far.
            tokens_per_step: Of those that are to come.
            is_there: Whether the run has reached the target; then there is no forecast.

        Returns:
            Values by quantity; those that are not there are not known.
        """
        self.low = self.p_value = math.nan
        if is_there or len(self.references.usable) < MIN_REFERENCES:
            return {"num_references": float(len(self.references.usable))}
        if self._awaits_data:
            self._tell("makes no forecast before a validation run has told whether references are of the same data")
            return {"num_references": float(len(self.references.usable))}
        if self._predictor == "tail" and step < predicting.MIN_STEPS:
            least = predicting.MIN_STEPS
            self._tell(f"makes no forecast by the tail before {least} optimizer steps, which still rises: at {step}")
            return {}
        if self._predictor in ("tail", "stack") and "alpha_tail" in shown.spectral:
            self._warn_of_peaks(shown.spectral["alpha_tail"].tokens)
        found = predict(self._predictor, shown, self._numbers, self._settings)
        values = {"num_references": float(found.num_references), "num_settings": float(found.num_settings)}
        if found.num_references < MIN_REFERENCES:
            is_spectral = self._predictor in ("tail", "head")
            what = "have reports on both sides" if is_spectral else "were measured and still above the target"
            self._tell(f"makes no forecast where fewer than {MIN_REFERENCES} references {what}")
            return values
        left, best = from_now_on(found, shown.tokens), self.references.best
        self._warn_of(found, left.reason, tokens)
        # A run that has taken more than was to be expected is to take no less than that.
        is_beyond = math.isnan(left.value) and not math.isnan(found.value)
        self.low, self.p_value = (shown.tokens if is_beyond else left.low) / best, found.p_value
        return values | {
            "tokens_to_target": left.value,
            "low": left.low,
            "high": left.high,
            "relative": left.value / best,
            "steps": step + (left.value - tokens) / tokens_per_step if tokens_per_step > 0 else math.nan,
            "extrapolated": math.nan if math.isnan(left.value) else float(found.extrapolated),
            "skill": found.skill,
            "median_error": found.median_error,
            "spectral_gain": found.spectral_gain,
            "spectral_gain_low": found.spectral_gain_low,
            "spectral_gain_high": found.spectral_gain_high,
        }

    def _tell(self, message: str) -> None:
        self._warn(message, False)

    def _warn_of_peaks(self, tokens: float) -> None:
        """Name the references whose tails still rise where those of others fall."""
        is_past = self._numbers.is_past_peak(tokens)
        paths = [str(reference.run.path) for reference in self.references.usable]
        rising = [path for path, past in zip(paths, is_past, strict=True) if past is False]
        if rising and any(is_past):
            self._tell(
                f"at {tokens:,.0f} tokens goes by tails on both sides of their own peaks, where the sign of tail "
                f"against tokens changes: those of {len(rising)} references still rise ({_first(rising)})"
            )

    def _warn_of(self, found: StackedForecast, reason: str | None, tokens: float) -> None:
        at = f"at {tokens:,.0f} tokens"
        if reason is not None:
            self._tell(f"makes no forecast {at}: {reason}")
        elif found.extrapolated:
            self._tell(f"forecasts beyond its references {at}, where the interval is the wider")
        if math.isnan(found.p_value):
            self._tell(
                f"cannot tell its skill {at}: its references are of {found.num_settings} settings, "
                "or alike in what they show or in their tokens. Train references of other batch sizes or learning rates"
            )
        elif found.p_value > NO_SKILL:
            self._tell(
                f"has no skill {at}: its references forecast each other with a rank "
                f"correlation of {found.skill:.2f} (p = {found.p_value:.2f}), as runs without a relation do"
            )


def _first(paths: list[str]) -> str:
    return ", ".join(paths[:3]) + (", ..." if len(paths) > 3 else "")
