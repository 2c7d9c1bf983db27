"""Ratios, p-values and leads against naive sums over pairs of runs; what moved, and what leads, where it is known."""

from itertools import combinations, product
from math import log, nan

import numpy as np
import pytest

from lightning_spectral.runs.divergences import Divergences
from lightning_spectral.runs.movement import LEAD, Movement, find_lead, largest_p, move
from lightning_spectral.runs.statistics import Variance

SIZES = [(2, 2), (3, 3), (4, 4), (3, 5), (1, 3), (4, 2)]


def divergences(
    sizes: tuple[int, int], shift: float = 0.0, seed: int = 0, num_others: int = 0, correlation: float = 0.0
) -> Divergences:
    """Squared distances of points that scatter in five directions about the mean of their side, at three losses."""
    generator = np.random.default_rng(seed)
    points = generator.standard_normal((sum(sizes) + num_others, 5))
    if correlation:
        points[sizes[0] :] = correlation * points[: sizes[0]] + (1 - correlation**2) ** 0.5 * points[sizes[0] :]
    points[sizes[0] : sum(sizes), 0] += shift
    matrices = []
    for _ in range(3):
        seen = points + 0.05 * generator.standard_normal(points.shape)
        matrices.append(((seen[:, None] - seen[None]) ** 2).sum(-1))
    return Divergences((1.0, 2.0, 3.0), np.stack(matrices), sizes, bool(correlation))


def ratio(matrix: np.ndarray, base: list[int], variant: list[int], others: list[int], is_paired: bool = False) -> float:
    """A mean over pairs between sides over a mean over pairs within, one by one."""
    between = [
        matrix[one, other]
        for (i, one), (j, other) in product(enumerate(base), enumerate(variant))
        if not (is_paired and i == j)
    ]
    within = [matrix[pair] for side in (base, variant, others) for pair in combinations(side, 2)]
    return float(np.mean(between) / np.mean(within))


@pytest.mark.parametrize("num_others", [0, 3])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_ratios_and_p_values_are_those_of_sums_over_pairs(sizes: tuple[int, int], num_others: int) -> None:
    found = divergences(sizes, 1.0, num_others=num_others)
    runs, others = list(range(sum(sizes))), list(range(sum(sizes), sum(sizes) + num_others))
    movement = move("activation", found, False)
    for number, matrix in enumerate(found.matrices):
        every = [
            ratio(matrix, list(base), [run for run in runs if run not in base], others)
            for base in combinations(runs, sizes[0])
        ]
        assert movement.ratios[number] == pytest.approx(every[0])
        if movement.tested_by == "splits":
            assert movement.p_values[number] == pytest.approx(np.mean(np.array(every) >= every[0] * (1 - 1e-9)))


def test_of_pairs_labels_are_exchanged_within_them_and_partners_do_not_count() -> None:
    found = divergences((7, 7), 0.6, correlation=0.9)
    movement = move("activation", found, False)
    assert (movement.tested_by, movement.num_ways) == ("flips", 64)
    for number, matrix in enumerate(found.matrices):
        every = []
        for flipped in product((0, 1), repeat=7):
            base, variant = ([i + 7 * (flip ^ side) for i, flip in enumerate(flipped)] for side in (0, 1))
            every.append(ratio(matrix, base, variant, [], is_paired=True))
        assert movement.ratios[number] == pytest.approx(every[0])
        assert movement.p_values[number] == pytest.approx(np.mean(np.array(every) >= every[0] * (1 - 1e-9)))


def test_fewer_pairs_are_tested_as_single_runs() -> None:
    found = divergences((6, 6), 1.0, correlation=0.5)
    movement, alone = move("activation", found, False), move("activation", found.without_pairs(), False)
    assert (movement.tested_by, movement.num_ways) == ("splits", 462)
    assert movement.p_values == alone.p_values
    assert all(one > other for one, other in zip(movement.ratios, alone.ratios, strict=True))  # partners are alike


def test_a_recorded_scatter_is_pooled_by_degrees_of_freedom() -> None:
    found = divergences((2, 2), 1.0)
    recorded = Divergences(found.losses, found.matrices, (2, 2), recorded=Variance(3.0, 6))
    for number, matrix in enumerate(found.matrices):
        between, within = matrix[:2, 2:].mean(), (matrix[0, 1] + matrix[2, 3]) / 2
        assert move("activation", recorded, False).ratios[number] == pytest.approx(between / ((2 * within + 36) / 8))
    alone = Divergences(found.losses, found.matrices[:, :2, :2], (1, 1), recorded=Variance(3.0, 6))
    assert move("activation", alone, False).ratios == pytest.approx(found.matrices[:, 0, 1] / 6)
    unknown = Divergences(found.losses, found.matrices[:, :2, :2], (1, 1))
    assert not move("activation", unknown, True).has_moved


