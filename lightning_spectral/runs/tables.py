"""Tables of runs and of comparisons, for the terminal."""

from collections.abc import Iterator, Mapping, Sequence
from math import isnan, nan
from typing import Any

from rich.table import Table
from rich.text import Text

from lightning_spectral.functional.estimate import Spectrum, fit_all, rankme_all
from lightning_spectral.functional.subspace import subspace_overlap
from lightning_spectral.runs.comparison import Comparison
from lightning_spectral.runs.gains import Gain
from lightning_spectral.runs.kinds import KINDS
from lightning_spectral.runs.measured import bands_of, other_lengths, series_used
from lightning_spectral.runs.movement import P_VALUE, Movement
from lightning_spectral.runs.noise import NoiseScale
from lightning_spectral.runs.run import Run
from lightning_spectral.runs.run_spectra import kind_of
from lightning_spectral.runs.shifts import Shift
from lightning_spectral.runs.spread import spread
from lightning_spectral.terminal import console, new_table, print_advice, shortened, show_interval, show_number

_AT_ONCE = 256
"""Reports whose spectra are in memory together, and fitted together."""

QUANTITIES = {
    "js": ("JS", 5),
    "alpha_head": ("alpha_head", 3),
    "alpha_tail": ("alpha_tail", 3),
    "rankme": ("RankMe", 1),
}


def print_comparison(comparison: Comparison) -> None:
    """Print gains, shifts and the verdict with its rule."""
    out = console()
    for name, side in (("base", comparison.base), ("variant", comparison.variant)):
        runs = ", ".join(str(run.path) for run in side[:3]) + (", ..." if len(side) > 3 else "")
        out.print(f"{name:8} {len(side)} {'run' if len(side) == 1 else 'runs'} of {side[0].family}: {runs}")
    for run in (*comparison.base, *comparison.variant):
        if run.columns:
            out.print(from_log(run))
    out.print(f"matched at {comparison.loss_name} {comparison.loss:.4f}\n")
    for line in other_lengths([*comparison.base, *comparison.variant]):
        out.print(line)
    for kind in dict.fromkeys(shift.kind for shift in comparison.shifts):
        for line in series_used([*comparison.base, *comparison.variant], kind):
            out.print(line)
    out.print(_gains(comparison.gains.values()))
    for line in _power(comparison):
        out.print(line)
    if comparison.timing.reason:
        done = "compared day by day" if comparison.timing.compared_by else "left out"
        out.print(f"tokens a second and seconds are {done}: {comparison.timing.reason}")
    out.print()
    for kind in dict.fromkeys(shift.kind for shift in comparison.shifts):
        out.print(_shifts(kind, [shift for shift in comparison.shifts if shift.kind == kind]))
        if kind in comparison.movements:
            out.print(f"{_moved(comparison.movements[kind], comparison.loss_name)}\n")
    for key, reason in comparison.left_out.items():
        out.print(f"without {key.kind} {key.name}, in {reason}")
    for key, reason in comparison.unknown.items():
        out.print(f"no {key.quantity} of {key.kind} {key.name}, in {reason}")
    out.print(Text.assemble(("verdict", "bold"), f"  {comparison.verdict.text}"))
    out.print(f"rule     {comparison.verdict.rule}", style="dim")


def _gains(gains: Any) -> Table:
    numbers = ["base", "variant", "gain", "interval", "run\nfloor"]
    table = new_table("gains of the variant (* beyond its floor)", [""], numbers)
    for gain in gains:
        table.add_row(*_gain_cells(gain))
    return table


def _gain_cells(gain: Gain) -> Iterator[str]:
    yield {"tokens": "tokens to loss", "throughput": "tokens a second", "seconds": "seconds to loss"}[gain.quantity]
    digits = 1 if gain.quantity == "seconds" else 0
    yield from (show_number(number, digits) for number in (gain.base, gain.variant))
    yield f"{'* ' if gain.is_detected else ''}{_signed(gain.gain, '.1%')}"
    yield "-" if isnan(gain.low) else f"{gain.low:+.1%}..{gain.high:+.1%}"
    yield _signed(gain.run_floor, ".1%")


def _power(comparison: Comparison) -> Iterator[str]:
    """What the seeds of a comparison could have shown, and which of them are pairs."""
    tokens, pairs = comparison.gains.get("tokens"), comparison.pairs
    if tokens is not None and not isnan(tokens.detectable):
        yield f"a gain in tokens of {tokens.detectable:.1%} or more would be found in 80 of 100 such comparisons"
    if pairs.seeds:
        yield f"tokens, seconds and exponents are compared pair by pair, of seeds {', '.join(map(str, pairs.seeds))}"
    elif pairs.reason:
        yield f"runs of equal seeds are not compared pair by pair: {pairs.reason}"


