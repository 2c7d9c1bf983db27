"""A spectrum's estimates against SciPy and the slow twins, and the reasons it gives for what it does not know."""

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_spectral.functional import Spectrum, rankme
from tests import _reference

RANKS = np.arange(1, 41.0)


def spectrum(exponent: float = 1.2, num_groups: int = 4, **facts) -> Spectrum:
    noise = np.random.default_rng(0).normal(1, 0.01, (num_groups, len(RANKS)))
    without = np.sort(RANKS**-exponent * noise)[:, ::-1]
    return Spectrum(torch.tensor(RANKS**-exponent), torch.tensor(without.copy()), **{"count": 400, **facts})


def cut(num_positive: int, **facts) -> Spectrum:
    """A spectrum of which the first values lie above rounding, as they do without each of four groups."""
    values = torch.tensor(RANKS**-1 * (num_positive >= RANKS))
    return Spectrum(values, values.expand(4, -1), **facts)


@pytest.mark.parametrize(("band", "ranks"), [((5, 20), (5, 20)), ((0.125, 0.5), (5, 20)), ((1, 40), (1, 40))])
def test_exponent_and_its_error_are_those_of_a_line_and_the_jackknife(band: tuple, ranks: tuple[int, int]) -> None:
    one = spectrum()
    found = one.exponent(band)

    def slope(values: np.ndarray) -> float:
        inside = slice(ranks[0] - 1, ranks[1])
        return -scipy.stats.linregress(np.log(RANKS[inside]), np.log(values[inside])).slope

    without = [slope(values) for values in one.leave_one_out.numpy()]
    assert found.value == pytest.approx(slope(one.values.numpy()))
    assert found.stderr == pytest.approx(math.sqrt(3 / 4 * np.square(without - np.mean(without)).sum()))
    assert found.corrected == pytest.approx(4 * found.value - 3 * np.mean(without))
    assert (found.band, found.num_values, found.reason) == (ranks, ranks[1] - ranks[0] + 1, None)
    assert found.r2 == pytest.approx(1)


def test_a_band_is_fitted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    one = spectrum()
    first = one.exponent((5, 20))
    monkeypatch.setattr(Spectrum, "_fit", None)
    assert one.exponent((5, 20)) is first


@pytest.mark.parametrize(
    ("one", "band", "reason"),
    [
        (spectrum(), (3, 4), "band (3, 4) of 40 values spans 2, and a line needs 3: widen it"),
        (spectrum(), (0.05, 0.1), "band (0.05, 0.1) of 40 values spans 3, and a line needs"),
        (spectrum(), (0.05, 0.06), "band (0.05, 0.06) of 40 values spans 1, and a line needs 3: widen it"),
        (spectrum(), (30, 41), "band must end at or before rank 40, the last there is, got (30, 41)"),
        (Spectrum(torch.zeros(40)), (1, 10), "all its values are exactly zero"),
        (Spectrum(torch.full((40,), torch.nan)), (1, 10), "its values are not finite"),
        (Spectrum.missing("no memory left"), (1, 10), "no memory left"),
        (cut(1, count=9), (1, 8), "band (1, 8), ranks 1 to 8, holds 1 positive values of 8: it needs more rows"),
        (cut(19, count=400), (0.125, 0.5), "band (0.125, 0.5), ranks 5 to 20, holds 15 positive values of 16: "),
        (cut(19, count=400), (5, 20), "beyond rank 19 all are zero or rounding, so lower its end"),
        (
            cut(4, count=400, dtype="float64"),
            (5, 20),
            "0 positive values of 16: beyond rank 4 all are zero or rounding",
        ),
        (
            cut(19, count=400, dtype="float32"),
            (5, 20),
            "float32 resolves no smaller ones, dtype='float64' does, 'auto'",
        ),
        (cut(19, count=400, dtype="bfloat16"), (5, 20), "bfloat16 resolves no smaller ones, row_dtype='float32' does"),
        (cut(19, count=20, dtype="float32"), (5, 20), "holds 15 positive values of 16: it needs more rows"),
        (cut(19, dtype="float64"), (5, 20), "beyond rank 19 all are zero or rounding, so lower its end"),
    ],
)
def test_no_exponent_says_why(one: Spectrum, band: tuple, reason: str) -> None:
    found = one.exponent(band)
    if "spans 3" in reason:  # three ranks are enough
        assert math.isfinite(found.value)
        return
    assert reason in found.reason
    assert all(math.isnan(number) for number in (found.value, found.stderr, found.corrected, found.r2))
    assert found.band is None


@pytest.mark.parametrize(
    ("one", "band", "reason"),
    [
        (spectrum(num_groups=1), (5, 20), "a group of samples received no rows, or there are fewer than 2"),
        (spectrum(count_without=40), (5, 20), "without one group 40 rows do not span 40 channels: take more"),
        (
            Spectrum(torch.tensor(RANKS**-1), torch.tensor(RANKS**-1)[:18].expand(4, 18), count=40),
            (5, 20),
            "without one group rank 20 lies beyond the 18 samples left: take more",
        ),
        (
            Spectrum(torch.tensor(RANKS**-1), torch.tensor(RANKS**-1 * (RANKS < 20)).expand(4, 40), count=400),
            (5, 20),
            "without one group band (5, 20) loses positive values: beyond rank 19 all are zero or rounding, "
            "so lower its end",
        ),
    ],
)
def test_an_exponent_without_an_error_bar_says_why(one: Spectrum, band: tuple, reason: str) -> None:
    found = one.exponent(band)
    assert math.isfinite(found.value)
    assert math.isnan(found.stderr)
    assert math.isnan(found.corrected)
    assert found.reason == f"no error bar: {reason}"


