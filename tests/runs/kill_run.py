"""Kills a training run at random moments and resumes it, again and again; prints what was done, for a test to judge."""

import json
import os
import random
import signal
import sys
import traceback
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_spectral import ActivationSpectrum, Run
from tests.models import LanguageModel, Network, tiny_trainer, token_loader


class Telling(ActivationSpectrum):
    """Tells each report once it is written."""

    pipe: int

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        super().on_train_batch_end(trainer, *args)
        os.write(self.pipe, f"{trainer.global_step}\n".encode())


def newest_checkpoint(folder: Path) -> Path | None:
    """The last that can be read: a kill may have torn one."""
    for path in sorted(folder.glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]), reverse=True):
        try:
            torch.load(path, weights_only=True)
        except Exception:
            continue
        return path
    return None


def train(folder: Path, pipe: int) -> None:
    spectrum = Telling("network.blocks.0", every_n_steps=1, num_tokens=32, num_groups=1)
    spectrum.pipe = pipe
    saving = ModelCheckpoint(folder / "checkpoints", "{step}", every_n_train_steps=3, save_top_k=-1)
    trainer = tiny_trainer(
        folder, callbacks=[spectrum, saving], max_epochs=-1, limit_val_batches=0, enable_checkpointing=True
    )
    model = LanguageModel(Network(width=8, num_blocks=1))
    model.network.logits = torch.nn.Linear(8, 40)
    trainer.fit(model, token_loader(1000), ckpt_path=newest_checkpoint(folder / "checkpoints"))


def kill_at_random(folder: Path, generator: random.Random) -> list[int]:
    """Train in a process of its own until it dies; returns the steps whose reports it had told."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            train(folder, writing)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as lines:
        told = [lines.readline() for _ in range(generator.randint(0, 9))]
        # Somewhere within the steps that follow, which take a few milliseconds each.
        until = perf_counter() + generator.uniform(0, 0.03)
        while perf_counter() < until:
            pass
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        told += lines.readlines()
    return [int(line) for line in told]


def main(folder: Path, num_kills: int) -> None:
    seed_everything(0, verbose=False)
    generator = random.Random(0)
    for _ in range(num_kills):
        checkpoint = newest_checkpoint(folder / "checkpoints")
        told = kill_at_random(folder, generator)
        steps: list[int] = []
        history: list[float] = []
        if (folder / "spectra" / "run.json").exists():
            run = Run(folder)
            steps = run.steps("activation")
            assert all(len(run.spectrum("activation", "network.blocks.0", step).values) for step in steps)
            history = run.history.step.tolist()
        resumed = 0 if checkpoint is None else int(checkpoint.stem.partition("=")[2])
        print(json.dumps({"resumed": resumed, "told": told, "steps": steps, "history": history}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
