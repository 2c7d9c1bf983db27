"""What watching costs a training run: steps with callbacks beside the same steps without, one by one in turn.

    python -m benchmarks.training

Several Trainers train the same GPT side by side, a step of each in turn, so that whatever disturbs the machine disturbs
neighbours alike. Each kind of step of a watched run (collecting, reporting, validating) is set against the plain run's
step at the same place: by the difference of the minima, and by the median of the paired differences. A report's cost
does not depend on how often reports come, so a few of them, close together, give the share at any cadence:
cost / (every_n_steps x plain step). What is measured on validation rows needs few steps; a gradient report needs many,
and is made once, with what it costs to make the first. All four together is the sum of their parts, with nothing that
they share taken off. Half an hour on two cores.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from rich.table import Table

from benchmarks.harness import Target, console, in_turn, main, seconds_of
from benchmarks.turns import Run, Segments, side_by_side
from lightning_spectral import ActivationSpectrum, GradientSpectrum, HeadDrift, TailForecaster
from lightning_spectral.functional.forecast import backtest, forecast_tokens
from lightning_spectral.nanogpt import NanoGPT, TextData

ACTIVATION_CADENCE = 100
GRADIENT_CADENCE = 500
"""Steps between reports by default."""

PROBES = 5
GROUPS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--batch-size", type=int, default=16, help="sequences")
    parser.add_argument("--tokens", type=int, default=256, help="a sequence")
    parser.add_argument("--num-tokens", type=int, default=65536, help="rows of an activation report")
    parser.add_argument("--num-samples", type=int, default=512, help="rows of a gradient report")
    parser.add_argument("--cycles", type=int, default=2, help="activation reports")
    parser.add_argument("--validations", type=int, default=6, help="validation runs, of which the first is not counted")
    parser.add_argument("--precision", default="32-true", help="of the Trainer")
    parser.add_argument("--accelerator", default="auto", help="of the Trainer")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    window = -(-arguments.num_tokens // (arguments.batch_size * arguments.tokens))
    gradient_window = -(-arguments.num_samples // arguments.batch_size)
    cycle, long = window + 4, gradient_window + 2
    tokens_of_step = arguments.batch_size * arguments.tokens
    rows = {"num_tokens": arguments.num_tokens}
    samples = {"num_samples": arguments.num_samples}

    activations: dict[str, Any] = {
        "plain": list,
        "ActivationSpectrum": lambda: [ActivationSpectrum(every_n_steps=cycle, **rows)],
        "all layers, every step": lambda: [ActivationSpectrum("all", cycle, num_tokens=cycle * tokens_of_step)],
    }
    validating: dict[str, Any] = {
        "plain": list,
        "ActivationSpectrum, validate": lambda: [ActivationSpectrum(every_n_steps=1, stage="validate", **rows)],
        "HeadDrift, TailForecaster": lambda: [HeadDrift(every_n_steps=1, **rows), forecaster(rows)],
        "ActivationSpectrum, validate; HeadDrift, TailForecaster": lambda: [
            ActivationSpectrum(every_n_steps=1, stage="validate", **rows),
            HeadDrift(every_n_steps=1, **rows),
            forecaster(rows),
        ],
    }
    first = train(activations, Schedule(cycle, window, arguments.cycles, has_validation=False), arguments, "training")
    second = train(validating, Schedule(1, 0, arguments.validations), arguments, "validation")

    gradients: dict[str, Any] = {
        "plain": list,
        "GradientSpectrum, hooks": lambda: [GradientSpectrum(every_n_steps=long, method="hooks", **samples)],
        "GradientSpectrum, vmap": lambda: [GradientSpectrum(every_n_steps=long, method="vmap", **samples)],
    }
    third = train(gradients, Schedule(long, gradient_window, 1, has_validation=False), arguments, "gradients")
    return {
        "num_layers": arguments.num_layers,
        "num_samples": arguments.num_samples,
        "activations": first,
        "validation": second,
        "gradients": third,
        "floors": floors(arguments),
        "forecast_seconds": of_forecast(),
    }


def forecaster(rows: dict[str, int]) -> TailForecaster:
    return TailForecaster(0.01, every_n_steps=1, **rows)


@dataclass(frozen=True)
class Schedule:
    """Cycles of steps, each of which ends with a report, and with a validation run unless there is none."""

    cycle: int
    """Steps."""
    window: int
    """Steps at the end of a cycle whose rows are collected."""
    cycles: int
    has_validation: bool = True

    @property
    def counted(self) -> range:
        """Steps that count: not the first cycle, or, of a single one, not the first step."""
        return range(self.cycle if self.cycles > 1 else 1, self.cycle * self.cycles)


def model_and_data(arguments: argparse.Namespace) -> tuple[LightningModule, LightningDataModule]:
    """A GPT of the sizes asked for, and the text it learns."""
    heads = max(1, arguments.width // 64)
    module = NanoGPT(
        num_layers=arguments.num_layers, width=arguments.width, num_heads=heads, block_size=arguments.tokens
    )
    return module, TextData(batch_size=arguments.batch_size, block_size=arguments.tokens)


def train(
    callbacks: dict[str, Any],
    schedule: Schedule,
    arguments: argparse.Namespace,
    title: str,
    make_model: Callable[[Any], tuple[LightningModule, LightningDataModule]] = model_and_data,
) -> dict[str, Any]:
    """Segments of all runs, and what the callbacks cost by them."""

    def run(make: Any) -> Run:
        torch.manual_seed(0)
        module, data = make_model(arguments)
        watching: list[Callback] = make()
        return Run(module, data, watching)

    settings = {
        "max_steps": schedule.cycle * schedule.cycles,
        "val_check_interval": schedule.cycle,
        "limit_val_batches": -(-arguments.num_tokens // (arguments.batch_size * arguments.tokens))
        * schedule.has_validation,
        "accelerator": arguments.accelerator,
        "precision": arguments.precision,
        "devices": 1,
    }
    makers = {name: (lambda make=make: run(make)) for name, make in callbacks.items()}
    found = side_by_side(makers, settings, title)
    plain = found["plain"]
    return {
        **asdict(schedule),
        "plain_step": {"minimum": min(plain.steps[1:]), "median": statistics.median(plain.steps[1:])},
        "plain_validation": min(plain.validations, default=0.0),
        "runs": {name: vars(segments) for name, segments in found.items()},
        "costs": {name: costs(segments, plain, schedule) for name, segments in found.items() if name != "plain"},
    }


def costs(watched: Segments, plain: Segments, schedule: Schedule) -> dict[str, Any]:
    """Seconds of one report beyond the plain run, by what they are spent on."""
    cycle, window, places = schedule.cycle, schedule.window, schedule.counted
    kinds = {
        "idle": [i for i in places if i % cycle < cycle - window],
        "collecting": [i for i in places if cycle - window <= i % cycle < cycle - 1],
        "reporting": [i for i in places if i % cycle == cycle - 1],
    }
    found: dict[str, Any] = {}
    for statistic in ("minimum", "median"):
        by_kind = {
            kind: difference([watched.steps[i] for i in chosen], [plain.steps[i] for i in chosen], statistic)
            for kind, chosen in kinds.items()
            if chosen
        }
        if schedule.has_validation:
            first = int(schedule.cycles > 1)
            by_kind["validation"] = difference(watched.validations[first:], plain.validations[first:], statistic)
        collecting = (window - 1) * by_kind.get("collecting", 0.0)
        found[statistic] = by_kind | {"report": collecting + by_kind["reporting"]}
    found["own"] = watched.own / schedule.cycles
    return found


def difference(watched: list[float], plain: list[float], statistic: str) -> float:
    if statistic == "minimum":
        return min(watched) - min(plain)
    return statistics.median(with_ - without for with_, without in zip(watched, plain, strict=True))


def floors(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of what a report cannot do without: bare products of its rows, bare solves of its matrices."""
    rows = torch.randn(arguments.batch_size * arguments.tokens, arguments.width)
    matrix = torch.cov(rows.T).double()
    seconds = in_turn({"product": lambda: rows.T @ rows, "solve": lambda: torch.linalg.eigvalsh(matrix)}, 20)
    product, solve = (min(seconds[name]) for name in ("product", "solve"))
    return {
        "product_of_a_step": product,
        "solve": solve,
        "report": PROBES * (product * arguments.num_tokens / len(rows) + (1 + GROUPS) * solve),
    }


