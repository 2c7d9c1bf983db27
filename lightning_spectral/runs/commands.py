"""The commands that read runs: show, compare, forecast."""

from argparse import ArgumentParser, ArgumentTypeError, BooleanOptionalAction, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning_spectral.functional.powerlaw import check_band
from lightning_spectral.runs.arguments import check_loss
from lightning_spectral.runs.comparison import compare
from lightning_spectral.runs.finding import open_runs
from lightning_spectral.runs.forecast_tables import print_forecast
from lightning_spectral.runs.forecasting import forecast
from lightning_spectral.runs.options import Parser, add_columns, columns_of
from lightning_spectral.runs.predicting import BY
from lightning_spectral.runs.run import Run
from lightning_spectral.runs.tables import each_series, evolution, print_comparison, print_run
from lightning_spectral.runs.to_json import to_json, to_json_line


def run_command(words: Sequence[str]) -> None:
    """Run one of the commands, given its name and its arguments.

    ValueError for wrong arguments, missing or broken runs, and runs that do not compare.
    """
    COMMANDS[words[0]](words[1:])


def _show(words: Sequence[str]) -> None:
    parser = Parser(
        "lightning-spectral show", description="Show what runs left behind: losses, and how spectra evolved."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="log directory of a run, or a pattern of several")
    parser.add_argument("--kind", help="of spectra: activation, gradient, weight, or one series, as activation-train")
    add_columns(parser)
    _add_outputs(parser)
    args = parser.parse_args(words)
    runs = open_runs(args.runs, columns=columns_of(args))
    if args.plot is not None:
        _plot_evolution(runs, args)
    if args.json:
        print(to_json_line({"runs": [_facts(run, args.kind) for run in runs]}))  # of thousands of reports
        return
    for run in runs:
        print_run(run, _kinds(run, args.kind))


def _kinds(run: Run, kind: str | None) -> list[str]:
    if kind is None:
        return run.kinds
    run.series(kind)  # says what there is if that is not there
    return [kind]


def _facts(run: Run, kind: str | None) -> dict[str, Any]:
    history = {name: column.tolist() for name, column in run.history._asdict().items()}
    spectra = [row for kind in _kinds(run, kind) for _ in each_series(run, kind) for row in evolution(run, kind)]
    known = {"path": str(run.path), "about": run.about, "columns": run.columns, "history": history, "spectra": spectra}
    return known | {"forecasts": run.forecasts}


def _plot_evolution(runs: Sequence[Run], args: Namespace) -> None:
    from lightning_spectral.runs.figures import evolution_figure, save

    for number, run in enumerate(runs):
        (kind, *_) = _kinds(run, args.kind) or _kinds(run, "activation")
        save(evolution_figure(run, kind), _numbered(args.plot, number))


def _compare(words: Sequence[str]) -> None:
    parser = Parser(
        "lightning-spectral compare",
        description="Compare two sides of runs at equal loss: did the variant learn better, or only run faster?",
    )
    parser.add_argument("base", metavar="BASE", help="log directory of a run, or a quoted pattern of several seeds")
    parser.add_argument("variant", metavar="VARIANT", help="likewise")
    parser.add_argument(
        "--at-loss", type=float, metavar="X", help="the loss to match at; default: the lowest all reached"
    )
    parser.add_argument(
        "--floor", metavar="PATH", help="seeds of the base's family, or an earlier comparison's JSON, for the run floor"
    )
    parser.add_argument(
        "--paired",
        action=BooleanOptionalAction,
        help="compare runs of one seed with each other; default: three seeds or more that both sides have",
    )
    add_columns(parser)
    _add_outputs(parser)
    args = parser.parse_args(words)
    base, variant = (open_runs(getattr(args, side), side, columns_of(args)) for side in ("base", "variant"))
    comparison = compare(base, variant, args.at_loss, args.floor, args.paired)
    if args.plot is not None:
        from lightning_spectral.runs.figures import comparison_figure, save

        save(comparison_figure(comparison), args.plot)
    if args.json:
        print(to_json(comparison.as_dict()))
    else:
        print_comparison(comparison)


def _forecast(words: Sequence[str]) -> None:
    parser = Parser(
        "lightning-spectral forecast",
        description="How many tokens will unfinished runs need, by the finished ones of their family? And how well "
        "would those have been forecast?",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="log directory of a run, finished or not, or a pattern of several"
    )
    parser.add_argument("--target", type=float, required=True, metavar="X", help="the loss to come down to")
    parser.add_argument("--by", choices=BY, default="stack", help="what forecasts go by; default: the stack")
    parser.add_argument("--layer", help="whose spectra; the deepest that was measured if none")
    parser.add_argument(
        "--tail",
        type=_number,
        nargs=2,
        metavar=("LO", "HI"),
        help="band of its tail: two ranks, or two fractions of the width",
    )
    parser.add_argument(
        "--at",
        type=float,
        nargs="+",
        metavar="TOKENS",
        help="when to forecast finished runs; default: 10, 25 and 50%% of the fastest",
    )
    add_columns(parser)
    _add_outputs(parser)
    args = parser.parse_args(words)
    tail = None if args.tail is None else tuple(args.tail)
    if tail is not None:
        check_band("tail", tail)
    check_loss("target", args.target)
    runs = open_runs(args.runs, columns=columns_of(args))
    families = forecast(runs, args.target, args.layer, tail, args.at, args.by)
    if args.plot is not None:
        from lightning_spectral.runs.figures import save
        from lightning_spectral.runs.forecast_figures import forecast_figure

        drawn = [family for family in families if family.backtest is not None]
        for number, family in enumerate(drawn):
            save(forecast_figure(family), _numbered(args.plot, number))
    if args.json:
        print(to_json({"families": [family.as_dict() for family in families]}))
        return
    for family in families:
        print_forecast(family)


def _number(text: str) -> int | float:
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        raise ArgumentTypeError(f"must be ranks or fractions, got {text!r}") from None


def _numbered(path: str, number: int) -> Path:
    """A file for each of several figures."""
    file = Path(path)
    return file if number == 0 else file.with_stem(f"{file.stem}-{number + 1}")


def _add_outputs(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--plot", metavar="FILE.png", help="draw a figure")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"show": _show, "compare": _compare, "forecast": _forecast}
