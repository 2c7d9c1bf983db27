"""Histograms against counting by hand."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_spectral.boards import EIGENVALUE_EDGES, SINGULAR_VALUE_EDGES, log10_histogram


@pytest.mark.parametrize("edges", [EIGENVALUE_EDGES, SINGULAR_VALUE_EDGES], ids=["eigenvalues", "singular values"])
def test_a_bin_holds_what_lies_left_of_its_edge(spectrum: Tensor, edges: list[float]) -> None:
    histogram = log10_histogram(spectrum, edges)
    assert histogram is not None
    outer = [-np.inf, *edges[:-1], np.inf]
    with np.errstate(divide="ignore"):
        logs = np.log10(spectrum.numpy())
    by_hand = [((logs > left) & (logs <= right)).sum() for left, right in pairwise(outer)]
    by_hand[0] += (logs == -np.inf).sum()
    assert histogram.counts.tolist() == by_hand
    assert histogram.counts.sum() == len(spectrum)


def test_all_bins_are_equally_wide() -> None:
    histogram = log10_histogram(torch.ones(1), EIGENVALUE_EDGES)
    assert histogram is not None
    np.testing.assert_allclose(np.diff(histogram.bounds), 0.2)
    assert len(histogram.bounds) == len(histogram.counts) + 1
    assert (histogram.lowest, histogram.highest) == (histogram.bounds[0], histogram.bounds[-1])
    assert histogram.logs.min() >= histogram.lowest


@pytest.mark.parametrize("values", [[], [1.0, torch.nan], [torch.inf]], ids=["none", "NaN", "inf"])
def test_there_is_none_of_what_cannot_be_counted(values: list[float]) -> None:
    assert log10_histogram(torch.tensor(values), EIGENVALUE_EDGES) is None
