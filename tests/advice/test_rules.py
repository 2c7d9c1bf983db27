"""Each rule on both sides of its floor, with the numbers it names; and what all of them come to."""

import math
from dataclasses import replace
from typing import Any

import pytest
from scipy.stats import t

from lightning_spectral.advice import (
    MOST,
    RULES,
    Alarmed,
    Awaited,
    BatchNoise,
    Drift,
    Drifted,
    Moved,
    Number,
    floor_of_fall,
    sentences,
)
from lightning_spectral.advice.facts import floor_of_change

NAN, INF = math.nan, math.inf


def said(fact: Any) -> str | None:
    """The one sentence about a fact, or none."""
    found = sentences([fact])
    assert len(found) <= 1
    return found[0].text if found else None


def moved(quantity: Any = "alpha_tail", last: float = 1.2, stderr: float = 0.01, **other: Any) -> Moved:
    numbers = {"first": Number(1.4, 0.02), "last": Number(last, stderr)}
    return Moved(**({"quantity": quantity, "num_layers": 5, "num_groups": 4, "steps": (25, 600)} | numbers | other))


FLOOR = float(t.ppf(0.975, 3)) * math.hypot(0.02, 0.01)


def test_floors_are_students_limits_of_a_difference() -> None:
    assert floor_of_change(Number(1.0, 0.02), Number(2.0, 0.01), 4) == pytest.approx(FLOOR)
    assert floor_of_fall(Number(1.0, 0.02), Number(2.0, 0.01), 4) == pytest.approx(
        float(t.ppf(0.95, 3)) * math.hypot(0.02, 0.01)
    )
    assert math.isnan(floor_of_change(Number(1.0, 0.02), Number(2.0, 0.01), 1))


def test_a_mean_over_layers_errs_no_more_than_its_layers() -> None:
    assert Number.mean([Number(1.0, 0.1), Number(2.0, 0.3)]) == (1.5, 0.2)
    assert math.isnan(Number.mean([]).value)


