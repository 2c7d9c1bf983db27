"""The parts of a report whose growth is measured, each beside the bare kernel that it cannot do without."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from lightning_spectral.capture.contraction import LayerRows
from lightning_spectral.functional import gram
from lightning_spectral.functional.moments import Moments
from lightning_spectral.measurement.collector import Collector
from lightning_spectral.measurement.decomposition import decompose
from lightning_spectral.measurement.gradient_report import decompose_grams

GROUPS = 4
BATCH_TOKENS = 4096
BATCH_SAMPLES = 16
"""A batch of activations is 16 x 256 tokens."""
ROW_SAMPLES = 32
ROW_TOKENS = 64
"""A batch of gradients is 32 x 64 tokens."""

Run = Callable[[], object]


@dataclass(frozen=True)
class Part:
    """One part of a report, and how its cost must grow with each of its sizes."""

    name: str
    make: Callable[..., tuple[Run, Run]]
    """Of one number per size: what is timed, and the bare kernels of the same shapes."""
    theory: dict[str, float]
    """The exponent by size."""
    kernel: str
    """What the bare kernels are."""


class Batch:
    """A batch of outputs that comes as often as it takes to offer some tokens, and a collector that takes all of it.

    All layers give the same output: a hook sees each one when its layer has just written it, not from cold memory.
    """

    def __init__(self, layers: int, width: int, tokens: int, share: int | None = None) -> None:
        torch.manual_seed(0)
        self.names = [f"layer{index}" for index in range(layers)]
        self.tokens = min(tokens, BATCH_TOKENS)
        self.repeats = tokens // self.tokens
        self.output = torch.randn(BATCH_SAMPLES, self.tokens // BATCH_SAMPLES, width)
        # Unless a share of the rows is given, the collector is never full and goes on taking rows.
        rows = 2**50 if share is None else share
        self.collector = Collector(self.names, rows, GROUPS, False, torch.float32, torch.device("cpu"))
        self.collector.begin_batch(BATCH_SAMPLES, None)
        self.offer(1)
        # In the first report widths are agreed on.
        self.collector.agree()
        self.collector.reset()

    def offer(self, repeats: int) -> None:
        """Hand every layer's output to the collector, batch by batch."""
        for _ in range(repeats):
            for name in self.names:
                self.collector.add(name, self.output)

    def moments(self) -> Moments:
        """Moments of all layers by group; the collector is of no use afterwards."""
        self.offer(self.repeats)
        ((_, pooled, *_),) = self.collector.pool()
        return pooled


def collecting(layers: int, width: int, tokens: int) -> tuple[Run, Run]:
    """Rows into sums: n d^2 multiply-adds per layer, and some passes over n d numbers and d^2 sums."""
    batch = Batch(layers, width, tokens)
    rows = torch.randn(batch.tokens // GROUPS, width)

    def bare() -> None:
        for _ in range(batch.repeats * layers * GROUPS):
            torch.mm(rows.mT, rows)

    return lambda: batch.offer(batch.repeats), bare


def decomposing(layers: int, width: int, tokens: int) -> tuple[Run, Run]:
    """Moments into spectra: G + 1 eigensolves of d^3 operations per layer."""
    batch = Batch(layers, width, tokens)
    parts = batch.moments()
    covariances = (parts.scatter.sum(1) / tokens).unsqueeze(1).repeat(1, GROUPS + 1, 1, 1)
    return lambda: decompose(batch.names, parts, {}), lambda: torch.linalg.eigvalsh(covariances)


def rows_by_hooks(samples: int, width: int, matrices: int) -> tuple[Run, Run]:
    """Inputs and gradients of outputs into rows: T d^2 multiply-adds per sample and matrix, and d^2 numbers written."""
    torch.manual_seed(0)
    size = min(samples, ROW_SAMPLES)
    linear = nn.Linear(width, width, bias=False)
    x, grad = torch.randn(2, size, ROW_TOKENS, width).unbind()
    out = {f"matrix{index}": torch.zeros(samples, width * width) for index in range(matrices)}
    starts = range(0, samples, size)

    def run() -> None:
        for start in starts:
            batch = LayerRows(size, {name: rows[start : start + size] for name, rows in out.items()}, float(size))
            for name in out:
                batch.add(name, linear, "weight", x, grad)

    def bare() -> None:
        for start in starts:
            for rows in out.values():
                torch.bmm(grad.mT, x, out=rows[start : start + size].view(size, width, width))

    return run, bare


def gram_of_rows(samples: int, numbers: int) -> tuple[Run, Run]:
    """Rows into their Gram matrix: N^2 P multiply-adds in float64, and N P numbers brought to it."""
    torch.manual_seed(0)
    rows = torch.randn(samples, numbers)
    wide = rows.double()
    return lambda: gram(rows), lambda: torch.mm(wide, wide.mT)


def solving_grams(samples: int, matrices: int) -> tuple[Run, Run]:
    """Gram matrices into singular values: G + 2 eigensolves of N^3 operations per matrix, G of them of fewer rows."""
    torch.manual_seed(0)
    rows = torch.randn(matrices, samples, 2 * samples, dtype=torch.float64)
    stacked = rows @ rows.mT
    grams = {f"matrix{index}": each for index, each in enumerate(stacked)}
    sizes = dict.fromkeys(grams, 2 * samples)
    groups = torch.arange(samples) % GROUPS
    left = samples - samples // GROUPS
    whole = stacked.unsqueeze(1).repeat(1, 2, 1, 1)
    without = stacked[:, :left, :left].unsqueeze(1).repeat(1, GROUPS, 1, 1)
    return (
        lambda: decompose_grams(grams, sizes, groups, GROUPS, torch.float32),
        lambda: (torch.linalg.eigvalsh(whole), torch.linalg.eigvalsh(without)),
    )


ACTIVATIONS = {"layers": 1.0, "width": 2.0, "tokens": 1.0}
PARTS = (
    Part("collecting activations", collecting, ACTIVATIONS, "torch.mm"),
    Part("decomposing activations", decomposing, {"layers": 1.0, "width": 3.0, "tokens": 0.0}, "eigvalsh"),
    Part("rows by hooks", rows_by_hooks, {"samples": 1.0, "width": 2.0, "matrices": 1.0}, "torch.bmm"),
    Part("Gram of rows", gram_of_rows, {"samples": 2.0, "numbers": 1.0}, "torch.mm"),
    Part("solving Grams", solving_grams, {"samples": 3.0, "matrices": 1.0}, "eigvalsh"),
)

STATE = "state of collecting, bytes"
STATE_THEORY = {"layers": 1.0, "width": 2.0, "tokens": 0.0}


def state_bytes(layers: int, width: int, tokens: int) -> int:
    """Bytes of the sums that a collector keeps after some tokens, counted."""
    batch = Batch(layers, width, tokens)
    batch.offer(batch.repeats)
    return sum(sums.nbytes for sums in batch.collector._sums.values())
