"""The verdict over a table of all cases, against the rule as it is printed."""

from itertools import product
from math import isnan, nan

import pytest

from lightning_spectral.runs.gains import MIN_GAIN, Gain
from lightning_spectral.runs.movement import P_VALUE, RATIO, Lead
from lightning_spectral.runs.statistics import LEVEL
from lightning_spectral.runs.verdict import RULE, decide

KINDS = {  # (tokens, throughput): a gain or a loss counts, 0 lies within its floor
    (False, False): "none",
    (True, False): "learning-side",
    (False, True): "execution-side",
    (True, True): "both",
}
LABELS = ["activation-led", "gradient-led", "mixed", "unmoved"]


def gain(found: float, resolved: float = 0.12) -> Gain:
    """A gain that lies beyond its floor if it is not zero; NaN for one whose floor is not known."""
    floor = nan if isnan(found) else 0.1
    return Gain(
        "tokens", 1.0, 1.0, 0.3 if isnan(found) else found, nan, nan, floor, bool(found > 0 or found < 0), 0.2, resolved
    )


def moved(activation: bool, gradient: bool) -> dict[str, bool]:
    return {"activation": activation, "gradient": gradient}


def lead(led_by: str) -> Lead:
    return Lead(led_by, nan, nan, nan)


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("resolved", [0.01, 0.12])
@pytest.mark.parametrize("throughput", [0.25, 0.0, -0.25])
@pytest.mark.parametrize("tokens", [0.5, 0.0, -0.5])
def test_every_case(tokens: float, throughput: float, resolved: float, label: str) -> None:
    verdict = decide(gain(tokens, resolved), gain(throughput), moved(label != "unmoved", label == "mixed"), lead(label))
    assert verdict.kind == KINDS[tokens != 0, throughput != 0]
    is_leaning = bool(throughput and not tokens and resolved <= MIN_GAIN)
    assert verdict.led_by == (label if tokens else "throughput-leaning" if is_leaning else "")
    assert ("throughput-leaning" in verdict.text) == is_leaning
    for side, found, unit in (("learning-side", tokens, "tokens)"), ("execution-side", throughput, "tokens/s)")):
        assert (side in verdict.text) == (found != 0)
        if found:
            assert f"{side} {'gain' if found > 0 else 'loss'} (" in verdict.text
            assert f"{found * 100:+.1f}% {unit}" in verdict.text
    is_open = throughput and not tokens and resolved > MIN_GAIN
    assert ("a gain in tokens is not resolvable below 12.0%" in verdict.text) == bool(is_open)
    if not tokens and not throughput:
        names = {"unmoved": "", "mixed": "; activation and gradient spectra moved"}
        power = "; of tokens these seeds show 20.0% or more in 80 of 100 cases"
        beside = names.get(label, "; activation spectra moved")
        assert verdict.text == f"no detectable difference in tokens or throughput{beside}{power}"
    assert verdict.rule == RULE
    assert "\n" not in verdict.text


@pytest.mark.parametrize(("tokens", "throughput"), [(nan, 0.3), (0.3, nan), (nan, nan), (nan, 0.0)])
def test_without_a_floor_there_is_no_verdict_whatever_else_is_known(tokens: float, throughput: float) -> None:
    verdict = decide(gain(tokens), gain(throughput), moved(True, False), lead("activation-led"))
    assert (verdict.kind, verdict.led_by) == ("unknown", "")
    assert verdict.text.startswith("no verdict: ")


@pytest.mark.parametrize(
    ("kind", "missing"),
    [("gradient", "no activation spectra to compare"), ("activation", "no gradient spectra to compare")],
)
def test_a_kind_that_cannot_lead_for_want_of_spectra_is_named(kind: str, missing: str) -> None:
    verdict = decide(gain(-0.1), gain(0.0), {kind: True}, lead(f"{kind}-led"))
    assert f"({kind}-led; {missing}, -10.0% tokens)" in verdict.text


def test_without_spectra_nothing_leads() -> None:
    verdict = decide(gain(0.5), gain(0.0), {}, lead(""))
    assert (verdict.led_by, verdict.text) == ("", "learning-side gain (no spectra to compare, +50.0% tokens)")


@pytest.mark.parametrize("kinds", list(product((True, False), repeat=2)), ids=str)
def test_one_kind_that_moved_and_does_not_lead_is_named(kinds: tuple[bool, bool]) -> None:
    text = decide(gain(0.5), gain(0.0), moved(*kinds), lead("mixed" if all(kinds) else "unmoved")).text
    assert ("spectra moved, but not clearly more than the other" in text) == (sum(kinds) == 1)


def test_the_rule_gives_the_numbers_that_are_used() -> None:
    assert f"{LEVEL:.1%} confidence" in RULE
    assert f"beyond {MIN_GAIN:.0%}." in RULE
    assert f"R >= {RATIO} and an exact permutation test gives p <= {P_VALUE} " in RULE


@pytest.mark.parametrize("tokens", [0.5, 0.0, -0.5])
def test_where_throughput_is_left_out_the_verdict_is_of_tokens(tokens: float) -> None:
    spectra = moved(True, False), lead("activation-led")
    verdict = decide(gain(tokens), gain(nan), *spectra, "they ran on other days")
    assert verdict.kind == ("learning-side" if tokens else "none")
    assert verdict.text.endswith("; tokens a second left out: they ran on other days")
    assert "execution-side" not in verdict.text
    assert tokens or verdict.text.startswith("no detectable difference in tokens; activation spectra moved")
    assert decide(gain(nan), gain(nan), *spectra, "they ran on other days").kind == "unknown"
