"""What comes first of a run: its loss, its spectra now and how they moved, noise beside batch, forecast, failures."""

from collections.abc import Callable, Mapping
from math import inf, isfinite, isnan, nan
from typing import NamedTuple

from lightning_spectral.advice.facts import Number, are_as_many, floor_of_change
from lightning_spectral.functional.estimate import Spectrum
from lightning_spectral.functional.powerlaw import Band
from lightning_spectral.reporting.drift import drift
from lightning_spectral.reporting.words import number
from lightning_spectral.runs import NoiseScale, Run
from lightning_spectral.runs.measured import bands_of


class Loss(NamedTuple):
    """Where the loss of a run stands; NaN where none is known yet."""

    name: str
    first: float
    last: float
    lowest: float
    step: float
    """Of the last entry with a loss."""
    tokens: float
    seconds: float


class Change(NamedTuple):
    """A number of a layer, or a mean over layers, at two reports."""

    first: Number
    last: Number
    floor: float
    """How far two reports of one process lie apart in 95 of 100 cases; NaN without error bars."""
    num_layers: int
    steps: tuple[int, int]

    @property
    def by(self) -> float:
        """Last less first."""
        return self.last.value - self.first.value

    @property
    def is_beyond(self) -> bool:
        """Whether it lies beyond its floor."""
        return self.steps[0] != self.steps[1] and abs(self.by) > self.floor


class Turned(NamedTuple):
    """How many layers' heads have turned beyond the floor since the first report."""

    num_beyond: int
    num_layers: int
    """Of which an overlap and its floor are known."""
    most: str
    """The layer that lies farthest below its floor, or nearest to it."""
    overlap: float
    floor: float


class Noise(NamedTuple):
    """The noise scale of the measured parameters together, beside the batch, in one unit."""

    unit: str
    """``tokens``, or ``samples`` where it is not known how many tokens a sample has."""
    value: float
    low: float
    high: float
    batch: float
    """NaN where it is not known in this unit."""


class Forecast(NamedTuple):
    """A forecast; NaN where there was none."""

    monitor: str
    target: float
    step: float
    tokens: float
    low: float
    high: float
    actual: float
    """Tokens at which the target was reached; NaN before."""


class Headline(NamedTuple):
    """What comes first of a run; None for what was not measured."""

    loss: Loss
    kind: str
    """Of the spectra that ``tail`` and ``rankme`` are of; empty without any."""
    step: int
    """Of their latest report; -1 without any."""
    tail: Change | None
    rankme: Change | None
    """As a share of the width."""
    turned: Turned | None
    noise: Noise | None
    forecast: Forecast | None
    """The last one."""


def headline(run: Run) -> Headline:
    """Read what comes first: the history, and the first report and the last of each kind."""
    kind = next((kind for kind in ("activation", "gradient", "weight") if kind in run.kinds), "")
    tail = rankme = turned = None
    step = -1
    if kind:
        first, last, steps = ends(run, kind)
        step = steps[1]
        tail = mean_change(first, last, steps, lambda one: tail_of(one, bands_of(run, kind)["tail"]))
        rankme = mean_change(first, last, steps, rankme_share)
        turned = turned_heads(first, last) if kind == "activation" else None
    return Headline(loss_of(run), kind, step, tail, rankme, turned, noise_of(run), last_forecast(run))


def ends(run: Run, kind: str) -> tuple[dict[str, Spectrum], dict[str, Spectrum], tuple[int, int]]:
    """The first report of each layer, the last report, and their steps."""
    steps = run.steps(kind)
    first, last = (run.spectra(kind, step) for step in (steps[0], steps[-1]))
    return first, first if len(steps) == 1 else last, (steps[0], steps[-1])


def loss_of(run: Run) -> Loss:
    """Where the loss stands, from the history alone."""
    history = run.history
    entries, losses = history.with_loss()
    if not len(entries):
        latest = [float(column[-1]) if len(column) else nan for column in history[:3]]
        return Loss(history.loss_name, nan, nan, nan, *latest)
    last, loss = entries[-1], float(losses[-1])
    if not isnan(history.diverged_at):
        last, loss = len(history.step) - 1, inf
    at = (float(history.step[last]), float(history.tokens[last]), float(history.seconds[last]))
    return Loss(history.loss_name, float(losses[0]), loss, float(losses.min()), *at)


