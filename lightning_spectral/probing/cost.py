"""What reports would cost: products, eigenvalues and samples' gradients timed here, memory counted by shape."""

from collections.abc import Callable, Sequence
from time import perf_counter

import torch
from torch import Tensor

from lightning_spectral.capture.channels import rows_last
from lightning_spectral.functional.singular import gram
from lightning_spectral.measurement import ActivationRequest, GradientRequest
from lightning_spectral.measurement.decomposition import decompose, matrices_at_a_time
from lightning_spectral.measurement.gradient_report import decompose_grams
from lightning_spectral.measurement.gradient_request import ROW_DTYPES
from lightning_spectral.measurement.placement import placed
from lightning_spectral.measurement.schedule import TrainSchedule
from lightning_spectral.measurement.stopwatch import settle
from lightning_spectral.measurement.sums import sums_bytes
from lightning_spectral.probing.found import CostFound, EngineFound, LayerFound

WIDEST_SOLVED = 1024
"""Eigenvalues of wider matrices are not timed: their time is this one's times the third power of the width."""

WIDEST_ROW = 2**16

MATRICES_AT_A_TIME = 3
"""Copies of a matrix on the way to its eigenvalues: pooled scatter, covariance, the solver's own."""


def activation_cost(
    request: ActivationRequest,
    layers: Sequence[LayerFound],
    outputs: dict[str, Tensor],
    num_samples: int | None,
    device: torch.device,
) -> CostFound:
    """Of a report on layers that can be read, whose last outputs were like those given."""
    good = [layer for layer in layers if layer.channel_dim is not None and layer.problem is None]
    products: dict[tuple[object, ...], float] = {}
    solves: dict[int, float] = {}
    collecting = solving = 0.0
    schedule = TrainSchedule(request.every_n_steps, request.num_tokens)
    rows = {layer.name: min(schedule.window_of(layer.rows) * layer.rows, request.num_tokens) for layer in good}
    for layer in good:
        assert layer.width is not None
        assert layer.channel_dim is not None
        like = outputs[layer.name]
        key = (like.shape, like.dtype, layer.channel_dim)
        if key not in products:
            products[key] = _seconds_a_row(request, like, layer.channel_dim, num_samples, device)
        if layer.width not in solves:
            solves[layer.width] = _seconds_to_solve(request, layer.width, device)
        collecting += products[key] * rows[layer.name]
        solving += solves[layer.width]
    num_steps = max((schedule.window_of(layer.rows) for layer in good), default=0)
    widths = [layer.width for layer in good if layer.width is not None]
    kept = sum(sums_bytes(request.num_groups, width, device) for width in widths)
    place = placed(request.sums_device, kept, device)
    return CostFound(
        "activation",
        f"{_span(list(rows.values()))} rows of {plural(len(good), 'layer')}, {plural(num_steps, 'step')}",
        collecting,
        solving,
        kept,
        max(kept, report_bytes(widths, request.num_groups, device)),
        "products of rows like these and eigenvalues timed here"
        + (f", those wider than {WIDEST_SOLVED} scaled by width^3" if max(widths, default=0) > WIDEST_SOLVED else ""),
        str(place.device),
        place.budget,
    )


def plural(count: int, word: str) -> str:
    """So many of them."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


def _span(rows: list[int]) -> str:
    least, most = min(rows, default=0), max(rows, default=0)
    return f"{most:,}" if least == most else f"{least:,} to {most:,}"


def report_bytes(widths: Sequence[int], num_groups: int, device: torch.device) -> int:
    """Bytes that a report on layers of these widths takes: moments of all groups, and matrices on their way."""
    unions = num_groups + (num_groups > 1)
    at_a_time = {width: min(unions * widths.count(width), matrices_at_a_time(width, device)) for width in widths}
    solving = max((count * width**2 for width, count in at_a_time.items()), default=0)
    return 8 * (num_groups * sum(width**2 for width in widths) + MATRICES_AT_A_TIME * solving)


def _seconds_a_row(
    request: ActivationRequest, like: Tensor, axis: int, num_samples: int | None, device: torch.device
) -> float:
    output = torch.randn(like.shape, device=device).to(like.dtype)
    collector = request.collector(["layer"], device)
    collector.begin_batch(num_samples, None)
    rows = rows_last(output, axis)

    def add() -> None:
        collector.reset()
        collector.add("layer", rows)

    return _least(add, device) / max(rows.shape[:-1].numel(), 1)


def _seconds_to_solve(request: ActivationRequest, width: int, device: torch.device) -> float:
    size = min(width, WIDEST_SOLVED)
    collector = request.collector(["layer"], device)
    rows = torch.randn(2 * size, size, device=device)

    def solve() -> float:
        collector.reset()
        collector.begin_batch(len(rows), None)
        collector.add("layer", rows)
        settle(device)
        start = perf_counter()
        for names, parts, _, dtypes in collector.pool():
            decompose(names, parts, {}, dtypes=dtypes)
        settle(device)
        return perf_counter() - start

    first = solve()
    return min(first, solve() if first < 0.5 else first) * (width / size) ** 3


def gradient_cost(
    request: GradientRequest, engine: EngineFound, count: int, sizes: Sequence[int], device: torch.device
) -> CostFound:
    """Of a report on parameters of P numbers each, with rows of so many samples by an engine that works."""
    total = sum(sizes)
    row_bytes = request.num_samples * total * ROW_DTYPES[request.row_dtype].itemsize
    place = placed(request.row_device, row_bytes, device)
    assert engine.seconds is not None
    assert engine.num_bytes is not None
    solving = _seconds_for_grams(request, count, sizes, device)
    return CostFound(
        "gradient",
        f"{count:,} samples x {total:,} numbers of {plural(len(sizes), 'parameter')}, by {engine.method}",
        engine.seconds,
        solving,
        row_bytes,
        engine.num_bytes,
        "samples of this batch and Gram matrices timed here",
        str(place.device),
        place.budget,
    )


def _seconds_for_grams(request: GradientRequest, wanted: int, sizes: Sequence[int], device: torch.device) -> float:
    count, numbers = min(wanted, WIDEST_SOLVED), min(sum(sizes), WIDEST_ROW)
    rows = torch.randn(count, numbers, device=device)
    scale = wanted / count
    product = _least(lambda: gram(rows), device) * scale**2 * sum(sizes) / numbers
    grams = {"parameter": gram(rows)}
    groups = torch.arange(count, device=device) % request.num_groups
    facts = {"parameter": numbers}, groups, request.num_groups, ROW_DTYPES[request.row_dtype]
    return product + len(sizes) * scale**3 * _least(lambda: decompose_grams(grams, *facts), device)


def _least(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the faster of two, the second without what only the first call costs."""
    found = []
    for _ in range(2):
        settle(device)
        start = perf_counter()
        work()
        settle(device)
        found.append(perf_counter() - start)
    return min(found)
