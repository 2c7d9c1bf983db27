"""Sampling floors: a slow twin, and how close they are to what processes that do not change show."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from benchmarks.findings.stationary import PROCESSES, drawn, power, sample_of
from lightning_spectral.functional import (
    Spectrum,
    angle_floor,
    js_divergence,
    js_floor,
    overlap_floor,
    principal_angles,
    subspace_overlap,
)
from tests import _reference

FLOORS = [js_floor, overlap_floor, angle_floor]


@pytest.mark.parametrize(
    ("name", "factors"),
    [("steep", (8, 8, 4)), ("dominated, rank 1", (7, 5, 2.5)), ("many rows", (5, 6, math.inf))],
)
def test_a_separated_spectrum_has_tight_floors(name, factors):
    # A squared normal exceeds its median 8.4 times in one case of twenty even if its scale is known.
    first, second = drawn(PROCESSES[name])
    found = (
        js_floor(first, second).median() / js_divergence(first.values, second.values).median(),
        (1 - overlap_floor(first, second)).median() / (1 - subspace_overlap(first.vectors, second.vectors)).median(),
        angle_floor(first, second).median() / principal_angles(first.vectors, second.vectors)[:, 0].median(),
    )
    assert all(1 < ratio < factor for ratio, factor in zip(found, factors, strict=True)), found


def test_a_pair_that_is_equal_at_the_cut_may_turn_freely_and_costs_its_own_direction_only():
    first, second = drawn(PROCESSES["equal at the cut, rank 1"]._replace(rank=2, eigenvalues=power(32, 3.0, r3=1)))
    assert angle_floor(first, second).median() == pytest.approx(math.pi / 2)
    assert overlap_floor(first, second).median() == pytest.approx(1 / 2, abs=0.05)


@pytest.mark.parametrize("angle", [0.2, 0.4])
def test_a_rotation_beyond_the_floor_is_seen(angle):
    process = PROCESSES["steep"]
    first, second = drawn(process)
    turn = np.eye(32)
    turn[np.ix_([2, 9], [2, 9])] = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    turned = dataclasses.replace(
        second,
        vectors=torch.tensor(turn) @ second.vectors,
        leave_one_out_vectors=torch.tensor(turn) @ second.leave_one_out_vectors,
    )
    seen = principal_angles(first.vectors, turned.vectors)[:, 0] > angle_floor(first, turned)
    torch.testing.assert_close(angle_floor(first, turned), angle_floor(first, second))
    assert int(seen.sum()) >= {0.2: 10, 0.4: 90}[angle]


def twin(samples: list[list[np.ndarray]], rank: int) -> tuple[float, float, float]:
    """The floors of one or two samples, given as the rows of each group, one pair of groups at a time."""

    def eigh(groups):
        values, vectors = np.linalg.eigh(np.cov(np.concatenate(groups), rowvar=False))
        return values[::-1], vectors[:, ::-1][:, :rank]

    js, loss, squares, degrees, shares = [], [], [], [], []
    for groups in samples:
        values, _ = eigh(groups)
        without = [eigh(groups[:g] + groups[g + 1 :]) for g in range(len(groups))]
        scale = (len(groups) - 1) ** 2 / len(groups)
        pairs = list(itertools.combinations(without, 2))
        angles = [scipy.linalg.subspace_angles(a[1], b[1]) for a, b in pairs]
        js.append(scale * np.mean([_reference.js_divergence(a[0], b[0]) for a, b in pairs]))
        loss.append(scale * np.mean([np.sum(np.sin(angle) ** 2) for angle in angles]))
        squares.append(scale * np.mean([angle[0] ** 2 for angle in angles]))
        p = values / values.sum()
        w = np.array([[a * b / (a - b) ** 2 for b in values[rank:]] for a in values[:rank]])
        row = w[w.sum(1).argmax()]
        parts = (np.linalg.eigvalsh(np.diag(p) - np.outer(p, p)), w.ravel(), row)
        degrees.append([max(1, part.sum() / np.sqrt((part**2).sum())) for part in parts])
        shares.append(w / w.sum())
    dof = len(samples) * (len(samples[0]) - 1)
    quantiles = [scipy.stats.f.ppf(0.95, nu, nu * dof) for nu in np.min(degrees, axis=0)]
    limits = [np.mean(expected) * quantile for expected, quantile in zip((js, loss, squares), quantiles, strict=True)]
    spread = limits[1] * np.mean(shares, axis=0)
    lost = min(sum(turned(x) ** 2 for x in spread.sum(axis)) for axis in (0, 1))
    most = min(rank, len(values) - rank)
    return min(limits[0], math.log(2)), 1 - min(lost, most) / rank, math.asin(turned(limits[2]))


def turned(square: float) -> float:
    """Sine of the angle that a perturbation allows whose square, over that of the gap, is given."""
    return math.sin(math.asin(2 * math.sqrt(square)) / 2) if square < 0.25 else 1.0


@pytest.mark.parametrize("num_samples", [1, 2])
@pytest.mark.parametrize("name", ["few rows", "many rows", "steep", "equal at the cut, 2 groups", "3 groups"])
def test_floors_equal_a_twin(name, num_samples):
    process = PROCESSES[name]
    rng = np.random.default_rng(1)
    groups = [process.draw(rng) for _ in range(num_samples)]
    samples = [sample_of(group, process.rank) for group in groups]
    expected = twin([list(group) for group in groups], process.rank)
    assert [float(floor(*samples)) for floor in FLOORS] == pytest.approx(expected, rel=1e-6)


def test_with_two_groups_the_expectation_is_half_the_distance_of_the_halves():
    groups = PROCESSES["2 groups"].draw(np.random.default_rng(0))
    sample = sample_of(groups, 5)
    halves = [_reference.covariance_spectrum(half) for half in groups]
    p = sample.values / sample.values.sum()
    norm = torch.linalg.matrix_norm(torch.diag(p) - torch.outer(p, p))
    nu = float((1 - p.square().sum()) / norm)
    expected = _reference.js_divergence(*halves) / 2 * scipy.stats.f.ppf(0.95, nu, nu)
    assert float(js_floor(sample)) == pytest.approx(expected, rel=1e-9)
    assert float(js_floor(Spectrum(sample.values, sample.leave_one_out))) == float(js_floor(sample))


def test_a_batch_equals_a_loop():
    first, second = drawn(PROCESSES["few rows"], num_draws=3)
    for floor in FLOORS:
        single = [floor(*(one_of(s, i) for s in (first, second))) for i in range(3)]
        torch.testing.assert_close(floor(first, second), torch.stack(single), rtol=1e-9, atol=1e-9)


def one_of(batch: Spectrum, index: int) -> Spectrum:
    parts = (batch.values, batch.leave_one_out, batch.vectors, batch.leave_one_out_vectors)
    return Spectrum(*(part[index] for part in parts))


def some_groups(sample: Spectrum, num_groups: int) -> Spectrum:
    return dataclasses.replace(
        sample,
        leave_one_out=sample.leave_one_out[..., :num_groups, :],
        leave_one_out_vectors=sample.leave_one_out_vectors[..., :num_groups, :, :],
    )


@pytest.mark.parametrize("floor", FLOORS)
def test_fewer_than_two_groups_have_no_floor_and_are_passed_over_beside_more(floor):
    first, second = drawn(PROCESSES["few rows"], num_draws=2)
    for num_groups in (0, 1):
        few = some_groups(second, num_groups)
        assert floor(few).isnan().all()
        assert floor(few, few).shape == (2,)
        assert floor(few, few).isnan().all()
        assert floor(first, few).isfinite().all()


def test_limits_are_those_that_distances_have():
    wild = Spectrum(
        torch.tensor([4.0, 3.0, 2.0]),
        torch.tensor([[9.0, 0.0, 0.0], [1.0, 1.0, 1.0]]),
        torch.eye(3)[:, :2],
        torch.stack([torch.eye(3)[:, :2], torch.eye(3)[:, 1:]]),
    )
    assert float(js_floor(wild)) == pytest.approx(math.log(2))
    assert float(overlap_floor(wild)) == pytest.approx(1 / 2)  # two planes in space share a line
    assert float(angle_floor(wild)) == pytest.approx(math.pi / 2)


@pytest.mark.parametrize("values", [[4.0, 2.0, 2.0, 0.0], [4.0, 0.0, 0.0, 0.0], [4.0, 3.0, 2.0, 1.0]], ids=str)
@pytest.mark.parametrize("rank", [2, 4])
def test_no_scatter_is_no_floor_above_zero(values, rank):
    vectors = torch.eye(4)[:, :rank]
    sample = Spectrum(torch.tensor(values), torch.tensor([values] * 3), vectors, vectors.expand(3, 4, rank))
    assert [float(floor(sample, sample)) for floor in FLOORS] == pytest.approx([0, 1, 0], abs=1e-7)


@pytest.mark.parametrize("floor", FLOORS)
def test_what_is_not_known_has_no_floor(floor):
    unknown = torch.full((3, 4, 2), torch.nan)
    sample = Spectrum(unknown[0, :, 0], unknown[..., 0], unknown[0], unknown)
    assert floor(sample).isnan()


@pytest.mark.parametrize("floor", [overlap_floor, angle_floor])
def test_subspaces_need_vectors(floor):
    with pytest.raises(ValueError, match=r"^samples must have vectors and leave_one_out_vectors, got None: "):
        floor(Spectrum(torch.ones(3), torch.ones(2, 3)))
