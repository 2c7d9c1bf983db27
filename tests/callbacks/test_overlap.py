"""``overlap``: solved beside training, published with its own step, never later than said, with the same numbers."""

import json
import logging
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_spectral import ActivationSpectrum, HeadDrift, Run, TailForecaster
from lightning_spectral.measurement import decomposition
from lightning_spectral.measurement.pending import Pending
from tests.distributed import run_distributed
from tests.limit import LIMIT
from tests.models import LanguageModel, tiny_trainer, token_loader

KEY = "activation/network.blocks.0/alpha_tail"
EVERY = 4
pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`",
    "ignore:TailForecaster makes no forecast",
    "ignore:.*Skipping val loop",
    "ignore:lightning-spectral draws",
)


def spectrum(overlap: bool | str = True, **kwargs: Any) -> ActivationSpectrum:
    return ActivationSpectrum("network.blocks.[01]", **({"every_n_steps": EVERY, "overlap": overlap} | kwargs))


class Gate:
    """Holds the solving thread back until the main one waits for it, or somebody opens it."""

    def __init__(self) -> None:
        self.opened = threading.Event()

    def solve(self, solver: Callable[..., Any]) -> Callable[..., Any]:
        def held(*args: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                assert self.opened.wait(LIMIT)
            return solver(*args)

        return held

    def result(self, result: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def waited_for(pending: Any) -> Any:
            self.opened.set()
            try:
                return result(pending)
            finally:
                self.opened.clear()  # before the next is begun

        return waited_for


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate = Gate()
    monkeypatch.setattr(decomposition, "_eigen", gate.solve(decomposition._eigen))
    monkeypatch.setattr(Pending, "result", gate.result(Pending.result))
    return gate


class Seen(CSVLogger):
    """Notes at which step of training each report came."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, version=0)
        self.came: dict[int, int] = {}
        self.values: dict[int, dict[str, float]] = {}
        self.trainer: Trainer | None = None

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if KEY in metrics:
            self.came[step] = self.trainer.global_step
            self.values[step] = {key: value for key, value in metrics.items() if "seconds" not in key}
        super().log_metrics(metrics, step)


def fit(folder: Path, *callbacks: Callback, resume: str | None = None, **kwargs: Any) -> tuple[Seen, Trainer]:
    torch.manual_seed(0)
    logger = Seen(folder)
    trainer = tiny_trainer(folder, callbacks=list(callbacks), logger=logger, **({"max_steps": 12} | kwargs))
    logger.trainer = trainer
    trainer.fit(LanguageModel(), token_loader(64), token_loader(8), ckpt_path=resume)
    return logger, trainer


class At(Callback):
    """Does something after a step."""

    def __init__(self, step: int, what: Callable[[Trainer], None]) -> None:
        self.step, self.what = step, what

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.what(trainer)


NO_VALIDATION = {"limit_val_batches": 0}


def test_a_report_that_is_ready_comes_with_the_next_step(tmp_path: Path, gate: Gate) -> None:
    def ready(trainer: Trainer) -> None:
        gate.opened.set()
        callback.measurement.pending._thread.join(LIMIT)

    callback = spectrum()
    seen, _ = fit(tmp_path, callback, At(6, ready), **NO_VALIDATION)
    assert seen.came == {4: 7, 8: 12, 12: 12}


@pytest.mark.parametrize(
    ("kwargs", "came"),
    [
        pytest.param({}, {4: 8, 8: 12, 12: 12}, id="the next report, the end of training"),
        pytest.param({"val_check_interval": 6}, {4: 6, 8: 12, 12: 12}, id="a validation run"),
        pytest.param({"limit_train_batches": 6}, {4: 6, 8: 12, 12: 12}, id="the end of an epoch"),
    ],
)
def test_a_report_comes_before(tmp_path: Path, gate: Gate, kwargs: dict[str, Any], came: dict[int, int]) -> None:
    kwargs = kwargs if "val_check_interval" in kwargs else kwargs | NO_VALIDATION
    seen, trainer = fit(tmp_path, spectrum(), **kwargs)
    assert seen.came == came
    assert float(trainer.callback_metrics[KEY]) == seen.values[12][KEY]


def test_a_report_comes_before_a_checkpoint_and_is_in_it(tmp_path: Path, gate: Gate) -> None:
    checkpoints = [ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=6, save_top_k=-1)]
    callback = spectrum()
    more = {"limit_train_batches": 6, **NO_VALIDATION}
    seen, _ = fit(tmp_path, callback, *checkpoints, max_steps=13, enable_checkpointing=True, **more)
    assert seen.came == {4: 6, 8: 12, 12: 12}
    saved = torch.load(tmp_path / "saved" / "step=6.ckpt", weights_only=True)["callbacks"][callback.state_key]
    assert saved["summary"]["num_reports"] == 1
    # A run goes on from there as one does without overlap, with the rows that are left of the window.
    resumed = []
    for overlap in (True, False):
        resume = str(tmp_path / "saved" / "step=6.ckpt")
        resumed.append(fit(tmp_path / f"{overlap}", spectrum(overlap), resume=resume, **more)[0].values)
    assert resumed[0] == resumed[1]
    assert resumed[0].keys() == {8, 12}
    assert resumed[0][12] == seen.values[12]


def test_all_callbacks_and_the_record_have_the_same_numbers_as_without(tmp_path: Path, gate: Gate) -> None:
    found: dict[bool, dict[str, Any]] = {}
    for overlap in (True, False):
        shared = {"every_n_steps": EVERY, "stage": "train", "overlap": overlap}
        drift = HeadDrift("network.blocks.0", 3, **shared)
        forecaster = TailForecaster(0.0, layer="network.blocks.0", **shared)
        logger, trainer = fit(tmp_path / str(overlap), spectrum(overlap), drift, forecaster, val_check_interval=6)
        run = Run(tmp_path / str(overlap) / "lightning_logs" / "version_0")
        assert list(run.about["series"]) == ["activation-train"]
        name = "network.blocks.0"
        reports = [run.spectrum("activation", name, step) for step in run.steps("activation")]
        lines = (run.folder / "forecasts.jsonl").read_text().splitlines()
        history = run.history
        found[overlap] = {
            "logged": logger.values,
            "metrics": {key: float(value) for key, value in trainer.callback_metrics.items() if "seconds" not in key},
            "spectra": [(one.count, one.values.tolist(), one.vectors.tolist()) for one in reports],
            "at": [(one.step, one.tokens) for one in reports],
            "history": [history.step.tolist(), history.tokens.tolist(), history.val_loss.tolist()],
            "forecasts": [json.loads(line) for line in lines],
            "losses": forecaster.summary()["losses"],
        }
    np.testing.assert_equal(found[True], found[False])
    assert found[True]["at"] == [(4, 128), (8, 256), (12, 384)]
    assert [(line["step"], line["tokens"]) for line in found[True]["forecasts"]] == found[True]["at"]


@pytest.mark.parametrize("where", ["_eigen", "pool"])
def test_what_fails_in_the_thread_is_nan_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    part = getattr(decomposition, where)
    calls: list[int] = []

    def fails(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("no memory\nat all")
        return part(*args)

    monkeypatch.setattr(decomposition, where, fails)
    with pytest.warns(UserWarning, match=r"at step 4, network.blocks.0: NaN, because no memory$"):
        seen, trainer = fit(tmp_path, spectrum(), **NO_VALIDATION)
    assert trainer.global_step == 12
    assert [np.isnan(seen.values[step][KEY]) for step in (4, 8, 12)] == [True, False, False]
    assert not np.isnan(seen.values[4][KEY.replace("blocks.0", "blocks.1")])
    assert float(trainer.callback_metrics["activation/failed"]) == 1


def test_a_report_that_cannot_be_begun_is_nan_with_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Pending.__init__
    calls: list[int] = []

    def fails(self: Any, *args: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("can't start new thread")
        real(self, *args)

    monkeypatch.setattr(Pending, "__init__", fails)
    with pytest.warns(UserWarning, match=r"at step 8, network.blocks.0: NaN, because can't start new thread$"):
        seen, _ = fit(tmp_path, spectrum(), **NO_VALIDATION)
    assert [np.isnan(seen.values[step][KEY]) for step in (4, 8, 12)] == [False, True, False]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("broken")])
def test_an_interrupted_run_has_the_report_it_was_making(tmp_path: Path, gate: Gate, error: Any) -> None:
    def stop(trainer: Trainer) -> None:
        raise error

    callback = spectrum()
    # Of an interrupt Lightning makes an exit.
    with pytest.raises(SystemExit if error is KeyboardInterrupt else RuntimeError):
        fit(tmp_path, callback, At(6, stop), **NO_VALIDATION)
    assert Run(tmp_path / "lightning_logs" / "version_0").steps("activation") == [4]
    assert callback.session is None


def test_rows_of_the_next_report_are_its_own(tmp_path: Path, gate: Gate) -> None:
    # All steps are collected, those of the next report while the sums of the last are being solved.
    found = [fit(tmp_path / str(overlap), spectrum(overlap), **NO_VALIDATION)[0] for overlap in (True, False)]
    assert found[0].came != found[1].came
    assert found[0].values == found[1].values


class Steep(LanguageModel):
    """Of its rows float32 does not resolve the tail."""

    def __init__(self) -> None:
        super().__init__()
        scale = 10.0 ** -torch.arange(32).div(6)
        self.network.blocks[1].register_forward_hook(lambda _, __, output: output * scale)


def test_a_layer_is_measured_in_float64_from_the_next_whole_window_on(tmp_path: Path, gate: Gate) -> None:
    callback = spectrum(normalize=False, tail=(20, 31), num_tokens=10**6)
    logger = Seen(tmp_path)
    trainer = tiny_trainer(tmp_path, callbacks=[callback], logger=logger, max_steps=16, **NO_VALIDATION)
    logger.trainer = trainer
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(Steep(), token_loader(64))
    told = [str(one.message) for one in said if "resolve" in str(one.message)]
    assert len(told) == 1
    assert "at step 4:" in told[0]
    assert told[0].endswith("in float64 from the one after the next report on")
    key = KEY.replace("blocks.0", "blocks.1")
    assert [np.isnan(logger.values[step][key]) for step in (4, 8, 12, 16)] == [True, True, False, False]
    run = Run(tmp_path / "lightning_logs" / "version_0")
    types = [run.spectrum("activation", "network.blocks.1", step).dtype for step in (4, 8, 12, 16)]
    assert types == ["float32", "float32", "float64", "float64"]


def on_rank(rank: int, folder: str) -> dict[str, Any]:
    """Both ways on two ranks, one of which is always late; which threads came to a collective."""
    threads: set[str] = set()
    real, solver = dist.all_reduce, decomposition._eigen

    def counted(*args: Any, **kwargs: Any) -> Any:
        threads.add(threading.current_thread().name)
        return real(*args, **kwargs)

    def late(*args: Any) -> Any:
        if rank == 1 and threading.current_thread() is not threading.main_thread():
            threading.Event().wait(0.01)
        return solver(*args)

    dist.all_reduce, decomposition._eigen = counted, late
    found: dict[str, Any] = {"threads": threads}
    data = {"strategy": "ddp", "devices": 2}
    for overlap in (True, False):
        seen, trainer = fit(Path(folder) / str(overlap), spectrum(overlap), val_check_interval=6, **data)
        found[overlap] = {"values": seen.values, "came": seen.came, "step": trainer.global_step}
        metrics = trainer.callback_metrics
        found[overlap]["metrics"] = {k: float(v) for k, v in metrics.items() if k.startswith("activation")}
    return found | {"broken": broken(Path(folder) / "broken", solver)}


def broken(folder: Path, solver: Callable[..., Any]) -> tuple[list[str], str, int]:
    """What is said, raised and recorded where all ranks fail while a report is being made."""
    gate, said = Gate(), []
    decomposition._eigen = gate.solve(solver)
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addHandler(handler)

    def stop(trainer: Trainer) -> None:
        raise RuntimeError("broken")

    callback = spectrum()
    with pytest.raises(RuntimeError) as raised:
        fit(folder, callback, At(5, stop), strategy="ddp", devices=2, **NO_VALIDATION)
    gate.opened.set()
    dropped = [one for one in said if "drops" in one]
    return dropped, str(raised.value), len(list(folder.rglob("*.npz")))


def test_on_two_ranks_no_thread_meets_the_other_and_numbers_are_the_same(tmp_path: Path) -> None:
    ranks = run_distributed(on_rank, 2, str(tmp_path))
    for seen in ranks:
        assert seen["threads"] == {"MainThread"}
        assert seen[True]["step"] == 12
        assert seen[True]["metrics"] == seen[False]["metrics"] == ranks[0][True]["metrics"]
    assert ranks[0][True]["values"] == ranks[0][False]["values"]
    assert list(ranks[0][True]["values"]) == [4, 8, 12]
    assert ranks[0][False]["came"] == {4: 4, 8: 8, 12: 12}
    dropped = "lightning-spectral drops the report of step 4, which was not ready when training ended early"
    assert ranks[0]["broken"] == ([dropped], "broken", 0)
    assert ranks[1]["broken"][1:] == ("broken", 0)
    # Before the validation run after step 6.
    assert ranks[0][True]["came"][4] <= 6


def test_auto_is_off_on_a_cpu(tmp_path: Path) -> None:
    seen, _ = fit(tmp_path, spectrum("auto"), **NO_VALIDATION)
    assert seen.came == {4: 4, 8: 8, 12: 12}


def test_what_overlap_can_be() -> None:
    with pytest.raises(ValueError, match=r"^overlap must be True, False or 'auto', got 1$"):
        spectrum(1)
    with pytest.raises(ValueError, match=r"^overlap must be False or 'auto' with stage='validate', got True: [^\n]*$"):
        spectrum(True, stage="validate")
    requests = [spectrum(overlap, stage="validate").request for overlap in ("auto", False)]
    assert requests[0] == requests[1]
    assert "overlap" not in requests[0].settings()
