"""TailForecaster on two gloo processes: all ranks end a hopeless run at one step, by the numbers that are logged."""

import logging
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch import seed_everything

from lightning_spectral import RunRecord
from lightning_spectral.runs.reference_numbers import ReferenceNumbers
from tests.callbacks.test_forecast_stack import law, references
from tests.callbacks.test_tail_forecaster import Falling, Kept
from tests.distributed import run_distributed
from tests.models import LENGTH, tiny_trainer, token_loader

STEP = 2 * 4 * LENGTH
"""Tokens of a step of two ranks."""


class Uneven(Falling):
    """Whose loss of validation is each rank's own; only the mean falls as that of one process does."""

    def validation_step(self, batch: dict, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)
        own = 3.0 - self.global_step / 10 + (1.5 if self.global_rank else -1.5)
        self.log("uneven_loss", own, batch_size=len(batch["input_ids"]))


def train(folder: Path, refs: str, limit: float | None, **kwargs: Any) -> dict[str, Any]:
    """What a rank saw, logged and said."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    seed_everything(0, verbose=False)
    forecaster = Kept(refs, predictor="batch", stop_if_relative_above=limit, **kwargs)
    limits = {"max_steps": 12, "val_check_interval": 4, "limit_val_batches": 8}
    trainer = tiny_trainer(folder, callbacks=[forecaster, RunRecord(family="F")], strategy="ddp", devices=2, **limits)
    trainer.fit(Uneven(), token_loader(400), token_loader(64, seed=1))
    logger.removeHandler(handler)
    return {
        "step": trainer.global_step,
        "said": [text for text in said if "ends training" in text],
        "low": forecaster.values("low"),
        "relative": forecaster.values("relative"),
        "actual": forecaster.actual,
    }


def on_rank(rank: int, folder: str, refs: str, other: str) -> dict[str, Any]:
    warnings.filterwarnings("ignore", "Kept ")
    found: dict[str, Any] = {"patient": train(Path(folder) / "patient", refs, None)}
    found["limit"] = limit = (1 + found["patient"]["low"][0] / best()) / 2
    found["all"] = train(Path(folder) / "all", refs, limit)
    found["mean"] = train(Path(folder) / "mean", refs, None, monitor="uneven_loss", target_loss=2.1)
    found["other data"] = train(Path(folder) / "other", other, limit)
    real = ReferenceNumbers.__init__

    def blind(self: ReferenceNumbers, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        self.log_batch = self.log_batch * math.nan

    for one in (0, 1):
        # Only this rank knows its references' batches, and has a forecast.
        ReferenceNumbers.__init__ = real if rank == one else blind
        found[f"only {one}"] = train(Path(folder) / f"only{one}", refs, limit)
    ReferenceNumbers.__init__ = real
    return found


def best() -> float:
    """Tokens of the fastest reference, of the smallest batch."""
    return law(STEP / 2 * 0.25) * 1.005


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    refs, other = references(folder / "refs"), references(folder / "other refs", data="a1")
    return run_distributed(on_rank, 2, str(folder), refs, other)


def test_all_ranks_end_at_one_step_and_one_says_why(ranks: list[dict[str, Any]]) -> None:
    assert [one["patient"]["step"] for one in ranks] == [12, 12]
    assert [one["all"]["step"] for one in ranks] == [4, 4]
    (reason,) = ranks[0]["all"]["said"]
    assert ranks[1]["all"]["said"] == []
    low = ranks[0]["all"]["low"][0] / best()
    assert low > ranks[0]["limit"] > 1
    assert f"at least {low:.2f} times the tokens" in reason
    assert f"stop_if_relative_above={ranks[0]['limit']:g}" in reason
    assert "(p = 0." in reason
    assert ranks[0]["patient"]["said"] == []


def test_what_is_logged_decides(ranks: list[dict[str, Any]]) -> None:
    """A rank alone in having a forecast ends the run if its numbers are those that are logged, and not otherwise."""
    assert [one["only 0"]["step"] for one in ranks] == [4, 4]
    assert len(ranks[0]["only 0"]["said"]) == 1
    assert ranks[1]["only 0"]["said"] == []
    assert np.isfinite(ranks[0]["only 0"]["low"]).all()
    assert np.isnan(ranks[1]["only 0"]["low"]).all()
    assert [one["only 1"]["step"] for one in ranks] == [12, 12]
    assert [one["only 1"]["said"] for one in ranks] == [[], []]
    assert np.isnan(ranks[0]["only 1"]["low"]).all()


def test_the_loss_is_the_mean_of_all_ranks(ranks: list[dict[str, Any]]) -> None:
    """2.2 at step 8 and 1.8 at step 12 in the mean; of either rank it would be crossed elsewhere, or never."""
    expected = 8 * STEP * (12 / 8) ** 0.25
    assert [one["mean"]["actual"] for one in ranks] == [pytest.approx(expected)] * 2


def test_references_of_other_validation_data_are_left_out_on_all_ranks(ranks: list[dict[str, Any]]) -> None:
    assert [one["other data"]["step"] for one in ranks] == [12, 12]
    for one in ranks:
        assert np.isnan(one["other data"]["low"]).all()
        assert np.isfinite(one["all"]["low"]).all()
