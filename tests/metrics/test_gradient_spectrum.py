"""PerSampleGradientSpectrum: batches, merged metrics and gloo ranks give the singular values of all rows."""

import pickle

import numpy as np
import pytest
import torch

from lightning_spectral.metrics import PerSampleGradientSpectrum, exchange
from lightning_spectral.metrics.exchange import gram_share, sum_over_ranks
from tests.distributed import run_distributed


def rows_of(count: int, num_columns: int = 50, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -3, num_columns)
    return torch.randn(count, num_columns, generator=generator) * scales


def svd(rows: torch.Tensor, centred: bool = False) -> np.ndarray:
    rows = rows.double().numpy()
    return np.linalg.svd(rows - rows.mean(0) if centred else rows, compute_uv=False)


@pytest.mark.parametrize("centred", [False, True])
def test_batches_give_the_spectrum_of_all_rows(centred: bool) -> None:
    rows, metric = rows_of(9), PerSampleGradientSpectrum(centred=centred)
    for batch in rows.split(4):
        metric.update(batch)
    found = metric.compute().numpy()
    np.testing.assert_allclose(found, svd(rows, centred), rtol=1e-6, atol=1e-6)


def test_merged_and_pickled_metrics_go_on() -> None:
    rows, one, two = rows_of(9), PerSampleGradientSpectrum(), PerSampleGradientSpectrum()
    one.update(rows[:4])
    two.update(rows[4:])
    one.merge_state(two)
    np.testing.assert_allclose(pickle.loads(pickle.dumps(one)).compute().numpy(), svd(rows), rtol=1e-8)
    one.reset()
    one.update(rows_of(3, 7))
    assert one.compute().shape == (3,)


def test_without_rows_there_is_no_spectrum() -> None:
    metric = PerSampleGradientSpectrum()
    with pytest.warns(UserWarning, match="was called before the ``update`` method"):
        assert metric.compute().shape == (0,)


@pytest.mark.parametrize("shape", [(3,), (3, 4, 5), (3, 4)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    metric = PerSampleGradientSpectrum()
    metric.update(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"g must have shape \(samples, 5\), got"):
        metric.update(torch.zeros(shape))


CASES = {2: [(5, 2), (0, 4), (1, 1)], 3: [(4, 3, 3), (4, 0, 3), (1, 5, 2)]}


def ranks_spectra(rank: int) -> list[list[np.ndarray]]:
    """Of each case: the metric's spectrum, and that of Grams exchanged in small slabs, of float32 and bfloat16 rows."""
    world = torch.distributed.get_world_size()
    exchange.SLAB_NUMBERS = 64
    found = []
    for counts in CASES[world]:
        start = sum(counts[:rank])
        mine = rows_of(sum(counts))[start : start + counts[rank]]
        metric = PerSampleGradientSpectrum()
        if len(mine):
            metric.update(mine)
        else:
            metric._update_count = 1  # what torchmetrics warns of on a rank without rows
        grams = [sum_over_ranks(gram_share(mine.to(dtype), list(counts))) for dtype in (torch.float32, torch.bfloat16)]
        found.append([metric.compute().numpy(), *(gram.numpy() for gram in grams), metric.compute().numpy()])
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_spectrum_is_that_of_one_process_with_all_rows(world_size: int) -> None:
    for of_rank in run_distributed(ranks_spectra, world_size):
        for counts, (spectrum, gram, rounded, again) in zip(CASES[world_size], of_rank, strict=True):
            rows = rows_of(sum(counts))
            np.testing.assert_allclose(spectrum, svd(rows), rtol=1e-5)
            np.testing.assert_array_equal(spectrum, again)
            for found, kept in ((gram, rows.double()), (rounded, rows.bfloat16().double())):
                np.testing.assert_allclose(found, (kept @ kept.T).numpy(), rtol=1e-12, atol=1e-14)
