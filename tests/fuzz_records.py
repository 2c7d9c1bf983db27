"""Spoilt records and hostile command lines."""

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lightning_spectral import Run, compare, forecast, report
from lightning_spectral.cli import main
from lightning_spectral.runs.record import Record, read_about
from tests.fuzz_case import Case
from tests.fuzz_damage import change_bytes, cut
from tests.runs.made_up import LAYER, made_up

NUM_RUNS = 5
WEIGHT = "gpt.blocks.3.out.weight"

VALUES: list[Any] = [
    *(None, True, 0, -1, 5, 10**30, 10**400, 0.5, -0.5, float("nan"), float("inf"), "", "x", "many", "[red]x[/red]"),
    *("a\nb", "\x1b[2J", "x" * 3000, [], [1], [None, 1], [5, 1], [1, 100], [0.1, 0.2, 0.3], ["a"], {}, {"a": {"b": 1}}),
    *([[[[]]]], {"": ""}, "NaN", "activation", [True, 3], [0.5, 0.1]),
]
FIELDS = [
    *(
        "",
        "x",
        "nan",
        "inf",
        "1e999",
        "-1",
        "1.5",
        "9" * 400,
        "9" * 5000,
        "0x10",
        "1_000",
        "\u0661",
        '"5"',
        "1,2",
        "\0",
    ),
    *("1e308", "-inf", " 7 ", "1e-320"),
]


def make_base(folder: Path) -> None:
    """Five runs of one family, with activations, bases, gradients and weights, under ``folder / "base"``."""
    for index in range(NUM_RUNS):
        run = made_up(
            folder / f"base/run{index}", 1e5 * (1 + index), 10.0, 1 + 0.1 * index, batch_tokens=64.0 * 2**index
        )
        record = Record(run / "spectra", read_about(run / "spectra"))
        series = record.about["series"]
        series["activation-validate"] |= {"head": [1, 10], "tail": [0.125, 0.5], "rank": 2}
        series["gradient-validate"] = {
            **{"kind": "gradient", "stage": "validate", "parameters": [WEIGHT], "num_samples": 16, "weights": True},
            **{"loss_reduction": "mean", "method": "auto", "head": [1, 10], "tail": [0.125, 0.5]},
        }
        record.describe(
            tags={"idea": "a"}, forecast={"forecast": {"monitor": "val_loss", "target_loss": 1.0, "actual": 5}}
        )
        for step in (100, 300, 600):
            values = np.arange(1, 17.0) ** -0.5
            record.write_report(
                "gradient-validate",
                step,
                {
                    "tokens": np.asarray(step * 500.0 * (1 + index)),
                    f"gradient/{WEIGHT}/singular_values": values,
                    f"gradient/{WEIGHT}/leave_one_out": np.stack([values[:12]] * 4),
                    f"gradient/{WEIGHT}/num_samples": np.asarray(16),
                    f"gradient/{WEIGHT}/failure": "",
                    f"weight/{WEIGHT}/singular_values": values,
                },
            )


def draw_record(rng: random.Random, folder: Path) -> Case:
    """A run that is spoilt in one or two places, and something that reads it."""
    run = folder / "spoilt"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(folder / "base/run0", run)
    done = [rng.choice(SPOILERS)(rng, run / "spectra") for _ in range(rng.choice((1, 1, 2)))]
    base = f"{folder}/base/run"
    reads: dict[str, Callable[[], Any]] = {
        "Run": partial(_read, run),
        "Run again": partial(_read, run),
        "show": partial(main, ["show", str(run)]),
        "show --json": partial(main, ["show", str(run), "--json"]),
        "compare": partial(compare, str(run), f"{base}1"),
        "compare, two": partial(main, ["compare", f"{base}[12]", str(run), "--json"]),
        "forecast": partial(forecast, [str(run), f"{base}[1-4]"], 1.0),
        "report": partial(report, str(run), folder / "report.html"),
        "report, two": partial(main, ["report", f"{base}1", str(run), "-o", f"{folder}/report.html"]),
        "watch": partial(main, ["watch", str(run), "--once"]),
    }
    name = rng.choice(list(reads))
    # Of a pattern, or a comparison, another run's name may stand beside; a setting that differs is one that is named.
    names = (str(run), "runs must", "at_loss")
    return Case(f"{name} after {'; '.join(done)}", names, reads[name])


