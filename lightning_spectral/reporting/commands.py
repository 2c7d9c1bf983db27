"""The commands that show runs: a page of what they left behind, and a summary of one under way."""

from collections.abc import Callable, Sequence

from lightning_spectral.functional.arguments import is_finite_number
from lightning_spectral.reporting.live import watch
from lightning_spectral.reporting.page import write_page
from lightning_spectral.runs.options import Parser, add_columns, columns_of
from lightning_spectral.terminal import console


def run_command(words: Sequence[str]) -> None:
    """Run one of the commands, given its name and its arguments.

    ValueError for wrong arguments, missing or broken runs, and files that cannot be written.
    """
    COMMANDS[words[0]](words[1:])


def _report(words: Sequence[str]) -> None:
    parser = Parser(
        "lightning-spectral report",
        description="Write a page of runs to look at: one HTML file that needs no network. Two arguments are the two "
        "sides of a comparison, base and variant, whose verdict stands first.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="log directory of a run, or a quoted pattern of several")
    parser.add_argument(
        "-o", "--output", default="report.html", metavar="FILE.html", help="the file; default: report.html"
    )
    parser.add_argument("--at-loss", type=float, metavar="X", help="of two sides: see lightning-spectral compare")
    parser.add_argument("--floor", metavar="PATH", help="likewise")
    add_columns(parser)
    args = parser.parse_args(words)
    file = write_page(args.runs, args.output, args.at_loss, args.floor, columns_of(args))
    console().print(f"{file}: {file.stat().st_size / 1e6:.2f} MB, open it in a browser", soft_wrap=True)


def _watch(words: Sequence[str]) -> None:
    parser = Parser(
        "lightning-spectral watch",
        description="Follow a run under way in the terminal: the newest one with a record in a folder. Ctrl-C ends it.",
    )
    parser.add_argument("folder", metavar="LOGDIR", help="where runs are logged, or the log directory of one")
    parser.add_argument("--once", action="store_true", help="print one summary, and end")
    parser.add_argument(
        "--every", type=float, default=2.0, metavar="SECONDS", help="between two looks at the record; default: 2"
    )
    args = parser.parse_args(words)
    if not (is_finite_number(args.every) and 0 < args.every <= 86_400):
        raise ValueError(f"every must be a positive number of seconds, got {args.every:g}: 2 is usual")
    watch(args.folder, args.once, args.every)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"report": _report, "watch": _watch}
