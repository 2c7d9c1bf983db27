"""Rows in file order: whether error bars cover, and drift floors hold, where neighbours come from one document.

    python -m benchmarks.findings.file_order

A small GPT reads held-out text in the order of its files. Reports of 64 sequences are made of it in several ways, by
the callbacks' own parts: in windows that are read whole, and spread over a pass of all the text, of which either the
files come in another order each time, or the pass begins elsewhere. Then the processes of the control study, whose
sequences are independent. Two minutes on one core; the table goes to ``benchmarks/results/findings``.
"""

import argparse
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from lightning.pytorch import seed_everything
from scipy.special import stdtrit
from torch import Tensor

from benchmarks.findings.control import HEAD, LEVEL, NUM_GROUPS, TAIL
from benchmarks.findings.processes import LENGTH, PROCESSES, eigenvalues, rows, trained_outputs
from benchmarks.findings.runs import RESULTS
from benchmarks.findings.tables import show_and_write
from benchmarks.harness import environment
from lightning_spectral.functional import (
    Spectrum,
    angle_floor,
    js_divergence,
    js_floor,
    overlap_floor,
    principal_angles,
    subspace_overlap,
)
from lightning_spectral.measurement.collector import Collector
from lightning_spectral.measurement.decomposition import decompose
from lightning_spectral.measurement.passes import Pass
from lightning_spectral.nanogpt import NanoGPT, TextData
from lightning_spectral.nanogpt.data import text_files

SIZE, BATCH_SIZE, RANK = 64, 16, 10
"""Sequences of a report and of a batch; leading vectors that drift is of."""
NUM_PAIRS = 300


def held_out(num_steps: int) -> Tensor:
    """``(sequences, LENGTH, d)`` float32: outputs of the last block of a small trained GPT, in file order."""
    seed_everything(0, verbose=False)
    data = TextData(block_size=LENGTH, batch_size=BATCH_SIZE)
    module = NanoGPT(num_layers=2, num_heads=2, width=64, block_size=LENGTH, warmup_steps=20, learning_rate=3e-3)
    return trained_outputs(module, data, num_steps)["gpt.blocks.1"]


def report(sequences: Tensor, normalize: bool = True) -> Spectrum:
    """What a validation report of ``SIZE`` sequences makes of a pass, ``(S, T, d)``: the callbacks' own parts."""
    num_tokens = SIZE * sequences.shape[1]
    collector = Collector(["layer"], num_tokens, NUM_GROUPS, normalize, torch.float64, torch.device("cpu"))
    batches = sequences.split(BATCH_SIZE)
    of = Pass(len(batches), len(sequences), BATCH_SIZE)
    for index, batch in enumerate(batches):
        collector.begin_batch(len(batch), None, of.place(index))
        collector.add("layer", batch)
    ((names, parts, *_),) = collector.pool()
    (spectrum,) = decompose(names, parts, collector.failures, num_vectors=RANK).values()
    return spectrum


def judge(reports: Sequence[Spectrum]) -> dict[str, str]:
    """How often 80% bars hold the mean of all reports, and how often pairs of them lie beyond their floors."""
    reach = float(stdtrit(NUM_GROUPS - 1, (1 + LEVEL) / 2))
    row = {}
    for name, of in (
        ("tail", lambda one: one.exponent(TAIL)),
        ("head", lambda one: one.exponent(HEAD)),
        ("RankMe", Spectrum.rankme),
    ):
        values, stderrs = torch.tensor([of(one)[:2] for one in reports], dtype=torch.float64).T
        if name == "tail":
            row |= {"spread of the tail": f"{float(values.std()):.4f}", "stated": f"{float(stderrs.mean()):.4f}"}
        row[f"bars cover: {name}"] = f"{_share((values - values.mean()).abs() <= reach * stderrs):.0%}"
    pairs = list(itertools.combinations(reports, 2))
    chosen = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))[:NUM_PAIRS].tolist()
    beyond: dict[str, Callable[[Spectrum, Spectrum], Tensor]] = {
        "JS": lambda a, b: js_divergence(a.values, b.values) > js_floor(a, b),
        "overlap": lambda a, b: subspace_overlap(a.vectors, b.vectors) < overlap_floor(a, b),
        "angle": lambda a, b: principal_angles(a.vectors, b.vectors)[0] > angle_floor(a, b),
    }
    for name, lies_beyond in beyond.items():
        row[f"beyond floor: {name}"] = f"{_share(torch.stack([lies_beyond(*pairs[index]) for index in chosen])):.0%}"
    return row