@pytest.mark.parametrize(
    ("num_ways", "largest"), [(3, nan), (10, nan), (34, nan), (35, 1 / 35), (36, 1 / 36), (40, 0.025), (126, 0.025)]
)
def test_four_seeds_a_side_are_the_fewest_for_a_p_value(num_ways: int, largest: float) -> None:
    assert largest_p(num_ways) == pytest.approx(largest, nan_ok=True)


@pytest.mark.parametrize("lies_beyond_floors", [True, False])
@pytest.mark.parametrize("num_seeds", [2, 3])
def test_with_fewer_seeds_floors_stand_for_it(num_seeds: int, lies_beyond_floors: bool) -> None:
    far, near = (move("activation", divergences((num_seeds,) * 2, shift), lies_beyond_floors) for shift in (20, 0))
    assert far.tested_by == near.tested_by == "floors"
    assert np.isnan(far.p_values).all()
    for movement, is_far in ((far, True), (near, num_seeds == 2)):  # of two seeds a side ratios scatter widely
        assert (sum(ratio >= 1.5 for ratio in movement.ratios) >= 2) == is_far
        assert movement.has_moved == (is_far and lies_beyond_floors)


def test_what_is_far_apart_at_one_loss_has_not_moved() -> None:
    far, near = divergences((4, 4), 8.0).matrices[0], divergences((4, 4)).matrices[0]
    for matrices, has_moved in (((far, near, near), False), ((far, near, far), True), ((far, far * nan, far), True)):
        found = Divergences((1.0, 2.0, 3.0), np.stack(matrices), (4, 4))
        assert move("activation", found, False).has_moved == has_moved


def test_a_small_move_has_not_moved_however_sure_it_is() -> None:
    found = divergences((12, 12), 1.8, seed=2)
    movement = move("activation", found, True)
    assert max(movement.p_values) < 0.002
    assert max(movement.ratios) < 1.5
    assert not movement.has_moved


def leads(shifts: tuple[float, float], num_seeds: int = 4) -> str:
    found = {
        kind: divergences((num_seeds,) * 2, shift, seed)
        for seed, (kind, shift) in enumerate(zip(("activation", "gradient"), shifts, strict=True))
    }
    return find_lead({kind: move(kind, one, shifts[0] > 9) for kind, one in found.items()}, found).led_by


@pytest.mark.parametrize(
    ("shifts", "led_by"),
    [
        ((8, 0), "activation-led"),
        ((0, 8), "gradient-led"),
        ((8, 8), "mixed"),
        ((0, 0), "unmoved"),
        ((30, 6), "activation-led"),
    ],
    ids=str,
)
def test_what_moved_most_leads(shifts: tuple[float, float], led_by: str) -> None:
    assert leads(shifts) == led_by


def test_a_lead_is_the_mean_difference_of_logarithms_and_its_interval_holds_it() -> None:
    found = {"activation": divergences((4, 4), 8.0), "gradient": divergences((4, 4), 7.0, seed=1)}
    movements = {kind: move(kind, one, False) for kind, one in found.items()}
    lead = find_lead(movements, found)
    first, second = (np.log(one.ratios) for one in movements.values())
    assert lead.difference == pytest.approx((first - second).mean())
    assert lead.low < lead.difference < lead.high
    assert 0 < lead.difference < LEAD
    assert lead.led_by == "mixed"
    assert find_lead(movements, found) == lead  # draws are the same each time
    assert movements["activation"].ratio == pytest.approx(np.exp(first.mean()))


def test_a_kind_that_is_alone_leads_if_it_moved() -> None:
    for shift, led_by in ((8.0, "gradient-led"), (0.0, "unmoved")):
        found = {"gradient": divergences((4, 4), shift)}
        assert find_lead({"gradient": move("gradient", found["gradient"], False)}, found).led_by == led_by
    assert find_lead({}, {}).led_by == ""


@pytest.mark.parametrize("is_sure", [True, False])
def test_a_lead_that_is_not_sure_is_none(is_sure: bool) -> None:
    """Of seeds of which one alone lies apart the interval holds zero."""
    found = {"activation": divergences((4, 4), 8.0), "gradient": divergences((4, 4), 8.0, seed=1)}
    matrices = found["gradient"].matrices.copy()
    if is_sure:
        matrices = divergences((4, 4), 2.0, seed=1).matrices
    found["gradient"] = Divergences((1.0, 2.0, 3.0), matrices, (4, 4))
    movements = {
        kind: Movement(kind, [1.0] * 3, [r] * 3, [nan] * 3, "splits", 35, True)
        for kind, r in (("activation", 9.0), ("gradient", 3.0))
    }
    lead = find_lead(movements, found)
    assert lead.difference == pytest.approx(log(3))
    assert lead.led_by == ("activation-led" if is_sure else "mixed")
