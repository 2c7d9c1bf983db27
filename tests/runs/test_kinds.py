"""Names of series and of quantities read back to what they were made of, and the table of kinds holds together."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_spectral.runs.kinds import KINDS, Key, Series

NAMES = st.text("abc.0-/ ", max_size=8).map(lambda text: text.strip("/"))


@given(st.sampled_from([*KINDS]), st.sampled_from(["train", "validate"]), st.integers(1, 12))
def test_a_series_reads_back(kind: str, stage: str, number: int) -> None:
    assert Series.parse(Series(kind, stage, number).text) == Series(kind, stage, number)


@pytest.mark.parametrize("text", ["activation", "activation-", "activation-train-x", "activation-train-1", ""])
def test_what_is_no_series(text: str) -> None:
    assert Series.parse(text) is None


@given(st.sampled_from(["tokens", "js", "alpha_tail"]), st.sampled_from([*KINDS]), NAMES)
def test_a_key_reads_back(quantity: str, kind: str, name: str) -> None:
    key = Key(quantity, kind, name)
    assert Key.parse(key.text) == key


def test_the_key_of_a_run_itself() -> None:
    assert Key.parse("tokens") == Key("tokens")
    assert Key("js", "activation").text == "activation/js"


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_kind_with_values_has_all_that_showing_them_needs(kind) -> None:
    assert KINDS[kind.series].series == kind.series
    assert bool(kind.values) or not (kind.count or kind.is_compared)
    assert kind.edges[0] < kind.edges[1] or kind.count is None
