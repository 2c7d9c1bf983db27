"""Two real gloo processes under Lightning's ddp strategy: the spectra are those of the pooled rows."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

from lightning_spectral import Run
from tests.callbacks import ddp_run
from tests.limit import LIMIT
from tests.runs.made_up import made_up


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ddp")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict]:
    for number, tokens in enumerate((40, 45, 50, 60)):
        path = folder / "references" / str(number)
        common = {"layer": "blocks.1", "num_tokens": 10_000, "normalize": False, "batch_tokens": tokens, "data": None}
        made_up(path, tokens, 1, tokens / 100, **common)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run(
        [sys.executable, ddp_run.__file__, str(folder)], env=environment, capture_output=True, text=True, timeout=LIMIT
    )
    assert run.returncode == 0, run.stderr[-4000:]
    (folder / "printed.txt").write_text(run.stdout)
    (folder / "warned.txt").write_text(run.stderr)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def rms_normalized(rows: np.ndarray) -> np.ndarray:
    return rows / np.sqrt((rows**2).mean(-1, keepdims=True) + 1e-6)


def pooled_eigenvalues(rows: np.ndarray) -> np.ndarray:
    return np.linalg.eigvalsh(np.cov(rows, rowvar=False))[::-1]


def recorded(ranks: list[dict], stage: str, steps: list[int], layer: int, per_rank: int | None = None) -> np.ndarray:
    """All rows that went through a layer on both ranks; of each rank no more samples than fit into its share."""
    parts = []
    for rank in ranks:
        samples = torch.cat([output for step in steps for output in rank["rows"].get((stage, step, layer), [])])
        parts.append(samples if per_rank is None else samples[: per_rank // ddp_run.LENGTH])
    return torch.cat(parts).double().reshape(-1, ddp_run.WIDTH).numpy()


@pytest.mark.parametrize("layer", range(ddp_run.NUM_BLOCKS))
def test_validation_spectrum_is_that_of_all_ranks_rows(ranks: list[dict], layer: int) -> None:
    (report,) = ranks[0]["reports"]["validate"]
    num_tokens, eigenvalues = report["layers"][f"blocks.{layer}"]
    rows = recorded(ranks, "validate", [6], layer)
    assert num_tokens == len(rows) == (11 + 9) * ddp_run.LENGTH
    np.testing.assert_allclose(eigenvalues.numpy(), pooled_eigenvalues(rows), rtol=1e-6)


@pytest.mark.parametrize("layer", range(ddp_run.NUM_BLOCKS))
@pytest.mark.parametrize("report_step", [3, 6])
def test_training_spectrum_is_that_of_all_ranks_shares(ranks: list[dict], report_step: int, layer: int) -> None:
    reports = {report["step"]: report for report in ranks[0]["reports"]["train"]}
    assert set(reports) == {3, 6}
    num_tokens, eigenvalues = reports[report_step]["layers"][f"blocks.{layer}"]
    # The first step has 7 samples of 5 rows on both ranks: one step holds the 30 rows asked for. Of the three steps to
    # the first report that leaves the last, with 2 and 4 samples; a share is 15 rows, 3 whole samples a rank.
    rows = rms_normalized(recorded(ranks, "train", [report_step - 1], layer, per_rank=15))
    assert num_tokens == len(rows)
    np.testing.assert_allclose(eigenvalues.numpy(), pooled_eigenvalues(rows), rtol=1e-5, atol=1e-6)


def test_a_layer_that_runs_on_one_rank_is_that_ranks(ranks: list[dict]) -> None:
    num_tokens, eigenvalues = ranks[1]["reports"]["others"][0]["layers"]["lone"]
    rows = rms_normalized(recorded(ranks[:1], "train", [2], ddp_run.NUM_BLOCKS, per_rank=15))
    assert num_tokens == len(rows)
    np.testing.assert_allclose(eigenvalues.numpy(), pooled_eigenvalues(rows), rtol=1e-5, atol=1e-6)


def test_what_one_rank_cannot_measure_is_nan_on_all(ranks: list[dict]) -> None:
    for rank in ranks:
        for report in rank["reports"]["others"]:
            assert report["layers"]["broken"][1].isnan().all()
        assert rank["metrics"]["others/activation/failed"] == 2


@pytest.mark.parametrize("layer", range(ddp_run.NUM_BLOCKS))
def test_drift_is_that_of_all_ranks_rows(ranks: list[dict], layer: int) -> None:
    bases = []
    for step in (2, 5):
        rows = rms_normalized(recorded(ranks, "train", [step], layer, per_rank=15))
        bases.append(np.linalg.eigh(np.cov(rows, rowvar=False))[1][:, -2:])
    angles = scipy.linalg.subspace_angles(*bases)
    metrics = ranks[0]["metrics"]
    assert metrics[f"drift/blocks.{layer}/max_angle"] == pytest.approx(angles[0], rel=1e-3)
    assert metrics[f"drift/blocks.{layer}/overlap"] == pytest.approx(np.mean(np.cos(angles) ** 2), rel=1e-4)
    assert 0 < metrics[f"drift/blocks.{layer}/max_angle_floor"] <= np.pi / 2


def test_both_ranks_forecast_from_all_ranks_rows(ranks: list[dict]) -> None:
    for rank in ranks:
        assert rank["metrics"]["forecast/num_references"] == 4
        alpha = rank["metrics"]["forecast/alpha_tail"]
        assert 0.4 < alpha < 0.6  # among its references'
        assert rank["metrics"]["forecast/low"] < rank["metrics"]["forecast/high"]


def test_both_ranks_come_to_the_same_numbers(ranks: list[dict]) -> None:
    ours = [{key: value for key, value in rank["metrics"].items() if key != "val_loss"} for rank in ranks]
    np.testing.assert_equal(*ours)


def test_what_each_rank_has_logged_is_left_as_it_is(ranks: list[dict]) -> None:
    """Not reduced in place, which would change what EarlyStopping sees."""
    for rank in ranks:
        rows = recorded([rank], "validate", [6], ddp_run.NUM_BLOCKS - 1)
        assert rank["metrics"]["val_loss"] == pytest.approx(np.square(rows).mean(), rel=1e-6)


def test_what_moved_is_said_by_one_rank(ranks: list[dict], folder: Path) -> None:
    printed = (folder / "printed.txt").read_text()
    assert printed.count("what moved beyond its floors") == 1
    advice = Run(folder / "lightning_logs" / "version_0").advice
    assert advice
    assert all(printed.count(one["url"]) == sum(other["url"] == one["url"] for other in advice) for one in advice)


def test_a_report_costs_four_collectives(ranks: list[dict]) -> None:
    # Three of its own, of counts, of scatters and of what each rank has solved, and one of tokens and losses for the
    # record. Besides, each measurement agrees once on widths and rows: after the first training step, and with the
    # first validation report; and then on the checksum of the validation data. A validation report agrees on what tells
    # its rows from others, and its run on the loss of all ranks, for the record and for the forecast.
    for rank in ranks:
        calls = [call for call in rank["calls"] if call[1] != "meet"]
        assert calls == [(1, "all_reduce")] + [(3, "all_reduce")] * 4 + [(6, "all_reduce")] * 12


def test_ranks_meet_before_each_collective_and_after_each_attempt(ranks: list[dict]) -> None:
    for rank in ranks:
        names = [name for step, name in rank["calls"] if step == 3]
        # Two of a width, which has succeeded; what was solved, and the report has; tokens, and they have been counted.
        parts = (["meet", "all_reduce"] * 2 + ["meet"], ["meet", "all_reduce", "meet"], ["meet", "all_reduce", "meet"])
        assert names == [name for part in parts for name in part]


def test_two_ranks_leave_one_record_of_all_rows(ranks: list[dict], folder: Path) -> None:
    run = Run(folder / "lightning_logs" / "version_0")
    assert len(list((folder / "lightning_logs").rglob("run.json"))) == 1
    assert run.about["world_size"] == 2
    samples = [sum(sizes) for sizes in zip(*ddp_run.TRAIN_BATCHES.values(), strict=True)]
    assert run.history.step.tolist() == [3, 6]
    assert run.history.tokens.tolist() == [sum(samples[:3]), sum(samples[:6])]
    assert run.about["batch_tokens"] == pytest.approx(sum(samples[:6]) / 6)
    # Each rank has logged the mean of its own samples, of unequal number.
    rows = recorded(ranks, "validate", [6], ddp_run.NUM_BLOCKS - 1)
    assert run.history.val_loss.tolist()[-1] == pytest.approx(np.square(rows).mean(), rel=1e-6)
    assert "takes the mean of val_loss over all ranks" in (folder / "warned.txt").read_text()
    # "train" and "others" ask for the same: they share a measurement, and its series.
    for stage, callback in (("train", "train"), ("train", "others"), ("validate", "validate")):
        for report in ranks[0]["reports"][callback]:
            for name, (num_tokens, eigenvalues) in report["layers"].items():
                found = run.spectrum(f"activation-{stage}", name, report["step"])
                assert found.count == num_tokens
                np.testing.assert_array_equal(found, eigenvalues)
