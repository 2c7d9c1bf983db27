"""What per-sample gradients and their spectra cost: our engines, the published protocol and Opacus, in one run.

    python benchmarks/per_sample.py --json per_sample.json

All contenders give the same rows, the gradients of each sample's loss with respect to the same matrices, and their
singular values (Opacus: the rows alone). They are run in turn, several times, and the minima are compared; peak memory
is that of a fresh process each, above what the process held before. The floor is one plain forward and backward pass of
the same samples. Opacus is part of the ``test`` extra.
"""

import argparse
import gc
import json
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from lightning_spectral.capture.backward import BackwardReader
from lightning_spectral.capture.contraction import LayerRows
from lightning_spectral.capture.engines import ByHooks, Engine, by_loop, by_vmap
from lightning_spectral.capture.parameters import resolve_parameters
from lightning_spectral.capture.per_sample import chunk_bytes, fill_rows, isolated, saved_bytes
from lightning_spectral.capture.shadow import BatchLoss
from lightning_spectral.functional import gram, singular_values
from lightning_spectral.functional.singular import BLOCK_NUMBERS
from lightning_spectral.nanogpt import NanoGPT
from lightning_spectral.nanogpt.model import next_token_loss

KINDS = ("attention.q", "attention.v", "attention.out", "mlp.down")
"""Query, value, attention output and MLP output projections, as in the published scripts."""