@pytest.mark.parametrize("quantity", ["alpha_tail", "rankme_share"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_a_number_that_moved_by_more_than_its_floor_is_told(quantity: str, sign: int) -> None:
    assert said(moved(quantity, 1.4 + sign * (FLOOR + 1e-6))) is not None
    assert said(moved(quantity, 1.4 + sign * (FLOOR - 1e-6))) is None


def test_a_tail_that_fell() -> None:
    assert said(moved()) == (
        "The exponent of the activations' tail fell from 1.4 at step 25 to 1.2 at step 600 (mean of 5 layers), by 0.2 "
        "where sampling alone gives up to 0.071: variance has gone to more directions, as in small GPTs after their "
        "first 32 to 128 steps; alone it forecasts no tokens"
    )


def test_each_direction_means_something_else() -> None:
    assert "fewer directions, as in the first 32 to 128 steps" in str(said(moved(last=1.6)))
    assert "look for a collapse" in str(said(moved("rankme_share", 1.2)))
    assert "more directions than at first" in str(said(moved("rankme_share", 1.6)))


@pytest.mark.parametrize(
    "other",
    [{"stderr": NAN}, {"last": NAN}, {"num_groups": 1}, {"steps": (25, 25)}, {"first": Number(NAN, 0.01)}],
    ids=str,
)
def test_without_a_floor_or_a_second_report_nothing_moved(other: dict[str, Any]) -> None:
    assert said(moved(**other)) is None


def drifted(*layers: Drift, reference: str = "first") -> Drifted:
    return Drifted(rank=10, reference=reference, layers=layers, step=600)


def test_heads_that_turned_beyond_their_floor() -> None:
    layers = [Drift("a", 0.96, 0.95), Drift("b", 0.31, 0.97), Drift("c", 0.5, 0.6)]
    assert said(drifted(*layers)) == (
        "The 10 leading directions of 2 of 3 layers have turned since the first report by step 600, most in b: overlap "
        "0.31, below its floor of 0.97: heads are learned, so this is usual; whether they still turn "
        "HeadDrift(reference='previous') tells"
    )
    assert "have not settled" in str(said(drifted(*layers, reference="previous")))
    assert "heads of other seeds" in str(said(drifted(*layers, reference="runs/base")))


@pytest.mark.parametrize(
    ("overlap", "floor", "is_said"), [(0.95, 0.95, False), (0.9499, 0.95, True), (1 - 1e-15, 1.0, False)]
)
def test_a_head_turned_below_its_floor_only(overlap: float, floor: float, is_said: bool) -> None:
    assert (said(drifted(Drift("a", overlap, floor))) is not None) == is_said


@pytest.mark.parametrize("layer", [Drift("a", NAN, 0.9), Drift("a", 0.1, NAN)])
def test_heads_without_a_floor_did_not_turn(layer: Drift) -> None:
    assert said(drifted(layer)) is None


def noise(batch: float = 8.0, low: float = 32.0, scale: float = 40.0, high: float = 64.0, **other: Any) -> BatchNoise:
    facts = {"batch": batch, "low": low, "scale": scale, "high": high}
    return BatchNoise(**({"tokens_per_sample": 256.0, "num_parameters": None, "step": 600} | facts | other))


def test_a_batch_below_the_noise_scale() -> None:
    # r from 8/64 to 8/32: tokens of twice the batch (1 + 2r)/(1 + r) = 1.11 to 1.2, steps half of that.
    assert said(noise()) == (
        "The batch of 2,048 tokens is 0.2 of the noise scale at step 600 (80%: 0.12 to 0.25): larger batches would "
        "cost few tokens, twice the batch 1.11 to 1.20 times the tokens in 0.56 to 0.60 times the steps, by the law of "
        "McCandlish et al. (2018)"
    )


def test_a_batch_above_the_noise_scale() -> None:
    # r from 2 to 4: tokens of half the batch (1 + r/2)/(1 + r) = 0.67 to 0.6, steps twice that.
    text = said(noise(128.0, tokens_per_sample=1.0))
    assert text is not None
    assert text.startswith("The batch of 128 samples is 3.2 of the noise scale at step 600 (80%: 2 to 4): smaller")
    assert "half the batch 0.60 to 0.67 times the tokens in 1.20 to 1.33 times the steps" in text


def test_an_open_interval_says_at_most() -> None:
    text = said(noise(scale=INF, high=INF, num_parameters=5, tokens_per_sample=NAN))
    assert text is not None
    assert text.startswith(
        "The batch of 8 samples is small beside the noise scale of the 5 measured parameters at step 600 (80%: at most "
        "0.25): larger batches would cost few tokens, twice the batch 1.00 to 1.20 times"
    )


@pytest.mark.parametrize(("batch", "is_said"), [(31.9, True), (32.1, False), (63.9, False), (64.1, True)])
def test_a_batch_within_the_interval_of_the_noise_scale_is_left_alone(batch: float, is_said: bool) -> None:
    assert (said(noise(batch)) is not None) == is_said


@pytest.mark.parametrize("other", [{"batch": NAN}, {"low": NAN, "high": NAN}, {"low": 0.0}, {"scale": NAN}], ids=str)
def test_without_an_interval_or_a_batch_nothing_is_said_of_the_noise(other: dict[str, Any]) -> None:
    assert said(noise(**other)) is None


def awaited(**other: Any) -> Awaited:
    facts = {"tokens": 1e6, "forecast": 2e6, "low": 1.5e6, "high": 3e6, "p_value": 0.01}
    return Awaited(**({"monitor": "val_loss", "target": 2.0} | facts | other))


def test_a_target_that_lies_beyond_the_end() -> None:
    assert said(awaited()) == (
        "The run ended at 1,000,000 tokens, and val_loss 2 is forecast at 2,000,000 (80%: 1,500,000 to 3,000,000): as "
        "runs of this family go it needs 1.5 times its tokens or more"
    )


@pytest.mark.parametrize(
    ("other", "is_said"),
    [
        ({"low": 1e6}, False),
        ({"low": 1e6 + 1}, True),
        ({"p_value": 0.1}, True),
        ({"p_value": 0.11}, False),
        ({"p_value": NAN}, False),
        ({"forecast": NAN, "low": NAN, "high": NAN}, False),
        ({"high": INF}, False),
        ({"tokens": NAN}, False),
    ],
    ids=str,
)
def test_a_forecast_needs_skill_and_an_interval_beyond_the_end(other: dict[str, Any], is_said: bool) -> None:
    assert (said(awaited(**other)) is not None) == is_said


def test_layers_in_alarm() -> None:
    layers = (("a", "RankMe is 4 of 16"), ("b", "RankMe is 5 of 16"))
    text = said(Alarmed(layers=layers, num_watched=5, step=600))
    assert text is not None
    assert text.startswith("2 of 5 layers are in alarm at step 600, a and 1 more (RankMe is 4 of 16): few directions")
    assert said(Alarmed(layers=(), num_watched=5, step=600)) is None


def test_five_sentences_at_the_most_in_the_order_of_the_table_and_each_once() -> None:
    facts = [
        moved(),
        moved("rankme_share"),
        drifted(Drift("a", 0.1, 0.9)),
        awaited(),
        noise(),
        noise(),
        Alarmed(layers=(("a", "RankMe is 4 of 16"),), num_watched=1, step=600),
    ]
    found = sentences(facts)
    assert len(found) == MOST == 5
    anchors = [one.url.split("#")[1] for one in found]
    assert anchors == [rule.anchor for rule in RULES][:5]
    assert all(one.url.startswith("https://lightning-spectral.github.io/lightning-spectral/") for one in found)
    assert len(sentences([replace(noise(), step=step) for step in range(8)])) == 5


def test_of_nothing_nothing_is_said() -> None:
    assert sentences([]) == []


def test_no_sentence_promises_that_a_tail_forecasts() -> None:
    for last in (1.2, 1.6):
        assert "alone it forecasts no tokens" in str(said(moved(last=last)))


@pytest.mark.parametrize(("prefix", "begins"), [("", "The "), ("val/", "val: The "), ("a", "a: The ")])
def test_a_sentence_says_whose_it_is(prefix: str, begins: str) -> None:
    text = said(replace(noise(), prefix=prefix))
    assert text is not None
    assert text.startswith(begins)
