"""The life of a measuring callback: keys of its own, a shared measurement, failures that stop nothing, resuming."""

import gc
import io
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_spectral import ActivationSpectrum
from lightning_spectral.measurement.sums import Sums
from tests.models import LanguageModel, Network, tiny_trainer, token_loader

KEY = "activation/network.blocks.0/alpha_tail"


class Reports(ActivationSpectrum):
    """Keeps what it logs, by step."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"num_tokens": 64, **kwargs})
        self.logged: list[tuple[int, dict[str, float]]] = []

    def measured(self, report):
        values = super().measured(report)
        self.logged.append((report.step, values))
        return values

    @property
    def steps(self) -> list[int]:
        return [step for step, _ in self.logged]


def fit(folder: Path, *callbacks: Callback, model: LanguageModel | None = None, ckpt_path: Any = None, **kwargs: Any):
    seed_everything(0, verbose=False)
    trainer = tiny_trainer(folder, callbacks=list(callbacks), **{"max_steps": 12, "limit_val_batches": 0, **kwargs})
    model = LanguageModel() if model is None else model
    trainer.fit(model, token_loader(), token_loader(16, seed=1), ckpt_path=ckpt_path)
    return trainer


def ours(caught: pytest.WarningsRecorder) -> list[str]:
    """What the package warned of; Lightning has its own to say."""
    return [
        str(warning.message)
        for warning in caught
        if str(warning.message).startswith(("ActivationSpectrum ", "Reports "))
    ]


def num_hooks(model: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param({}, {}, id="identical"),
        pytest.param({"prefix": "a/"}, {"prefix": "a/", "every_n_steps": 3}, id="equal prefixes"),
        pytest.param({"stage": "train"}, {"stage": "validate"}, id="two stages"),
    ],
)
def test_one_key_has_one_writer(tmp_path: Path, first: dict[str, Any], second: dict[str, Any]) -> None:
    spectra = [ActivationSpectrum(**first), ActivationSpectrum(**second)]
    model = LanguageModel()
    key = re.escape(f"{first.get('prefix', '')}activation/network.blocks.0/alpha_tail")
    with pytest.raises(ValueError, match=f"both write '{key}': give one of them a prefix$") as raised:
        fit(tmp_path, *spectra, model=model, limit_val_batches=1)
    assert "\n" not in str(raised.value)
    assert num_hooks(model) == 0


def test_refused_callback_holds_no_keys(tmp_path: Path) -> None:
    first, second = Reports(layers="*.blocks.0", every_n_steps=6), Reports(layers="*.blocks.[12]", every_n_steps=6)
    trainer = tiny_trainer(tmp_path, max_steps=6, limit_val_batches=0, callbacks=[first, second])
    with pytest.raises(ValueError, match="both write 'activation/failed'"):
        trainer.fit(LanguageModel(), token_loader(), token_loader())
    trainer.callbacks.remove(second)
    trainer.callbacks.append(replacement := Reports(layers="*.blocks.[12]", every_n_steps=6, prefix="b/"))
    trainer.fit(LanguageModel(), token_loader(), token_loader())
    assert first.steps == replacement.steps == [6]


class NanUntilKnown(Callback):
    """Looks at a key whenever another callback might."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, bool]] = []

    def look(self, event: str, trainer: Trainer) -> None:
        self.seen.append((event, bool(trainer.callback_metrics[KEY].isnan())))

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.look("batch", trainer)

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.look("validation", trainer)


