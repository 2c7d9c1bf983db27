"""What is said at the end of real runs: once, below all tables, with the numbers of the record, and kept in it."""

import json
import math
import re
import warnings
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from scipy.stats import t

from lightning_spectral import ActivationSpectrum, GradientSpectrum, HeadDrift, Run, RunRecord, SpectralWatch, boards
from lightning_spectral.advice import MOST, Fact, sentences
from lightning_spectral.boards import Board
from lightning_spectral.callbacks import conclusion
from lightning_spectral.cli import main
from lightning_spectral.documentation import DOCUMENTATION
from tests.models import LENGTH, NUM_BLOCKS, PROBES, WIDTH, LanguageModel, NoLogDir, tiny_trainer, token_loader

HEADING = "what moved beyond its floors"
LAYERS = [f"network.{name}" for name in PROBES]
BATCH, GROUPS = 4, 4


class Fast(LanguageModel):
    """Learns so fast that spectra move beyond their floors within twelve steps."""

    rate = 0.1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.rate)


class Still(Fast):
    """Learns nothing."""

    rate = 0.0


def fit(folder: Path, *callbacks: Callback, ckpt_path: Any = None, model: Any = None, **kwargs: Any) -> Trainer:
    """Twelve steps with a validation after every fourth."""
    seed_everything(0, verbose=False)
    defaults = {"max_steps": 12, "val_check_interval": 4, "check_val_every_n_epoch": None}
    trainer = tiny_trainer(folder, callbacks=list(callbacks), **(defaults | kwargs))
    model = Fast() if model is None else model
    trainer.fit(model, token_loader(48, BATCH), token_loader(64, seed=1), ckpt_path=ckpt_path)
    return trainer


def spectra(**kwargs: Any) -> ActivationSpectrum:
    return ActivationSpectrum(**{"stage": "validate", "every_n_steps": 4, "num_tokens": 512, **kwargs})


def drift(**kwargs: Any) -> HeadDrift:
    return HeadDrift(**{"rank": 4, "every_n_steps": 4, "num_tokens": 512, **kwargs})


def said(printed: str) -> list[str]:
    """The text of each sentence on the terminal, which breaks lines."""
    _, _, below = printed.partition(HEADING)
    return [
        " ".join(text.split()) for text in re.findall(rf"^- (.*?)^  {DOCUMENTATION}", below, re.DOTALL | re.MULTILINE)
    ]


def urls(printed: str) -> list[str]:
    return [line.strip() for line in printed.splitlines() if line.strip().startswith(DOCUMENTATION)]


@pytest.mark.parametrize("is_first", [False, True], ids=["record last", "record first"])
def test_sentences_stand_once_below_all_tables_and_in_the_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], is_first: bool
) -> None:
    watching = [spectra(), GradientSpectrum(every_n_steps=6, num_samples=32), drift()]
    fit(tmp_path, *([RunRecord(), *watching] if is_first else [*watching, RunRecord()]))
    printed = capsys.readouterr().out
    assert printed.count(HEADING) == 1
    tables = [printed.index(f"\n{title}") for title in ("gradient spectra, train", "drift of 4 leading eigenvectors")]
    assert max(tables) < printed.index(HEADING)
    advice = Run(tmp_path).advice
    assert 2 <= len(advice) <= MOST
    assert said(printed) == [one["text"] for one in advice]
    assert urls(printed) == [one["url"] for one in advice]
    assert all(url.startswith(f"{DOCUMENTATION}reading-spectra/#") for url in urls(printed))
    main(["show", str(tmp_path)])
    assert said(capsys.readouterr().out) == [one["text"] for one in advice]
    main(["show", str(tmp_path), "--json"])
    assert json.loads(capsys.readouterr().out)["runs"][0]["about"]["advice"] == advice


def numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in re.findall(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?", text)]


def test_the_numbers_are_those_of_the_record(tmp_path: Path) -> None:
    fit(tmp_path, spectra(), drift())
    run = Run(tmp_path)
    reports = [[run.spectrum("activation", name, step) for name in LAYERS] for step in (4, 12)]
    sentences = {one["url"].rpartition("#")[2]: one["text"] for one in run.advice}
    shares = [[spectrum.rankme() for spectrum in spectra] for spectra in reports]
    (first, first_error), (last, last_error) = (
        (sum(one.value for one in row) / len(row) / WIDTH, sum(one.stderr for one in row) / len(row) / WIDTH)
        for row in shares
    )
    floor = float(t.ppf(0.975, GROUPS - 1)) * math.hypot(first_error, last_error)
    assert abs(last - first) > floor
    found = numbers(sentences["rising-rankme"])
    assert found[:5] == pytest.approx([first, 4, last, 12, len(LAYERS)], rel=5e-3)
    assert found[5:7] == pytest.approx([abs(last - first), floor], rel=0.05)


class Noise(GradientSpectrum):
    """Keeps what it knows at the end."""

    def facts(self) -> list[Fact]:
        self.known = list(super().facts())
        return self.known


@pytest.mark.parametrize("accumulated", [1, 3])
def test_the_batch_stands_beside_the_noise_scale(tmp_path: Path, accumulated: int) -> None:
    noise = Noise("all", every_n_steps=4, num_samples=64, prefix="g/")
    trainer = fit(tmp_path, noise, model=LanguageModel(), limit_val_batches=0, accumulate_grad_batches=accumulated)
    (fact,) = noise.known
    logged = {key.rpartition("/")[2]: float(value) for key, value in trainer.callback_metrics.items()}
    assert (fact.batch, fact.tokens_per_sample) == (accumulated * BATCH, LENGTH)
    assert fact.low == logged["noise_scale_low"]
    assert fact.high == logged["noise_scale_high"]
    assert fact.num_parameters is None
    assert logged["tokens_in_batch"] == accumulated * BATCH * LENGTH
    assert logged["tokens_in_noise_scale"] == pytest.approx(LENGTH * logged["noise_scale_smoothed"])
    assert [one["text"] for one in Run(tmp_path).advice] == [one.text for one in sentences([fact])]


def test_a_part_of_the_model_is_said_to_be_one(tmp_path: Path) -> None:
    noise = Noise("*.mix.weight", every_n_steps=6, num_samples=64)
    fit(tmp_path, noise, limit_val_batches=0)
    assert noise.known[0].num_parameters == NUM_BLOCKS


def test_nothing_is_said_of_what_could_not_be_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any) -> torch.Tensor:
        raise RuntimeError("no convergence")

    for solver in ("eigh", "eigvalsh"):
        monkeypatch.setattr(torch.linalg, solver, fails)
    gradients = GradientSpectrum(every_n_steps=6, num_samples=32, loss_fn=fails)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        trainer = fit(tmp_path, spectra(), drift(), gradients)
    assert trainer.global_step == 12
    assert all(trainer.callback_metrics[f"{kind}/failed"] > 0 for kind in ("activation", "drift", "gradient"))
    assert HEADING not in capsys.readouterr().out
    assert Run(tmp_path).about["advice"] == Run(tmp_path).advice == []


def test_nothing_is_said_within_the_floors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, spectra(), drift(), model=Still())
    assert HEADING not in capsys.readouterr().out
    assert Run(tmp_path).advice == []


def test_one_that_fails_keeps_nobody_else_from_speaking(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: HeadDrift) -> list[Fact]:
        raise KeyError("overlap")

    monkeypatch.setattr(HeadDrift, "facts", fails)
    with pytest.warns(UserWarning, match=r"leaves out what HeadDrift knows: KeyError\('overlap'\)$") as caught:
        fit(tmp_path, drift(), spectra())
    assert len([one for one in caught if "leaves out" in str(one.message)]) == 1
    printed = capsys.readouterr().out
    assert "RankMe, as a share of the width, rose" in " ".join(printed.split())
    assert "drifting-head" not in printed


@pytest.mark.parametrize("what", ["sentences", "print_advice"])
def test_a_run_ends_well_where_nothing_can_be_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    def fails(*args: Any) -> None:
        raise OSError("cannot write")

    monkeypatch.setattr(conclusion, what, fails)
    with pytest.warns(UserWarning, match="The conclusion of the run could not be told: OSError"):
        trainer = fit(tmp_path, spectra())
    assert trainer.state.finished
    assert bool(Run(tmp_path).advice) == (what == "print_advice")


def test_sentences_say_whose_they_are(tmp_path: Path) -> None:
    fit(tmp_path, spectra(prefix="a/"), spectra(prefix="b/", layers="*.blocks.5"), drift())
    begun = {one["text"].split()[0] for one in Run(tmp_path).advice}
    assert begun == {"a:", "b:", "The"}


class Reads(Callback):
    """Reads the record when training starts."""

    def on_train_start(self, trainer: Trainer, pl_module: LanguageModel) -> None:
        self.advice = Run(trainer.default_root_dir).about.get("advice")


