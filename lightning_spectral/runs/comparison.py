"""Comparing two sides of runs at equal loss: what was gained in tokens and in time, and what moved in the spectra."""

import os
from pathlib import Path
from typing import Any, NamedTuple

from lightning_spectral.runs.arguments import check_loss, check_paths
from lightning_spectral.runs.divergences import find_divergences, losses_between
from lightning_spectral.runs.finding import RunPaths, open_runs
from lightning_spectral.runs.gains import BETTER, TIMES, Gain, gain_in, without_floor
from lightning_spectral.runs.independence import check_alike, check_apart
from lightning_spectral.runs.kinds import Key
from lightning_spectral.runs.measured import (
    bands_of,
    check_comparable,
    highest_common_loss,
    keep_known,
    lowest_common_loss,
    measure,
    other_lengths,
)
from lightning_spectral.runs.movement import Lead, Movement, find_lead, move
from lightning_spectral.runs.pairs import Pairs, check_paired, find_pairs, in_order, use_pairs
from lightning_spectral.runs.run import Run
from lightning_spectral.runs.shifts import Shift, mean_shift, shifts_of
from lightning_spectral.runs.sides import Sides
from lightning_spectral.runs.statistics import Scatter, read_scatter, scatter
from lightning_spectral.runs.timing import Timing, time_sides
from lightning_spectral.runs.verdict import Verdict, decide

Paths = RunPaths

NEAR_LOSS = 0.05
"""Share by which the loss of a recorded floor may differ from the one that is matched."""


class Comparison(NamedTuple):
    """Two sides of runs at equal loss."""

    base: list[Run]
    variant: list[Run]
    loss_name: str
    loss: float
    """The loss they are matched at."""
    gains: dict[str, Gain]
    shifts: list[Shift]
    verdict: Verdict
    run_floor: Scatter
    """What seeds show, as it is used."""
    left_out: dict[Key, str]
    """Spectra that cannot be compared, and why."""
    unknown: dict[Key, str]
    """Exponents that a run's spectra do not give, and why: their shifts are NaN."""
    timing: Timing
    """By what tokens a second and seconds are compared, or why not."""
    movements: dict[str, Movement]
    """Whether spectra moved, by kind."""
    lead: Lead
    """Which kind of them moved most."""
    pairs: Pairs
    """Runs of base and variant that were compared seed by seed."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-like, for programs; serves as the recorded run floor of later comparisons, too."""
        return {
            "base": [str(run.path) for run in self.base],
            "variant": [str(run.path) for run in self.variant],
            "families": {"base": self.base[0].family, "variant": self.variant[0].family},
            "loss_name": self.loss_name,
            "loss": self.loss,
            "timing": self.timing._asdict(),
            "gains": {name: gain._asdict() for name, gain in self.gains.items()},
            "shifts": [shift._asdict() for shift in self.shifts],
            "movements": {kind: one._asdict() | {"ratio": one.ratio} for kind, one in self.movements.items()},
            "lead": self.lead._asdict(),
            "pairs": self.pairs._asdict(),
            "verdict": self.verdict._asdict(),
            "series": {
                kind: {str(run.path): run.series(kind) for run in (*self.base, *self.variant)}
                for kind in dict.fromkeys(shift.kind for shift in self.shifts)
            },
            "caveats": other_lengths([*self.base, *self.variant]),
            "left_out": {f"{key.kind}/{key.name}": reason for key, reason in self.left_out.items()},
            "unknown": {key.text: reason for key, reason in self.unknown.items()},
            "run_floor": self.run_floor.as_dict(),
        }


