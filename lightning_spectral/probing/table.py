"""A probe as tables: what is found, what is refused with its remedy, what a report costs."""

import math
from collections.abc import Callable, Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from lightning_spectral.probing.found import CostFound, EngineFound, LayerFound, ParameterFound, Probe
from lightning_spectral.terminal import new_table

MOST_TENSORS = 6
"""Of a batch, that are listed one by one."""


def tables(probe: Probe) -> Iterator[RenderableType]:
    """The parts of a probe, in the order in which somebody would ask for them.

    All that is the user's is text, no markup, whatever the console; a heading is as wide as the console.
    """
    yield Text(f"{probe.module}: one training batch on {probe.device}, nothing trained", style="bold")
    yield _facts(probe)
    yield from _part("activations", probe.layers, probe.layers_problem, _layers)
    yield from _part("gradients", probe.parameters, probe.parameters_problem, _parameters, probe.loss.problem)
    if probe.engines:
        yield _heading("ways to have these rows of gradients, with what a report takes")
        yield _engines(probe)
    if probe.costs:
        yield _heading("a report, estimated")
        yield _costs(probe.costs)
        yield Text("; ".join(map(_kept, probe.costs)))
        yield Text("; ".join(f"{cost.kind}: {cost.how}" for cost in probe.costs), style="dim")


def _part(
    name: str,
    found: Sequence[LayerFound] | Sequence[ParameterFound],
    problem: str | None,
    make: Callable[..., tuple[Table, str | None]],
    *more: object,
) -> Iterator[RenderableType]:
    if problem is not None:
        yield _heading(name)
        yield _refusal(problem)
        name = f"{name} of what could be named"
    if found:
        table, words = make(found, *more)
        yield _heading(f"{name}; a row is {words}" if words else name)
        yield table


def _heading(words: str) -> Text:
    return Text(words, style="italic")


def _cells(*cells: str | Text) -> list[Text]:
    return [cell if isinstance(cell, Text) else Text(cell) for cell in cells]


def _refusal(reason: str) -> Text:
    return Text(f"refused: {reason}", style="yellow")


def _facts(probe: Probe) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    if probe.step is not None:
        table.add_row("step", Text(f"failed: {probe.step}", style="red"))
    for name, describe in {"samples": _samples, "mask": _mask, "loss": _loss, "self-check": _check}.items():
        table.add_row(*_cells(name, describe(probe)))
    table.add_row()
    return table


def _samples(probe: Probe) -> str | Text:
    found = probe.samples
    if found.problem is not None:
        return _refusal(found.problem)
    if found.count is None:
        return "-"
    tensors = {
        path: f"{shape} {'for all samples' if axis is None else f'on axis {axis}'}"
        for path, (shape, axis) in (found.tensors or {}).items()
    }
    parts = []
    for some in (tensors, found.others or {}):
        parts += [f"{path or 'batch'} {words}" for path, words in list(some.items())[:MOST_TENSORS]]
        if len(some) > MOST_TENSORS:
            parts.append(f"and {len(some) - MOST_TENSORS} more")
    return "\n".join([f"{found.count:,} ({found.rule})", *parts])


def _mask(probe: Probe) -> str | Text:
    mask = probe.mask
    if mask.problem is not None:
        return _refusal(mask.problem)
    if mask.key is not None:
        if mask.num_real is None:
            return f"{mask.key}: -"
        return f"{mask.key} ({mask.meaning}): {mask.num_real:,} of {mask.num_all:,} positions count"
    others = (f"mask={key!r} would count {kept}" for key, kept in (mask.others or {}).items())
    return "; ".join(["none, every position counts", *others])


def _loss(probe: Probe) -> str | Text:
    loss = probe.loss
    if loss.value is None and loss.of_training is None:
        return "-" if loss.problem is None else _refusal(loss.problem)
    of_training = "" if loss.of_training is None else f"{loss.of_training:.6g} in training"
    if loss.value is None:
        return of_training
    same = {"passed": "the same", "failed": "another"}.get(loss.is_same, f"not compared: {loss.is_same}")
    return f"{loss.value:.6g} on a copy{', ' if of_training else ''}{of_training}; {same}"