def test_a_resumed_run_speaks_of_its_whole_course(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watching = [spectra(), drift(), Noise("*.blocks.0.mix.weight", every_n_steps=6, num_samples=32)]
    first = fit(tmp_path, *watching)
    first.save_checkpoint(tmp_path / "half.ckpt")
    said_first = Run(tmp_path).advice
    capsys.readouterr()
    reads, again = Reads(), Noise("*.blocks.0.mix.weight", every_n_steps=6, num_samples=32)
    fit(tmp_path, spectra(), drift(), again, reads, max_steps=24, ckpt_path=tmp_path / "half.ckpt")
    # What was said at step 12 is not of the run that goes on.
    assert reads.advice is None
    printed = capsys.readouterr().out
    assert printed.count(HEADING) == 1
    advice = Run(tmp_path).advice
    assert said(printed) == [one["text"] for one in advice] != [one["text"] for one in said_first]
    (rankme,) = (one["text"] for one in advice if one["url"].endswith("#rising-rankme"))
    assert re.search(r"at step 4 .* at step 24 ", rankme)
    assert again.known[0].batch == BATCH
    assert again.known[0].step == 24


def test_what_is_known_is_resumed_without_another_report(tmp_path: Path) -> None:
    noise = Noise("*.blocks.0.mix.weight", every_n_steps=6, num_samples=32)
    fit(tmp_path, noise).save_checkpoint(tmp_path / "half.ckpt")
    again = Noise("*.blocks.0.mix.weight", every_n_steps=6, num_samples=32)
    fit(tmp_path, again, max_steps=13, ckpt_path=tmp_path / "half.ckpt")
    assert again.known == noise.known


def test_each_fit_of_a_trainer_is_concluded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed: list[Any] = []
    monkeypatch.setattr(conclusion, "print_advice", printed.append)
    trainer = fit(tmp_path, spectra(), RunRecord())
    trainer.validate(trainer.lightning_module, token_loader(64, seed=1), verbose=False)
    assert len(printed) == 1  # and not at the end of validation
    trainer.fit_loop.epoch_loop.max_steps = 24
    trainer.fit(trainer.lightning_module, token_loader(48, BATCH), token_loader(64, seed=1))
    assert len(printed) == 2


def test_a_record_alone_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, RunRecord())
    assert HEADING not in capsys.readouterr().out
    assert Run(tmp_path).advice == []


class Cloud(NoLogDir):
    """A service that takes files."""


class CloudBoard(Board):
    """Reads what it is given, when it is given."""

    logger_class = "Cloud"
    advice: ClassVar[list[Any]] = []

    def artifact(self, folder: Path, name: str) -> None:
        self.advice.append(json.loads((folder / "run.json").read_text())["advice"])


@pytest.mark.parametrize("is_first", [False, True], ids=["record last", "record first"])
def test_what_is_uploaded_says_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_first: bool) -> None:
    monkeypatch.setattr(boards, "BOARDS", (CloudBoard,))
    monkeypatch.setattr(CloudBoard, "advice", [])
    record, spectrum = RunRecord(upload=True), spectra()
    fit(tmp_path, *([record, spectrum] if is_first else [spectrum, record]), logger=Cloud(tmp_path))
    (advice,) = CloudBoard.advice
    assert advice == Run(tmp_path / "project" / "run7").advice != []


def test_another_runs_record_is_left_alone(tmp_path: Path) -> None:
    """Another process may have begun one in the folder since this one ended training."""

    class Intruder(Callback):
        def on_fit_end(self, trainer: Trainer, pl_module: LanguageModel) -> None:
            path = tmp_path / "spectra" / "run.json"
            path.write_text(path.read_text().replace(Run(tmp_path).id, "f" * 32))

    with pytest.warns(UserWarning, match="is no longer the record of this run"):
        fit(tmp_path, Intruder(), spectra())
    assert "advice" not in Run(tmp_path).about


def test_any_loop_is_concluded_as_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed_everything(0, verbose=False)
    model = Fast()
    optimizer = model.configure_optimizers()
    with SpectralWatch(model, activations=spectra(), drift=drift(), optimizer=optimizer, log_dir=tmp_path) as watch:
        for index, batch in enumerate(token_loader(48, BATCH), start=1):
            with watch.step(batch):
                watch.loss(model.loss(batch)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if index % 4 == 0:
                with watch.validation(token_loader(64, seed=1)) as batches, torch.no_grad():
                    for held_out in batches:
                        model.loss(held_out)
    printed = capsys.readouterr().out
    assert printed.count(HEADING) == 1
    assert said(printed) == [one["text"] for one in Run(tmp_path).advice] != []
