"""PerSampleGradientSpectrum: batches, merged metrics and gloo ranks give the singular values of all rows."""

import copy
import pickle
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lightning_spectral.functional import gram
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


def test_a_metric_that_was_copied_saved_or_reset_sees_its_own_rows() -> None:
    rows, metric = rows_of(9), PerSampleGradientSpectrum()
    metric.update(rows_of(3, 7))
    metric.compute()
    metric.reset()
    metric.update(rows[:4])
    other, loaded = copy.deepcopy(metric), PerSampleGradientSpectrum()
    other.update(rows_of(1, seed=5))
    metric.update(rows[4:])
    metric.persistent(True)
    loaded.persistent(True)
    loaded.load_state_dict(metric.state_dict())
    loaded.update(rows[:0])
    for each in (metric, loaded):
        np.testing.assert_allclose(each.compute().numpy(), svd(rows), rtol=1e-8)
    np.testing.assert_allclose(other.compute().numpy(), svd(torch.cat([rows[:4], rows_of(1, seed=5)])), rtol=1e-8)


def test_forward_returns_the_spectrum_of_its_batch_and_keeps_all_rows() -> None:
    rows, metric = rows_of(9), PerSampleGradientSpectrum()
    for batch in rows.split(4):
        np.testing.assert_allclose(np.atleast_1d(metric(batch).numpy()), svd(batch), rtol=1e-8)
    np.testing.assert_allclose(metric.compute().numpy(), svd(rows), rtol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_rows_are_kept_in_their_type_and_without_a_graph(dtype: torch.dtype) -> None:
    rows, metric = (1e3 * rows_of(6)).to(dtype), PerSampleGradientSpectrum()
    metric.update(rows.clone().requires_grad_())
    assert metric.rows[0].dtype == dtype
    assert not metric.rows[0].requires_grad
    np.testing.assert_allclose(metric.compute().numpy(), svd(rows), rtol=1e-8)


def test_rows_that_are_not_finite_give_nan_with_the_reason() -> None:
    metric = PerSampleGradientSpectrum()
    metric.update(torch.full((2, 3), torch.nan))
    with pytest.warns(UserWarning, match="returns NaN: the rows hold NaN or infinity"):
        assert metric.compute().isnan().all()


def test_without_rows_there_is_no_spectrum() -> None:
    metric = PerSampleGradientSpectrum()
    with pytest.warns(UserWarning, match="was called before the ``update`` method"):
        assert metric.compute().shape == (0,)


@pytest.mark.parametrize("shape", [(3,), (3, 4, 5), (3, 4)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    metric = PerSampleGradientSpectrum()
    metric.update(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"g must have shape \(samples, 5\), got") as caught:
        metric.update(torch.zeros(shape))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(3,), (3, 4, 5)])
def test_what_is_no_matrix_is_refused_at_once(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"g must have shape \(samples, P\), got"):
        PerSampleGradientSpectrum().update(torch.zeros(shape))


def test_merged_rows_set_the_length_of_those_to_come() -> None:
    one, two = PerSampleGradientSpectrum(), PerSampleGradientSpectrum()
    two.update(torch.ones(2, 4))
    one.merge_state(two)
    with pytest.raises(ValueError, match=r"g must have shape \(samples, 4\), got \(2, 5\)"):
        one.update(torch.ones(2, 5))
    assert one.compute().shape == (2,)


def test_one_process_needs_no_group() -> None:
    rows = rows_of(4)
    share = sum_over_ranks(gram_share(rows, [4]))
    torch.testing.assert_close(share, rows.double() @ rows.double().T, rtol=1e-12, atol=1e-14)


CASES = {2: [(5, 2), (0, 4), (1, 1), (0, 0)], 3: [(4, 3, 3), (4, 0, 3), (1, 5, 2), (0, 0, 2)]}
SLABS = [1, 64, 2**23]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("slab", SLABS)
def test_a_gram_by_blocks_of_columns_is_that_of_all(slab: int, dtype: torch.dtype) -> None:
    rows, elsewhere, seen = rows_of(9, 101).to(dtype), torch.device("cpu", 0), []

    def watched(block: torch.Tensor) -> torch.Tensor:
        seen.append(block.shape[1])
        return gram(block)

    with patch.object(exchange, "SLAB_NUMBERS", slab), patch.object(exchange, "gram", watched):
        found = exchange.gram_blocks(rows, elsewhere)
    torch.testing.assert_close(found, gram(rows), rtol=1e-12, atol=1e-14)
    assert sum(seen) == 101
    assert max(seen) == {1: 1, 64: 7, 2**23: 101}[slab]


"""One column at a time, several slabs with a remainder, all at once."""


def metric_of(rows: torch.Tensor, **kwargs: Any) -> PerSampleGradientSpectrum:
    metric = PerSampleGradientSpectrum(**kwargs)
    if len(rows):
        metric.update(rows)
    else:
        metric._update_count = 1  # what torchmetrics warns of on a rank without rows
    return metric


def exchanged(rows: torch.Tensor, counts: tuple[int, ...], **kwargs: Any) -> tuple[np.ndarray, list[int]]:
    """The Gram of all ranks' rows, and how many numbers each exchange brought to this rank."""
    received, exchange_slab = [], dist.all_to_all_single

    def recording(output: torch.Tensor, *args: Any, **options: Any) -> Any:
        received.append(output.numel())
        return exchange_slab(output, *args, **options)

    with patch.object(dist, "all_to_all_single", recording):
        return sum_over_ranks(gram_share(rows, list(counts), **kwargs)).numpy(), received


def measure(rank: int) -> dict[str, Any]:
    """What one process sees of every case."""
    world, seen = dist.get_world_size(), {}
    for counts in CASES[world]:
        start = sum(counts[:rank])
        mine = rows_of(sum(counts))[start : start + counts[rank]]
        metric = metric_of(mine)
        seen[counts] = {
            "spectra": [np.atleast_1d(metric.compute().numpy()) for _ in range(2)],
            "kept": [rows.clone() for rows in metric.rows],
            "bfloat16": metric_of(mine.bfloat16()).compute().numpy(),
            "centred": metric_of(mine, centred=True).compute().numpy(),
        }
        for slab in SLABS:
            with patch.object(exchange, "SLAB_NUMBERS", slab):
                for dtype in (torch.float32, torch.bfloat16):
                    seen[counts][slab, dtype] = exchanged(mine.to(dtype), counts)
                seen[counts][slab, "spectrum"] = metric_of(mine).compute().numpy()
        seen[counts]["narrow"] = exchanged(mine[:, :1], counts)[0]
        seen[counts]["travelled"] = exchanged(mine, counts, dtype=torch.bfloat16)[0]
    alone = [dist.new_group([member]) for member in range(world)][rank]
    seen["alone"] = metric_of(rows_of(3, seed=rank), process_group=alone).compute().numpy()
    seen["on_step"] = PerSampleGradientSpectrum(dist_sync_on_step=True)(rows_of(2 + rank, seed=rank)).numpy()
    return seen


@pytest.fixture(scope="module", params=CASES, ids="{}_ranks".format)
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_distributed(measure, request.param)


def of_cases(ranks: list[dict[str, Any]]) -> list[tuple[tuple[int, ...], torch.Tensor, int, dict[Any, Any]]]:
    """Counts, all rows, rank and what it saw, of every case and rank."""
    return [
        (counts, rows_of(sum(counts)), rank, seen[counts])
        for counts in CASES[len(ranks)]
        for rank, seen in enumerate(ranks)
    ]


def test_ranks_spectrum_is_that_of_one_process_with_all_rows(ranks: list[dict[str, Any]]) -> None:
    for _, rows, _, seen in of_cases(ranks):
        np.testing.assert_allclose(seen["spectra"][0], svd(rows), rtol=1e-5)
        np.testing.assert_allclose(seen["bfloat16"], svd(rows.bfloat16()), rtol=1e-5)
        for slab in SLABS:
            np.testing.assert_allclose(seen[slab, "spectrum"], svd(rows), rtol=1e-5)


def test_ranks_spectrum_about_their_common_mean_is_that_of_one_process(ranks: list[dict[str, Any]]) -> None:
    for _, rows, _, seen in of_cases(ranks):
        if len(rows):
            expected = svd(rows, centred=True)
            np.testing.assert_allclose(seen["centred"], expected, rtol=1e-5, atol=1e-6 * svd(rows)[0])


def test_ranks_agree_to_the_bit_and_keep_their_own_rows(ranks: list[dict[str, Any]]) -> None:
    for counts, rows, rank, seen in of_cases(ranks):
        np.testing.assert_array_equal(seen["spectra"][0], ranks[0][counts]["spectra"][0])
        np.testing.assert_array_equal(seen["spectra"][1], seen["spectra"][0])
        start = sum(counts[:rank])
        kept = torch.cat([rows[:0], *seen["kept"]])
        assert torch.equal(kept, rows[start : start + counts[rank]])


@pytest.mark.parametrize("slab", SLABS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shares_sum_to_the_gram_of_all_rows(ranks: list[dict[str, Any]], slab: int, dtype: torch.dtype) -> None:
    for _, rows, _, seen in of_cases(ranks):
        kept = rows.to(dtype).double()
        np.testing.assert_allclose(seen[slab, dtype][0], (kept @ kept.T).numpy(), rtol=1e-12, atol=1e-14)


def test_a_rank_never_receives_more_than_a_slab(ranks: list[dict[str, Any]]) -> None:
    for counts, rows, _, seen in of_cases(ranks):
        for slab in SLABS:
            received = seen[slab, torch.float32][1]
            # A slab has at least one column.
            assert max(received) <= max(slab, len(rows))
        # Every column of every row reaches exactly one rank.
        total = sum(sum(other[counts][64, torch.float32][1]) for other in ranks)
        assert total == rows.numel()
        assert len(rows) < 3 or len(seen[64, torch.float32][1]) > 1


def test_fewer_columns_than_ranks_leave_some_with_nothing_to_multiply(ranks: list[dict[str, Any]]) -> None:
    for _, rows, _, seen in of_cases(ranks):
        column = rows[:, :1].double()
        np.testing.assert_allclose(seen["narrow"], (column @ column.T).numpy(), rtol=1e-12)


def test_rows_travel_in_the_type_asked_for(ranks: list[dict[str, Any]]) -> None:
    for _, rows, _, seen in of_cases(ranks):
        kept = rows.bfloat16().double()
        np.testing.assert_allclose(seen["travelled"], (kept @ kept.T).numpy(), rtol=1e-12, atol=1e-14)


def test_a_process_group_keeps_to_itself(ranks: list[dict[str, Any]]) -> None:
    for rank, seen in enumerate(ranks):
        np.testing.assert_allclose(seen["alone"], svd(rows_of(3, seed=rank)), rtol=1e-5)


def test_forward_that_synchronises_sees_the_step_of_all_ranks(ranks: list[dict[str, Any]]) -> None:
    expected = svd(torch.cat([rows_of(2 + rank, seed=rank) for rank in range(len(ranks))]))
    for seen in ranks:
        np.testing.assert_allclose(seen["on_step"], expected, rtol=1e-5)