def _moved(movement: Movement, loss_name: str) -> str:
    """Whether spectra moved, and by what that was found."""
    ratios, losses = (", ".join(show_number(one, 2) for one in row) for row in (movement.ratios, movement.losses))
    p_values = ", ".join(show_number(one, 3) for one in movement.p_values)
    tested = f"p {p_values} of {movement.num_ways:,} {movement.tested_by}"
    if movement.tested_by == "floors":
        tested = f"{movement.num_ways} splits give no p of {P_VALUE:g}, as four seeds a side do: floors stand for it"
    return (
        f"{movement.kind} spectra {'moved' if movement.has_moved else 'did not move'}: between sides {ratios} times as "
        f"far apart as between seeds (R), at {loss_name} {losses}; {tested}"
    )


def _signed(number: float, form: str) -> str:
    """A number with its sign; a dash for NaN."""
    return "-" if isnan(number) else f"{number:+{form}}"


def _shifts(kind: str, shifts: Sequence[Shift]) -> Table:
    # With headings of two lines, and names on lines of their own, it fits into 80 columns.
    numbers = ["base", "variant", "shift", "interval", "sampling\nfloor", "run\nfloor"]
    table = new_table(f"{kind} spectra at the matched loss (* beyond its floors)", [""], numbers)
    before = None
    for shift in shifts:
        name = shift.name or "mean of all"
        label, digits = QUANTITIES[shift.quantity]
        interval = "-" if isnan(shift.low) else f"{shift.low:+.{digits}f}..{shift.high:+.{digits}f}"
        moved = f"{shift.shift:.{digits}f}" if shift.quantity == "js" else _signed(shift.shift, f".{digits}f")
        if name != before:
            table.add_row(name)
        table.add_row(
            f"  {label}",
            *(show_number(number, digits) for number in (shift.base, shift.variant)),
            f"* {moved}" if shift.is_detected else moved,
            interval,
            *(show_number(number, digits) for number in (shift.sampling_floor, shift.run_floor)),
        )
        before = name
    return table


def from_log(run: Run) -> str:
    """What a run without a record was read from, and what was taken for what."""
    tool, *columns = run.columns.items()
    meanings = ", ".join(f"{what}: {name}" for what, name in columns)
    return f"{run.path} has no spectra: read from {tool[1]} ({meanings})"


def print_run(run: Run, kinds: Sequence[str]) -> None:
    """Print what a run is, its losses and how its spectra of some kinds evolved."""
    out = console()
    out.print(f"{run.path}  {run.family}" + "".join(f"  {key}={value}" for key, value in run.tags.items()))
    history = run.history
    entries, losses = history.with_loss()
    if len(entries):
        last = entries[-1]
        tokens, seconds = show_number(history.tokens[last], 0), show_number(history.seconds[last], 1)
        out.print(
            f"{history.loss_name} {losses[0]:.4f} to {losses[-1]:.4f} (lowest {losses.min():.4f}) over "
            f"{history.step[last]:,.0f} steps, {tokens} tokens, {seconds} s"
        )
    if not isnan(history.diverged_at):
        out.print(f"its {history.loss_name} is no finite number from step {history.diverged_at:,.0f} on")
    if run.columns:
        out.print(from_log(run))
    print_advice((one["text"], one["url"]) for one in run.advice)
    for kind in kinds:
        for series in each_series(run, kind):
            # Of each layer as many as fit, also of one that joined later.
            shown = {step for name in run.names(kind) for step in spread(run.steps(kind, name))}
            rows = list(evolution(run, kind, sorted(shown)))
            out.print(_evolution(run, kind, series, rows))
            for name in run.names(kind):
                if (steps := run.steps(kind, name)) != run.steps(kind):
                    out.print(f"{name} was reported from step {steps[0]:,} to {steps[-1]:,}")
                for line in _why_unknown([row for row in rows if row["name"] == name]):
                    out.print(line)


