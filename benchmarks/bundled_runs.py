"""Trains the reference runs that the package carries, as ``references="bundled:tiny"``, and packs their records.

    python -m benchmarks.bundled_runs FOLDER

The model, data and Trainer of ``examples/nanogpt.yaml``, but for batches of 4 to 64 sequences, half to twice the
learning rate, and a seed of their own; none is of the demo's setting, so that what the demo shows is a forecast. A run
ends at its first validation below the target. Three quarters of an hour of one core; runs that are there are kept, and
one that never comes down to it is none (64 sequences at twice the rate).
"""

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console

from lightning_spectral import ActivationSpectrum, Run, RunRecord
from lightning_spectral.nanogpt import NanoGPT, TextData

PACKED = Path(__file__).parents[1] / "lightning_spectral" / "runs" / "bundled" / "tiny"
TARGET = 2.0
"""Nats per byte."""
BLOCK_SIZE = 256
NUM_VALIDATION_TOKENS = 32_768
EVERY_NUM_TOKENS = 65_536
WARMUP_TOKENS = 50 * 8 * BLOCK_SIZE
MAX_TOKENS = 3_000_000
LAYER = "gpt.blocks.3"
SETTINGS = [
    *(
        (16, 1.0),
        (4, 1.0),
        (8, 2.0),
        (8, 0.5),
        (16, 2.0),
        (4, 0.5),
        (32, 1.0),
        (16, 0.5),
        (4, 2.0),
        (32, 2.0),
        (8, 1.5),
    ),
    *((32, 0.5), (64, 1.0), (64, 2.0), (16, 1.5), (4, 1.5), (32, 1.5), (64, 1.5)),
]
"""Sequences a step, and learning rates as multiples of the recipe's."""


def name_of(batch_size: int, multiplier: float) -> str:
    return f"batch_{batch_size}-lr_x{multiplier:g}"


def train(folder: Path, batch_size: int, multiplier: float, seed: int) -> str:
    """Train one run until its validation loss comes down to the target; says what came out.

    Args:
        folder: Where runs go.
        batch_size: Sequences a step.
        multiplier: Of the learning rate.
        seed: Of initialisation and order.
    """
    path = folder / name_of(batch_size, multiplier)
    if not is_complete(path):
        shutil.rmtree(path, ignore_errors=True)
        seed_everything(seed, verbose=False)
        batch_tokens = batch_size * BLOCK_SIZE
        every = EVERY_NUM_TOKENS // batch_tokens
        model = NanoGPT(warmup_steps=WARMUP_TOKENS // batch_tokens, lr_multiplier=multiplier)
        spectrum = ActivationSpectrum(
            LAYER, stage="validate", every_n_steps=every, num_tokens=NUM_VALIDATION_TOKENS, num_groups=4
        )
        trainer = Trainer(
            accelerator="cpu",
            max_steps=MAX_TOKENS // batch_tokens,
            val_check_interval=every,
            check_val_every_n_epoch=None,
            limit_val_batches=-(-NUM_VALIDATION_TOKENS // batch_tokens),
            num_sanity_val_steps=0,
            gradient_clip_val=1.0,
            logger=CSVLogger(folder, name="", version=path.name),
            callbacks=[
                spectrum,
                RunRecord(vectors=False),
                EarlyStopping("val_loss", stopping_threshold=TARGET, patience=10**9, check_finite=False),
            ],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = TextData(block_size=BLOCK_SIZE, batch_size=batch_size, seed=seed)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            trainer.fit(model, data)
    run = Run(path)
    return f"{run.tokens_to(TARGET):12,.0f} tokens, {run.history.seconds[-1]:6.0f} s: {path}"


def is_complete(path: Path) -> bool:
    try:
        return bool(Run(path).history.val_loss.min() <= TARGET)
    except ValueError:  # there is no record yet, or not a line of it
        return False


def pack(run: Path, to: Path) -> None:
    """Keep of a record what a forecast needs: history, description and float32 eigenvalues.

    Args:
        run: Log directory of the run.
        to: Log directory of the packed one.
    """
    target = to / "spectra"
    target.mkdir(parents=True)
    source = run / "spectra"
    shutil.copy(source / "history.csv", target)
    about = json.loads((source / "run.json").read_text())
    about["machines"] = []
    (target / "run.json").write_text(json.dumps(about, separators=(",", ":")))
    for path in sorted(source.glob("*.npz")):
        with np.load(path) as arrays:
            kept = {name: array for name, array in arrays.items() if not name.rpartition("/")[2].startswith(LEFT_OUT)}
        np.savez_compressed(target / path.name, **{name: to_float32(array) for name, array in kept.items()})


LEFT_OUT = ("leave_one_out", "num_rows_without", "vectors")


def to_float32(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.ndim and array.dtype == np.float64 else array


def _be_quiet() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def _train(args: tuple[Path, int, float, int]) -> str:
    return train(*args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where runs go; those that are there are kept")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--to", type=Path, default=PACKED, help="where packed records go")
    args = parser.parse_args()
    jobs = [(args.folder, size, multiplier, 100 + seed) for seed, (size, multiplier) in enumerate(SETTINGS)]
    console = Console()
    with multiprocessing.get_context("spawn").Pool(args.processes, _be_quiet) as pool:
        for number, line in enumerate(pool.imap(_train, jobs), start=1):
            console.print(f"{number:3} of {len(jobs)}: {line}", highlight=False, soft_wrap=True)
    shutil.rmtree(args.to, ignore_errors=True)
    for _, size, multiplier, _ in jobs:
        if is_complete(args.folder / name_of(size, multiplier)):
            pack(args.folder / name_of(size, multiplier), args.to / name_of(size, multiplier))


if __name__ == "__main__":
    main()
