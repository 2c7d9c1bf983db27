"""Trains a family of small GPTs to one loss at several batch sizes: references for forecasts, and runs to compare.

Twelve runs by default, six batch sizes with two seeds each, one after the other in each of two processes: about half an
hour on two cores. A run whose record is complete is not made again, so that the script can be interrupted.
"""

import argparse
import contextlib
import logging
import math
import multiprocessing
import os
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console

from lightning_spectral import ActivationSpectrum, Run
from lightning_spectral.nanogpt import NanoGPT, TextData

BLOCK_SIZE = 128
EVERY_NUM_TOKENS = 16_384
"""Training tokens between validation runs."""
NUM_VALIDATION_TOKENS = 32_768


def train(folder: Path, batch_size: int, seed: int, target: float, max_tokens: int) -> str:
    """Train one run until its validation loss comes down to the target; says what came out.

    Args:
        folder: Where runs go.
        batch_size: Sequences a step.
        seed: Of initialisation and order.
        target: Loss, in nats per byte.
        max_tokens: Where to give up.
    """
    path = folder / f"batch_{batch_size}-seed_{seed}"
    if not _is_complete(path, target):
        seed_everything(seed, verbose=False)
        every = max(1, EVERY_NUM_TOKENS // (batch_size * BLOCK_SIZE))
        model = NanoGPT(
            block_size=BLOCK_SIZE,
            learning_rate=1e-3 * math.sqrt(batch_size / 16),
            warmup_steps=2 * every,
            cooldown=1e-6,  # a constant learning rate: how long a run takes is not known beforehand
        )
        # In float64: early in training the tail lies far below the head.
        spectrum = ActivationSpectrum(
            "all", stage="validate", every_n_steps=every, num_tokens=NUM_VALIDATION_TOKENS, dtype="float64"
        )
        trainer = Trainer(
            accelerator="cpu",
            max_steps=max_tokens // (batch_size * BLOCK_SIZE),
            val_check_interval=every,
            check_val_every_n_epoch=None,
            limit_val_batches=NUM_VALIDATION_TOKENS // (batch_size * BLOCK_SIZE),
            num_sanity_val_steps=0,
            gradient_clip_val=1.0,
            logger=CSVLogger(path.parent, name="", version=path.name),
            callbacks=[
                spectrum,
                EarlyStopping("val_loss", stopping_threshold=target, patience=10**9, check_finite=False),
            ],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            trainer.fit(model, TextData(block_size=BLOCK_SIZE, batch_size=batch_size, seed=seed))
    run = Run(path)
    return f"{run.tokens_to(target):12,.0f} tokens, {run.history.seconds[-1]:6.0f} s: {path}"


def _is_complete(path: Path, target: float) -> bool:
    try:
        return bool(Run(path).history.val_loss.min() <= target)
    except ValueError:  # there is no record yet, or not a line of it
        return False


def _be_quiet() -> None:
    """Of a dozen runs side by side, a line each is enough."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def _train(args: tuple[Path, int, int, float, int]) -> str:
    return train(*args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where runs go; those that are there are kept")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 8, 16, 32, 64, 128])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--target", type=float, default=2.0, help="validation loss, in nats per byte")
    parser.add_argument("--max-tokens", type=int, default=4_000_000, help="where a run gives up")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    # Long ones first, so that no process is left with one at the end.
    sizes = sorted(args.batch_sizes, reverse=True)
    jobs = [(args.folder, size, seed, args.target, args.max_tokens) for size in sizes for seed in args.seeds]
    console = Console()
    with multiprocessing.get_context("spawn").Pool(args.processes, _be_quiet) as pool:
        for number, line in enumerate(pool.imap(_train, jobs), start=1):
            console.print(f"{number:3} of {len(jobs)}: {line}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
