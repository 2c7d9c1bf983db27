"""Activation spectra of five layers and of all layers, against the published protocol: a forward pass for each layer.

    env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE python -m benchmarks.activation_protocol

The protocol of the scripts released with *Spectral Lens* is written afresh: for each probed layer all batches go from
the embedding through that layer, the float32 rows are concatenated on the CPU and RMS-normalised, and NumPy makes their
covariance and its eigenvalues. Ours reads all layers off one forward pass of the model, which in training happens
anyway, and solves every matrix five times, for the jackknife. What remains of it when the pass is training's own is
what the hooks and the solver took in the same run.

Both are in one process, and NumPy is as fast as its OpenBLAS, which those two variables can slow down: leave them
unset. Solves cost the same however many tokens there are, so that fewer tokens than the 65,536 of a report at its
defaults put ours in a worse light; what it comes to with those is computed from the parts of both. Seconds of the CPU,
of all threads together, tell less of what else the machine had to do.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.harness import Target, console, main, min_and_median, peak_bytes, seconds_of
from lightning_spectral.capture.activations import ActivationReader
from lightning_spectral.measurement.collector import RMS_EPS, Collector
from lightning_spectral.measurement.decomposition import decompose
from lightning_spectral.measurement.stopwatch import Stopwatch
from lightning_spectral.nanogpt.model import GPT, Context, GPTConfig

NUM_PROBES = 5
DEFAULT_TOKENS = 65536
BLAS_VARIABLES = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")


class Setting:
    """A model, batches of tokens, and both ways to its spectra."""

    def __init__(self, num_layers: int, width: int, tokens: int, batch_size: int, block_size: int) -> None:
        torch.manual_seed(0)
        sizes = {"num_layers": num_layers, "width": width, "num_heads": max(1, width // 64)}
        self.model = GPT(GPTConfig.from_tier("tiny", "rope", vocab_size=256, block_size=block_size, **sizes)).eval()
        for parameter in self.model.parameters():
            if not parameter.any():  # blocks that are the identity would give the covariance of the embedding
                torch.nn.init.normal_(parameter, std=0.02)
        self.batches = torch.randint(256, (tokens // (batch_size * block_size), batch_size, block_size))
        if len(self.batches) == 0:
            raise ValueError(f"tokens must fill a batch of {batch_size * block_size}, got {tokens}")
        self.all = list(range(num_layers))
        self.five = sorted({round(i * (num_layers - 1) / (NUM_PROBES - 1)) for i in range(NUM_PROBES)})
        self.solving = 0.0
        """Seconds of the latest run that do not depend on the number of tokens."""
        self.own = 0.0
        """Seconds of our latest run without the forward pass."""

    def through(self, last: int, input_ids: Tensor) -> Tensor:
        """The residual stream after a block, by no more than the embedding and the blocks up to it."""
        assert self.model.rotary is not None
        x = self.model.embedding(input_ids)
        context = Context(x, self.model.rotary[:, : input_ids.shape[1]], None, None)
        for block in self.model.blocks[: last + 1]:
            x = block(x, context, None)
        return x

    @torch.no_grad()
    def published(self, probes: list[int]) -> np.ndarray:
        """Descending eigenvalues of each probe, by a pass of its own."""
        spectra = []
        self.solving = 0.0
        for probe in probes:
            outputs = [self.through(probe, batch).flatten(0, 1).float().cpu() for batch in self.batches]
            rows = torch.cat(outputs)
            del outputs
            rows = F.rms_norm(rows, rows.shape[-1:], eps=RMS_EPS)
            covariance = np.cov(rows.numpy(), rowvar=False)
            start = time.perf_counter()
            spectra.append(np.linalg.eigvalsh(covariance)[::-1])
            self.solving += time.perf_counter() - start
        return np.stack(spectra)

    @torch.no_grad()
    def ours(self, probes: list[int], num_groups: int = 4) -> np.ndarray:
        """The same, by hooks on one pass of the whole model."""
        reading = Stopwatch()

        def read(name: str, output: Tensor) -> None:
            with reading.running():
                collector.add(name, output)

        reader = ActivationReader(read)
        device = torch.device("cpu")
        collector = Collector(reader.names, self.batches.numel(), num_groups, True, torch.float32, device)
        for probe in probes:
            reader.add(f"blocks.{probe}", self.model.blocks[probe])
        reader.is_open = True
        for batch in self.batches:
            collector.begin_batch(len(batch), None)
            self.model(batch)
        start = time.perf_counter()
        spectra = [
            spectrum.values.numpy()
            for names, parts, _, dtypes in collector.pool()
            for spectrum in decompose(names, parts, collector.failures, dtypes=dtypes).values()
        ]
        self.solving = time.perf_counter() - start
        self.own = reading.seconds + self.solving
        reader.remove()
        return np.stack(spectra)

    def contenders(self, has_all: bool) -> dict[str, Callable[[], np.ndarray]]:
        """Runs by name."""
        runs: dict[str, Callable[[], np.ndarray]] = {
            "published, five": lambda: self.published(self.five),
            "ours, five": lambda: self.ours(self.five),
            "ours without error bars, five": lambda: self.ours(self.five, num_groups=1),
        }
        if has_all:
            runs |= {"published, all": lambda: self.published(self.all), "ours, all": lambda: self.ours(self.all)}
        return runs


def contender(name: str, settings: dict[str, Any]) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A small run and the one that is measured, for :func:`benchmarks.harness.peak_bytes`."""
    small = Setting(num_layers=2, width=64, tokens=32, batch_size=2, block_size=16)
    return small.contenders(True)[name], Setting(**settings).contenders(True)[name]