@pytest.mark.parametrize("stage", ["train", "validate"])
def test_key_can_be_monitored_before_its_first_report(tmp_path: Path, stage: str) -> None:
    spectrum = Reports(stage=stage, every_n_steps=6, num_groups=1)
    look = NanUntilKnown()
    stopping = EarlyStopping(KEY, patience=100, check_finite=False)
    checkpoint = ModelCheckpoint(tmp_path / "best", "{step}", monitor=KEY, save_top_k=-1)
    fit(
        tmp_path,
        look,
        stopping,
        checkpoint,
        spectrum,
        limit_val_batches=1,
        val_check_interval=3,
        enable_checkpointing=True,
    )
    assert look.seen[0] == ("batch", True)
    assert ("validation", True) in look.seen or stage == "validate"
    assert look.seen[-1] == ("validation", False)
    expected = dict(spectrum.logged)[{"train": 12, "validate": 9}[stage]][KEY]
    assert float(stopping.best_score) == pytest.approx(min(values[KEY] for _, values in spectrum.logged))
    assert float(checkpoint.current_score) == pytest.approx(expected)


def test_equal_requests_share_hooks_and_solves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solve, num_solves = torch.linalg.eigvalsh, []
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda x: (num_solves.append(x.shape), solve(x))[1])

    class CountHooks(Callback):
        def on_train_start(self, trainer: Trainer, pl_module) -> None:
            self.num_hooks = num_hooks(pl_module)

    count = CountHooks()
    alone = Reports(every_n_steps=4)
    fit(tmp_path, alone, count)
    assert count.num_hooks == 5
    assert num_solves == [(1, 32, 32)] * 5 * 5 * 3  # one at a time: all, without each of four groups
    num_solves.clear()
    first, second, third = (
        Reports(every_n_steps=4, prefix="a/"),
        Reports(every_n_steps=4, prefix="b/", tail=(2, 9)),
        Reports(every_n_steps=4, prefix="c/", layers="*.blocks.[34]"),
    )
    fit(tmp_path, first, second, third, count)
    assert count.num_hooks == 6
    assert num_solves == [(1, 32, 32)] * 5 * 6 * 3
    assert first.logged == alone.logged
    assert third.steps == [4, 8, 12]
    assert [values[KEY.replace("0", "4")] for _, values in third.logged] == [
        values[KEY.replace("0", "4")] for _, values in alone.logged
    ]


def test_unequal_requests_do_not(tmp_path: Path) -> None:
    alone = Reports(every_n_steps=4)
    fit(tmp_path, alone)
    first, second = (
        Reports(every_n_steps=4, prefix="a/"),
        Reports(every_n_steps=3, num_groups=3, num_tokens=96, prefix="b/"),
    )
    fit(tmp_path, first, second)
    assert first.logged == alone.logged
    assert second.steps == [3, 6, 9, 12]


def test_hooks_are_gone_after_fit(tmp_path: Path) -> None:
    model = LanguageModel()
    fit(tmp_path, Reports(every_n_steps=4), model=model)
    assert num_hooks(model) == 0


