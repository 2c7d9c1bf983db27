"""Histograms against counting by hand."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_spectral.boards import log10_histogram
from lightning_spectral.runs.kinds import KINDS


@pytest.mark.parametrize("kind", ["activation", "gradient"])
def test_a_bin_holds_what_lies_left_of_its_edge(spectrum: Tensor, kind: str) -> None:
    lowest, highest = KINDS[kind].edges
    histogram = log10_histogram(spectrum, lowest, highest)
    assert histogram is not None
    edges = [round(lowest + index / 5, 1) for index in range(round(5 * (highest - lowest)) + 1)]
    assert histogram.edges == edges
    outer = [-np.inf, *edges[:-1], np.inf]
    with np.errstate(divide="ignore"):
        logs = np.log10(spectrum.numpy())
    by_hand = [((logs > left) & (logs <= right)).sum() for left, right in pairwise(outer)]
    by_hand[0] += (logs == -np.inf).sum()
    assert histogram.counts.tolist() == by_hand
    assert histogram.counts.sum() == len(spectrum)


def test_all_bins_are_equally_wide() -> None:
    histogram = log10_histogram(torch.ones(1), -7.0, 4.0)
    assert histogram is not None
    np.testing.assert_allclose(np.diff(histogram.bounds), 0.2)
    assert len(histogram.bounds) == len(histogram.counts) + 1
    assert (histogram.lowest, histogram.highest) == (histogram.bounds[0], histogram.bounds[-1])
    assert histogram.logs.min() >= histogram.lowest


@pytest.mark.parametrize("values", [[], [1.0, torch.nan], [torch.inf]], ids=["none", "NaN", "inf"])
def test_there_is_none_of_what_cannot_be_counted(values: list[float]) -> None:
    assert log10_histogram(torch.tensor(values), -7.0, 4.0) is None
