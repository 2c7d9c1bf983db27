"""The verdict of a comparison: whether a change made the model learn better, or only run faster."""

from collections.abc import Mapping
from math import isnan
from typing import NamedTuple

from lightning_spectral.runs.gains import EQUIVALENCE, MIN_GAIN, Gain
from lightning_spectral.runs.kinds import KINDS
from lightning_spectral.runs.movement import LEAST_WAYS, P_VALUE, RATIO, Lead
from lightning_spectral.runs.statistics import LEVEL

RULE = (
    f"a gain counts if it lies beyond the run floor, what seeds alone show with {LEVEL:.1%} confidence, and beyond "
    f"{MIN_GAIN:.0%}. In tokens to the matched loss: learning-side. R is the mean divergence of spectra between sides "
    "over that between seeds of a side, meaned over layers, at three losses; a kind of spectra moved if at two of them "
    f"R >= {RATIO:g} and an exact permutation test gives p <= {P_VALUE:g} (of {LEAST_WAYS} splits, as of four seeds a "
    f"side, 1/{LEAST_WAYS} counts; with fewer, divergence beyond run and sampling floors stands for p). "
    "Activation-led if activations moved and their ln R is above that of gradients by more than ln 2, with 80% "
    "confidence above 0; gradient-led in mirror image; else mixed if both moved, and unmoved if not. In tokens a "
    f"second: execution-side, and throughput-leaning if the {EQUIVALENCE:.0%} interval of the gain in tokens lies "
    f"within {MIN_GAIN:.0%}; these are compared run by run only if base and variant ran in turn on the same machines, "
    "else day by day if there are runs of several days, else left out."
)


class Verdict(NamedTuple):
    """What a comparison comes to."""

    kind: str
    """``learning-side``, ``execution-side``, ``both``, ``none`` or ``unknown``."""
    led_by: str
    """Of a learning-side difference: ``activation-led``, ``gradient-led``, ``mixed``, ``unmoved``, or nothing without
    spectra; of an execution-side one ``throughput-leaning``, or nothing where a gain in tokens is not ruled out."""
    text: str
    """In words."""
    rule: str = RULE
    """How it was come to."""


def decide(
    tokens: Gain, throughput: Gain, has_moved: Mapping[str, bool], lead: Lead, time_left_out: str = ""
) -> Verdict:
    """Apply the rule.

    Args:
        tokens: The gain in them; without a run floor there is no verdict.
        throughput: Likewise.
        has_moved: Whether spectra did, by kind, of those that can be compared.
        lead: Which moved most.
        time_left_out: Why throughput cannot be compared, if it cannot.

    Returns:
        The verdict.
    """
    if isnan(tokens.run_floor) or (isnan(throughput.run_floor) and not time_left_out):
        return Verdict("unknown", "", "no verdict: one run a side, and no recorded run floor of the family")
    moved = [kind for kind, moved in has_moved.items() if moved]
    learning = execution = led_by = ""
    if tokens.is_detected:
        led_by = lead.led_by
        learning = f"learning-side {_sign(tokens)} ({_how(led_by, has_moved)}, {tokens.gain:+.1%} tokens)"
    if throughput.is_detected and not time_left_out:
        leaning = "" if learning or not tokens.is_zero else "throughput-leaning"
        led_by = led_by or leaning
        execution = (
            f"execution-side {_sign(throughput)} ({f'{leaning}, ' if leaning else ''}{throughput.gain:+.1%} tokens/s)"
        )
        if not (learning or leaning):
            execution += f"; a gain in tokens is not resolvable below {tokens.resolved:.1%}"
    without = f"; tokens a second left out: {time_left_out}" if time_left_out else ""
    if learning and execution:
        return Verdict("both", led_by, f"both: {learning} and {execution}")
    if learning or execution:
        return Verdict("learning-side" if learning else "execution-side", led_by, (learning or execution) + without)
    where = "tokens" if time_left_out else "tokens or throughput"
    beside = f"; {' and '.join(moved)} spectra moved" if moved else ""
    power = f"; of tokens these seeds show {tokens.detectable:.1%} or more in 80 of 100 cases"
    return Verdict("none", "", f"no detectable difference in {where}{beside}{power}{without}")


def _sign(gain: Gain) -> str:
    return "gain" if gain.gain > 0 else "loss"


def _how(led_by: str, has_moved: Mapping[str, bool]) -> str:
    if not has_moved:
        return "no spectra to compare"
    notes = [
        f"no {kind} spectra to compare" for kind, row in KINDS.items() if row.is_compared and kind not in has_moved
    ]
    if led_by == "unmoved" and any(has_moved.values()):
        (moved,) = (kind for kind, moved in has_moved.items() if moved)
        notes.append(f"{moved} spectra moved, but not clearly more than the other")
    return "; ".join([led_by, *notes])
