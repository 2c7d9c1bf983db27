"""The parts of the GPU benchmark: each returns what it found as lines of a table."""

import inspect
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from typing_extensions import override

from benchmarks import training
from benchmarks.gpu_gaps import gaps_of
from benchmarks.gpu_sizes import (
    RandomData,
    Sizes,
    Trained,
    activations,
    all_four,
    deterministic,
    gradients,
    module_of,
    train,
)
from benchmarks.one_report import report
from benchmarks.training import ACTIVATION_CADENCE, GRADIENT_CADENCE, Schedule
from lightning_spectral import ActivationSpectrum, GradientSpectrum
from lightning_spectral.nanogpt import NanoGPT


@dataclass(frozen=True)
class Line:
    """One number that was found."""

    what: str
    found: float
    unit: str
    note: str = ""
    aim: str = ""


def _window(sizes: Sizes) -> int:
    return -(-sizes.num_tokens // (sizes.batch_size * sizes.block_size))


def _side_by_side(sizes: Sizes, callbacks: dict[str, Any], window: int, cycles: int, title: str) -> dict[str, Any]:
    schedule = Schedule(window + 4, window, cycles, has_validation=False)
    make = lambda _: (module_of(sizes), RandomData(sizes))  # noqa: E731
    return training.train({"plain": list} | callbacks, schedule, sizes.arguments(), title, make)


def _shares(sizes: Sizes, found: dict[str, Any], name: str, cadence: int, aim: str) -> list[Line]:
    """Throughput that a report leaves at its default cadence, by a step of a batch and by one of many."""
    step = found["plain_step"]["minimum"]
    batches = max(1, sizes.tokens_per_step // (sizes.batch_size * sizes.block_size))
    cost, by_median = (found["costs"][name][statistic]["report"] for statistic in ("minimum", "median"))
    failed = found["runs"][name]["failed"]
    note = f"{by_median:.3g} by medians of pairs" + (f"; {failed:g} without a spectrum" if failed else "")
    lines = [Line(f"{name}: a report, beyond the plain run", cost, "s", note)]
    for count in sorted({1, batches}):
        what = f"{name}: throughput, a report every {cadence} steps of {count} {'batches' if count > 1 else 'batch'}"
        lines.append(Line(what, 1 / (1 + cost / (cadence * count * step)), "", aim=aim if count == batches else ""))
    return lines


def of_training(sizes: Sizes) -> list[Line]:
    """Steps with and without activation spectra, solved while training waits, interleaved one by one."""
    window = _window(sizes)
    name = "ActivationSpectrum"
    make = {name: lambda: [activations(sizes, window + 4, overlap=False)]}
    found = _side_by_side(sizes, make, window, sizes.cycles, "training")
    step = found["plain_step"]
    tokens = sizes.batch_size * sizes.block_size
    return [
        Line(
            "plain step", step["minimum"], "s", f"median {step['median']:.4g}, {tokens / step['minimum']:,.0f} tokens/s"
        ),
        Line("a step that collects, beyond the plain one", found["costs"][name]["minimum"].get("collecting", 0.0), "s"),
        Line("the step that reports, beyond the plain one", found["costs"][name]["minimum"]["reporting"], "s"),
        *_shares(sizes, found, name, ACTIVATION_CADENCE, "at least 0.99"),
    ]


def of_gradients(sizes: Sizes) -> list[Line]:
    """The same for per-sample gradients by hooks and by vmap."""
    window = -(-sizes.num_samples // sizes.batch_size)
    methods = ("hooks", "vmap")
    make: dict[str, Callable[[], list[Callback]]] = {
        f"gradients by {method}": lambda method=method: [gradients(sizes, window + 4, method)] for method in methods
    }
    found = _side_by_side(sizes, make, window, sizes.cycles, "gradients")
    # Of both kinds of reports together 0.97 is asked, by the engine that is to be left on.
    aims = dict.fromkeys(make, "") | {"gradients by hooks": "at least 0.97"}
    return [line for name in make for line in _shares(sizes, found, name, GRADIENT_CADENCE, aims[name])]


def of_overlap(sizes: Sizes) -> list[Line]:
    """Runs one after the other, with the solve inside a step and beside training; the first half is to warm up."""
    if "overlap" not in inspect.signature(ActivationSpectrum).parameters:
        raise SkippedError("ActivationSpectrum has no argument overlap here")
    window = _window(sizes)
    cycle = window + 8
    steps = cycle * 4  # the first solve in a thread, which starts the solver, ends in the first half
    lines = []
    for name, callbacks in {
        "without callbacks": [],
        "overlap off": [activations(sizes, cycle, overlap=False)],
        "overlap on": [activations(sizes, cycle, overlap=True)],
    }.items():
        run = train(sizes, module_of(sizes), callbacks, steps)
        first = len(run.steps) // 2
        counted = run.steps[first:]
        median = statistics.median(counted)
        longest = counted.index(max(counted))
        after = (first + longest + 1) % cycle
        note = f"median step {median:.4g} s, the longest {after} after a report's; "
        note += f"{run.spectra} spectra, {run.failed} failed"
        lines.append(Line(f"{name}: longest step / median", max(counted) / median, "", note))
        if callbacks:
            beyond = sum(counted) - median * len(counted)
            lines.append(Line(f"{name}: a report, beyond median steps", beyond / (len(counted) / cycle), "s"))
    return lines


def of_gaps(sizes: Sizes) -> list[Line]:
    """Time in which no kernel ran, in steps that collect and in steps that do not."""
    every = 6
    lines = []
    for name, callbacks in {"plain": [], "collecting": [activations(sizes, every, overlap=False)]}.items():
        found = gaps_of(sizes, callbacks, steps=every)
        what = "no kernel running" if sizes.device == "cuda" else "no operator running"
        longest = f"longest gap {1e3 * found.longest:.3g} ms, {found.count} kernels"
        lines.append(Line(f"{name} steps: share of the time with {what}", found.share, "", longest))
    return lines


def of_widths(sizes: Sizes) -> list[Line]:
    """A report by part and width, rows in bfloat16."""
    lines = []
    for width in sizes.widths:
        layers = sizes.layers_of_widest if width == max(sizes.widths) else 5
        report(width, 1, 4096, sizes.device, torch.bfloat16, overlap=False)  # what only the first one costs
        cost = report(width, layers, sizes.num_tokens, sizes.device, torch.bfloat16, overlap=False)
        of = f"{layers} layer{'s' if layers > 1 else ''}, {sizes.num_tokens:,} rows of each"
        note = f"{of}; {'; '.join(cost.failures.values())}" if cost.failures else of
        lines += [
            Line(f"width {width}: collecting", cost.collecting, "s", note),
            Line(f"width {width}: solving on {sizes.device}", cost.solving, "s", f"{layers} x 5 matrices"),
        ]
    return lines


def of_solving(sizes: Sizes) -> list[Line]:
    """One layer's solve on the device, and on the CPU by number of threads."""
    lines = []
    before = torch.get_num_threads()
    for width in sizes.widths:
        rows = -(-2 * width // 4096) * 4096
        if sizes.device == "cuda":
            report(width, 1, rows, "cuda", overlap=False)
            lines.append(Line(f"width {width}: on the GPU", report(width, 1, rows, "cuda", overlap=False).solving, "s"))
        for threads in sorted({1, min(4, before), before}):
            if width == max(sizes.widths) and threads < before:
                continue  # a minute, to be told what the other widths tell
            torch.set_num_threads(threads)
            found = report(width, 1, rows, overlap=False).solving
            lines.append(Line(f"width {width}: {threads} CPU thread{'s' if threads > 1 else ''}", found, "s"))
        torch.set_num_threads(before)
    return lines


def of_memory(sizes: Sizes) -> list[Line]:
    """Peak memory of a run of its own; of the GPU, or, on a CPU, none."""
    window = max(_window(sizes), -(-sizes.num_samples // sizes.batch_size))
    # None was the word for the device in versions that had no name for it.
    on_device = "device" if "device" in _annotation(GradientSpectrum, "row_device") else None
    lines = []
    plain = 0
    for name, callbacks in {
        "without callbacks": [],
        "ActivationSpectrum": [activations(sizes, window)],
        "gradients by hooks, rows on the device": [gradients(sizes, window, "hooks", row_device=on_device)],
        "gradients by hooks, rows on the CPU": [gradients(sizes, window, "hooks", row_device="cpu")],
        "gradients by vmap": [gradients(sizes, window, "vmap")],
    }.items():
        run = train(sizes, module_of(sizes), callbacks, window)
        plain = plain or run.peak_bytes
        more = f"{(run.peak_bytes - plain) / 2**30:.3g} GiB more than without; " if callbacks else ""
        note = f"{more}{run.spectra} spectra, {run.failed} failed"
        lines.append(Line(name, run.peak_bytes / 2**30, "GiB", note))
    return lines


def _annotation(callback: type, argument: str) -> str:
    return str(inspect.signature(callback).parameters[argument].annotation)


def of_identity(sizes: Sizes) -> list[Line]:
    """Whether weights are the same bits with all four callbacks as without, and as in the same run again."""
    with deterministic():
        runs = {
            "without": train(sizes, module_of(sizes), [], 6),
            "again": train(sizes, module_of(sizes), [], 6),
            "with": train(sizes, module_of(sizes), all_four(sizes, 2), 6, limit_val_batches=2, val_check_interval=2),
        }
    watched = runs["with"]
    note = f"{watched.spectra} spectra, {watched.failed} failed"
    with_, again = (_differing(runs["without"], runs[name]) for name in ("with", "again"))
    return [
        Line("parameters that differ with all four callbacks", len(with_), "", _listed([note, *with_]), "0"),
        Line("parameters that differ in the same run again", len(again), "", _listed(again), "0"),
    ]


def _differing(one: Trained, other: Trained) -> list[str]:
    mine, its = (run.module.state_dict() for run in (one, other))
    return [name for name in mine if not torch.equal(mine[name], its[name])]


def _listed(words: list[str], most: int = 6) -> str:
    return ", ".join(words[:most]) + f" and {len(words) - most} more" * (len(words) > most)


def _watched(sizes: Sizes, module: NanoGPT, method: str = "hooks", **settings: Any) -> list[Line]:
    """A model that is trained and watched: its spectra are there, and its steps are timed."""
    callbacks = [activations(sizes, 4), gradients(sizes, 4, method)]
    run = train(sizes, module, callbacks, 8, **settings)
    watched = len([key for key in run.metrics if key.endswith("/alpha_tail")])
    note = f"{run.failed} failed; median step {statistics.median(run.steps[4:]):.4g} s"
    return [Line("layers and parameters with a spectrum", run.spectra, "", note, str(watched))]


def of_flex(sizes: Sizes) -> list[Line]:
    """Compiled FlexAttention in compiled blocks, packed documents and a window."""
    if sizes.device != "cuda":
        raise SkippedError("FlexAttention can be trained on CUDA alone")
    module = module_of(sizes, recipe="flex_window")
    for block in module.gpt.blocks:
        block.compile()
    return _watched(sizes, module, "auto")  # hooks do not run in what is compiled


def of_fp8(sizes: Sizes) -> list[Line]:
    """The 8-bit head: on a GPU its products, on a CPU their rounding."""
    fp8 = "on" if sizes.device == "cuda" else "emulate"
    return _watched(sizes, module_of(sizes, recipe="untied", switches={"fp8": fp8}))


def of_nccl(sizes: Sizes) -> list[Line]:
    """DDP in a world of one: NCCL's collectives on a GPU, gloo's on a CPU, against no strategy at all."""
    backend = "nccl" if sizes.device == "cuda" else "gloo"
    return _against_one(sizes, module_of(sizes), DDPStrategy(process_group_backend=backend), backend)


class Sharded(NanoGPT):
    """Each block's parameters are sharded by FSDP2."""

    @override
    def configure_model(self) -> None:
        for part in (*self.gpt.blocks, self.gpt):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


def of_fsdp2(sizes: Sizes) -> list[Line]:
    """FSDP2 on one device, against no strategy at all."""
    torch.manual_seed(0)
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    return _against_one(sizes, Sharded(**sizes.model), strategy, "fully_shard")


def _against_one(sizes: Sizes, module: NanoGPT, strategy: Any, name: str) -> list[Line]:
    """The largest relative difference of exponents under a strategy from those without, before weights can differ."""
    exponents = []
    # In float32, for mixed precision is another thing under each strategy, and all of one step.
    same = {
        "precision": "32-true",
        "accumulate_grad_batches": -(-sizes.num_samples // sizes.batch_size),
        "use_distributed_sampler": False,
    }
    for model, settings in ((module_of(sizes), {}), (module, {"strategy": strategy})):
        callbacks = [activations(sizes, 1), gradients(sizes, 1, "hooks")]
        run = train(sizes, model, callbacks, 1, **(same | settings))
        exponents.append({key: value for key, value in run.metrics.items() if key.endswith("/alpha_tail")})
    one, other = exponents
    assert one.keys() == other.keys(), sorted(one.keys() ^ other.keys())
    known = [key for key in one if not math.isnan(one[key])]
    difference = max((abs(other[key] / one[key] - 1) for key in known), default=math.nan)
    note = f"{len(known)} exponents of {len(one)}; NaN under it: {sum(math.isnan(other[key]) for key in one)}"
    return [Line(f"exponents under {name}, worst relative difference from those without", difference, "", note)]


class SkippedError(Exception):
    """A part that this machine cannot run, in one line."""


@dataclass(frozen=True)
class Part:
    """One part."""

    run: Callable[[Sizes], list[Line]]
    seconds: float
    """That it takes on an H200 at the most, about, with what starts a process: it is not begun where less is left."""

    @property
    def what(self) -> str:
        assert self.run.__doc__ is not None
        return self.run.__doc__


PARTS = {
    "training": Part(of_training, 45),
    "widths": Part(of_widths, 10),
    "overlap": Part(of_overlap, 30),
    "gradients": Part(of_gradients, 60),
    "gaps": Part(of_gaps, 25),
    "identity": Part(of_identity, 25),
    "memory": Part(of_memory, 60),
    "flex": Part(of_flex, 60),
    "fp8": Part(of_fp8, 30),
    "nccl": Part(of_nccl, 40),
    "fsdp2": Part(of_fsdp2, 40),
    "solving": Part(of_solving, 30),
}
"""By name, in the order in which they are of use where time is short."""