def _read(path: Path) -> None:
    run = Run(path)
    repr((run, run.id, run.family, run.tags))
    run.history.with_loss()
    run.tokens_to(1.1)
    for kind in run.kinds:
        for name in run.names(kind):
            for step in run.steps(kind):
                spectrum = run.spectrum(kind, name, step)
                rank = spectrum.rankme().value
                assert not rank < 1, f"gives RankMe {rank}"
                assert not rank > len(spectrum.values) + 1e-9, f"gives RankMe {rank}"
                spectrum.exponent((0.125, 0.5))
            run.spectrum_at(kind, name, 77_000.0)


def _file(rng: random.Random, spectra: Path, pattern: str = "*") -> Path:
    files = sorted(file for file in spectra.glob(pattern) if file.is_file())
    return rng.choice(files) if files else spectra / "run.json"


def _bytes(rng: random.Random, spectra: Path) -> str:
    return change_bytes(rng, _file(rng, spectra))


def _cut(rng: random.Random, spectra: Path) -> str:
    return cut(rng, _file(rng, spectra))


def _json(rng: random.Random, spectra: Path) -> str:
    file = spectra / "run.json"
    if not file.is_file():  # spoilt already: a pipe, or a device that never ends
        return "nothing"
    try:
        about = json.loads(file.read_text())
    except (ValueError, OSError, RecursionError):
        return "nothing"
    places: list[tuple[Any, Any]] = []

    def visit(part: Any) -> None:
        for key in part if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ():
            places.append((part, key))
            visit(part[key])

    visit(about)
    if not places:
        return "nothing"
    part, key = rng.choice(places)
    value = rng.choice(VALUES)
    if rng.random() < 0.15:
        del part[key]
    elif isinstance(part, dict) and rng.random() < 0.1:
        part[str(value)[:50]] = part.pop(key)
    else:
        part[key] = value
    file.write_text(json.dumps(about))
    return f"{key!r} of run.json set to {str(value)[:40]!r}"


def _history(rng: random.Random, spectra: Path) -> str:
    file = spectra / "history.csv"
    if not file.is_file():
        return "nothing"
    try:
        lines = file.read_text().split("\n")
    except (ValueError, OSError):
        return "nothing"
    at = rng.randrange(len(lines))
    fields = lines[at].split(",")
    fields[rng.randrange(len(fields))] = rng.choice(FIELDS)
    lines[at] = ",".join(fields)
    if rng.random() < 0.3:
        rng.shuffle(lines)
    if rng.random() < 0.2:
        lines.insert(at, lines[at])
    file.write_text("\n".join(lines))
    return f"line {at} of the history changed"


def _arrays(rng: random.Random, spectra: Path) -> str:
    file = _file(rng, spectra, "*.npz")
    if not file.is_file():
        return "nothing"
    try:
        with np.load(file) as found:
            arrays = dict(found.items())
    except Exception:
        return "nothing"
    if not arrays:
        return "nothing"
    name = rng.choice(list(arrays))
    array = arrays[name]
    numbers = array if array.dtype.kind == "f" else np.asarray(1.0)
    changes: dict[str, Callable[[], Any]] = {
        "a number": lambda: np.asarray(1.0),
        "a scalar NaN": lambda: np.asarray(np.nan),
        "all NaN": lambda: numbers * np.nan,
        "negative": lambda: -numbers,
        "reversed": lambda: numbers[::-1] if numbers.ndim else numbers,
        "complex": lambda: numbers * 1j,
        "text": lambda: numbers.astype(str),
        "bytes": lambda: numbers.astype("S"),
        "objects": lambda: np.array([{"a": 1}], dtype=object),
        "bool": lambda: numbers > 0.5,
        "ints": lambda: numbers.astype(np.int64),
        "half": lambda: numbers.astype(np.float16),
        "big endian": lambda: numbers.astype(">f8"),
        "long doubles": lambda: numbers.astype(np.longdouble),
        "dates": lambda: np.array(["2020-01-01"], dtype="datetime64[D]"),
        "fields": lambda: np.zeros(3, dtype=[("a", "<f8")]),
        "empty": lambda: np.zeros(0),
        "no axis of groups": lambda: numbers[0] if numbers.ndim else numbers,
        "an axis more": lambda: numbers[None],
        "zeros": lambda: numbers * 0,
        "infinite": lambda: numbers * np.inf,
        "huge": lambda: numbers * 1e300,
        "tiny": lambda: numbers * 1e-320,
        "one infinite": lambda: np.where(np.arange(numbers.size).reshape(numbers.shape) == 0, np.inf, numbers),
        "shorter": lambda: numbers[..., :3] if numbers.ndim else numbers,
        "a negative number": lambda: np.asarray(-5),
        "a large number": lambda: np.asarray(2**63, dtype=np.uint64),
    }
    change = rng.choice(list(changes))
    with np.errstate(all="ignore"):
        arrays[name] = changes[change]()
    if rng.random() < 0.1:
        del arrays[name]
        change = "gone"
    np.savez(file, **arrays)
    return f"{name} of {file.name} is {change}"