def of_forecast() -> float:
    """Seconds of one forecast from twelve references, with their own leave-one-out; the runs above have none."""
    alpha = torch.linspace(1, 2, 12, dtype=torch.float64)
    tokens = torch.exp(14 + alpha + 0.1 * torch.cos(7 * alpha))

    def forecast() -> None:
        forecast_tokens(alpha, tokens, at=1.5)
        backtest(alpha, tokens)

    forecast()
    return min(seconds_of(forecast) for _ in range(5))


def show(result: dict[str, Any]) -> None:
    for part in ("activations", "validation", "gradients"):
        found = result[part]
        step = found["plain_step"]
        title = (
            f"{part}: seconds beyond the plain run, a report (differences of minima / medians of paired differences)\n"
            f"plain step {step['minimum']:.3f} / {step['median']:.3f} s, validation {found['plain_validation']:.2f} s"
        )
        kinds = ("idle", "collecting", "reporting", "validation", "report")
        header = ("", "idle step", "collecting step", "reporting step", "validation run", "whole report")
        table = Table(*header, "own clock", title=title, title_justify="left")
        for name, cost in found["costs"].items():
            cells = (f"{cost['minimum'].get(k, 0):.3f} / {cost['median'].get(k, 0):.3f}" for k in kinds)
            table.add_row(name, *cells, f"{cost['own']:.3f}")
        console.print(table)
    settings = vmap_shares(result)
    table = Table("every_n_steps", "num_samples", "share", title="GradientSpectrum by vmap, its share of training")
    for row in settings:
        table.add_row(str(row["every_n_steps"]), str(row["num_samples"]), f"{row['share']:.1%}")
    console.print(table)


