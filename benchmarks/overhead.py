"""What watching costs: training with ActivationSpectrum at its defaults against training without, in one run.

    python benchmarks/overhead.py --json overhead.json

The two are run in turn, several times; machines are noisy, so the ratio of the minima is the number to quote. The floor
is the bare matrix products that a report cannot do without: n d^2 multiply-adds per layer, timed as ``torch.mm``.
"""

import argparse
import json
import time
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lightning_spectral import ActivationSpectrum
from lightning_spectral.nanogpt import NanoGPT, TextData


class StepTimer(Callback):
    """Wall time of each training step, from batch to batch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


def train(arguments: argparse.Namespace, watch: bool) -> tuple[float, float]:
    """Seconds of training without the first step, and those of them that the callback says it took."""
    torch.manual_seed(0)
    timer, callbacks = StepTimer(), []
    if watch:
        callbacks.append(ActivationSpectrum(every_n_steps=arguments.every_n_steps, num_tokens=arguments.num_tokens))
    module = NanoGPT(num_layers=arguments.num_layers, width=arguments.width, num_heads=arguments.width // 64)
    trainer = Trainer(
        max_steps=arguments.steps,
        callbacks=[*callbacks, timer],
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module, TextData(batch_size=arguments.batch_size))
    return sum(timer.seconds[1:]), float(trainer.callback_metrics.get("spectral/seconds", 0.0))


def product_floor(arguments: argparse.Namespace, num_probes: int = 5) -> float:
    """Seconds of the bare products of all reports in a run."""
    rows = torch.randn(arguments.batch_size * 256, arguments.width)
    timings = []
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(rows.T, rows)
        timings.append(time.perf_counter() - start)
    num_reports = arguments.steps // arguments.every_n_steps
    return min(timings) * num_probes * num_reports * arguments.num_tokens / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--batch-size", type=int, default=16, help="sequences of 256 tokens")
    parser.add_argument("--steps", type=int, default=33)
    parser.add_argument("--every-n-steps", type=int, default=32)
    parser.add_argument("--num-tokens", type=int, default=65536)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")

    plain, watched, ours = [], [], []
    for _ in track(range(arguments.repeats), description="pairs of runs"):
        plain.append(train(arguments, watch=False)[0])
        seconds, own = train(arguments, watch=True)
        watched.append(seconds)
        ours.append(own)
    num_reports = arguments.steps // arguments.every_n_steps
    result = {
        "settings": {key: value for key, value in vars(arguments).items() if key != "json"},
        "seconds_without": plain,
        "seconds_with": watched,
        "ratio_of_minima": min(watched) / min(plain),
        "own_seconds": ours,
        "own_share": min(ours) / min(watched),
        "own_share_at_defaults": min(ours) / num_reports / (100 * min(plain + watched) / (arguments.steps - 1)),
        "floor_seconds": product_floor(arguments),
        "environment": {"torch": torch.__version__, "threads": torch.get_num_threads()},
    }
    table = Table("", "seconds", title="ActivationSpectrum, cost of watching", title_justify="left")
    table.add_row("training without, minimum", f"{min(plain):.2f}")
    table.add_row("training with, minimum", f"{min(watched):.2f}")
    table.add_row("ratio", f"{result['ratio_of_minima']:.3f}")
    table.add_row("time in the callback, minimum", f"{min(ours):.2f}")
    table.add_row("its share of training", f"{result['own_share']:.3%}")
    table.add_row("its share at a report every 100 steps", f"{result['own_share_at_defaults']:.3%}")
    table.add_row("floor: the matrix products alone", f"{result['floor_seconds']:.2f}")
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
