"""Training to a loss, and steps and validation runs of given numbers of tokens."""

import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_spectral import cli
from lightning_spectral.nanogpt import NanoGPT, TextData, module
from lightning_spectral.nanogpt.protocol import num_batches
from tests.distributed import run_distributed

SMALL = {"num_layers": 1, "num_heads": 1, "width": 32, "block_size": 8, "learning_rate": 0.01, "warmup_steps": 5}


class Losses(pl.Callback):
    """Keeps (step, val_loss, validation batches) of each validation run."""

    def __init__(self):
        self.entries = []

    def on_validation_end(self, trainer, *_):
        loss = trainer.callback_metrics["val_loss"].item()
        self.entries.append((trainer.global_step, loss, sum(trainer.num_val_batches)))


def text(folder, **arguments):
    """Of period 10; 48 blocks of 8 tokens are for training, 11 are held out."""
    (folder / "text.txt").write_bytes(b"0123456789" * 48)
    arguments = {"block_size": 8, "batch_size": 3, "val_fraction": 0.2} | arguments
    return TextData(str(folder / "text.txt"), **arguments)


def fit(model, data, *callbacks, **arguments):
    losses = Losses()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"accelerator": "cpu", "enable_model_summary": False, "callbacks": [losses, *callbacks]}
    trainer = pl.Trainer(**(quiet | {"val_check_interval": 5, "check_val_every_n_epoch": None} | arguments))
    trainer.fit(model, data)
    return trainer, losses.entries


def nanogpt(**arguments):
    pl.seed_everything(0, verbose=False)
    return NanoGPT(**(SMALL | arguments))


def test_stops_at_the_loss(tmp_path, monkeypatch):
    # Not by what reaches the root logger: other loggers of experiments, once imported, set up logging anew.
    told = []
    monkeypatch.setattr(module, "rank_zero_info", told.append)
    trainer, entries = fit(nanogpt(stop_at_loss=2.0), text(tmp_path), max_steps=200)
    assert all(loss > 2.0 for _, loss, _ in entries[:-1])
    assert entries[-1][1] <= 2.0
    assert trainer.global_step == entries[-1][0] < 200
    step, loss, _ = entries[-1]
    message = (
        f"val_loss is {loss:.4f}, at or below stop_at_loss=2.0: training stops at step {step}, after {step * 24:,}"
    )
    assert [text for text in told if message in text] == told
    assert len(told) == 1


def test_sanity_check_stops_nothing(tmp_path):
    trainer, entries = fit(nanogpt(stop_at_loss=100.0), text(tmp_path), max_steps=20, num_sanity_val_steps=2)
    assert trainer.global_step == 5
    assert [step for step, *_ in entries] == [0, 5]


def test_minimum_of_steps_is_honoured(tmp_path):
    trainer, _ = fit(nanogpt(stop_at_loss=100.0), text(tmp_path), min_steps=12, max_steps=20, num_sanity_val_steps=0)
    assert 12 <= trainer.global_step <= 15


def test_validating_alone_stops_nothing(tmp_path):
    model = nanogpt(stop_at_loss=100.0)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    trainer.validate(model, text(tmp_path), verbose=False)
    assert not trainer.should_stop


def on_one_of_two_ranks(rank, folder):
    class Apart(pl.Callback):
        """Keeps the loss of one rank, and so the mean, above the target when the other is below it."""

        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            if trainer.global_rank == 1 and trainer.global_step < 10:
                batch["labels"][:] = 7

    model = nanogpt(stop_at_loss=4.4, batch_tokens=48, val_tokens=48)
    trainer, entries = fit(
        model, text(Path(folder)), Apart(), max_steps=20, strategy="ddp", devices=2, use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )  # fmt: skip
    return trainer.global_step, entries, trainer.accumulate_grad_batches, model.tokens