def _share(held: Tensor) -> float:
    return float(held.double().mean())


def documents(sequences: Tensor) -> list[Tensor]:
    """The held-out sequences, by the file in which they begin."""
    sizes = torch.tensor([file.stat().st_size for file in text_files(None)])
    data = TextData(block_size=LENGTH)
    num_train = int(sizes.sum()) - round(int(sizes.sum()) * data.val_fraction)
    first = num_train + LENGTH * torch.arange(len(sequences))
    _, counts = torch.searchsorted(sizes.cumsum(0), first, right=True).unique_consecutive(return_counts=True)
    return list(sequences.split(counts.tolist()))


def ways(text: Tensor, num_reports: int) -> dict[str, list[Spectrum]]:
    """Reports of held-out text, by the way in which they are made."""
    shuffled = text[torch.randperm(len(text), generator=torch.Generator().manual_seed(0))]
    windows = text[: num_reports * SIZE].split(SIZE)
    dealt = torch.cat([torch.arange(first, SIZE, NUM_GROUPS) for first in range(NUM_GROUPS)])
    step = len(text) // SIZE / num_reports  # a report's sequences lie so many times num_reports apart

    def passes(of: Tensor) -> list[Spectrum]:
        return [report(of.roll(-round(number * step), 0)) for number in range(num_reports)]

    files, generator = documents(text), torch.Generator().manual_seed(0)

    def in_other_order() -> Tensor:
        return torch.cat([files[index] for index in torch.randperm(len(files), generator=generator)])

    return {
        "spread over all, files in another order each time": [report(in_other_order()) for _ in range(num_reports)],
        "spread over all, file order": passes(text),
        "spread over all, shuffled": passes(shuffled),
        "windows read whole, shuffled": [report(one) for one in shuffled[: num_reports * SIZE].split(SIZE)],
        "windows read whole, file order": [report(one) for one in windows],
        "likewise, sequences dealt to groups": [report(one[dealt]) for one in windows],
    }


def independent(process: str, num_reports: int) -> list[Spectrum]:
    """Reports of a process of the control study."""
    generator = torch.Generator().manual_seed(0)
    values = eigenvalues("power", 64)
    return [report(rows(process, values, SIZE, generator), normalize=False) for _ in range(num_reports)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the table goes")
    parser.add_argument("--reports", type=int, default=60, help="of each way")
    parser.add_argument("--steps", type=int, default=300, help="training steps of the model")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = ways(held_out(arguments.steps), arguments.reports)
    found |= {f"process: {process}": independent(process, arguments.reports) for process in PROCESSES}
    table = [{"reports": name} | judge(reports) for name, reports in found.items()]
    date = environment()["date"]
    text = (
        f"{arguments.reports} reports of {SIZE} sequences of {LENGTH} tokens each, width 64, {NUM_GROUPS} groups. Bars "
        "of 80% should cover the reports' mean in 80% of them; floors are upper limits, beyond which 5% of pairs of "
        "reports on one model should lie at the most. A window that is read whole knows nothing of the documents "
        "beyond it, which other windows hold. Passes that begin elsewhere in one order of files read neighbours of "
        "each other's sequences: 60 of them are far fewer independent reports."
    )
    show_and_write(
        [(f"Rows in file order, {date}", text), ("Coverage and alarms", table)], "", arguments.folder / "file_order.md"
    )


if __name__ == "__main__":
    main()
