"""One activation report of a few layers, fed with random rows through the real hooks, with the time of its parts."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from time import perf_counter, process_time
from typing import Any

import torch
from torch import nn

from benchmarks.harness import settle
from lightning_spectral.measurement import ActivationRequest, Scene
from lightning_spectral.measurement.stopwatch import Stopwatch

GROUPS = 4
SAMPLES = 16
TOKENS = 256
"""A batch is 16 x 256 rows of each layer."""


@dataclass(frozen=True)
class Cost:
    """Seconds of a report by part, of the wall clock and of all threads' work."""

    collecting: float
    """All batches through the hooks of all layers."""
    solving: float
    """From the last row to the report."""
    collecting_cpu: float
    solving_cpu: float
    failures: dict[str, str] = field(default_factory=dict)
    """Why layers have no spectrum, by name."""


def report(
    width: int,
    layers: int = 5,
    num_tokens: int = 65536,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Cost:
    """Make one report of rows of some width.

    Args:
        width: Channels of each layer.
        layers: How many; all are given the same rows, as a hook sees them just written.
        num_tokens: Rows of each layer.
        device: Where the rows are.
        dtype: Of the rows.
        settings: More of the request, where it has them: ``overlap=False`` for example.

    Returns:
        Its cost.
    """
    torch.manual_seed(0)
    stack = nn.ModuleList(nn.Identity() for _ in range(layers))
    places: dict[str, nn.Module] = {f"layer{index}": layer for index, layer in enumerate(stack)}
    known = {one.name for one in fields(ActivationRequest)}
    request = ActivationRequest(
        stage="train",
        every_n_steps=2**30,
        num_groups=GROUPS,
        num_tokens=num_tokens,
        normalize=True,
        dtype="float32",
        channel_dim=-1,
        **{name: value for name, value in settings.items() if name in known},
    )
    scene = Scene(stack, torch.device(device), Stopwatch(), _no_loss)
    measurement = request.measure(scene)
    measurement.watch(places)
    measurement.start_training(0)
    tokens = min(TOKENS, num_tokens // SAMPLES)
    batch = torch.randn(SAMPLES, tokens, width, device=device).to(dtype)
    measurement.is_collecting = True
    with torch.no_grad():
        start = now()
        for _ in range(num_tokens // (SAMPLES * tokens)):
            measurement.open(batch, 0, has_right_stage=True)
            for layer in stack:
                layer(batch)
            measurement.close()
        measurement.steps_collected = 1
        collected = now()
        measurement.make_report(1)
        solved = now()
    assert measurement.report is not None
    spectra = measurement.report.spectra["activation"]
    failures = {name: spectrum.failure for name, spectrum in spectra.items() if spectrum.failure is not None}
    measurement.remove()
    (collecting, collecting_cpu), (solving, solving_cpu) = (
        tuple(after - before for before, after in zip(*times, strict=True))
        for times in ((start, collected), (collected, solved))
    )
    return Cost(collecting, solving, collecting_cpu, solving_cpu, failures)


def now() -> tuple[float, float]:
    """Of the wall clock, and of this process's threads, once a GPU is done with what is queued."""
    settle()
    return perf_counter(), process_time()


def _no_loss(loss_fn: object) -> Any:
    raise NotImplementedError("rows are read off outputs alone")


def contender(name: str, settings: dict[str, Any]) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """What the harness runs in a process of its own, for its memory: a small report, and that of the settings."""
    threads = settings.pop("threads", None)
    if threads is not None:
        torch.set_num_threads(threads)
    return partial(report, 64, 1, 4096), lambda: asdict(report(**settings))