def test_hooks_are_gone_after_an_exception(tmp_path: Path) -> None:
    class Crash(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 5:
                raise RuntimeError("crash")

    model = LanguageModel()
    spectra = [Reports(every_n_steps=4, prefix="a/"), Reports(every_n_steps=4, prefix="b/")]
    with pytest.raises(RuntimeError, match="crash"):
        fit(tmp_path, *spectra, Crash(), model=model)
    assert num_hooks(model) == 0
    fit(tmp_path, *spectra, model=model)
    assert spectra[0].steps == spectra[1].steps == [4, 4, 8, 12]


def failures_of(folder: Path) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tb")).Reload()
    return [(event.step, event.value) for event in events.Scalars("activation/failed")]


def test_nan_activations_are_nan_in_one_report(tmp_path: Path) -> None:
    class Spoilt(LanguageModel):
        """The first block puts out NaN in the fourth step, after the loss has been computed from the rest."""

        def training_step(self, *given):
            loss = super().training_step(*given)
            if self.trainer.global_step == 3:
                self.network.blocks[0](torch.full((1, 8, 32), torch.nan))
            return loss

    spectrum = Reports(every_n_steps=4, num_tokens=10**6)
    with pytest.warns(UserWarning, match="at step 4, network.blocks.0: NaN, because the rows hold NaN") as caught:
        fit(tmp_path, spectrum, model=Spoilt(), logger=TensorBoardLogger(tmp_path, "tb", ""))
    assert len(ours(caught)) == 1
    assert [np.isnan(values[KEY]) for _, values in spectrum.logged] == [True, False, False]
    assert [np.isnan(values[KEY.replace("0", "1")]) for _, values in spectrum.logged] == [False] * 3
    assert failures_of(tmp_path) == [(4, 1), (8, 1), (12, 1)]


def test_failed_solves_are_nan_and_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(matrix: torch.Tensor) -> torch.Tensor:
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(torch.linalg, "eigvalsh", fail)
    spectrum = Reports(every_n_steps=4)
    with pytest.warns(UserWarning, match="at step 4, network.blocks.0: NaN, .*eigensolver did not converge") as caught:
        trainer = fit(tmp_path, spectrum, logger=TensorBoardLogger(tmp_path, "tb", ""))
    assert len(ours(caught)) == 1
    assert trainer.global_step == 12
    assert trainer.callback_metrics[KEY].isnan()
    assert failures_of(tmp_path) == [(4, 5), (8, 10), (12, 15)]


@pytest.mark.parametrize("where", ["measured", "draw", "Decomposition"])
def test_whatever_else_goes_wrong_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory\nand a trace")

    owner = "lightning_spectral.measurement.activations" if where == "Decomposition" else ActivationSpectrum
    monkeypatch.setattr(owner if isinstance(owner, type) else __import__(owner, fromlist=["x"]), where, fail)
    spectrum = ActivationSpectrum(every_n_steps=4)
    with pytest.warns(UserWarning, match="out of memory") as caught:
        trainer = fit(tmp_path, spectrum, logger=TensorBoardLogger(tmp_path, "tb", ""))
    assert len(ours(caught)) == 1
    assert trainer.global_step == 12
    assert bool(trainer.callback_metrics[KEY].isnan()) == (where != "draw")
    num_failed = {"measured": 1, "draw": 0, "Decomposition": 5}[where]
    assert failures_of(tmp_path) == [(step, num_failed * step / 4) for step in (4, 8, 12)]


def test_missing_mask_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^mask must name .*, got 'msk': the batch holds \['input_ids', 'labels'\]$"):
        fit(tmp_path, ActivationSpectrum(mask="msk"))


def test_second_fit_is_measured_like_a_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def model(width: int, num_blocks: int) -> LanguageModel:
        torch.manual_seed(0)
        return LanguageModel(Network(width, num_blocks))

    once = Reports(every_n_steps=4)
    fit(tmp_path, once, model=model(32, 3))
    twice = Reports(every_n_steps=4)
    fit(tmp_path, twice, model=model(16, 12))
    capsys.readouterr()
    fit(tmp_path, twice, model=model(32, 3))
    assert twice.logged[3:] == once.logged
    assert twice.summary() == once.summary()
    assert "blocks.11" not in capsys.readouterr().out


def test_trainer_that_fits_on_reports_on(tmp_path: Path) -> None:
    spectrum = Reports(every_n_steps=4)
    gc.collect()
    gc.disable()  # what is left of the first fit must not be met again, collected or not
    try:
        trainer = fit(tmp_path, spectrum, max_epochs=1, max_steps=-1)
        trainer.fit_loop.max_epochs = 2
        trainer.fit(trainer.lightning_module, token_loader(), token_loader())
    finally:
        gc.enable()
    assert spectrum.steps == [4, 8, 12, 16, 20, 24, 28, 32]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list], dict[str, Any]]:
    """24 steps in epochs of four with a checkpoint at each; reports at 7, 14 and 21 are of two steps each."""
    folder = tmp_path_factory.mktemp("whole")
    spectra = resumable()
    fit(folder, *spectra.values(), SaveEveryStep(), **RESUMABLE)
    summaries = {stage: spectrum.summary() for stage, spectrum in spectra.items()}
    return folder, {stage: spectrum.logged for stage, spectrum in spectra.items()}, summaries