def _check(probe: Probe) -> str | Text:
    loss = probe.loss
    if probe.samples.problem is not None:
        return "not made, for samples are refused"
    if loss.value is None and loss.of_training is None:
        return "not made"
    if loss.problem is not None:
        return _refusal(loss.problem)
    if loss.is_mean != "passed":
        return f"not made: {loss.is_mean}"
    residual = "" if loss.residual is None else f", residual {loss.residual:.0e}"
    ratio = "not known" if loss.weights_ratio is None else f"{loss.weights_ratio:.3g}"
    return f"passed, a mean of its samples' losses{residual}; ratio of sample weights {ratio}"


def _layers(layers: Sequence[LayerFound]) -> tuple[Table, str | None]:
    words = {layer.row for layer in layers}
    # What all have in common is said once.
    is_one = len(words) == 1 and None not in words and all(layer.problem is None for layer in layers)
    table = new_table("", ["layer", "type", "output"], ["axis", "width", "rows"])
    if not is_one:
        table.add_column("a row", overflow="fold")
    for layer in layers:
        shape = "-" if layer.shape is None else "x".join(map(str, layer.shape))
        axis = "-" if layer.channel_dim is None else str(layer.channel_dim)
        width = "-" if layer.width is None else f"{layer.width:,}"
        cells: list[str | Text] = [layer.name, layer.kind, shape, axis, width, f"{layer.rows:,}"]
        if not is_one:
            cells.append((layer.row or "-") if layer.problem is None else _refusal(layer.problem))
        table.add_row(*_cells(*cells))
    return _bare(table), words.pop() if is_one else None


def _parameters(parameters: Sequence[ParameterFound], of_loss: str | None) -> tuple[Table, str]:
    table = new_table("", ["parameter", "of", "shape"], ["numbers"])
    has_problems = any(parameter.problem is not None for parameter in parameters)
    if has_problems:
        table.add_column("", overflow="fold")
    for parameter in parameters:
        shape = "x".join(map(str, parameter.shape)) or "-"
        numbers = f"{math.prod(parameter.shape):,}" if parameter.shape else "-"
        cells: list[str | Text] = [parameter.name, parameter.kind, shape, numbers]
        if has_problems:
            reason = "the self-check fails" if parameter.problem == of_loss else parameter.problem
            cells.append("" if parameter.problem is None else Text(f"NaN: {reason}", style="yellow"))
        table.add_row(*_cells(*cells))
    return _bare(table), "that of one sample's loss"


def _engines(probe: Probe) -> Table:
    table = new_table("", ["method", "works"], ["seconds", "memory"])
    said = {probe.loss.problem: "the loss is refused", probe.samples.problem: "samples are refused"}
    for engine in probe.engines:
        works: str | Text = "yes, 'auto' takes it" if engine.is_auto else "yes"
        if not engine.works:
            works = Text(f"no: {said.get(engine.problem, engine.problem)}", style="yellow")
        table.add_row(*_cells(engine.method, works, *_cost(engine)))
    return _bare(table)


def _cost(engine: EngineFound) -> tuple[str, str]:
    seconds = "-" if engine.seconds is None else show_seconds(engine.seconds)
    return seconds, "-" if engine.num_bytes is None else show_bytes(engine.num_bytes)


def _costs(costs: Sequence[CostFound]) -> Table:
    table = new_table("", ["of", "reads"], ["rows, s", "spectra, s", "memory", "peak"])
    for cost in costs:
        seconds = show_seconds(cost.collecting), show_seconds(cost.solving)
        memory = show_bytes(cost.kept_bytes), show_bytes(cost.peak_bytes)
        table.add_row(*_cells(cost.kind, cost.reads, *seconds, *memory))
    return _bare(table)


def _kept(cost: CostFound) -> str:
    """Where what is held waits for the report, and what it may take."""
    of_all = f"of a budget of {show_bytes(cost.budget_bytes)}"
    held = "sums" if cost.kind == "activation" else "rows"
    return f"{cost.kind}: {show_bytes(cost.kept_bytes)} of {held} wait on {cost.kept_on}, {of_all}"


def _bare(table: Table) -> Table:
    """Without its title, which a narrow table would fold."""
    table.title = None
    return table


def show_seconds(seconds: float) -> str:
    """Two digits, for an estimate has no more."""
    return f"{seconds:,.0f}" if seconds >= 10 else f"{seconds:.2g}"


def show_bytes(count: int) -> str:
    """In the unit that suits."""
    number = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:.3g} TiB"
