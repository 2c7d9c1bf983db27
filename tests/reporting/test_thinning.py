"""What a page leaves out cannot be seen: neighbours within a column of pixels, never a peak or a gap."""

from itertools import pairwise
from math import inf, log, nan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_spectral.reporting.choices import shortened
from lightning_spectral.reporting.thinning import MOST_COLUMNS, RANK_COLUMNS, kept_points, kept_ranks, plain
from lightning_spectral.reporting.words import duration, interval, share, short


@given(st.integers(1, 5000), st.lists(st.integers(1, 5000), max_size=4))
def test_ranks_lie_a_column_apart_and_ends_of_bands_stay(width: int, ends: list[int]) -> None:
    ends = [end for end in ends if end <= width]
    kept = kept_ranks(width, ends)
    assert kept == sorted(set(kept))
    assert {1, width, *ends} <= set(kept)
    least = log(max(width, 2)) / RANK_COLUMNS
    for before, after in pairwise(kept):
        # What lies between two kept ones is less than a column from the first.
        assert after == before + 1 or log((after - 1) / before) < least + 1e-12


def test_few_points_are_kept_as_they_are() -> None:
    at = np.arange(1.0, 2 * MOST_COLUMNS + 1)
    assert kept_points(at, [at]).tolist() == list(range(len(at)))


@pytest.mark.parametrize("isolated", [1, 2, 77, 4_999, 49_000])
def test_peaks_gaps_and_ends_are_kept(isolated: int) -> None:
    at = np.arange(1.0, 50_001)
    curve, other = np.sin(at / 5000), np.full(len(at), nan)
    curve[isolated] = 9.0
    other[::7] = 1.0
    curve[30_000] = nan
    kept = kept_points(at, [curve, other])
    assert {0, isolated, 30_000, len(at) - 1} <= set(kept.tolist())
    assert len(kept) < len(at) / 4
    # The early decades, which fill most of a logarithmic axis, are there as well.
    assert set(range(100)) <= set(kept.tolist())


def test_numbers_are_short_and_json() -> None:
    given = {"a": 1.23456789, "b": [nan, inf, -inf, 3.0], "c": np.float64(819_200.0), "d": True, "e": None, "f": "x"}
    expected = {"a": 1.2346, "b": [None, "inf", "-inf", 3], "c": 819_200, "d": True, "e": None, "f": "x"}
    assert plain(given) == expected


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1_228_800, "1.23 M"),
        (12_345, "12.3 k"),
        (2048, "2,048"),
        (999.4, "999"),
        (999.5, "1,000"),
        (-999.7, "-1,000"),
        (999_700, "1 M"),
        (9.99e14, "999 T"),
        (1.234e15, "1,234 T"),
        (0.0123456, "0.0123"),
        (inf, "unbounded"),
        (nan, "-"),
        (None, "-"),
    ],
)
def test_numbers_in_words(value: float | None, shown: str) -> None:
    assert short(value) == shown


@pytest.mark.parametrize(
    ("value", "digits", "shown"),
    [(150, 2, "150"), (99.6, 2, "100"), (123_456, 2, "123 k"), (999.97, 4, "1,000"), (1234.5, 4, "1,234")],
)
def test_no_number_of_ordinary_size_has_an_exponent(value: float, digits: int, shown: str) -> None:
    assert short(value, digits) == shown


def test_other_things_in_words() -> None:
    assert interval(2.0, inf) == "2 or more"
    assert interval(nan, nan) == "no interval"
    assert [duration(seconds) for seconds in (3.0, 600.0, 9000.0, 3e5, nan)] == [
        "3 s",
        "10 min",
        "2.5 h",
        "3.5 days",
        "-",
    ]
    assert [share(value) for value in (0.052, 0.25, nan)] == ["5.2%", "25%", "-"]


@pytest.mark.parametrize(
    ("names", "short_names"),
    [
        (["gpt.blocks.0", "gpt.blocks.11"], ["blocks.0", "blocks.11"]),
        (["m.blocks.0.attention.out.weight", "m.blocks.1.attention.out.weight"], ["blocks.0", "blocks.1"]),
        (["encoder.layers.0", "decoder.layers.0"], ["encoder", "decoder"]),
        (["only.one"], ["only.one"]),
        (["a", "b"], ["a", "b"]),
    ],
)
def test_names_lose_what_all_have_in_common(names: list[str], short_names: list[str]) -> None:
    assert shortened(names) == short_names