def compare(
    base: Paths,
    variant: Paths,
    at_loss: float | None = None,
    floor: Paths | None = None,
    paired: bool | None = None,
) -> Comparison:
    """Compare two runs, or two sides of runs with several seeds each, at equal loss.

    Args:
        base: Log directory, or directories, or glob patterns of them.
        variant: Likewise.
        at_loss: The loss to match at; None for the lowest that all runs reached while their spectra were measured, but
            no lower than that of a floor that is a file.
        floor: Where no side has two runs, or few: a recorded run floor of the base's family, that is, seeds of one
            setting, or a file with the JSON of an earlier comparison. Seeds of several days show how days differ.
        paired: Whether runs of one seed are compared with each other. None for where both sides have the same three
            seeds or more, in one order of the data (:func:`lightning_spectral.runs.pairs.find_pairs`).

    Returns:
        Gains, shifts and a verdict, each beside what sampling and what seeds alone show.

    Raises:
        ValueError: If a path names no run, one run is on both sides, or runs cannot be compared: their spectra are of
            different stages, layers, data or numbers of rows, a side mixes families or holds one run twice, a floor is
            of another loss, a loss was not reached, or runs that are to be paired are no pairs.

    Example::

        comparison = compare("logs/rope/*", "logs/muon/*")
        comparison.verdict.text
        comparison.gains["tokens"].gain
    """
    if at_loss is not None:
        check_loss("at_loss", at_loss)
    check_paired(paired)
    sides = open_runs(base, "base"), open_runs(variant, "variant")
    others, recorded = _open_floor(floor, sides)
    for name, side in (("base", sides[0]), ("variant", sides[1]), ("floor", others)):
        check_alike(name, side)
    check_apart(*sides)
    pairs = find_pairs(*sides)
    sides = in_order(sides[0], pairs), in_order(sides[1], pairs)
    runs = [*sides[0], *sides[1], *others]
    kinds = check_comparable(runs)
    bands = {kind: bands_of(runs[0], kind) for kind in kinds}
    loss = lowest_common_loss(runs, kinds) if at_loss is None else float(at_loss)
    if recorded is not None:
        loss = max(loss, recorded.loss) if at_loss is None else loss
        _check_floor_is_of(recorded, runs[0].history.loss_name, loss)
    every = [measure(run, loss, kinds, bands) for run in runs]
    every, left_out = keep_known(every)
    num_base, num_both = len(sides[0]), len(sides[0]) + len(sides[1])
    first, second, third = every[:num_base], every[num_base:num_both], every[num_both:]
    pairs = use_pairs(pairs, first, second, floor is not None, paired)
    known = scatter([first, second, *([third] if third else [])])
    if recorded is not None:
        known = known.and_of(recorded)
    timing, timed = time_sides([first, second, third], known, recorded)
    known, is_paired = timed.known, bool(pairs.seeds)
    measured = Sides(first, second, known, is_paired)
    in_time = Sides(timed.base, timed.variant, timed.floor, is_paired and timing.compared_by == "runs")
    gains = {quantity: gain_in(quantity, in_time if quantity in TIMES else measured) for quantity in BETTER}
    if not timing.compared_by:
        gains |= {quantity: without_floor(gains[quantity]) for quantity in TIMES}
    losses = losses_between(runs, highest_common_loss(runs, kinds), loss)
    shifts, means, found, movements = [], [], {}, {}
    for kind in kinds:
        names = [key.name for key in first[0].spectra if key.kind == kind]
        if names:
            of_names = [shift for name in names for shift in shifts_of(kind, name, measured)]
            means.append(mean_shift(kind, of_names, measured))
            shifts += of_names
            of_floor = None if recorded is None else recorded.variances.get(Key("js", kind))
            found[kind] = find_divergences(every, kind, names, losses, (num_base, len(second)), is_paired, of_floor)
            movements[kind] = move(kind, found[kind], means[-1].is_detected)
    lead = find_lead(movements, found)
    has_moved = {kind: movement.has_moved for kind, movement in movements.items()}
    left_out_time = "" if timing.compared_by else timing.reason
    verdict = decide(gains["tokens"], gains["throughput"], has_moved, lead, left_out_time)
    unknown = {key: f"{one.run}: {why}" for one in [*second, *first] for key, why in one.unknown.items()}
    unknown = {key: why for key, why in unknown.items() if key._replace(quantity="js") in first[0].spectra}
    return Comparison(
        *sides,
        loss_name=runs[0].history.loss_name,
        loss=loss,
        gains=gains,
        shifts=[*means, *shifts],
        verdict=verdict,
        run_floor=known,
        left_out=left_out,
        unknown=unknown,
        timing=timing,
        movements=movements,
        lead=lead,
        pairs=pairs,
    )


def _open_floor(floor: Paths | None, sides: tuple[list[Run], list[Run]]) -> tuple[list[Run], Scatter | None]:
    """Where a run floor beyond the two sides comes from: other runs, or an earlier comparison."""
    family, compared = sides[0][0].family, {run.id for side in sides for run in side}
    if floor is None:
        return [], None
    check_paths("floor", floor)
    if isinstance(floor, (str, Path)) and os.path.isfile(floor):
        recorded = read_scatter(Path(floor))
        if family not in recorded.families:
            raise ValueError(f"floor must be of the base's family, {family}, got {', '.join(recorded.families)}")
        if compared & set(recorded.runs):
            raise ValueError(f"floor must be of other runs than those that are compared, got {str(floor)!r}")
        return [], recorded
    # Those that are compared show their scatter anyway.
    others = [run for run in open_runs(floor, "floor") if run.id not in compared]
    for run in others:
        if run.family != family:
            raise ValueError(f"floor must be of the base's family, {family}, got {run.family} in {run}")
    return others, None


def _check_floor_is_of(recorded: Scatter, loss_name: str, loss: float) -> None:
    """Refuse a recorded floor of another loss, at which seeds scatter otherwise."""
    if recorded.loss_name != loss_name:
        raise ValueError(f"floor must be of the loss that is compared, {loss_name}, got one of {recorded.loss_name}")
    if abs(loss - recorded.loss) > NEAR_LOSS * abs(recorded.loss):
        raise ValueError(
            f"floor must be of about the loss that is matched, {loss:.4g}, got one of {recorded.loss:.4g}: compare at "
            "that, or give the runs that it was made of"
        )
