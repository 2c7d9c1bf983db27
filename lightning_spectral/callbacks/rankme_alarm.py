"""Alarms of ActivationSpectrum: layers whose RankMe is below a share of their width, or has fallen by one."""

import math
from collections.abc import Mapping
from typing import Any

from lightning_spectral.advice import Alarmed, Number, are_as_many, floor_of_fall
from lightning_spectral.documentation import page
from lightning_spectral.functional.arguments import describe, is_finite_number
from lightning_spectral.functional.estimate import Spectrum
from lightning_spectral.measurement.arguments import check_positive

ALARM = "activation/alarm"
"""Key of the number of layers in alarm."""


class RankMeAlarm:
    """Looks at each report's RankMe, and remembers those of some reports before.

    Args:
        below: Share of the width, from 0 to 1, below which a layer is in alarm; None for no such alarm.
        fall: Share of what it was by which RankMe must fall, and by more than its floor; None for no such alarm.
        within: Reports within which.

    Raises:
        ValueError: For arguments out of range.
    """

    def __init__(self, below: float | None, fall: float | None, within: int) -> None:
        for name, share in (("alarm_rankme_below", below), ("alarm_rankme_fall", fall)):
            if share is not None and not (is_finite_number(share) and 0 < share < 1):
                raise ValueError(f"{name} must be a share between 0 and 1, or None, got {describe(share)}")
        check_positive(alarm_reports=within)
        self.below = below
        self.fall = fall
        self.within = within
        self._before: dict[str, list[list[float]]] = {}
        self._warned: list[list[str]] = []
        self._now: dict[str, list[str]] = {}
        self._num_watched = 0
        self._step: int | None = None

    @property
    def is_set(self) -> bool:
        """Whether any alarm was asked for."""
        return self.below is not None or self.fall is not None

    def look(self, step: int, spectra: Mapping[str, Spectrum]) -> list[str]:
        """Take in a report; returns what to warn of, once for each layer and cause of a run, over a resume too."""
        causes = {name: self._causes(name, spectrum) for name, spectrum in spectra.items()}
        self._now = {name: list(found.values()) for name, found in causes.items() if found}
        self._num_watched, self._step = len(spectra), step
        messages = []
        for name, found in causes.items():
            for cause, numbers in found.items():
                if [name, cause] not in self._warned:
                    self._warned.append([name, cause])
                    messages.append(f"at step {step}, {name}: {numbers} (see {page('reading-spectra', 'collapse')})")
        return messages

    @property
    def num_layers(self) -> float:
        """Layers in alarm at the latest report; NaN before the first."""
        return math.nan if self._step is None else float(len(self._now))

    def fact(self, prefix: str = "") -> Alarmed | None:
        """What is to be said at the end of a run; None before the first report, or where no alarm was asked for."""
        if self._step is None:
            return None
        layers = tuple((name, "; ".join(numbers)) for name, numbers in self._now.items())
        return Alarmed(prefix=prefix, layers=layers, num_watched=self._num_watched, step=self._step)

    def _causes(self, name: str, spectrum: Spectrum) -> dict[str, str]:
        """Why a layer is in alarm, with the numbers, by cause; nothing of one that could not be measured."""
        if spectrum.failure is not None:
            return {}
        estimate, width = spectrum.rankme(), len(spectrum.values)
        now = Number(*estimate)
        found = {}
        margin = floor_of_fall(now, Number(now.value, 0.0), len(spectrum.leave_one_out))
        # RankMe of n rows is at most n - 1, whatever the layer.
        if self.below is not None and spectrum.count > self.below * width:
            margin = 0.0 if math.isnan(margin) else margin
            if now.value + margin < self.below * width:
                error = f" +/- {now.stderr:.2g}" if math.isfinite(now.stderr) else ""
                found["below"] = (
                    f"RankMe is {now.value:.4g}{error} of {width}, below alarm_rankme_below={self.below:g} of the width"
                )
        if self.fall is not None:
            found |= self._fallen(name, spectrum, now)
        return found

    def _fallen(self, name: str, spectrum: Spectrum, now: Number) -> dict[str, str]:
        width, groups = len(spectrum.values), len(spectrum.leave_one_out)
        known = self._before.get(name, [])
        # Other numbers of rows, or channels, have another RankMe by themselves.
        alike = [one for one in known if one[2] == width and are_as_many(one[3], spectrum.count)]
        self._before[name] = [*known, [now.value, now.stderr, width, spectrum.count]][-self.within :]
        if not alike:
            return {}
        most = max((Number(*one[:2]) for one in alike), key=lambda number: number.value)
        assert self.fall is not None
        floor = floor_of_fall(most, now, groups)
        fallen = most.value - now.value
        # False where the floor is not known.
        if not (fallen > floor and fallen > self.fall * most.value):
            return {}
        return {
            "fall": f"RankMe fell from {most.value:.4g} to {now.value:.4g} of {width} within {self.within} reports, by "
            f"more than alarm_rankme_fall={self.fall:g} of it and than its floor of {floor:.2g}"
        }

    def state(self) -> dict[str, Any]:
        """What a resumed run needs: plain numbers, strings, lists and dictionaries."""
        return {
            "before": dict(self._before),
            "warned": list(self._warned),
            "now": dict(self._now),
            "num_watched": self._num_watched,
            "step": self._step,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state` gave, or begin anew with an empty one."""
        self._before = {name: list(one) for name, one in state.get("before", {}).items()}
        self._warned = list(state.get("warned", []))
        self._now = dict(state.get("now", {}))
        self._num_watched, self._step = state.get("num_watched", 0), state.get("step")
