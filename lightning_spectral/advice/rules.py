"""The table of rules: from facts to sentences with a number, what it usually means, and where that is explained."""

from collections.abc import Callable, Iterable
from math import isfinite
from typing import Any, NamedTuple

from lightning_spectral.advice.facts import Alarmed, Awaited, BatchNoise, Drifted, Fact, Moved
from lightning_spectral.documentation import page
from lightning_spectral.functional.forecast import NO_SKILL

MOST = 5
"""Sentences about one run."""

ROUNDING = 1e-6
"""Of overlaps: on the same rows weights that stand still have a floor of 1."""


class Sentence(NamedTuple):
    """What moved, and where to read on."""

    text: str
    url: str


def alarm(fact: Alarmed) -> str | None:
    """Layers in collapse alarm, whose own limit was crossed beyond its error."""
    if not fact.layers:
        return None
    name, numbers = fact.layers[0]
    others = f" and {len(fact.layers) - 1} more" if len(fact.layers) > 1 else ""
    return (
        f"{len(fact.layers)} of {fact.num_watched} layers are in alarm at step {fact.step:,}, {name}{others} "
        f"({numbers}): few directions carry the variance, which is what a collapse of representations looks like"
    )


def noise(fact: BatchNoise) -> str | None:
    r"""Of a batch that its noise scale's 80% interval lies wholly above, or below.

    The costs are those of McCandlish et al., *An Empirical Model of Large-Batch Training*, arXiv 1812.06162 (2018):
    steps S and samples E to a loss trade as :math:`(S/S_{min} - 1)(E/E_{min} - 1) = 1`, so that a batch of r critical
    ones takes :math:`1 + r` times the fewest samples and :math:`1 + 1/r` times the fewest steps. The noise scale stands
    for the critical batch, as there.
    """
    if not (fact.batch > 0 and fact.low > 0 and fact.scale > 0 and fact.high >= fact.low):
        return None
    least, most = fact.batch / fact.high, fact.batch / fact.low
    known = isfinite(fact.tokens_per_sample) and fact.tokens_per_sample != 1
    size = f"{fact.batch * fact.tokens_per_sample:,.0f} tokens" if known else f"{fact.batch:,.0f} samples"
    whole = fact.num_parameters is None
    parameters = "" if whole else f" of the {fact.num_parameters} measured parameters"
    ratio = f"{_ratio(fact.batch / fact.scale)} of" if isfinite(fact.scale) else "small beside"
    start = f"the batch of {size} is {ratio} the noise scale{parameters}"
    interval = f"(80%: {_ratio(least)} to {_ratio(most)})" if isfinite(fact.high) else f"(80%: at most {_ratio(most)})"
    if most < 1:
        times, meaning = 2.0, "larger batches would cost few tokens, twice the batch"
    elif least > 1:
        times, meaning = 0.5, "smaller batches would save tokens, half the batch"
    else:
        return None
    tokens = sorted(_cost(one, times) for one in (least, most))
    steps = [one / times for one in tokens]
    return (
        f"{start} at step {fact.step:,} {interval}: {meaning} {_range(*tokens)} times the tokens in {_range(*steps)} "
        "times the steps, by the law of McCandlish et al. (2018)"
    )


def _cost(ratio: float, times: float) -> float:
    """Tokens at so many times a batch that is ``ratio`` noise scales, over those at the batch itself."""
    return (1 + times * ratio) / (1 + ratio)


def _ratio(value: float) -> str:
    return f"{value:,.0f}" if value >= 9.95 else f"{value:.2g}"


def _range(low: float, high: float) -> str:
    ends = f"{low:.2f}", f"{high:.2f}"
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


def awaited(fact: Awaited) -> str | None:
    """Of a forecast with skill whose interval begins beyond the tokens of the run."""
    if not (fact.p_value <= NO_SKILL and fact.low > fact.tokens and fact.low <= fact.forecast <= fact.high):
        return None
    if not isfinite(fact.high):
        return None
    return (
        f"the run ended at {fact.tokens:,.0f} tokens, and {fact.monitor} {fact.target:g} is forecast at "
        f"{fact.forecast:,.0f} (80%: {fact.low:,.0f} to {fact.high:,.0f}): as runs of this family go it needs "
        f"{_ratio(fact.low / fact.tokens)} times its tokens or more"
    )


