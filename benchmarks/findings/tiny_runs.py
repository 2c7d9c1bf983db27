"""Real runs of a tiny GPT, seeds of a few settings in turn: what comparisons are drawn from that must find nothing."""

import io
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything

from lightning_spectral import ActivationSpectrum, GradientSpectrum, Run, RunRecord
from lightning_spectral.nanogpt import NanoGPT, TextData

SETTINGS = {"base": (16, 1e-3), "rate": (16, 2e-3), "batch": (64, 2e-3)}
"""Sequences of a batch, and learning rate."""
NUM_SEEDS = {"base": 12, "rate": 8, "batch": 8}
BLOCK_SIZE, NUM_STEPS, EVERY = 32, 240, 20


def train_all(folder: Path) -> Iterator[Path]:
    """The log directory of each run, made if it is not there; settings in turn, as comparisons in time want them."""
    for seed in range(1, max(NUM_SEEDS.values()) + 1):
        for setting, num_seeds in NUM_SEEDS.items():
            if seed <= num_seeds:
                path = folder / setting / str(seed)
                if not _is_complete(path):
                    _train(path, setting, seed)
                yield path


def _is_complete(path: Path) -> bool:
    return (path / "spectra").is_dir() and Run(path).history.with_loss()[0].size == NUM_STEPS // EVERY


def _train(path: Path, setting: str, seed: int) -> None:
    batch_size, learning_rate = SETTINGS[setting]
    seed_everything(seed, verbose=False)
    model = NanoGPT(
        num_layers=2, num_heads=2, width=32, block_size=BLOCK_SIZE, warmup_steps=10, learning_rate=learning_rate
    )
    data = TextData(block_size=BLOCK_SIZE, batch_size=batch_size, seed=seed)
    callbacks = [
        ActivationSpectrum(stage="validate", every_n_steps=EVERY, num_tokens=4096),
        GradientSpectrum(stage="validate", every_n_steps=EVERY, num_samples=64),
        RunRecord(tags={"setting": setting}, vectors=False),
    ]
    trainer = Trainer(
        accelerator="cpu",
        callbacks=callbacks,
        default_root_dir=path,
        max_steps=NUM_STEPS,
        val_check_interval=EVERY,
        check_val_every_n_epoch=None,
        limit_val_batches=256 // batch_size,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with redirect_stdout(io.StringIO()):
        trainer.fit(model, data)
