"""The table of forecasts that closes a run: how they came to the truth."""

import math
from collections.abc import Mapping

from lightning_spectral.terminal import console, new_table

NUM_ROWS = 8
ROOMY = 100
"""Columns of a terminal from which on there is room for the interval of what spectra take off."""


class ForecastTable:
    """Keeps forecasts as a run goes on, the first, the last, and some in between evenly in reports."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, float, Mapping[str, float]]] = []
        self._num, self._every = 0, 1

    def note(self, step: int, tokens: float, values: Mapping[str, float]) -> None:
        """Remember what was forecast at a report; nothing where there was no forecast.

        Args:
            step: Optimizer steps.
            tokens: Training tokens.
            values: By quantity.
        """
        if math.isnan(values["tokens_to_target"]):
            return
        if self._num % self._every and self._rows:
            self._rows[-1] = (step, tokens, values)  # the last is always there
        else:
            self._rows.append((step, tokens, values))
        self._num += 1
        if len(self._rows) > NUM_ROWS:
            self._rows, self._every = self._rows[::2], 2 * self._every

    def print(self, title: str, actual: float) -> None:
        """Print what was kept, if there is any.

        Args:
            title: Above it.
            actual: Tokens that the target took; NaN if it was not reached.
        """
        if not self._rows:
            return
        out = console()
        whose = ["of the\nbest", "references\nerr by", "spectra\nsave"]
        headings = ["step", "tokens", "forecast", "80% interval", *whose]
        table = new_table(title, [], headings)
        for step, tokens, values in self._rows:
            low, high = (f"{values[end]:,.0f}" for end in ("low", "high"))
            table.add_row(
                f"{step:,}",
                f"{tokens:,.0f}",
                f"{values['tokens_to_target']:,.0f}{'*' if values['extrapolated'] == 1 else ''}",
                f"{low} .. {high}",
                f"{values['relative']:.2f}",
                _percent(values["median_error"]),
                _gain(values, out.width >= ROOMY),
            )
        if not math.isnan(actual):
            table.add_row("", "", f"{actual:,.0f}", "needed", *[""] * 3)
        out.print(table)
        if any(values["extrapolated"] == 1 for _, _, values in self._rows):
            out.print("*: extrapolated, for the run lies beyond its references in a number that is gone by")


def _percent(value: float, sign: str = "") -> str:
    return "-" if math.isnan(value) else f"{value:{sign}.0%}"


def _gain(values: Mapping[str, float], is_roomy: bool) -> str:
    low, high = (values[f"spectral_gain_{end}"] for end in ("low", "high"))
    gain = _percent(values["spectral_gain"], "+")
    return f"{gain} ({_percent(low, '+')} .. {_percent(high, '+')})" if is_roomy and gain != "-" else gain
