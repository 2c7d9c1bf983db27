"""The verdict over a table of all cases, against the rule as it is printed."""

from itertools import product
from math import nan

import pytest

from lightning_spectral.runs.statistics import LEVEL
from lightning_spectral.runs.verdict import MIN_GAIN, RULE, decide

KINDS = {  # (tokens, throughput): a gain or a loss counts, 0 lies within its floor
    (False, False): "none",
    (True, False): "learning-side",
    (False, True): "execution-side",
    (True, True): "both",
}
MOVED = [
    {},
    *({"activation": moved} for moved in (True, False)),
    *({"gradient": moved} for moved in (True, False)),
    *(dict(zip(("activation", "gradient"), moved, strict=True)) for moved in product((True, False), repeat=2)),
]


@pytest.mark.parametrize("moved", MOVED, ids=str)
@pytest.mark.parametrize("throughput", [0.25, 0.0, -0.25])
@pytest.mark.parametrize("tokens", [0.5, 0.0, -0.5])
def test_every_case(tokens: float, throughput: float, moved: dict[str, bool]) -> None:
    verdict = decide(tokens, throughput, moved)
    assert verdict.kind == KINDS[tokens != 0, throughput != 0]
    leaders = [kind for kind, has_moved in moved.items() if has_moved]
    led_by = {0: "", 1: "".join(f"{kind}-led" for kind in leaders), 2: "mixed"}[len(leaders)]
    assert verdict.led_by == (led_by if tokens else "")
    assert ("learning-side" in verdict.text) == (tokens != 0)
    assert ("execution-side" in verdict.text) == (throughput != 0)
    for side, gain, unit in (("learning-side", tokens, "tokens)"), ("execution-side", throughput, "tokens/s)")):
        if gain:
            assert f"{side} {'gain' if gain > 0 else 'loss'} (" in verdict.text
            assert f"{gain * 100:+.1f}% {unit}" in verdict.text
    if not tokens and not throughput:
        named = f"; {' and '.join(leaders)} spectra differ beyond their floors" if leaders else ""
        assert verdict.text == f"no detectable difference in tokens or throughput{named}"
    assert verdict.rule == RULE
    assert "\n" not in verdict.text


@pytest.mark.parametrize(("tokens", "throughput"), [(nan, 0.3), (0.3, nan), (nan, nan), (nan, 0.0)])
def test_without_a_floor_there_is_no_verdict_whatever_else_is_known(tokens: float, throughput: float) -> None:
    verdict = decide(tokens, throughput, {"activation": True})
    assert (verdict.kind, verdict.led_by) == ("unknown", "")
    assert verdict.text.startswith("no verdict: ")


@pytest.mark.parametrize(
    ("moved", "missing"),
    [
        ({"gradient": True}, "no activation spectra to compare"),
        ({"activation": True}, "no gradient spectra to compare"),
    ],
)
def test_a_kind_that_cannot_lead_for_want_of_spectra_is_named(moved: dict[str, bool], missing: str) -> None:
    assert missing in decide(-0.1, 0.0, moved).text


def test_the_rule_gives_the_numbers_that_are_used() -> None:
    assert f"{LEVEL:.1%} confidence" in RULE
    assert f"beyond {MIN_GAIN:.0%}." in RULE


@pytest.mark.parametrize("tokens", [0.5, 0.0, -0.5])
def test_where_throughput_is_left_out_the_verdict_is_of_tokens(tokens: float) -> None:
    verdict = decide(tokens, nan, {"activation": True}, "they ran on other days")
    assert verdict.kind == ("learning-side" if tokens else "none")
    assert verdict.text.endswith("; tokens a second left out: they ran on other days")
    assert "execution-side" not in verdict.text
    assert tokens or verdict.text.startswith("no detectable difference in tokens; activation spectra differ")
    assert decide(nan, nan, {}, "they ran on other days").kind == "unknown"