def _special(rng: random.Random, spectra: Path) -> str:
    file = _file(rng, spectra)
    if not file.exists():
        return "nothing"
    file.unlink()
    way = rng.choice(("pipe", "folder", "loop", "zero", "null", "empty", "gone", "pickle", "deep"))
    if way == "pipe":
        os.mkfifo(file)
    elif way == "folder":
        file.mkdir()
    elif way in ("loop", "zero", "null"):
        file.symlink_to({"loop": file.name, "zero": "/dev/zero", "null": "/dev/null"}[way])
    elif way == "empty":
        file.touch()
    elif way == "pickle":
        file.write_bytes(pickle.dumps({"a": 1}))
    elif way == "deep":
        file.write_text("[" * 100_000)
    return f"{file.name} is {way}"


def _name(rng: random.Random, spectra: Path) -> str:
    file = _file(rng, spectra, "*.npz")
    if not file.exists():
        return "nothing"
    name = rng.choice((f"activation-validate-{'9' * 200}.npz", "x-000000001.npz", "activation-000000050.npz"))
    name = rng.choice(
        (name, "activation-validate-2-000000100.npz", "forecast-validate-000000100.npz", "a[b]-000000001.npz")
    )
    file.rename(spectra / name)
    return f"{file.name} is called {name[:40]}"


SPOILERS = [_bytes, _cut, _json, _json, _json, _history, _history, _arrays, _arrays, _arrays, _arrays, _special, _name]


def draw_command(rng: random.Random, folder: Path) -> Case:
    """A command line of words that may fit together."""
    base = f"{folder}/base/run"
    words = [
        "",
        "x",
        "[",
        "[!",
        "*",
        "**",
        "a\nb",
        "[red]x[/red]",
        "x" * 5000,
        "-1",
        "nan",
        "1e999",
        "--",
        "-x",
        "~",
        "/",
        ".",
    ]
    words += ["/dev/null", "/dev/zero", f"{base}0/spectra/run.json", "nothing/*", "\udcff", "a\0b", "\x1b[2J"]
    numbers = ["1.0", "1.2", "0", "-5", "nan", "inf", "1e99", "x", "", "9" * 400, "50000"]
    bands = ["1", "8", "0.125", "0.5", "100", "-1", "nan", "x", "5", "9" * 30, "\u00b2"]
    runs = [f"{base}0", f"{base}1", f"{base}*", f"{base}[0-4]", f"{folder}/base/*", *rng.sample(words, 2)]
    command = rng.choice(("show", "compare", "forecast", "show", "compare", "forecast", rng.choice(words)))
    line = [command, *(rng.choice(runs) for _ in range(rng.choice((0, 1, 1, 2, 2, 3))))]
    options: list[list[str]] = [
        ["--json"],
        ["--kind", rng.choice(["activation", "gradient", "weight", "drift", "activation-validate", *words])],
        ["--at-loss", rng.choice(numbers)],
        ["--floor", rng.choice(runs)],
        ["--target", rng.choice(numbers)],
        ["--layer", rng.choice([LAYER, *words])],
        ["--tail", rng.choice(bands), rng.choice(bands)],
        ["--at", *(rng.choice(numbers) for _ in range(rng.choice((1, 2))))],
        [rng.choice(words)],
        ["--help"],
    ]
    if command == "forecast" and rng.random() < 0.8:
        line += ["--target", rng.choice(["1.0", "1.2", *numbers])]
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        line += rng.choice(options)
    if rng.random() < 0.02:
        line += [
            "--plot",
            rng.choice([f"{folder}/a.png", f"{folder}/a.x", "", str(folder), "/dev/null", f"{folder}/no/a.png"]),
        ]
    return Case(
        f"{line!r}"[:300],
        ("must", "needs", "arguments", "argument", "see lightning-spectral", str(folder)),
        partial(main, line),
    )