RESUMABLE: dict[str, Any] = {"max_steps": 24, "limit_train_batches": 4, "limit_val_batches": 2}


class SaveEveryStep(Callback):
    """Saves where ModelCheckpoint does, without a state of its own: after a step, and after an epoch's validation."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / f"step={trainer.global_step}.ckpt")

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        self.on_train_batch_end(trainer)


def resumable() -> dict[str, Reports]:
    return {
        "train": Reports(every_n_steps=7, num_tokens=64),
        "validate": Reports(every_n_steps=7, stage="validate", prefix="val/"),
    }


# Ends of epochs, for data go on only there. None lies inside a window: 5 to 7, 12 to 14, 19 to 21.
@pytest.mark.parametrize("step", [4, 8, 12, 16])
def test_resumed_run_reports_as_if_never_interrupted(whole_run, tmp_path: Path, step: int) -> None:
    folder, logged, summaries = whole_run
    spectra = resumable()
    fit(tmp_path, *spectra.values(), ckpt_path=folder / f"step={step}.ckpt", **RESUMABLE)
    for stage, spectrum in spectra.items():
        assert spectrum.logged == [report for report in logged[stage] if report[0] > step], stage
        assert spectrum.summary() == summaries[stage]


@pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch ended.*")
def test_window_that_was_cut_holds_fewer_rows(whole_run, tmp_path: Path) -> None:
    folder, _, _ = whole_run
    spectra = resumable()
    with pytest.warns(UserWarning, match="24 rows do not span 32 channels"):
        fit(tmp_path, *spectra.values(), ckpt_path=folder / "step=13.ckpt", **RESUMABLE)
    rows = {step: values[KEY.replace("alpha_tail", "num_tokens")] for step, values in spectra["train"].logged}
    assert rows == {14: 32, 21: 64}


def test_checkpoint_is_safe_to_load(whole_run) -> None:
    folder, _, _ = whole_run
    checkpoint = torch.load(folder / "step=8.ckpt", weights_only=True)
    states = [state for key, state in checkpoint["callbacks"].items() if key.startswith("Reports")]
    assert [state["measurement"]["last_validation"] for state in states] == [None, 4]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint", "ignore:.*ckpt_path=")
@pytest.mark.parametrize("when", ["exception", "after fit"])
def test_state_is_in_checkpoints_written_late(tmp_path: Path, when: str) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if when == "exception" and trainer.global_step == 6:
                raise RuntimeError("stop")

    spectrum = Reports(every_n_steps=4)
    path = tmp_path / "late.ckpt"
    if when == "exception":
        with pytest.raises(RuntimeError, match="stop"):
            fit(tmp_path, spectrum, Stop(), OnExceptionCheckpoint(tmp_path, "late"), enable_checkpointing=True)
    else:
        fit(tmp_path, spectrum, max_steps=6).save_checkpoint(path)
    resumed = Reports(every_n_steps=4)
    fit(tmp_path, resumed, ckpt_path=path)
    assert resumed.steps == [8, 12]
    assert resumed.summary()["first"] == spectrum.summary()["first"]


def test_out_of_memory_for_the_buffers_is_a_failed_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(Sums, "__init__", fail)
    spectrum = Reports(every_n_steps=4)
    with pytest.warns(UserWarning, match="NaN, because no memory left"):
        trainer = fit(tmp_path, spectrum)
    assert trainer.global_step == 12
    assert spectrum.steps == [4, 8, 12]
    assert all(np.isnan(values[KEY]) for _, values in spectrum.logged)


def test_forwards_after_the_backward_pass_are_not_rows(tmp_path: Path) -> None:
    class Sample(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: LanguageModel, outputs: Any, batch: Any, _: int
        ) -> None:
            with torch.no_grad():
                pl_module.network(batch["input_ids"])

    alone, beside = Reports(every_n_steps=4, num_tokens=10_000), Reports(every_n_steps=4, num_tokens=10_000)
    fit(tmp_path, alone)
    fit(tmp_path, Sample(), beside)
    assert beside.logged == alone.logged


def alive() -> list[Sums]:
    return [one for one in gc.get_objects() if type(one) is Sums]


@pytest.mark.parametrize("stage", ["train", "validate"])
def test_sums_live_from_the_first_collected_step_to_the_report(tmp_path: Path, stage: str) -> None:
    spectrum, seen = Reports(every_n_steps=4, stage=stage, num_tokens=64), []

    class Look(Callback):
        """Comes after the spectrum's own hooks."""

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            seen.append((trainer.global_step, len(alive())))

        def on_validation_batch_end(self, trainer: Trainer, module: Any, out: Any, batch: Any, batch_idx: int) -> None:
            if not trainer.sanity_checking:
                seen.append((f"validation {batch_idx}", len(alive())))

    gc.collect()
    assert not alive()
    gc.disable()  # they go by themselves
    try:
        fit(tmp_path, spectrum, Look(), max_steps=8, limit_val_batches=2, val_check_interval=4)
        assert not alive()
    finally:
        gc.enable()
    held = {when: number for when, number in seen if number}
    layers = len(spectrum.names)
    # Of two steps, the last before the report; in validation each layer comes to use its spare slot.
    expected = {3: layers, 7: layers} if stage == "train" else {"validation 0": layers, "validation 1": 2 * layers}
    assert held == expected