def worst_difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest relative difference of eigenvalues above 1e-3 of the largest: what float32 products promise."""
    counts = expected > 1e-3 * expected[:, :1]
    return float(np.abs(found[counts] / expected[counts] - 1).max())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", nargs="+", default=["12:384", "48:192"], help="layers:width")
    parser.add_argument("--all-layers-up-to", type=int, default=12, help="depth beyond which only five are measured")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--batch-size", type=int, default=16, help="sequences")
    parser.add_argument("--block-size", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--repeats", type=int, default=2)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    sizes = [measure_size(arguments, *map(int, size.split(":"))) for size in arguments.sizes]
    return {"blas_variables": {name: os.environ.get(name) for name in BLAS_VARIABLES}, "sizes": sizes}


def measure_size(arguments: argparse.Namespace, num_layers: int, width: int) -> dict[str, Any]:
    """All contenders on one model."""
    batch = {"batch_size": arguments.batch_size, "block_size": arguments.block_size}
    settings = {"num_layers": num_layers, "width": width, "tokens": arguments.tokens, **batch}
    has_all = num_layers <= arguments.all_layers_up_to
    # Of one batch: both must agree before it matters which is faster, and the full runs find everything warm.
    few = Setting(**settings | {"tokens": arguments.batch_size * arguments.block_size})
    spectra = {name: run() for name, run in few.contenders(has_all).items()}
    differences = {
        name: worst_difference(values, spectra[f"published, {name.rpartition(' ')[2]}"])
        for name, values in spectra.items()
        if not name.startswith("published")
    }
    assert max(differences.values()) < 1e-4, f"the spectra differ: {differences}"

    setting = Setting(**settings)
    runs = setting.contenders(has_all)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    solving: dict[str, list[float]] = {name: [] for name in runs}
    own: dict[str, list[float]] = {name: [] for name in runs if name.startswith("ours")}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    for _ in track(range(arguments.repeats), f"{num_layers} layers", console=console, transient=True):
        for name, run in runs.items():
            start = time.process_time()
            seconds[name].append(seconds_of(run))
            cpu[name].append(time.process_time() - start)
            solving[name].append(setting.solving)
            if name in own:
                own[name].append(setting.own)
    return {
        "num_layers": num_layers,
        "width": width,
        "tokens": setting.batches.numel(),
        "worst_difference": differences,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "solving": solving,
        "without_forward": own,
        "block_passes": {"five": sum(p + 1 for p in setting.five), "all": sum(p + 1 for p in setting.all)},
        # The published protocol takes one layer after the other: all need no more memory than five.
        "peak_bytes": {
            name: peak_bytes("benchmarks.activation_protocol", name, settings)
            for name in runs
            if name != "published, all"
        },
    }


def ratio(size: dict[str, Any], which: str) -> float:
    """How many times as long the published protocol takes; minima, as machines are noisy."""
    return min(size["seconds"][f"published, {which}"]) / min(size["seconds"][f"ours, {which}"])


def ratio_at_default(size: dict[str, Any], which: str) -> float:
    """The same at the tokens of a report at its defaults: all but the solves grows with them."""
    published, ours = (
        (min(size["seconds"][name]) - min(size["solving"][name])) * DEFAULT_TOKENS / size["tokens"]
        + min(size["solving"][name])
        for name in (f"published, {which}", f"ours, {which}")
    )
    return published / ours


def show(result: dict[str, Any]) -> None:
    for size in result["sizes"]:
        title = f"{size['num_layers']} layers of width {size['width']}, {size['tokens']:,} tokens"
        columns = ("seconds, min / median", "CPU seconds", "seconds solving", "without the forward pass", "peak MiB")
        table = Table("", *columns, title=title, title_justify="left")
        for name, seconds in size["seconds"].items():
            own = size["without_forward"].get(name)
            table.add_row(
                name,
                min_and_median(seconds),
                f"{min(size['cpu_seconds'][name]):.2f}",
                f"{min(size['solving'][name]):.3f}",
                min_and_median(own) if own else "",
                f"{size['peak_bytes'][name] / 2**20:.0f}" if name in size["peak_bytes"] else "as five",
            )
        console.print(table)
        for which in ("five", "all"):
            if f"ours, {which}" not in size["seconds"]:
                continue
            remains = min(size["seconds"][f"published, {which}"]) / min(size["without_forward"][f"ours, {which}"])
            busy = min(size["cpu_seconds"][f"published, {which}"]) / min(size["cpu_seconds"][f"ours, {which}"])
            rounds = zip(size["seconds"][f"published, {which}"], size["seconds"][f"ours, {which}"], strict=True)
            console.print(
                f"{which}: published / ours {ratio(size, which):.2f} "
                f"(median of rounds {statistics.median(theirs / ours for theirs, ours in rounds):.2f}; "
                f"of CPU seconds {busy:.2f}; "
                f"computed for {DEFAULT_TOKENS:,} tokens {ratio_at_default(size, which):.2f}); "
                f"published / what remains when the forward pass is training's own {remains:.1f}; "
                f"eigenvalues differ by {size['worst_difference'][f'ours, {which}']:.0e}"
            )
    if slowed := [name for name in BLAS_VARIABLES[:2] if result["blas_variables"][name] is not None]:
        console.print(f"{' and '.join(slowed)} set: NumPy may be slower than it need be")


def targets(result: dict[str, Any]) -> list[Target]:
    found = []
    for size in result["sizes"]:
        layers = size["num_layers"]
        for which, limit in (("five", 2.3), ("all", 5.0)):
            if f"ours, {which}" not in size["seconds"]:
                continue
            passes = size["block_passes"][which]
            solves = min(size["solving"][f"ours, {which}"]) / min(size["seconds"][f"ours, {which}"])
            at_default = f"solves are {solves:.0%} of ours; {ratio_at_default(size, which):.2f} at {DEFAULT_TOKENS:,}"
            what = f"{layers} layers, {which} of them: published / ours with a forward pass of its own"
            floor = f"block passes {passes} / {layers} = {passes / layers:.2f}"
            found.append(Target("4", what, ratio(size, which), limit, False, floor, at_default))
    return found


if __name__ == "__main__":
    main(sys.modules[__name__])
