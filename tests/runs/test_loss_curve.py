"""The few losses of a run that are kept, and where they lead: the same while it trains and read back."""

import math

import numpy as np
import pytest
import torch

from lightning_spectral.functional import anchored_power_law
from lightning_spectral.runs.loss_curve import NUM_LOSSES, LossCurve


def test_losses_that_are_kept_lie_far_apart() -> None:
    curve = LossCurve()
    for step in range(1, 200):
        curve.add(step, 10.0 * step, 1 / step)
    steps = [int(point[0]) for point in curve.points]
    assert len(steps) == NUM_LOSSES == 8
    assert steps[0] == 1
    assert steps[-2:] == [198, 199]
    assert any(199 / 4 < step < 198 for step in steps)


def test_an_end_leaves_the_curve_as_it_is() -> None:
    curve = LossCurve()
    for step in range(1, 20):
        curve.add(step, 10.0 * step, 1 / step)
    before = [list(point) for point in curve.points]
    ended = curve.until(195.0, 0.05)
    assert curve.points == before
    assert ended.points[-1][1:] == [195.0, 0.05]
    assert len(ended.points) == NUM_LOSSES
    again = LossCurve(before)
    again.add(math.nan, 195.0, 0.05)
    assert [point[1:] for point in again.points] == [point[1:] for point in ended.points]


def test_it_leads_where_its_power_law_does() -> None:
    """All points on one law: whichever are kept, the law is theirs."""
    curve = LossCurve()
    tokens = np.geomspace(1e3, 4e5, 50)
    for step, at in enumerate(tokens):
        curve.add(step, float(at), 100 * float(at) ** -0.25)
    assert curve.log_tokens_to(2.0) == pytest.approx(math.log((2 / 100) ** -4))
    kept = torch.tensor(curve.points, dtype=torch.float64)
    assert curve.log_tokens_to(2.0) == pytest.approx(math.log(anchored_power_law(kept[:, 1], kept[:, 2], 2.0)))


def test_without_a_fall_it_does_not_say() -> None:
    assert math.isnan(LossCurve().log_tokens_to(1.0))
    assert math.isnan(LossCurve([[1.0, 10.0, 3.0]]).log_tokens_to(1.0))
    assert math.isnan(LossCurve([[0.0, 0.0, 4.0], [1.0, 10.0, 3.0]]).log_tokens_to(1.0))