def test_a_band_is_taken_where_it_is_whole_whatever_lies_beyond() -> None:
    assert cut(20, count=400, dtype="float32").exponent((5, 20)).value == pytest.approx(1)
    assert cut(20, count=400, dtype="float32").exponent((5, 20)).num_values == 16


@pytest.mark.parametrize(
    ("one", "band", "is_cut"),
    [
        (cut(19, count=400, dtype="float32"), (5, 20), True),
        (cut(19, count=400, dtype="float32"), (5, 19), False),
        (cut(19, count=400, dtype="float64"), (5, 20), False),
        (cut(19, count=20, dtype="float32"), (5, 20), False),  # rows do not span it
        (cut(0, count=400, dtype="float32"), (5, 20), False),  # nothing is there at all
        (cut(19, count=400, dtype="float32"), (30, 41), False),
        (
            replace(cut(40, count=400, count_without=300, dtype="float32"), leave_one_out=cut(19).leave_one_out),
            (5, 20),
            1,
        ),
        (
            replace(cut(40, count=400, count_without=20, dtype="float32"), leave_one_out=cut(19).leave_one_out),
            (5, 20),
            0,
        ),
        (Spectrum.missing("no memory left", dtype="float32"), (5, 20), False),
    ],
)
def test_what_a_wider_type_would_resolve(one: Spectrum, band: tuple, is_cut: bool) -> None:
    assert one.is_cut_by_dtype(band) == bool(is_cut)


def test_rows_that_span_the_channels_without_any_group_are_enough() -> None:
    assert spectrum(count_without=41).exponent((5, 20)).reason is None


def test_bias_is_not_corrected_where_the_jackknife_cannot() -> None:
    found = spectrum(corrects_bias=False).exponent((5, 20))
    assert math.isfinite(found.stderr)
    assert math.isnan(found.corrected)


def test_rankme_has_the_jackknifes_error() -> None:
    one = spectrum()
    without = [float(rankme(values)) for values in one.leave_one_out]
    assert one.rankme().value == pytest.approx(_reference.rankme(one.values.numpy()))
    assert one.rankme().stderr == pytest.approx(math.sqrt(3 / 4 * np.square(without - np.mean(without)).sum()))
    assert all(math.isnan(number) for number in Spectrum.missing("no memory left").rankme())


@given(st.integers(1, 12), st.integers(0, 4), st.integers(0, 3), st.sampled_from([None, 7]))
def test_arrays_read_back_to_the_same_spectrum(num: int, groups: int, vectors: int, without: int | None) -> None:
    rng = np.random.default_rng(num)
    vectors = min(vectors, num)
    one = Spectrum(
        torch.tensor(np.sort(rng.random(num))[::-1].copy()),
        torch.tensor(np.sort(rng.random((groups, num)))[:, ::-1].copy()),
        torch.tensor(rng.random((num, vectors))) if vectors else None,
        torch.tensor(rng.random((groups, num, vectors))) if vectors else None,
        count=9,
        count_without=without,
        failure="none of yours" if num == 3 else None,
        dtype="float32" if num % 2 else "",
    )
    arrays = {name: np.asarray(array) for name, array in one.arrays("values_of_it", "rows_of_it").items()}
    found = Spectrum.from_arrays(arrays, "values_of_it", "rows_of_it", name="b", step=3)
    assert (found.name, found.step, found.count, found.count_without) == ("b", 3, 9, without)
    assert (found.failure, found.dtype) == (one.failure, one.dtype)
    np.testing.assert_array_equal(found, one)
    np.testing.assert_array_equal(found.leave_one_out, one.leave_one_out)
    for there, here in ((found.vectors, one.vectors), (found.leave_one_out_vectors, one.leave_one_out_vectors)):
        assert (there is None) == (here is None)
        if here is not None:
            np.testing.assert_array_equal(there, here.float().double())


def test_state_is_what_a_checkpoint_takes_and_comes_back(tmp_path) -> None:
    one = spectrum(name="b.0", step=4)
    torch.save(one.state(), tmp_path / "state")
    found = Spectrum.from_state(torch.load(tmp_path / "state", weights_only=True))
    assert (found.name, found.step, found.count) == ("b.0", 4, 400)
    assert found.exponent((5, 20)) == one.exponent((5, 20))


def test_leading_vectors_have_memory_of_their_own() -> None:
    many = torch.eye(40).expand(6, 40, 40)
    one = Spectrum(torch.tensor(1 / RANKS), torch.tensor(1 / RANKS).expand(5, 40), many[0], many[1:])
    few = one.leading(3)
    assert few.vectors.shape == (40, 3)
    assert few.leave_one_out_vectors.shape == (5, 40, 3)
    assert few.vectors.untyped_storage().nbytes() == 40 * 3 * 4
    assert spectrum().leading(3).vectors is None
