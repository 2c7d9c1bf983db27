"""The verdict of a comparison: whether a change made the model learn better, or only run faster."""

from collections.abc import Mapping
from math import isnan
from typing import NamedTuple

from lightning_spectral.runs.kinds import KINDS

MIN_GAIN = 0.02
"""A gain below two percent gets no name, however little seeds scatter."""

RULE = (
    "a gain counts if it lies beyond the run floor, what seeds alone show with 97.5% confidence, and beyond 2%. "
    "In tokens to the matched loss: learning-side, led by activations, by gradients or by both (mixed) if the "
    "Jensen-Shannon divergence of their spectra, meaned over layers, lies beyond its run and sampling floors. "
    "In tokens a second: execution-side; these are compared run by run only if base and variant ran in turn on the "
    "same machines, else day by day if there are runs of several days, else left out."
)


class Verdict(NamedTuple):
    """What a comparison comes to."""

    kind: str
    """``learning-side``, ``execution-side``, ``both``, ``none`` or ``unknown``."""
    led_by: str
    """Of a learning-side difference: ``activation-led``, ``gradient-led``, ``mixed``, or nothing."""
    text: str
    """In words."""
    rule: str = RULE
    """How it was come to."""


def decide(
    token_gain: float, throughput_gain: float, spectra_moved: Mapping[str, bool], time_left_out: str = ""
) -> Verdict:
    """Apply the rule to gains of the variant: 0 within their floors, NaN if the scatter of runs is not known.

    ``spectra_moved`` says whether spectra differ beyond their floors, by kind, of those that can be compared, and
    ``time_left_out`` why throughput cannot be, if it cannot.
    """
    if time_left_out:
        throughput_gain = 0.0
    if isnan(token_gain) or isnan(throughput_gain):
        return Verdict("unknown", "", "no verdict: one run a side, and no recorded run floor of the family")
    moved = [kind for kind, has_moved in spectra_moved.items() if has_moved]
    learning = execution = led_by = ""
    if token_gain:
        led_by = "mixed" if len(moved) > 1 else f"{moved[0]}-led" if moved else ""
        learning = f"learning-side {_sign(token_gain)} ({_how(led_by, spectra_moved)}, {token_gain:+.1%} tokens)"
    if throughput_gain:
        execution = f"execution-side {_sign(throughput_gain)} (throughput-leaning, {throughput_gain:+.1%} tokens/s)"
    without = f"; tokens a second left out: {time_left_out}" if time_left_out else ""
    if learning and execution:
        return Verdict("both", led_by, f"both: {learning} and {execution}")
    if learning or execution:
        return Verdict("learning-side" if learning else "execution-side", led_by, (learning or execution) + without)
    beside = f"; {' and '.join(moved)} spectra differ beyond their floors" if moved else ""
    where = "tokens" if time_left_out else "tokens or throughput"
    return Verdict("none", "", f"no detectable difference in {where}{beside}{without}")


def _sign(gain: float) -> str:
    return "gain" if gain > 0 else "loss"


def _how(led_by: str, spectra_moved: Mapping[str, bool]) -> str:
    if not spectra_moved:
        return "no spectra to compare"
    if not led_by:
        return "no spectra moved beyond their floors"
    missing = [kind for kind, row in KINDS.items() if row.is_compared and kind not in spectra_moved]
    return f"{led_by}; no {missing[0]} spectra to compare" if missing else led_by
