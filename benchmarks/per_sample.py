"""What per-sample gradients and their spectra cost: our engines, the published protocol, Opacus and BackPACK.

    python -m benchmarks.per_sample --json per_sample.json

Twice: the rows wanted alone, by passes of their own, and within a training step, which computes all gradients anyway.
All contenders give rows of the same matrices, which is checked, and their singular values by way of the same Gram
matrices. They are run in turn, and minima are compared; peak memory is that of a fresh process each, above what it held
before. The floor is one plain forward and backward pass of the same samples.

Opacus is part of the ``test`` extra. BackPACK is not: its torchvision, of which nothing is used here, may bring a build
of torch that does not fit. ``pip install --no-deps backpack-for-pytorch einops unfoldNd`` leaves it out. A peer that is
not installed is left out with a word.
"""

import argparse
import sys
from functools import partial
from typing import Any

from rich.table import Table

from benchmarks.contenders import PEERS, SIZES, SMALL, Setting, error_of_ours, error_of_peer, is_installed, run
from benchmarks.harness import Target, console, in_turn, main, min_and_median, peak_bytes, seconds_of
from lightning_spectral.capture.per_sample import chunk_bytes, saved_bytes
from lightning_spectral.capture.shadow import BatchLoss
from lightning_spectral.functional.singular import BLOCK_NUMBERS

CONTENDERS = "benchmarks.contenders"

ALONE = {
    "published": "published protocol: a pass per sample and matrix",
    "loop": "loop over samples",
    "vmap": "vmap, in chunks",
    "hooks": "hooks, a pass of their own, in chunks",
    "hooks_at_once": "hooks, a pass of their own, all at once",
    "opacus": "Opacus, all else frozen",
    "backpack": "BackPACK, all else frozen",
    "opacus_rows": "Opacus, rows without spectrum",
    "backpack_rows": "BackPACK, rows without spectrum",
}

IN_STEP = {
    "step_hooks": "hooks",
    "step_hooks_kept": "hooks, rows kept to the end as in all batches but the last",
    "step_opacus": "Opacus, hooks on these matrices alone",
    "step_backpack": "BackPACK, these matrices extended alone",
    "step_backpack_in_place": "BackPACK, our Gram in its extension hook",
    "step_opacus_rows": "Opacus, rows without spectrum",
    "step_backpack_rows": "BackPACK, rows without spectrum",
}

MODELS = {"baseline": "learned positions, fused q, k, v", "rope": "head tied to the embedding"}
"""Recipes of which all parameters are measured."""

OUT_OF_REACH = 1e-3
"""Relative error beyond which rows are wrong rather than rounded."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--tokens", type=int, default=256, help="a sample")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--chunk", type=int, default=8, help="samples at a time")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--published-repeats", type=int, default=2, help="the slow one's")
    parser.add_argument(
        "--memory-of", nargs="+", metavar="CONTENDER", help="beside the floor; all of them if not given"
    )
    parser.add_argument(
        "--memory-points",
        nargs="+",
        default=["1:32", "4:32", "8:32", "16:32", "8:8", "8:64"],
        help="CHUNK:SAMPLES at which the memory of vmap is held against its formula",
    )


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    sizes = {size: vars(arguments)[size] for size in SIZES}
    missing = [peer for peer in PEERS if not is_installed(peer)]
    names = ["plain", *(name for name in ALONE | IN_STEP if not any(peer in name for peer in missing))]
    weighed = [name for name in names if name in ("plain", *(arguments.memory_of or names)) and "_rows" not in name]
    setting = Setting(**sizes)
    check(setting, names)
    quick = {name: partial(run, setting, name) for name in names if name != "published"}
    seconds = in_turn(quick, arguments.repeats, "repeats in turn")
    # One run of it is 640 passes: time enough for the machine to show all its moods.
    seconds["published"] = [seconds_of(partial(run, setting, "published")) for _ in range(arguments.published_repeats)]
    return {
        "missing": missing,
        "seconds": seconds,
        "peak_bytes": {name: peak_bytes(CONTENDERS, name, sizes) for name in weighed},
        "models": {recipe: errors(recipe) for recipe in MODELS},
        "formula": [formula_point(sizes, *map(int, point.split(":"))) for point in arguments.memory_points],
    }


def check(setting: Setting, names: list[str]) -> None:
    """Refuse to time contenders that do not all give the same: singular values, to 1e-4 of each matrix's largest."""
    expected = run(setting, "loop")
    for name in names:
        if name == "plain" or name.endswith("_rows") or name == "loop":
            continue
        if name == "published":  # on the few samples that it can do meanwhile
            small = Setting(**SMALL | {"num_layers": 6, "samples": 4})
            found, wanted = run(small, name), run(small, "loop")
        else:
            found, wanted = run(setting, name), expected
        error = float(((found - wanted).abs() / wanted[:, :1]).max())
        if not error < 1e-4:
            raise ValueError(
                f"{name} must give the singular values that the loop gives, got a difference of {error:.1e}"
            )