def test_table_prints_where_only_ascii_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    fit(tmp_path, Reports(every_n_steps=4))
    stream.flush()
    assert b" +/- " in stream.buffer.getvalue()


class Masked(torch.utils.data.Dataset):
    """Token batches with a mask, but for some."""

    def __init__(self, without: set[int]) -> None:
        self.batches = [dict(batch) for batch in token_loader()]
        for index, batch in enumerate(self.batches):
            if index not in without:
                batch["mask"] = torch.ones_like(batch["input_ids"])

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.batches[index]


def test_mask_missing_from_one_batch_costs_its_report_only(tmp_path: Path) -> None:
    loader = torch.utils.data.DataLoader(Masked(without={6}), batch_size=None)
    spectrum = Reports(every_n_steps=4, mask="mask", num_tokens=10_000)
    trainer = tiny_trainer(tmp_path, callbacks=[spectrum], max_steps=12, limit_val_batches=0)
    with pytest.warns(UserWarning, match="NaN, because mask must name"):
        trainer.fit(LanguageModel(), loader, token_loader())
    assert [bool(np.isnan(values[KEY])) for _, values in spectrum.logged] == [False, True, False]


def test_mask_missing_from_validation_shows_in_the_sanity_check(tmp_path: Path) -> None:
    spectrum = Reports(stage="validate", every_n_steps=1, mask="mask")
    with pytest.raises(ValueError, match=r"^mask must name"):
        fit(tmp_path, spectrum, limit_val_batches=2, num_sanity_val_steps=1)


def test_validation_loader_that_is_not_there_is_refused(tmp_path: Path) -> None:
    spectrum = Reports(stage="validate", every_n_steps=1, dataloader_idx=1)
    with pytest.raises(ValueError, match=r"^dataloader_idx must be below 1, the number of validation loaders, got 1$"):
        fit(tmp_path, spectrum, limit_val_batches=2)


def test_seconds_can_be_monitored_from_the_start(tmp_path: Path) -> None:
    class Look(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            self.seen = getattr(self, "seen", None) or set(trainer.callback_metrics)

    look = Look()
    fit(tmp_path, look, Reports(every_n_steps=4))
    assert "spectral/seconds" in look.seen
