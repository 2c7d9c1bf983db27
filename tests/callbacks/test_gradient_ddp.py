"""Two real gloo processes under Lightning's ddp strategy: singular values are those of one process with all rows."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_spectral.functional import noise_sums
from tests.callbacks import gradient_ddp_run
from tests.callbacks.gradient_ddp_run import METHODS, NUM_SAMPLES
from tests.limit import LIMIT


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ddp")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run(
        [sys.executable, gradient_ddp_run.__file__, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def expected_rows(ranks: list[dict], prefix: str) -> np.ndarray:
    """4 samples of rank 0 and 3 of rank 1: from the last two steps in training, the first of them in validation."""
    parts = []
    for found, share in zip(ranks, (4, 3), strict=True):
        if prefix.endswith("validate/"):
            rows = found["validation"]
        else:
            steps = found["before" if prefix == "hooks/" else "after"]
            # The first step has 3 + 2 samples: two steps hold the 7 asked for.
            rows = torch.cat([steps[2], steps[3]])
        parts.append(rows[:share])
    return torch.cat(parts).double().numpy()


@pytest.mark.parametrize(
    "prefix", [*(f"{method}{stage}/" for method in METHODS for stage in ("", " validate")), "elsewhere/"]
)
def test_singular_values_are_those_of_all_ranks_rows(ranks: list[dict], prefix: str) -> None:
    rows = expected_rows(ranks, prefix)
    assert len(rows) == NUM_SAMPLES
    for found in ranks:
        values = found["spectra"][prefix].numpy()
        np.testing.assert_allclose(values, np.linalg.svd(rows, compute_uv=False), rtol=1e-5, atol=1e-7)
        assert found["metrics"][f"{prefix}gradient/net.0.weight/num_samples"] == NUM_SAMPLES


@pytest.mark.parametrize("prefix", [f"{method}{stage}/" for method in METHODS for stage in ("", " validate")])
def test_noise_scale_and_interval_are_those_of_one_process_with_all_rows(ranks: list[dict], prefix: str) -> None:
    rows = torch.tensor(expected_rows(ranks, prefix))
    # Four samples and three, each cut into three stretches.
    groups = torch.tensor([0, 0, 1, 2, 0, 1, 2])
    sums = noise_sums(rows @ rows.T, groups)
    numbers = (sums.noise_scale, *sums.interval, sums.moments_between.noise_scale)
    expected = dict(zip(("", "_low", "_high", "_smoothed"), map(float, numbers), strict=True))
    for found in ranks:
        metrics = {end: found["metrics"][f"{prefix}gradient/net.0.weight/noise_scale{end}"] for end in expected}
        assert metrics == pytest.approx(expected, rel=1e-3)


def test_the_batch_is_that_of_all_ranks(ranks: list[dict]) -> None:
    sizes = [size for batches in gradient_ddp_run.TRAIN_BATCHES.values() for size in batches]
    for found in ranks:
        in_batch = found["metrics"]["vmap/a_overview/tokens_in_batch"]
        assert in_batch == sum(sizes) / gradient_ddp_run.STEPS  # samples, for these have no tokens


def test_what_one_rank_cannot_measure_is_nan_on_all(ranks: list[dict]) -> None:
    reasons = [found["broken"].partition(" (one sample alone")[0] for found in ranks]
    assert reasons == ["rank 1: rank 1 cannot", "rank 1 cannot"]
    assert [found["metrics"]["broken/gradient/failed"] for found in ranks] == [1, 1]


@pytest.mark.parametrize("stage", ["train", "validate"])
def test_one_sample_that_one_rank_cannot_take_is_nan_on_all(ranks: list[dict], stage: str) -> None:
    # In training its rows of the step before are there already; nothing hangs, and the run is none the worse.
    reasons = [found["fussy"][f"{stage}/"].partition(" (one sample alone")[0] for found in ranks]
    assert reasons == ["rank 1: rank 1 cannot", "rank 1 cannot"]
    for found in ranks:
        assert found["fussy metrics"][f"{stage}/gradient/failed"] == 1
        assert np.isnan(found["fussy metrics"][f"{stage}/gradient/net.0.weight/rankme"])
        assert found["fussy identical"]


def test_both_ranks_come_to_the_same_numbers(ranks: list[dict]) -> None:
    np.testing.assert_equal(ranks[0]["metrics"], ranks[1]["metrics"])


def test_weights_and_gradients_are_bit_identical_to_a_run_without(ranks: list[dict]) -> None:
    assert all(found["identical"] and found["gradients"] for found in ranks)