def errors(recipe: str) -> dict[str, str]:
    """What ours and the peers say of all parameters of a model, held against the loop."""
    setting = Setting(**SMALL | {"samples": 4}, recipe=recipe, parameters="all")
    found = {"ours": error_of_ours(setting)}
    for peer in PEERS:
        found[peer] = error_of_peer(setting, peer) if is_installed(peer) else "not installed"
    return {name: _told(error) for name, error in found.items()}


def _told(error: float | str) -> str:
    if isinstance(error, str):
        return error
    return f"right: relative error {error:.0e}" if error < OUT_OF_REACH else f"wrong: relative error {error:.2g}"


def formula_point(sizes: dict[str, int], chunk: int, samples: int) -> dict[str, int]:
    """What the docstring of ``fill_rows`` says, rows, the chunk and two float64 blocks of the Gram, and what is."""
    changed = sizes | {"chunk": chunk, "samples": samples}
    setting = Setting(**changed)
    numbers = sum(p.numel() for p in setting.parameters.values())
    saved = saved_bytes(BatchLoss(setting.module), list(setting.parameters), setting.batch)
    said = 4 * samples * numbers + chunk_bytes(chunk, saved, numbers) + 2 * 8 * BLOCK_NUMBERS
    measured = peak_bytes(CONTENDERS, "vmap", changed)
    return {"chunk": chunk, "samples": samples, "measured": measured, "formula": said}


def show(result: dict[str, Any]) -> None:
    seconds, memory = result["seconds"], result["peak_bytes"]
    best = {name: min(values) for name, values in seconds.items()}
    floor = {"plain": "plain forward and backward, the floor"}
    table = Table("rows wanted alone", "seconds, min / median", "published / this", "peak MiB")
    for name, title in (floor | ALONE).items():
        if name in best:
            cells = (min_and_median(seconds[name]), f"{best['published'] / best[name]:.1f}", _mib(memory.get(name)))
            table.add_row(title, *cells)
    console.print(table)
    table = Table("within a training step", "seconds, min / median", "beyond plain", "peak MiB", "beyond plain")
    for name, title in (floor | IN_STEP).items():
        if name in best:
            share, peak = best[name] / best["plain"] - 1, memory.get(name)
            extra = None if peak is None else peak - memory["plain"]
            table.add_row(title, min_and_median(seconds[name]), f"{share:.1%}", _mib(peak), _mib(extra))
    console.print(table)
    for peer in result["missing"]:
        console.print(f"{peer} is not installed")
    table = Table("all parameters of", "ours, auto", *PEERS)
    for recipe, said in result["models"].items():
        table.add_row(f"{recipe}: {MODELS[recipe]}", *said.values())
    console.print(table)
    table = Table("chunk", "samples", "peak MiB", "formula MiB", "ratio", title="vmap: memory against its formula")
    for row in result["formula"]:
        found, said = row["measured"], row["formula"]
        table.add_row(str(row["chunk"]), str(row["samples"]), _mib(found), _mib(said), f"{found / said:.2f}")
    console.print(table)


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:,.0f}"


def targets(result: dict[str, Any]) -> list[Target]:
    best = {name: min(values) for name, values in result["seconds"].items()}
    memory = result["peak_bytes"]
    extra = {name: size - memory["plain"] for name, size in memory.items()}
    floor = f"plain {best['plain']:.2f} s, {_mib(memory['plain'])} MiB"
    note = ""
    if "step_backpack_in_place" in extra:
        share, size = best["step_backpack_in_place"], extra["step_backpack_in_place"]
        note = f"BackPACK with our Gram in its extension hook: {share:.2f} s, {_mib(size)} MiB beyond plain"
    found = [
        Target("4", "published / vmap, seconds", best["published"] / best["vmap"], 12, False, floor),
        Target("4", "published / hooks, seconds", best["published"] / best["hooks"], 20, False, floor),
    ]
    hooks, in_step = ("hooks", "hooks_at_once"), ("step_opacus", "step_backpack")
    for what, numbers, ours, theirs, limit in (
        ("within a step: hooks / better peer, seconds", best, ("step_hooks",), in_step, 1.05),
        ("within a step: hooks / better peer, memory beyond plain", extra, ("step_hooks",), in_step, 0.6),
        ("alone: hooks / better peer, seconds", best, hooks, PEERS, 1.05),
        ("alone: hooks / better peer, peak memory", memory, hooks, PEERS, 0.6),
    ):
        mine, others = _least(numbers, ours), _least(numbers, theirs)
        if mine is not None and others is not None:
            said = note if ours == ("step_hooks",) else ""
            if said and numbers is extra:
                said += "; the rows of the largest matrix alone, which everyone holds once, are 18 MiB at these sizes"
            found.append(Target("5", what, mine / max(others, 1e-9), limit, True, floor, said))
    return found


def _least(numbers: dict[str, Any], names: tuple[str, ...]) -> float | None:
    """The least of those that were measured; None if none was."""
    return min((float(numbers[name]) for name in names if name in numbers), default=None)


if __name__ == "__main__":
    main(sys.modules[__name__])