class Setting:
    """A model, a batch and the matrices to be measured."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.module = NanoGPT(
            num_layers=arguments.num_layers,
            width=arguments.width,
            num_heads=max(1, arguments.width // 64),
            block_size=arguments.tokens,
        )
        for parameter in self.module.parameters():
            if not parameter.any():  # what is initialised to zero keeps gradients behind it at zero
                torch.nn.init.normal_(parameter, std=0.02)
        shape = (arguments.samples, arguments.tokens)
        self.batch = {key: torch.randint(256, shape) for key in ("input_ids", "labels")}
        probes = sorted({round(i * (arguments.num_layers - 1) / 4) for i in range(5)})
        names = [f"gpt.blocks.{layer}.{kind}.weight" for layer in probes for kind in KINDS]
        self.parameters = resolve_parameters(self.module, names)
        self.samples = arguments.samples
        self.chunk = arguments.chunk
        self._loss: BatchLoss | None = None
        self._hooks = ByHooks()

    def loss_of(self, batch: dict[str, Tensor]) -> Tensor:
        return next_token_loss(self.module(batch["input_ids"]), batch["labels"])

    def rows(self, engine: Engine, chunk: int | None) -> dict[str, Tensor]:
        """Rows as a report makes them: a fresh shadow and fresh memory."""
        loss = BatchLoss(self.module)
        out = {name: torch.empty(self.samples, p.numel()) for name, p in self.parameters.items()}
        with isolated():
            fill_rows(engine, loss, list(out), self.batch, out, chunk)
        return out

    def plain(self) -> None:
        """One forward and backward pass of the batch: what a training step does anyway."""
        self.module.zero_grad()
        self.loss_of(self.batch).backward()

    def vmap(self) -> Tensor:
        return spectra(self.rows(by_vmap, self.chunk))

    def hooks(self) -> Tensor:
        """By a pass of its own. The check that rows add up to the gradient belongs to the first report alone."""
        return spectra(self.rows(self._hooks, self.chunk))

    def loop(self) -> Tensor:
        return spectra(self.rows(by_loop, None))

    def in_step(self) -> Tensor:
        """A training step's forward and backward pass with rows read off it, then their spectra."""
        out = {name: torch.empty(self.samples, p.numel()) for name, p in self.parameters.items()}
        reader = BackwardReader()
        for name, parameter in self.parameters.items():
            reader.add(name, parameter, self.module)
        reader.checked()
        reader.begin(LayerRows(self.samples, out, float(self.samples)))
        self.plain()
        rows = reader.end()
        reader.remove()
        assert rows is not None
        assert not rows.failures
        return spectra(out)

    def published(self) -> Tensor:
        """The protocol of the scripts released with *Spectral Lens*, written afresh: a pass per sample and matrix."""
        values = []
        for parameter in self.parameters.values():
            rows = []
            for index in range(self.samples):
                one = {key: value[index : index + 1] for key, value in self.batch.items()}
                self.module.zero_grad()
                self.loss_of(one).backward()
                assert parameter.grad is not None
                rows.append(parameter.grad.detach().flatten().clone())
            values.append(torch.linalg.svdvals(torch.stack(rows)).double())
        return torch.stack(values)

    def opacus(self) -> Tensor:
        """Rows alone, by Opacus; only these matrices are trained, so that it keeps no others."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from opacus import GradSampleModule

            for parameter in self.module.parameters():
                parameter.requires_grad_(any(parameter is p for p in self.parameters.values()))
            model = GradSampleModule(self.module.gpt, loss_reduction="mean", strict=False)
            next_token_loss(model(self.batch["input_ids"]), self.batch["labels"]).backward()
            rows = {name: p.grad_sample.flatten(1) for name, p in self.parameters.items()}
            for parameter in self.module.parameters():
                parameter.grad_sample = None
            model.to_standard_module()
            self.module.requires_grad_(True)
        return rows


def spectra(rows: dict[str, Tensor]) -> Tensor:
    return singular_values(torch.stack([gram(matrix) for matrix in rows.values()]))


def seconds_of(run: Callable[[], Any]) -> float:
    gc.collect()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak_bytes(contender: str, arguments: argparse.Namespace, **changes: int) -> int:
    """Memory that one run takes at its peak, in a process of its own, above what it held before."""
    values = vars(arguments) | changes
    words = [
        f"--{name.replace('_', '-')}={values[name]}" for name in ("num_layers", "width", "tokens", "samples", "chunk")
    ]
    command = [sys.executable, __file__, *words, "--memory-of", contender]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(run.stdout.splitlines()[-1])


def print_peak(contender: str, arguments: argparse.Namespace) -> None:
    setting = Setting(arguments)
    small = Setting(argparse.Namespace(num_layers=2, width=64, tokens=8, samples=2, chunk=1))
    getattr(small, contender)()  # imports and thread pools are not what is measured
    gc.collect()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    getattr(setting, contender)()
    print(_status("VmHWM") - before)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"field must be in /proc/self/status, got {field!r}: peak memory is measured on Linux")


def memory_formula(arguments: argparse.Namespace, chunk: int, samples: int) -> int:
    """What the docstring of ``fill_rows`` says: rows, the chunk, and two float64 blocks of the Gram matrix."""
    setting = Setting(arguments)
    names = list(setting.parameters)
    numbers = sum(p.numel() for p in setting.parameters.values())
    saved = saved_bytes(BatchLoss(setting.module), names, setting.batch)
    return 4 * samples * numbers + chunk_bytes(chunk, saved, numbers) + 2 * 8 * BLOCK_NUMBERS


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    setting = Setting(arguments)
    expected = setting.vmap()
    for name in ("hooks", "loop", "in_step"):
        torch.testing.assert_close(getattr(setting, name)(), expected, rtol=1e-3, atol=float(expected.max()) * 1e-5)
    contenders = ["plain", "vmap", "hooks", "in_step", "opacus", "loop", "published"]
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("repeats in turn", total=arguments.repeats * len(contenders))
        for repeat in range(arguments.repeats):
            for name in contenders:
                if name != "published" or repeat < arguments.published_repeats:
                    seconds[name].append(seconds_of(getattr(setting, name)))
                progress.advance(task)
        memory = {name: peak_bytes(name, arguments) for name in ("plain", "vmap", "hooks", "in_step", "opacus", "loop")}
        formula = []
        for point in arguments.memory_points:
            chunk, samples = map(int, point.split(":"))
            found = peak_bytes("vmap", arguments, chunk=chunk, samples=samples)
            formula.append(
                {
                    "chunk": chunk,
                    "samples": samples,
                    "measured": found,
                    "formula": memory_formula(arguments, chunk, samples),
                }
            )
    return {
        "settings": {key: value for key, value in vars(arguments).items() if key not in ("json", "memory_of")},
        "seconds": seconds,
        "peak_bytes": memory,
        "formula": formula,
        "environment": {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
            "python": platform.python_version(),
        },
    }


def show(result: dict[str, Any]) -> None:
    best = {name: min(values) for name, values in result["seconds"].items()}
    titles = {
        "plain": "plain forward and backward (floor)",
        "vmap": "vmap",
        "hooks": "hooks, a pass of its own",
        "in_step": "hooks, inside a training step",
        "opacus": "Opacus GradSampleModule (rows alone)",
        "loop": "loop over samples",
        "published": "published protocol",
    }
    title = "Per-sample gradients and their singular values"
    table = Table("", "seconds", "published / this", "this / Opacus", "peak MiB", title=title, title_justify="left")
    for name, title in titles.items():
        peak = result["peak_bytes"].get(name)
        table.add_row(
            title,
            f"{best[name]:.2f}",
            f"{best['published'] / best[name]:.1f}",
            f"{best[name] / best['opacus']:.2f}",
            "-" if peak is None else f"{peak / 2**20:,.0f}",
        )
    Console(width=120).print(table)
    share = best["in_step"] / best["plain"] - 1
    print(f"hooks inside a training step add {share:.1%} to its forward and backward pass, spectra included")
    table = Table("chunk", "samples", "peak MiB", "formula MiB", "ratio", title="vmap: memory against its formula")
    for row in result["formula"]:
        found, said = row["measured"] / 2**20, row["formula"] / 2**20
        table.add_row(str(row["chunk"]), str(row["samples"]), f"{found:,.0f}", f"{said:,.0f}", f"{found / said:.2f}")
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--tokens", type=int, default=256, help="a sample")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--chunk", type=int, default=8, help="samples at a time")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--published-repeats", type=int, default=2, help="the slow one's")
    parser.add_argument(
        "--memory-points",
        nargs="+",
        default=["1:32", "4:32", "8:32", "16:32", "8:8", "8:64"],
        help="CHUNK:SAMPLES at which the memory of vmap is held against its formula",
    )
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print_peak(arguments.memory_of, arguments)
        return
    result = measure(arguments)
    show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
