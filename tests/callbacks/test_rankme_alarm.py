"""Alarms of RankMe: on both sides of each limit, once for each layer and cause, over a resume, and without harm."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from scipy.stats import t

from lightning_spectral import ActivationSpectrum
from lightning_spectral.callbacks.rankme_alarm import RankMeAlarm
from lightning_spectral.functional import Spectrum
from tests.models import LanguageModel, tiny_trainer, token_loader

WIDTH, GROUPS = 16, 4


def flat(rank: float, spread: float = 0.0, count: int = 1000) -> Spectrum:
    """RankMe is ``rank`` exactly, where it is whole; without each group it is that times a bit more or less."""

    def eigenvalues(wanted: float) -> torch.Tensor:
        # A share a of one value, the rest spread evenly over the others, of the entropy that is wanted.
        low, high = 1 / WIDTH, 1.0
        for _ in range(200):
            a = (low + high) / 2
            others = (1 - a) / (WIDTH - 1)
            entropy = -a * math.log(a) - (WIDTH - 1) * others * math.log(others) if a < 1 else 0.0
            low, high = (a, high) if math.exp(entropy) > wanted else (low, a)
        return torch.tensor([a] + [(1 - a) / (WIDTH - 1)] * (WIDTH - 1), dtype=torch.float64)

    factors = [1 + spread * sign for sign in (-1.5, -0.5, 0.5, 1.5)] if spread else []
    without = torch.stack([eigenvalues(rank * factor) for factor in factors]) if factors else torch.empty(0, 0)
    return Spectrum(eigenvalues(rank), without.double(), count=count)


def stderr(spectrum: Spectrum) -> float:
    return spectrum.rankme().stderr


def test_the_spectra_are_what_they_are_made_to_be() -> None:
    spectrum = flat(4.0, 0.01)
    assert spectrum.rankme().value == pytest.approx(4.0, rel=1e-9)
    # (G - 1)/G sum of squares: 0.75 (2 1.5^2 + 2 0.5^2) 0.04^2
    assert stderr(spectrum) == pytest.approx(0.04 * math.sqrt(0.75 * 5), rel=1e-3)


@pytest.mark.parametrize(("inside", "is_alarm"), [(1e-3, True), (-1e-3, False)])
def test_below_counts_from_its_own_error_on(inside: float, is_alarm: bool) -> None:
    spectrum = flat(4.0, 0.01)
    limit = 4.0 + float(t.ppf(0.95, GROUPS - 1)) * stderr(spectrum)
    alarm = RankMeAlarm((limit + inside) / WIDTH, None, 5)
    messages = alarm.look(10, {"a": spectrum})
    assert alarm.num_layers == is_alarm
    assert bool(messages) == is_alarm
    if messages:
        assert "at step 10, a: RankMe is 4 +/- 0.077 of 16, below alarm_rankme_below=" in messages[0]
        assert messages[0].endswith("reading-spectra/#collapse)")


@pytest.mark.parametrize(("rank", "is_alarm"), [(3.99, True), (4.01, False)])
def test_without_groups_the_number_alone_counts(rank: float, is_alarm: bool) -> None:
    alarm = RankMeAlarm(0.25, None, 5)
    alarm.look(10, {"a": flat(rank)})
    assert alarm.num_layers == is_alarm


def test_rows_too_few_to_reach_the_limit_are_no_collapse() -> None:
    alarm = RankMeAlarm(0.5, None, 5)
    alarm.look(10, {"few": flat(2.0, count=8), "enough": flat(2.0, count=9)})
    assert [name for name, _ in alarm.fact().layers] == ["enough"]


def fall_between(first: Spectrum, last: Spectrum) -> float:
    return float(t.ppf(0.95, GROUPS - 1)) * math.hypot(stderr(first), stderr(last))


@pytest.mark.parametrize(("spread", "is_alarm"), [(0.02, True), (0.05, False)])
def test_a_fall_counts_beyond_its_floor(spread: float, is_alarm: bool) -> None:
    first, last = flat(8.0, spread), flat(6.0, spread)
    # Both sides of a fall by 2.
    assert (fall_between(first, last) < 2.0) == is_alarm
    alarm = RankMeAlarm(None, 0.1, 5)
    assert alarm.look(10, {"a": first}) == []
    assert bool(alarm.look(20, {"a": last})) == is_alarm
    assert alarm.num_layers == is_alarm


@pytest.mark.parametrize(("share", "is_alarm"), [(0.24, True), (0.26, False)])
def test_a_fall_counts_from_its_share_on(share: float, is_alarm: bool) -> None:
    alarm = RankMeAlarm(None, share, 5)
    alarm.look(10, {"a": flat(8.0, 1e-4)})
    assert bool(alarm.look(20, {"a": flat(6.0, 1e-4)})) == is_alarm


@pytest.mark.parametrize(("within", "is_alarm"), [(3, True), (2, False)])
def test_a_fall_counts_within_so_many_reports(within: int, is_alarm: bool) -> None:
    alarm = RankMeAlarm(None, 0.2, within)
    for step, rank in enumerate((8.0, 7.5, 6.9, 6.2)):
        alarm.look(step, {"a": flat(rank, 1e-4)})
    assert alarm.num_layers == is_alarm


@pytest.mark.parametrize("last", [flat(6.0), flat(6.0, 1e-4, count=500)], ids=["no error", "other rows"])
def test_a_fall_without_a_floor_or_of_other_rows_is_none(last: Spectrum) -> None:
    alarm = RankMeAlarm(None, 0.1, 5)
    alarm.look(10, {"a": flat(8.0, 1e-4)})
    assert alarm.look(20, {"a": last}) == []
    assert alarm.num_layers == 0


def test_layers_enter_and_leave_and_are_warned_of_once_each() -> None:
    alarm = RankMeAlarm(0.25, 0.3, 1)
    low, high = flat(2.0, 1e-4), flat(8.0, 1e-4)
    seen = []
    for step, one in enumerate((low, high, low, high)):
        resumed = RankMeAlarm(0.25, 0.3, 1)
        resumed.restore(alarm.state())
        alarm = resumed
        seen.append((len(alarm.look(step, {"blocks.0": one, "blocks.1": low})), alarm.num_layers))
    # Both below; one out; in again by both causes, of which the fall is new; out.
    assert seen == [(2, 2.0), (0, 1.0), (1, 2.0), (0, 1.0)]


def test_what_could_not_be_measured_is_in_no_alarm() -> None:
    alarm = RankMeAlarm(0.9, 0.1, 5)
    assert math.isnan(alarm.num_layers)
    assert alarm.fact() is None
    alarm.look(10, {"a": Spectrum.missing("no rows")})
    assert alarm.num_layers == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alarm_rankme_below": 1.0}, "alarm_rankme_below must be a share between 0 and 1, or None, got 1.0"),
        ({"alarm_rankme_below": float("nan")}, "alarm_rankme_below must be a share"),
        ({"alarm_rankme_fall": 0}, "alarm_rankme_fall must be a share between 0 and 1, or None, got 0"),
        ({"alarm_reports": 0}, "alarm_reports must be a positive int, got 0"),
        ({"alarm_rankme_fall": 0.1, "num_groups": 1}, "alarm_rankme_fall needs error bars, got num_groups=1"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ActivationSpectrum(**arguments)


class Looks(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.seen.append(float(trainer.callback_metrics["activation/alarm"]))


def spectrum(below: float | None) -> ActivationSpectrum:
    return ActivationSpectrum(["*.blocks.0", "*.blocks.1"], every_n_steps=2, num_tokens=128, alarm_rankme_below=below)


def fit(
    folder: Path, callbacks: list[Any], max_steps: int, checkpoint: Path | None = None
) -> tuple[Trainer, list[str]]:
    torch.manual_seed(0)
    trainer = tiny_trainer(
        folder, callbacks=callbacks, max_steps=max_steps, limit_val_batches=0, logger=CSVLogger(folder, version=0)
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(LanguageModel(), token_loader(batch_size=16), ckpt_path=checkpoint)
    return trainer, [str(one.message) for one in caught if "RankMe" in str(one.message)]


def test_a_run_in_alarm_says_so_once_a_layer_and_not_again_when_resumed(tmp_path: Path) -> None:
    looks = Looks()
    trainer, messages = fit(tmp_path / "a", [spectrum(0.99), looks], 4)
    assert [message.split(":")[0] for message in messages] == [
        "ActivationSpectrum at step 2, network.blocks.0",
        "ActivationSpectrum at step 2, network.blocks.1",
    ]
    assert math.isnan(looks.seen[0])  # known before the first report, so that it can be monitored
    assert looks.seen[1:] == [2.0, 2.0, 2.0]
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    trainer, messages = fit(tmp_path / "b", [spectrum(0.99)], 8, tmp_path / "last.ckpt")
    assert messages == []
    assert float(trainer.callback_metrics["activation/alarm"]) == 2.0
    assert "activation/alarm" in (tmp_path / "b" / "lightning_logs" / "version_0" / "metrics.csv").read_text()


def test_nobody_is_alarmed_who_has_no_cause_or_did_not_ask(tmp_path: Path) -> None:
    trainer, messages = fit(tmp_path / "a", [spectrum(0.01)], 4)
    assert messages == []
    assert float(trainer.callback_metrics["activation/alarm"]) == 0.0
    trainer, messages = fit(tmp_path / "b", [spectrum(None)], 4)
    assert messages == []
    assert "activation/alarm" not in trainer.callback_metrics


def test_early_stopping_can_end_a_run_in_alarm(tmp_path: Path) -> None:
    stopper = EarlyStopping(
        "activation/alarm", stopping_threshold=0.5, mode="max", check_finite=False, check_on_train_epoch_end=True
    )
    trainer, _ = fit(tmp_path, [spectrum(0.99), stopper], 100)
    assert trainer.global_step == 4  # its first epoch


def test_training_is_the_same_to_the_bit(tmp_path: Path) -> None:
    with_alarm, _ = fit(tmp_path / "a", [spectrum(0.99)], 6)
    without, _ = fit(tmp_path / "b", [], 6)
    expected = without.lightning_module.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in with_alarm.lightning_module.state_dict().items())
