"""Sweeps a recipe's learning rates: the better half of the multipliers goes on to runs of twice the tokens, and so on.

Seven multipliers by default, in three rounds of 7, 4 and 2 runs: 1.5 million tokens in all. Each run starts anew, as
its schedule ends with its tokens, and all have the same seed. A run whose result is in the folder is not made again,
so that the script can be interrupted.
"""

import argparse
import contextlib
import json
import logging
import math
import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer, seed_everything
from rich.console import Console
from rich.table import Table

from lightning_spectral.nanogpt import NanoGPT, TextData


def train(multiplier: float, tokens: int, seed: int, model: dict[str, Any], data: dict[str, Any]) -> float:
    """Train one run and validate it at its end.

    Args:
        multiplier: Of the recipe's learning rates.
        tokens: Of training, a few steps at least.
        seed: Of initialisation and order.
        model: Arguments of NanoGPT.
        data: Arguments of TextData.
    """
    seed_everything(seed, verbose=False)
    text = TextData(seed=seed, **data)
    steps = tokens // (text.block_size * text.batch_size)
    trainer = Trainer(
        max_steps=steps,
        val_check_interval=steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    network = NanoGPT(lr_multiplier=multiplier, warmup_steps=steps // 10, block_size=text.block_size, **model)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        trainer.fit(network, text)
    return trainer.callback_metrics["val_loss"].item()


def result_of(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Give the result of a run, from its file if it is there.

    Args:
        path: The file.
        settings: Arguments of `train`.
    """
    if path.exists():
        result = json.loads(path.read_text())
        if result["settings"] != settings:
            raise ValueError(f"folder must hold runs of the same settings, got others in {path}: take a new folder")
        return result
    start = time.perf_counter()
    loss = train(**settings)
    # a run that diverged is no better than any other
    result = {"settings": settings, "val_loss": loss if math.isfinite(loss) else None}
    _write(path, result | {"seconds": round(time.perf_counter() - start, 1)})
    return json.loads(path.read_text())


def sweep(
    folder: Path,
    multipliers: Sequence[float],
    tokens: int,
    rounds: int,
    seed: int,
    model: dict[str, Any],
    data: dict[str, Any],
    console: Console,
) -> float:
    """Run all rounds; gives the best multiplier of the last, and writes all of them to `sweep.json`.

    Args:
        folder: Where results go.
        multipliers: What to begin with.
        tokens: Of each run of the first round.
        rounds: How many there are; in each there are half the runs, of twice the tokens.
        seed: Of all runs.
        model: Arguments of NanoGPT.
        data: Arguments of TextData.
        console: Where progress goes.
    """
    summary, left = [], sorted(multipliers)
    for number in range(rounds):
        results = []
        for index, multiplier in enumerate(left):
            settings = {
                "multiplier": multiplier,
                "tokens": tokens << number,
                "seed": seed,
                "model": model,
                "data": data,
            }
            result = result_of(folder / f"round_{number + 1}" / f"lr_{multiplier:g}.json", settings)
            results.append(result)
            console.print(
                f"round {number + 1} of {rounds}, run {index + 1} of {len(left)}: learning rates x {multiplier:g}, "
                f"{tokens << number:,} tokens: val_loss {_show(result['val_loss'])}, {result['seconds']} s",
                soft_wrap=True,
            )
        results.sort(key=lambda result: math.inf if result["val_loss"] is None else result["val_loss"])
        summary += [{"round": number + 1} | result for result in results]
        left = sorted(result["settings"]["multiplier"] for result in results[: math.ceil(len(results) / 2)])
        best = results[0]["settings"]["multiplier"]
    _write(folder / "sweep.json", {"best": best, "runs": summary})
    console.print(_table(summary))
    console.print(f"Best: lr_multiplier={best:g}")
    if len(multipliers) > 1 and best in (min(multipliers), max(multipliers)):
        console.print("It is at the edge of what was tried: the best may lie beyond.")
    return best


def _table(summary: list[dict[str, Any]]) -> Table:
    table = Table(title="From best to worst in each round", title_justify="left")
    for heading in ("round", "tokens", "lr_multiplier", "val_loss"):
        table.add_column(heading, justify="right")
    for run, following in zip(summary, [*summary[1:], summary[-1]], strict=True):
        settings = run["settings"]
        table.add_row(
            str(run["round"]),
            f"{settings['tokens']:,}",
            f"{settings['multiplier']:g}",
            _show(run["val_loss"]),
            end_section=following["round"] != run["round"],
        )
    return table


def _show(loss: float | None) -> str:
    return "diverged" if loss is None else f"{loss:.4f}"


def _write(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all: an interrupted script leaves no half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    unfinished.replace(path)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where results go; those that are there are kept")
    parser.add_argument("--multipliers", type=float, nargs="+", default=[0.125, 0.25, 0.5, 1, 2, 4, 8])
    parser.add_argument("--tokens", type=int, default=65_536, help="training tokens of a run of the first round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=8, help="sequences a step")
    parser.add_argument("--block-size", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--val-tokens", type=int, default=32_768, help="tokens of a validation run")
    parser.add_argument("--path", help="text to train on; Python's standard library by default")
    parser.add_argument("--model", type=json.loads, default={}, help='other arguments of NanoGPT: {"recipe": "rope"}')
    args = parser.parse_args(words)
    least = 2 * args.batch_size * args.block_size
    if args.tokens < least:
        parser.error(f"--tokens must be at least {least}, two steps, got {args.tokens}")
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    # Of a dozen runs one after the other, a line each is enough.
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    data = {"path": args.path, "block_size": args.block_size, "batch_size": args.batch_size}
    model = {"val_tokens": args.val_tokens} | args.model
    console = Console(highlight=False)
    sweep(args.folder, args.multipliers, args.tokens, args.rounds, args.seed, model, data, console)


if __name__ == "__main__":
    main()