def drift(fact: Drifted) -> str | None:
    """Of heads whose overlap with the reference is below its sampling floor."""
    turned = [layer for layer in fact.layers if layer.floor - layer.overlap > ROUNDING]  # not where either is NaN
    if not turned:
        return None
    most = min(turned, key=lambda layer: layer.overlap - layer.floor)
    since, meaning = _REFERENCES.get(
        fact.reference,
        ("from those of the reference run", "more than other rows would show, as heads of other seeds have as well"),
    )
    return (
        f"the {fact.rank} leading directions of {len(turned)} of {len(fact.layers)} layers have turned {since} by step "
        f"{fact.step:,}, most in {most.layer}: overlap {most.overlap:.4g}, below its floor of {most.floor:.4g}: "
        f"{meaning}"
    )


_REFERENCES = {
    "first": (
        "since the first report",
        "heads are learned, so this is usual; whether they still turn HeadDrift(reference='previous') tells",
    ),
    "previous": ("since the report before", "these heads have not settled"),
}


def rankme(fact: Moved) -> str | None:
    """Of RankMe, as a share of the width, that moved by more than its floor."""
    if fact.quantity != "rankme_share" or not _is_beyond(fact):
        return None
    if fact.last.value > fact.first.value:
        meaning = "layers use more directions than at first"
    else:
        meaning = "layers use fewer directions than at first; if the validation loss stands still, look for a collapse"
    return f"RankMe, as a share of the width, {_change(fact, 'rose', 'fell')}: {meaning}"


def tail(fact: Moved) -> str | None:
    """Of a tail exponent that moved by more than its floor."""
    if fact.quantity != "alpha_tail" or not _is_beyond(fact):
        return None
    if fact.last.value < fact.first.value:
        meaning = (
            "variance has gone to more directions, as in small GPTs after their first 32 to 128 steps; alone it "
            "forecasts no tokens"
        )
    else:
        meaning = (
            "variance has gathered in fewer directions, as in the first 32 to 128 steps of small GPTs and, later, at "
            "higher learning rates; alone it forecasts no tokens"
        )
    return f"the exponent of the activations' tail {_change(fact, 'rose', 'fell')}: {meaning}"


def _is_beyond(fact: Moved) -> bool:
    """Not where a number or its error is NaN."""
    return fact.steps[0] != fact.steps[1] and abs(fact.last.value - fact.first.value) > fact.floor


def _change(fact: Moved, up: str, down: str) -> str:
    # As many digits as tell the change from its floor.
    word = up if fact.last.value > fact.first.value else down
    layers = f"mean of {fact.num_layers} layers" if fact.num_layers > 1 else "one layer"
    return (
        f"{word} from {fact.first.value:.3g} at step {fact.steps[0]:,} to {fact.last.value:.3g} at step "
        f"{fact.steps[1]:,} ({layers}), by {abs(fact.last.value - fact.first.value):.2g} where sampling alone gives up "
        f"to {fact.floor:.2g}"
    )


class Rule(NamedTuple):
    """What is said of one type of fact."""

    fact: type[Fact]
    say: Callable[[Any], str | None]
    """None within the floors, and where they are not known."""
    anchor: str
    """Heading on the page about reading spectra."""


RULES = (
    Rule(Alarmed, alarm, "collapse"),
    Rule(BatchNoise, noise, "large-noise-scale"),
    Rule(Awaited, awaited, "forecast"),
    Rule(Drifted, drift, "drifting-head"),
    Rule(Moved, rankme, "rising-rankme"),
    Rule(Moved, tail, "falling-tail"),
)
"""In the order in which they are said."""


def sentences(facts: Iterable[Fact]) -> list[Sentence]:
    """What can be said of facts: at most ``MOST`` sentences, by the order of the rules, each once."""
    known = list(facts)
    said: dict[str, Sentence] = {}
    for rule in RULES:
        for fact in known:
            if isinstance(fact, rule.fact) and (text := rule.say(fact)) is not None:
                whose = f"{fact.prefix.rstrip('/')}: " if fact.prefix else ""
                shown = whose + text[0].upper() + text[1:]
                said.setdefault(shown, Sentence(shown, page("reading-spectra", rule.anchor)))
    return list(said.values())[:MOST]
