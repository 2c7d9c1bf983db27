"""What a report says of a layer equals NumPy on the same rows: the spectrum, those without each group, the vectors."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_spectral.functional import Moments, Spectrum, moments
from lightning_spectral.measurement import decomposition
from lightning_spectral.measurement.decomposition import (
    SINGLE_FROM,
    Decomposition,
    Pooled,
    decompose,
    matrices_at_a_time,
    shares,
)
from lightning_spectral.metrics.collectives import Together
from tests.distributed import run_distributed

NUM_LAYERS, NUM_GROUPS, NUM_ROWS, WIDTH, NUM_VECTORS = 3, 4, 25, 7, 3


@pytest.fixture
def rows() -> np.ndarray:
    spread = np.arange(1, WIDTH + 1) ** -0.8
    return np.random.default_rng(0).normal(10, spread, (NUM_LAYERS, NUM_GROUPS, NUM_ROWS, WIDTH))


def spectra_of(rows: np.ndarray, **kwargs: int) -> list[Spectrum]:
    names = [f"layer{index}" for index in range(len(rows))]
    found = decompose(names, moments(torch.tensor(rows)), {}, **kwargs)
    assert list(found) == [spectrum.name for spectrum in found.values()] == names
    return list(found.values())


def eigh(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values, vectors = np.linalg.eigh(np.cov(rows.reshape(-1, WIDTH), rowvar=False))
    return values[::-1], vectors[:, ::-1]


@pytest.mark.parametrize("num_vectors", [0, NUM_VECTORS])
def test_spectra_with_and_without_each_group(rows: np.ndarray, num_vectors: int) -> None:
    for layer, spectrum in zip(rows, spectra_of(rows, num_vectors=num_vectors), strict=True):
        np.testing.assert_allclose(spectrum.values, eigh(layer)[0], rtol=1e-9)
        for group in range(NUM_GROUPS):
            np.testing.assert_allclose(spectrum.leave_one_out[group], eigh(np.delete(layer, group, 0))[0], rtol=1e-9)
        assert spectrum.count == NUM_GROUPS * NUM_ROWS
        assert spectrum.count_without == (NUM_GROUPS - 1) * NUM_ROWS


def test_leading_vectors_with_and_without_each_group(rows: np.ndarray) -> None:
    for layer, spectrum in zip(rows, spectra_of(rows, num_vectors=NUM_VECTORS), strict=True):
        parts = [(layer, spectrum.vectors)]
        parts += [(np.delete(layer, group, 0), spectrum.leave_one_out_vectors[group]) for group in range(NUM_GROUPS)]
        for part, vectors in parts:
            cosines = np.abs(np.sum(eigh(part)[1][:, :NUM_VECTORS] * vectors.numpy(), axis=0))
            np.testing.assert_allclose(cosines, 1, rtol=1e-9)


@pytest.mark.parametrize("num_rows", [1, NUM_ROWS], ids=["low rank", "full rank"])
def test_vectors_leave_the_values_as_they_are(rows: np.ndarray, num_rows: int) -> None:
    few = rows[:, :, :num_rows]
    for plain, other in zip(spectra_of(few), spectra_of(few, num_vectors=NUM_VECTORS), strict=True):
        for expected, found in ((plain.values, other.values), (plain.leave_one_out, other.leave_one_out)):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14 * float(expected.max()))
            assert torch.equal(found == 0, expected == 0)
            assert bool((expected == 0).any()) == (num_rows == 1)
        assert plain.vectors is plain.leave_one_out_vectors is None


def test_each_matrix_is_solved_once_with_vectors_or_without(rows: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for name in ("eigvalsh", "eigh"):
        solver = getattr(torch.linalg, name)
        monkeypatch.setattr(torch.linalg, name, lambda x, n=name, s=solver: (calls.append((n, x.shape[:-2])), s(x))[1])
    spectra_of(rows)
    spectra_of(rows, num_vectors=NUM_VECTORS)
    number = NUM_LAYERS * (1 + NUM_GROUPS)
    assert calls == [("eigvalsh", (1,))] * number + [("eigh", (1,))] * number


@given(st.lists(st.integers(1, 100), max_size=12), st.integers(1, 5))
def test_shares_hold_everything_once_and_evenly(costs: list[int], world: int) -> None:
    dealt = shares(costs, world)
    assert sorted(index for mine in dealt for index in mine) == list(range(len(costs)))
    loads = [sum(costs[index] for index in mine) for mine in dealt]
    # Graham: no more than 4/3 of what any dealing can do; what none can undercut is the mean, and the dearest.
    least = max(sum(costs) / world, max(costs, default=0))
    assert max(loads) <= least + max(costs, default=0) * (1 - 1 / world)
    assert max(loads) - min(loads) <= max(costs, default=0)


def test_shares_of_equal_matrices_differ_by_one() -> None:
    assert sorted(map(len, shares([8.0] * 25, 4))) == [6, 6, 6, 7]
    assert shares([27.0, 8, 8, 8], 2) == [[0], [1, 2, 3]]


@pytest.mark.parametrize("power", [-0.5, -1.2], ids=["resolved", "not resolved"])
def test_wide_layers_are_solved_in_float32_without_each_group(power: float, monkeypatch: pytest.MonkeyPatch) -> None:
    width = SINGLE_FROM["cpu"]
    rows = np.random.default_rng(0).normal(0, np.arange(1, width + 1) ** power, (1, NUM_GROUPS, 400, width))
    dtypes, solver = [], torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda x: (dtypes.extend([x.dtype] * len(x[0:])), solver(x))[1])
    parts = moments(torch.tensor(rows))
    whole = decompose(["layer"], parts, {}, dtypes=["float32"])["layer"]
    assert whole.values.dtype == whole.leave_one_out.dtype == torch.float64
    is_single = [dtype == torch.float32 for dtype in dtypes]
    assert is_single == [False, *[power == -0.5] * NUM_GROUPS]
    np.testing.assert_allclose(whole.values, np.linalg.eigvalsh(np.cov(rows.reshape(-1, width).T))[::-1], rtol=1e-7)
    for group in range(NUM_GROUPS):
        left = np.delete(rows[0], group, 0).reshape(-1, width)
        np.testing.assert_allclose(whole.leave_one_out[group], np.linalg.eigvalsh(np.cov(left.T))[::-1], rtol=1e-4)
    dtypes.clear()
    double = decompose(["layer"], parts, {}, dtypes=["float64"])["layer"]
    assert dtypes == [torch.float64] * (1 + NUM_GROUPS)
    assert torch.equal(whole.values, double.values)
    for band in ((1, 10), (0.125, 0.5), (0.5, 1.0)):
        one, other = whole.exponent(band), double.exponent(band)
        assert one.stderr == pytest.approx(other.stderr, rel=0.01)
        assert one.corrected == pytest.approx(other.corrected, abs=0.01 * other.stderr)


def test_one_bad_layer_costs_the_others_nothing(rows: np.ndarray) -> None:
    rows[1, 2, 3, 4] = np.inf
    good, bad, other = spectra_of(rows)
    assert bad.failure == "the rows hold NaN or infinity"
    assert bad.values.isnan().all()
    for layer, spectrum in ((rows[0], good), (rows[2], other)):
        assert spectrum.failure is None
        np.testing.assert_allclose(spectrum.values, eigh(layer)[0], rtol=1e-9)


@pytest.mark.parametrize(("num_rows", "has_error"), [(2, False), (3, True)])
def test_error_bars_need_rows_that_span_the_channels_without_any_group(num_rows: int, has_error: bool) -> None:
    # Three groups of 2 leave 6 rows, of rank 5 about their mean, for 7 channels; three of 3 leave 9.
    rows = np.random.default_rng(1).normal(size=(1, NUM_GROUPS, num_rows, WIDTH))
    (spectrum,) = spectra_of(rows)
    exponent = spectrum.exponent((1, 5))
    assert np.isfinite(exponent.value)
    assert np.isfinite(exponent.stderr) == has_error
    assert (exponent.reason is None) == has_error
    assert has_error or "6 rows do not span 7 channels" in exponent.reason


@pytest.mark.parametrize("num_vectors", [0, NUM_VECTORS])
def test_an_empty_group_leaves_no_error_bar(rows: np.ndarray, num_vectors: int) -> None:
    parts = moments(torch.tensor(rows[:1]))
    scatter = parts.scatter.clone()
    count, mean = parts.num_rows.clone(), parts.mean.clone()
    count[0, 1], mean[0, 1], scatter[0, 1] = 0, 0, 0
    spectrum = decompose(["layer"], Moments(count, mean, scatter), {}, num_vectors=num_vectors)["layer"]
    assert spectrum.leave_one_out.shape == (0, WIDTH)
    assert num_vectors == 0 or spectrum.leave_one_out_vectors.shape == (0, WIDTH, NUM_VECTORS)
    assert np.isnan(spectrum.exponent((1, 5)).stderr)
    assert "a group of samples received no rows" in spectrum.exponent((1, 5)).reason


WIDTHS = {5: 2, 7: 3, 12: 1}
"""Layers of each width, all in one report."""
FAILING = 7


def pooled() -> list[Pooled]:
    """The same on each rank; of width 7 one layer holds infinity, and one has no rows in one group."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for width, number in WIDTHS.items():
        parts = moments(torch.randn(number, NUM_GROUPS, NUM_ROWS, width, generator=generator, dtype=torch.float64))
        if width == 7:
            parts.scatter[1, 2, 3, 4] = torch.inf
            parts.num_rows[2, 1], parts.mean[2, 1], parts.scatter[2, 1] = 0, 0, 0
        names = [f"{width}.{index}" for index in range(number)]
        found.append(Pooled(names, parts, {}, ["float32", "float64", "float64"][:number]))
    return found