def test_two_ranks_stop_together(tmp_path):
    text(tmp_path)
    first, second = run_distributed(on_one_of_two_ranks, 2, str(tmp_path))
    assert first == second
    step, entries, accumulate, tokens = first
    assert [step for step, *_ in entries] == [5, 10]
    assert entries[0][1] > 4.4 >= entries[1][1]
    assert {batches for *_, batches in entries} == {1}
    assert (accumulate, tokens) == (1, 48 * step)


def test_batch_tokens_accumulate(tmp_path):
    model = nanogpt(batch_tokens=72, val_tokens=48)
    trainer, entries = fit(model, text(tmp_path), max_steps=6, num_sanity_val_steps=0, val_check_interval=6)
    assert (trainer.accumulate_grad_batches, trainer.limit_val_batches) == (3, 2)
    assert model.tokens == 6 * 72
    assert [(step, batches) for step, _, batches in entries] == [(2, 2), (4, 2), (6, 2)]
    trainer.fit(nanogpt(batch_tokens=72), text(tmp_path))
    assert trainer.accumulate_grad_batches == 3


def test_development_run_is_left_alone(tmp_path):
    model = nanogpt(batch_tokens=96, val_tokens=48)
    trainer, _ = fit(model, text(tmp_path), fast_dev_run=True)
    assert (trainer.accumulate_grad_batches, trainer.limit_val_batches) == (1, 1)


@pytest.mark.parametrize(
    ("num_tokens", "message"),
    [
        (100, "= 8 x 3 x 2 = 48, got 100: take 96 or 144"),
        (24, "= 8 x 3 x 2 = 48, got 24: take 48"),
        (0, "got 0: take 48"),
    ],
)
def test_refuses_tokens_that_batches_do_not_make_up(num_tokens, message):
    with pytest.raises(ValueError, match=f"^batch_tokens must be a multiple of block_size x .*{message}$"):
        num_batches("batch_tokens", num_tokens, block_size=8, batch_size=3, world_size=2)


def test_refuses_a_setting_of_the_trainer_besides(tmp_path):
    message = "batch_tokens sets the Trainer's accumulate_grad_batches, got 2 there too: leave it out"
    with pytest.raises(ValueError, match=message):
        fit(nanogpt(batch_tokens=96), text(tmp_path), max_steps=1, accumulate_grad_batches=2)


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_refuses_more_validation_than_there_is(command, tmp_path):
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_steps=5,
        enable_checkpointing=False, val_check_interval=5, check_val_every_n_epoch=None,
    )  # fmt: skip
    with pytest.raises(
        ValueError, match="val_tokens must be at most 72, the whole batches of held-out tokens, got 240"
    ):
        getattr(trainer, command)(nanogpt(val_tokens=240), text(tmp_path))


def test_refuses_loaders_of_unknown_size():
    loader = DataLoader([{"input_ids": torch.zeros(1, 8, dtype=torch.long)}], batch_size=None)
    message = "val_tokens needs a data module that has block_size and batch_size, got NoneType: set the Trainer's limit"
    with pytest.raises(ValueError, match=message):
        pl.Trainer(accelerator="cpu", logger=False).validate(nanogpt(val_tokens=8), loader)


def test_example_stops_with_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setattr(sys, "argv", ["lightning-spectral"])
    repository = Path(__file__).parents[2]
    overrides = {
        "model.num_layers": 1,
        "model.width": 8,
        "model.block_size": 32,
        "model.stop_at_loss": 100.0,
        "model.batch_tokens": 128,
        "model.val_tokens": 128,
        "data.block_size": 32,
        "data.batch_size": 2,
        "data.path": str(repository / "lightning_spectral"),
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
    }
    words = [f"--{key}={value}" for key, value in overrides.items()]
    cli.main(["fit", "--config", str(repository / "examples" / "constant_loss.yaml"), *words])
    folder = tmp_path / "lightning_logs" / "version_0" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step=25.ckpt", "step=50.ckpt"]
    checkpoint = folder / "step=50.ckpt"
    assert torch.load(checkpoint, weights_only=True)["tokens"] == 50 * 128