def _why_unknown(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Why exponents of one layer or parameter are not known."""
    for quantity in ("alpha_tail", "alpha_head"):
        whys = {row["step"]: row["unknown"][quantity] for row in rows if quantity in row["unknown"]}
        if whys:
            yield f"no {quantity} of {rows[0]['name']} at step {', '.join(map(str, whys))}: {whys[max(whys)]}"


def each_series(run: Run, kind: str) -> Iterator[str]:
    """Let a kind mean each of its series in turn: one, but for several measurements or a run that was resumed."""
    if kind not in KINDS:
        yield kind
        return
    first, *others = run.series_beside(kind)
    try:
        for series in (first, *others):
            run.use(kind, series)
            yield series
    finally:
        run.use(kind, first)


def _evolution(run: Run, kind: str, series: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    settings = run.settings(kind)
    has_bases, has_noise = "rank" in settings, kind_of(kind) == "gradient"
    numbers = ["step", "tokens", "alpha_tail", "alpha_head", "RankMe", *(["overlap"] if has_bases else [])]
    numbers += ["noise scale (80%)"] if has_noise else []
    title = f"{kind} spectra, {settings.get('stage', '')}"
    if kind in KINDS and len(run.series_beside(kind)) > 1:
        title += f", {series}, {run.span(series)}"
    table = new_table(title, [kind], numbers)
    shown = shortened([row["name"] for row in rows], table)
    before = None
    for row in rows:
        is_first, before = row["name"] != before, row["name"]
        cells = [
            f"{row['step']:,}",
            show_number(row["tokens"], 0),
            f"{show_number(row['alpha_tail'], 3)} +/- {show_number(row['alpha_tail_stderr'], 3)}",
            show_number(row["alpha_head"], 3),
            show_number(row["rankme"], 1),
            *([show_number(row["overlap"], 3)] if has_bases else []),
        ]
        if has_noise:
            noise = (row[f"noise_scale{end}"] for end in ("", "_low", "_high"))
            cells.append(show_interval(*noise))
        table.add_row(shown[row["name"]] if is_first else "", *cells)
    return table


def evolution(run: Run, kind: str, steps: Sequence[int] | None = None) -> Iterator[dict[str, Any]]:
    """The numbers of a run's spectra of a kind at the reports of some steps, or all.

    For each layer or parameter and each of the steps at which it was reported, exponents, RankMe, and the overlap of
    the leading eigenvectors with those of its first report; of gradients also the noise scale with its 80% interval, in
    samples, open above where its high end is ``inf``. NaN for what is not known, of exponents with the reason.
    """
    steps = run.steps(kind) if steps is None else steps
    bands, first = bands_of(run, kind), _first_bases(run, kind, steps)
    rows: dict[str, list[dict[str, Any]]] = {}
    for start in range(0, len(steps), _AT_ONCE):
        spectra = [
            spectrum
            for step in steps[start : start + _AT_ONCE]
            for spectrum in run.spectra(kind, step, without=("leave_one_out_vectors",)).values()
        ]
        tails = fit_all(spectra, bands["tail"])
        heads = fit_all(spectra, bands["head"], with_errors=False)  # of these none are shown
        ranks = rankme_all(spectra)
        has_noise = kind_of(kind) == "gradient"
        noises = {step: run.noise_scales(step, kind) for step in steps[start : start + _AT_ONCE] if has_noise}
        for spectrum, tail, head, rank in zip(spectra, tails, heads, ranks, strict=True):
            rows.setdefault(spectrum.name, []).append(
                {
                    "kind": kind,
                    "series": run.series(kind),
                    "name": spectrum.name,
                    "step": spectrum.step,
                    "tokens": spectrum.tokens,
                    "alpha_tail": tail.value,
                    "alpha_tail_stderr": tail.stderr,
                    "alpha_head": head.value,
                    "rankme": rank,
                    "overlap": _overlap(spectrum, first.setdefault(spectrum.name, spectrum)),
                    **_noise(noises.get(int(spectrum.step), {}).get(spectrum.name)),
                    "unknown": {
                        f"alpha_{part}": one.reason
                        for part, one in (("tail", tail), ("head", head))
                        if isnan(one.value)
                    },
                }
            )
    for name in run.names(kind):
        yield from rows.get(name, ())


def _first_bases(run: Run, kind: str, steps: Sequence[int]) -> dict[str, Spectrum]:
    """The first report of each layer or parameter, where the first of these steps is a later one."""
    if list(steps[:1]) == run.steps(kind)[:1]:
        return {}
    return {name: run.spectrum(kind, name, run.steps(kind, name)[0]) for name in run.names(kind)}


def _overlap(spectrum: Spectrum, first: Spectrum) -> float:
    if spectrum.vectors is None or first.vectors is None:
        return nan
    # A run that was resumed may have kept more of them, or fewer: all that are in both count, as in drift.
    rank = min(spectrum.vectors.shape[-1], first.vectors.shape[-1])
    return float(subspace_overlap(spectrum.vectors[..., :rank], first.vectors[..., :rank]))


def _noise(scale: NoiseScale | None) -> dict[str, float]:
    """The cells of a parameter's noise scale; none of what is no gradient."""
    if scale is None:
        return {}
    return {"noise_scale": scale.value, "noise_scale_low": scale.low, "noise_scale_high": scale.high}