def solved(num_vectors: int, failing: bool = False, single: bool = False) -> dict[str, Any]:
    """A report's spectra as a record keeps them, without each group in float32 perhaps; and what was solved here."""
    if single:
        with pytest.MonkeyPatch.context() as patched:
            patched.setitem(SINGLE_FROM, "cpu", min(WIDTHS))
            return solved(num_vectors, failing)
    whole = Decomposition(pooled(), 3, num_vectors)
    solver = decomposition._eigen

    def solve(sample: Moments, *args: Any) -> Any:
        if sample.mean.shape[-1] == FAILING:
            raise torch.OutOfMemoryError("no memory\nat all")
        return solver(sample, *args)

    decomposition._eigen = solve if failing else solver
    try:
        whole.solve()
        spectra = whole.spectra(Together(torch.device("cpu")))
    finally:
        decomposition._eigen = solver
    return {"share": whole.share, "spectra": {name: one.arrays("values", "count") for name, one in spectra.items()}}


def both(rank: int) -> dict[str, Any]:
    """With vectors and without, and where one of two ranks has no memory for a width."""
    return {
        "plain": solved(0),
        "vectors": solved(NUM_VECTORS),
        "failing": solved(0, failing=rank == 1),
        "single": solved(0, single=True),
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_distributed(both, 2)


@pytest.mark.parametrize("way", ["plain", "vectors", "single"])
def test_ranks_share_the_matrices_and_find_what_one_finds(ranks: list[dict[str, Any]], way: str) -> None:
    alone = solved(NUM_VECTORS if way == "vectors" else 0, single=way == "single")
    mine, theirs = (set(seen[way]["share"]) for seen in ranks)
    number = sum(WIDTHS.values()) * (1 + NUM_GROUPS)
    assert len(mine) + len(theirs) == len(mine | theirs) == number
    assert abs(len(mine) - len(theirs)) <= 5  # dear ones here, cheap ones there
    assert mine | theirs == set(alone["share"])
    assert list(alone["spectra"]) == list(ranks[0][way]["spectra"])
    for name, expected in alone["spectra"].items():
        for seen in ranks:
            np.testing.assert_equal(seen[way]["spectra"][name], expected)
        if way == "single" and not expected["failure"]:
            double = ranks[0]["plain"]["spectra"][name]
            np.testing.assert_equal(expected["values"], double["values"])
            is_same = expected["leave_one_out"] == double["leave_one_out"]
            assert not is_same.any() if expected["dtype"] == "float32" else is_same.all()
            np.testing.assert_allclose(expected["leave_one_out"], double["leave_one_out"], rtol=1e-5)


def test_the_dearer_of_two_types_is_told_by_where_matrices_are_solved_not_where_moments_are() -> None:
    (one,) = (one for one in pooled() if one.width == 7)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(decomposition, "SINGLE_FROM", {"cpu": 7})
        assert one.cost(0, 1) < one.cost(0, 0) == 7**3
        one.device = torch.device("cuda")
        assert one.cost(0, 1) == one.cost(0, 0)


def test_how_many_are_solved_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [matrices_at_a_time(width, torch.device("cuda")) for width in (768, 1600, 4096)] == [14, 3, 1]
    assert matrices_at_a_time(64, torch.device("cpu")) == 1
    found = []
    for number in (1, 2, 100):
        monkeypatch.setattr(decomposition, "matrices_at_a_time", lambda width, device, number=number: number)
        solved = Decomposition(pooled(), num_vectors=2)
        found.append(len(list(solved.steps())))
        spectra = solved.spectra()
        if number == 1:
            expected = spectra
        for name, one in spectra.items():
            np.testing.assert_allclose(one.values, expected[name].values, rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(one.leave_one_out, expected[name].leave_one_out, rtol=1e-12, atol=1e-12)
    assert found[0] > found[1] > found[2] == len(pooled())


def test_what_cannot_be_solved_together_is_solved_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Decomposition(pooled())
    expected.solve()
    solve = Decomposition._solve

    def failing(self: Decomposition, some: list[decomposition.Matrix]) -> Tensor:
        if any((one.width, one.layer, one.union) == (0, 1, 2) for one in some):
            raise MemoryError("no memory")
        return solve(self, some)

    monkeypatch.setattr(Decomposition, "_solve", failing)
    monkeypatch.setattr(decomposition, "matrices_at_a_time", lambda width, device: 100)
    found = Decomposition(pooled())
    found.solve()
    lost = found.pooled[0].names[1]
    whole = expected.spectra()
    assert whole[lost].failure is None
    for name, one in found.spectra().items():
        assert one.failure == ("no memory" if name == lost else whole[name].failure)
        if name != lost:
            np.testing.assert_allclose(one.values, whole[name].values, rtol=1e-12, atol=1e-12)


def test_what_nobody_has_solved_is_no_spectrum_of_zeros() -> None:
    found = Decomposition(pooled()).spectra()
    reasons = {name: one.failure for name, one in found.items()}
    assert reasons == dict.fromkeys(reasons, "no rank has solved it")
    assert len(reasons) == sum(WIDTHS.values())


def test_what_one_rank_cannot_solve_is_missing_on_both_with_its_reason(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        for name, arrays in seen["failing"]["spectra"].items():
            if name.startswith(f"{FAILING}."):
                assert arrays["failure"] == "rank 1: no memory"
                assert len(arrays["values"]) == 0
            else:
                np.testing.assert_equal(arrays, seen["plain"]["spectra"][name])


def test_an_error_costs_the_layers_of_its_width_alone() -> None:
    spectra = solved(0, failing=True)["spectra"]
    assert {name for name, arrays in spectra.items() if arrays["failure"]} == {"7.0", "7.1", "7.2"}
    assert spectra["7.0"]["failure"] == "no memory"