def vmap_shares(result: dict[str, Any]) -> list[dict[str, float]]:
    """How cadence and samples set the cost of passes of their own: it is proportional to their ratio."""
    found = result["gradients"]
    cost = found["costs"]["GradientSpectrum, vmap"]["minimum"]["report"]
    step = found["plain_step"]["minimum"]
    rows = result["num_samples"]
    return [
        {"every_n_steps": every, "num_samples": samples, "share": cost * samples / rows / (every * step)}
        for every, samples in ((500, 512), (500, 256), (500, 128), (1000, 512), (2000, 512))
    ]


def shares(result: dict[str, Any], statistic: str) -> dict[str, float]:
    """Share of training, by set of callbacks at their default cadence; validation as often as activation reports."""
    step = {part: result[part]["plain_step"][statistic] for part in ("activations", "gradients")}

    def of_validation(name: str) -> float:
        cost = result["validation"]["costs"][name][statistic]["validation"]
        return cost / (ACTIVATION_CADENCE * step["activations"])

    def of_gradients(name: str) -> float:
        return result["gradients"]["costs"][name][statistic]["report"] / (GRADIENT_CADENCE * step["gradients"])

    report = result["activations"]["costs"]["ActivationSpectrum"][statistic]["report"]
    alone = report / (ACTIVATION_CADENCE * step["activations"])
    forecast = result["forecast_seconds"] / (ACTIVATION_CADENCE * step["activations"])
    drift = of_validation("HeadDrift, TailForecaster") + forecast
    beside = of_validation("ActivationSpectrum, validate; HeadDrift, TailForecaster") + forecast
    beside -= of_validation("ActivationSpectrum, validate")
    return {
        "ActivationSpectrum": alone,
        "HeadDrift and TailForecaster, alone": drift,
        "HeadDrift and TailForecaster, beside": beside,
        "GradientSpectrum, hooks": of_gradients("GradientSpectrum, hooks"),
        "GradientSpectrum, vmap": of_gradients("GradientSpectrum, vmap"),
        "all four, hooks": alone + drift + of_gradients("GradientSpectrum, hooks"),
    }


def by_own_clocks(result: dict[str, Any]) -> float:
    """Share of training that HeadDrift and TailForecaster add to an ActivationSpectrum that measures the same."""
    costs = result["validation"]["costs"]
    both = costs["ActivationSpectrum, validate; HeadDrift, TailForecaster"]["own"]
    added = both - costs["ActivationSpectrum, validate"]["own"] + result["forecast_seconds"]
    return added / (ACTIVATION_CADENCE * result["activations"]["plain_step"]["minimum"])


def targets(result: dict[str, Any]) -> list[Target]:
    share, median = shares(result, "minimum"), shares(result, "median")
    step = result["activations"]["plain_step"]["minimum"]
    floor = result["floors"]["report"] / (ACTIVATION_CADENCE * step)
    every = result["activations"]["costs"]["all layers, every step"]["minimum"]
    product = result["floors"]["product_of_a_step"]
    layers = result["num_layers"]

    def throughput(name: str) -> float:
        return 1 / (1 + share[name])

    def by_median(name: str) -> str:
        return f"{1 / (1 + median[name]):.4f} by medians of pairs"

    at = "throughput at defaults, "
    beside = "HeadDrift and TailForecaster, beside"
    alone = share["HeadDrift and TailForecaster, alone"]
    return [
        Target(
            "1",
            f"{at}ActivationSpectrum",
            throughput("ActivationSpectrum"),
            0.99,
            False,
            f"{1 / (1 + floor):.4f}: bare products and solves",
            by_median("ActivationSpectrum"),
        ),
        Target(
            "1",
            f"{at}all four, hooks",
            throughput("all four, hooks"),
            0.97,
            False,
            note=by_median("all four, hooks"),
        ),
        Target(
            "1",
            "HeadDrift and TailForecaster beside an ActivationSpectrum that measures the same, share of training",
            share[beside],
            0.002,
            True,
            note=f"{by_own_clocks(result):.5f} by the callbacks' own clocks: the difference of validation runs of "
            f"{result['validation']['plain_validation']:.0f} s wavers; {alone:.4f} beside one on training rows",
        ),
        Target(
            "1",
            "GradientSpectrum by vmap, 512 samples every 500 steps, share of training",
            share["GradientSpectrum, vmap"],
            0.1,
            True,
            note="halves with half the samples, or with twice the steps",
        ),
        Target(
            "2",
            "a step that collects all layers, over one that does not",
            1 + every["collecting"] / step,
            1.1,
            True,
            f"{1 + layers * product / step:.3f}: bare products",
            f"the report of {layers} layers, apart, {every['reporting'] - every['collecting']:.2f} s",
        ),
    ]


if __name__ == "__main__":
    main(sys.modules[__name__])