def tail_of(spectrum: Spectrum, band: Band) -> Number:
    """The exponent of a band, with its standard error."""
    exponent = spectrum.exponent(band)
    return Number(exponent.value, exponent.stderr)


def rankme_share(spectrum: Spectrum) -> Number:
    """RankMe over the width."""
    value, stderr = spectrum.rankme()
    width = len(spectrum.values) or nan
    return Number(value / width, stderr / width)


def mean_change(
    first: Mapping[str, Spectrum],
    last: Mapping[str, Spectrum],
    steps: tuple[int, int],
    measure: Callable[[Spectrum], Number],
) -> Change | None:
    """Change of the mean over the layers of which a number is known in both reports; None if there is none."""
    known: list[tuple[Number, Number]] = []
    groups: list[int] = []
    for name, spectrum in last.items():
        earlier = first.get(name)
        if earlier is None or not are_alike(earlier, spectrum):
            continue
        pair = measure(earlier), measure(spectrum)
        if isfinite(pair[0].value) and isfinite(pair[1].value):
            known.append(pair)
            groups.append(min(len(earlier.leave_one_out), len(spectrum.leave_one_out)))
    if not known:
        return None
    before, after = (Number.mean(numbers) for numbers in zip(*known, strict=True))
    return Change(before, after, floor_of_change(before, after, min(groups)), len(known), steps)


def are_alike(one: Spectrum, other: Spectrum) -> bool:
    """Whether numbers of two spectra compare: fewer rows alone make one steeper."""
    is_known = one.failure is None and other.failure is None
    return is_known and len(one.values) == len(other.values) and are_as_many(one.count, other.count)


def turned_heads(first: Mapping[str, Spectrum], last: Mapping[str, Spectrum]) -> Turned | None:
    """Which heads have turned since the first report; None where no vectors were recorded, or it is the only one."""
    found = {name: drift(spectrum, first[name]) for name, spectrum in last.items() if name in first}
    known = {name: one for name, one in found.items() if isfinite(one.overlap) and isfinite(one.overlap_floor)}
    if not known or all(last[name] is first[name] for name in known):
        return None
    most = min(known, key=lambda name: known[name].overlap - known[name].overlap_floor)
    num_beyond = sum(one.overlap < one.overlap_floor for one in known.values())
    return Turned(num_beyond, len(known), most, known[most].overlap, known[most].overlap_floor)


def tokens_per_sample(run: Run) -> float:
    """Tokens of a sample in the mean, where a record has the batch in both; NaN elsewhere."""
    samples, tokens = (number(run.about.get(f"batch_{unit}")) for unit in ("samples", "tokens"))
    return tokens / samples if samples > 0 else nan


def in_unit(scale: NoiseScale, run: Run) -> Noise:
    """A noise scale, from the pairs that its interval is of, beside the batch: in tokens, or in samples.

    That is, where it is not known how many tokens a sample has.
    """
    size = tokens_per_sample(run)
    if isnan(size):
        return Noise("samples", scale.between, scale.low, scale.high, number(run.about.get("batch_samples")))
    batch = number(run.about.get("batch_tokens"))
    return Noise("tokens", scale.between * size, scale.low * size, scale.high * size, batch)


def noise_of(run: Run) -> Noise | None:
    """The noise scale at the latest report of gradients; None without one."""
    if "gradient" not in run.kinds:
        return None
    return in_unit(run.noise_scale(run.steps("gradient")[-1]), run)


def last_forecast(run: Run) -> Forecast | None:
    """The last forecast, with its target; None where no forecaster was."""
    if not run.forecasts:
        return None
    last = run.forecasts[-1]
    facts = (run.about.get("forecast") or {}).get(str(last.get("prefix", ""))) or {}
    values = (number(last.get(key)) for key in ("step", "tokens_to_target", "low", "high", "actual"))
    return Forecast(str(facts.get("monitor") or "loss"), number(facts.get("target_loss")), *values)
