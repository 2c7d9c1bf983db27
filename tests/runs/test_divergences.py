"""Divergences between runs are SciPy's, at losses that lie where they are said to."""

from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from lightning_spectral import Run
from lightning_spectral.runs.divergences import find_divergences, losses_between
from lightning_spectral.runs.measured import BANDS, measure
from tests.runs.made_up import LAYER, made_up


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    return [Run(made_up(tmp_path / f"{n}", 1000.0 * (1 + n), 10.0, 1.0 + 0.1 * n)) for n in range(3)]


def test_losses_are_those_after_three_quarters_and_half_of_the_tokens(runs: list[Run]) -> None:
    """From 2.0 to 1.0 these runs go from a quarter to all of their tokens, each in its own."""
    lowest, *others = losses_between(runs, 2.0, 1.0)
    assert lowest == 1.0
    for loss, share in zip(others, (0.25 + 0.75 * 0.75, 0.25 + 0.75 * 0.5), strict=True):
        assert [run.tokens_to(loss) for run in runs] == pytest.approx([share * 1000 * (1 + n) for n in range(3)])


@pytest.mark.parametrize(("highest", "lowest"), [(1.0, 1.0), (-np.inf, 1.0), (9.0, 1.0)])
def test_without_a_stretch_in_common_one_loss_stands_for_three(runs: list[Run], highest: float, lowest: float) -> None:
    assert losses_between(runs, highest, lowest) == [lowest] * 3


def test_divergences_are_those_of_scipy_and_what_is_missing_is_left_out(runs: list[Run]) -> None:
    every = [measure(run, 1.0, ["activation"], {"activation": BANDS}) for run in runs]
    found = find_divergences(every, "activation", [LAYER], [1.0, 1.3, 0.1], (2, 1))
    for number, loss in enumerate((1.0, 1.3)):
        values = [run.at_loss(loss).spectrum("activation", LAYER).values.numpy() for run in runs]
        expected = [[jensenshannon(one, other) ** 2 for other in values] for one in values]
        np.testing.assert_allclose(found.matrices[number], expected, rtol=1e-6, atol=1e-12)
    assert np.isnan(found.matrices[2]).all()  # never reached
    assert np.isnan(find_divergences(every, "activation", [], [1.0], (2, 1)).matrices).all()
