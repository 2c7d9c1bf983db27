"""Spectra in Weights & Biases without its service, and a history that comes out again to be compared.

`python examples/wandb_offline.py` trains a small GPT at two learning rates, three seeds each, offline: `wandb sync`
would send the runs. It says what W&B was given, and exports each history to `history.jsonl`, with `config.json` beside
it. Of a run that was sent `json.dump(list(wandb.Api().run("entity/project/id").scan_history()), file)` has these rows.
"""

import argparse
import json
import os
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import WandbLogger
from wandb.proto.wandb_internal_pb2 import Record

from lightning_spectral import ActivationSpectrum, RunRecord
from lightning_spectral.nanogpt import NanoGPT, TextData

BLOCK_SIZE, BATCH_SIZE = 64, 8


def train(folder: Path, max_steps: int, multiplier: float, seed: int) -> Path:
    """Train a run at a multiple of the learning rate; gives the file that would be sent."""
    seed_everything(seed, verbose=False)
    every = max(1, max_steps // 10)
    folder.mkdir(parents=True, exist_ok=True)
    logger = WandbLogger(save_dir=folder, offline=True, project="spectra", name=f"{folder.parent.name}-{seed}")
    trainer = Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        val_check_interval=every,
        check_val_every_n_epoch=None,
        limit_val_batches=16,
        num_sanity_val_steps=0,
        logger=logger,
        callbacks=[
            ActivationSpectrum("all", stage="validate", every_n_steps=every, num_tokens=8192),
            RunRecord(upload=True),  # an artifact of the run, at the end
        ],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=every,
    )
    model = NanoGPT(num_layers=2, width=32, block_size=BLOCK_SIZE, warmup_steps=every, lr_multiplier=multiplier)
    trainer.fit(model, TextData(block_size=BLOCK_SIZE, batch_size=BATCH_SIZE, seed=seed))
    (folder / "config.json").write_text(json.dumps(dict(logger.experiment.config)))
    (file,) = Path(logger.experiment.dir).parent.glob("*.wandb")
    wandb.finish()
    return file


def records(file: Path) -> Iterator[Any]:
    """What a run's file holds: LevelDB's log, blocks of 32 KiB with pieces of records, each after a header."""
    data = file.read_bytes()
    start, record = 7, b""
    while start + 7 <= len(data):
        if (left := -start % 32768) and left < 7:  # too little for a header: the block was filled up
            start += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, start)
        record += data[start + 7 : start + 7 + length]
        start += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield Record.FromString(record)
            record = b""


def export(file: Path, path: Path) -> Counter[str]:
    """Write the rows of a run's history, one a line; counts what was logged, by kind."""
    counts: Counter[str] = Counter()
    with path.open("w") as rows:
        for record in records(file):
            if record.HasField("artifact"):
                counts[f"artifact of type {record.artifact.type}"] += 1
            if not record.HasField("history"):
                continue
            row: dict[str, Any] = {}
            for item in record.history.item:
                name, *inner = item.nested_key or [item.key]
                value = json.loads(item.value_json)
                if not inner:
                    row[name] = value
                    counts["number"] += not name.startswith("_")
                elif inner == ["_type"]:
                    counts[value] += 1
            rows.write(json.dumps(row) + "\n")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-steps", type=int, default=120, help="optimizer steps of a run, reported ten times")
    parser.add_argument("--seeds", type=int, default=3, help="runs at each learning rate")
    parser.add_argument("--folder", type=Path, default=Path("lightning_logs/wandb_offline"), help="where runs go")
    arguments = parser.parse_args()
    os.environ |= {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}

    files = [
        train(arguments.folder / side / f"seed_{seed}", arguments.max_steps, multiplier, seed)
        for side, multiplier in (("base", 1.0), ("doubled", 2.0))
        for seed in range(1, 1 + arguments.seeds)
    ]
    wandb.teardown()  # its service writes what it still holds
    for file in files:
        counts = export(file, file.parents[2] / "history.jsonl")
    print("W&B has of the last run:", ", ".join(f"{count} x {kind}" for kind, count in counts.most_common()))
    sides = " ".join(f"'{arguments.folder}/{side}/*/history.jsonl'" for side in ("base", "doubled"))
    print(f"Compare what was exported: lightning-spectral compare {sides}")


if __name__ == "__main__":
    main()
