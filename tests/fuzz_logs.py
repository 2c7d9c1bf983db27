"""Spoilt logs of other tools."""

import json
import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from lightning_spectral import Run, compare, report
from lightning_spectral.cli import main
from tests.fuzz_case import Case
from tests.fuzz_damage import change_bytes, cut
from tests.fuzz_records import FIELDS, VALUES

LOSSES = [2.0, 1.5, 1.2, 1.0, 0.7, 0.5]


def make_logs(folder: Path) -> None:
    """One log of each tool under ``folder / "logs"``, of a run that comes down to loss 1."""
    logs = folder / "logs"
    for name in ("csv", "mlflow/metrics", "mlflow/params"):
        (logs / name).mkdir(parents=True)
    rows = [{"step": 100 * i, "epoch": i, "tokens": 6400 * (i + 1), "val_loss": x} for i, x in enumerate(LOSSES)]
    lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    (logs / "csv/metrics.csv").write_text("\n".join(lines) + "\n")
    (logs / "csv/hparams.yaml").write_text("batch_size: 4\nmodel:\n  lr: 0.1\n  names: [a, b]\nseed: 1\n")
    with SummaryWriter(str(logs / "tb")) as writer:
        for row in rows:
            for name in ("epoch", "tokens", "val_loss"):
                writer.add_scalar(name, row[name], row["step"], new_style=name == "tokens")
    shutil.copyfile(logs / "csv/hparams.yaml", logs / "tb/hparams.yaml")
    for name in ("epoch", "tokens", "val_loss"):
        found = [f"{1_700_000_000_000 + row['step']} {row[name]} {row['step']}\n" for row in rows]
        (logs / "mlflow/metrics" / name).write_text("".join(found))
    (logs / "mlflow/params/lr").write_text("0.1")
    (logs / "mlflow/meta.yaml").write_text("run_id: a\nstart_time: 1699999999000\n")
    history = [
        {**row, "_step": i, "_runtime": 2.0 * i, "_timestamp": 1.7e9 + 2 * i, "trainer/global_step": row["step"]}
        for i, row in enumerate(rows)
    ]
    (logs / "wandb.json").write_text(json.dumps(history))
    lines = [",".join(history[0]), *(",".join(map(str, row.values())) for row in history)]
    (logs / "wandb.csv").write_text("\n".join(lines) + "\n")
    metrics = {
        name: [{"value": row[name], "timestamp": 1_700_000_000_000, "step": row["step"]} for row in rows]
        for name in ("epoch", "tokens", "val_loss")
    }
    run = {"info": {"start_time": 1_699_999_999_000}, "params": {"lr": "0.1"}, "metrics": metrics, "tags": {}}
    (logs / "run.json").write_text(json.dumps({"system": {}, "mlflow": run}))


def draw_log(rng: random.Random, folder: Path) -> Case:
    """A log that is spoilt in one or two places, and something that reads it."""
    name = rng.choice(sorted(path.name for path in (folder / "logs").iterdir()))
    where = folder / "spoilt_logs"
    shutil.rmtree(where, ignore_errors=True)
    log = where / name
    source = folder / "logs" / name
    where.mkdir()
    if source.is_dir():
        shutil.copytree(source, log)
    else:
        shutil.copyfile(source, log)
    done = [rng.choice(SPOILERS)(rng, log) for _ in range(rng.choice((1, 1, 2)))]
    said: dict[str, Any] = {}
    if rng.random() < 0.3:
        keys = ("loss", "step", "tokens", "seconds", "batch_tokens", "family")
        said[rng.choice(keys)] = rng.choice(["val_loss", "tokens", "step", "lr*3", "batch_size*8", 64, *VALUES])
    base = f"{folder}/base/run1"
    reads: dict[str, Callable[[], Any]] = {
        "Run": partial(_read, log, said),
        "Run again": partial(_read, log, said),
        "show": partial(main, ["show", str(log)]),
        "show --json": partial(main, ["show", str(log), "--json", "--loss-key", "val_loss"]),
        "compare": partial(compare, str(log), base),
        "report": partial(report, [str(log), base], folder / "report.html"),
        "watch": partial(main, ["watch", str(log), "--once"]),
        "compare, both": partial(main, ["compare", base, str(log), "--batch-tokens", "64", "--json"]),
    }
    read = rng.choice(list(reads))
    names = (str(log), "runs must", "at_loss", *said, "base", "mixed")
    return Case(f"{read} {said} after {'; '.join(done)}", names, reads[read])


def _read(path: Path, said: dict[str, Any]) -> None:
    run = Run(path, **said)
    history = run.history
    assert len(set(map(len, history))) == 1
    assert (history.step[1:] > history.step[:-1]).all(), "steps do not rise"
    assert not (history.tokens < 0).any()
    assert not (history.seconds < 0).any(), "seconds below zero"
    run.tokens_to(1.1)


def _file(rng: random.Random, log: Path) -> Path:
    return rng.choice(sorted(path for path in log.rglob("*") if not path.is_dir())) if log.is_dir() else log


def _bytes(rng: random.Random, log: Path) -> str:
    return change_bytes(rng, _file(rng, log))


def _cut(rng: random.Random, log: Path) -> str:
    return cut(rng, _file(rng, log))


def _cell(rng: random.Random, log: Path) -> str:
    file = _file(rng, log)
    if not file.is_file():
        return "nothing"
    try:
        lines = file.read_text().split("\n")
    except ValueError:
        return "nothing"
    at = rng.randrange(len(lines))
    sign = "," if "," in lines[at] else " "
    cells = lines[at].split(sign)
    cells[rng.randrange(len(cells))] = rng.choice(FIELDS)
    lines[at] = sign.join(cells)
    if rng.random() < 0.3:
        rng.shuffle(lines)
    file.write_text("\n".join(lines))
    return f"line {at} of {file.name} changed"


def _value(rng: random.Random, log: Path) -> str:
    """Something else in JSON, or in YAML, which takes JSON."""
    file = log if log.suffix == ".json" else log / rng.choice(("hparams.yaml", "meta.yaml"))
    if not file.is_file():
        return "nothing"
    try:
        held = json.loads(file.read_text()) if file.suffix == ".json" else {"start_time": 1, "batch_size": 4}
    except (ValueError, RecursionError):
        return "nothing"
    places: list[tuple[Any, Any]] = []

    def visit(part: Any) -> None:
        for key in part if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ():
            places.append((part, key))
            visit(part[key])

    visit(held)
    value = rng.choice(VALUES)
    if places:
        part, key = rng.choice(places)
        part[key] = value
    else:
        held = value
    file.write_text(json.dumps(held))
    return f"a value of {file.name} set to {str(value)[:40]!r}"


def _special(rng: random.Random, log: Path) -> str:
    file = _file(rng, log)
    if not os.path.lexists(file):
        return "nothing"
    file.unlink()
    way = rng.choice(("pipe", "folder", "loop", "zero", "null", "empty", "gone", "deep"))
    if way == "pipe":
        os.mkfifo(file)
    elif way == "folder":
        file.mkdir()
    elif way in ("loop", "zero", "null"):
        file.symlink_to({"loop": file.name, "zero": "/dev/zero", "null": "/dev/null"}[way])
    elif way == "empty":
        file.touch()
    elif way == "deep":
        file.write_text("[" * 100_000)
    if log.is_dir() and not any(path for path in log.rglob("*") if not path.is_dir()):
        (log / "left").touch()
    return f"{file.name} is {way}"


SPOILERS = [_bytes, _bytes, _cut, _cell, _cell, _cell, _value, _value, _special]
