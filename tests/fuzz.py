"""Hostile arguments, records, commands and logs from a fixed seed: `python -m tests.fuzz` tries twenty thousand.

Every case must work or be refused: a ValueError, or exit status 2, with exactly one line that names the argument or the
file. Any other error, a case that takes long, one that takes much memory, and a number that cannot be are faults.
`python -m tests.fuzz --only records:17` tries one case again, with its traceback.
"""

import argparse
import contextlib
import io
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tests import fuzz_arguments, fuzz_logs, fuzz_records
from tests.fuzz_case import Case

SECONDS = 30
MEGABYTES = 512
KINDS: Mapping[str, Callable[[random.Random, Path], Case]] = {
    "arguments": fuzz_arguments.draw,
    "records": fuzz_records.draw_record,
    "commands": fuzz_records.draw_command,
    "logs": fuzz_logs.draw_log,
}
SHARES = {"arguments": 0.65, "records": 0.2, "commands": 0.1, "logs": 0.05}


class Outcome(NamedTuple):
    """What a case came to: works, refused or fault, and for a fault what is wrong."""

    kind: str
    what: str = ""


class _TooLongError(BaseException):
    pass


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Raise in what takes longer than a case may."""

    def stop(*_: Any) -> None:
        raise _TooLongError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def judge(case: Case) -> Outcome:
    """Run a case and say what it came to."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out, err = io.StringIO(), io.StringIO()
    try:
        with (
            limited(),
            warnings.catch_warnings(),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            warnings.simplefilter("ignore")
            found = case.run()
            case.check(found)
        outcome = Outcome("works")
    except SystemExit as stopped:
        refusal = err.getvalue()
        if stopped.code in (0, None):
            outcome = Outcome("works")
        elif stopped.code == 2 and refusal.startswith("lightning-spectral: error: "):
            outcome = _of_message(refusal.removesuffix("\n"), case.names)
        else:
            outcome = Outcome("fault", f"exit {stopped.code} with {refusal!r}")
    except ValueError as error:
        outcome = _of_message(str(error), case.names)
    except _TooLongError:
        outcome = Outcome("fault", f"takes more than {SECONDS} s")
    except Exception as error:
        outcome = Outcome("fault", f"{type(error).__name__}: {error}")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    return Outcome("fault", f"takes {grown:.0f} MB") if grown > MEGABYTES else outcome


def _of_message(message: str, names: tuple[str, ...]) -> Outcome:
    if not message or len(message.splitlines()) != 1:
        return Outcome("fault", f"is refused in other than one line: {message!r}")
    if not any(name in message for name in names):
        return Outcome("fault", f"is refused without a name: {message!r}")
    return Outcome("refused")


def draw(kind: str, number: int, seed: int, folder: Path) -> Case:
    """The case of that number: a function of it, of the kind and of the seed alone."""
    return KINDS[kind](random.Random(f"{seed}/{kind}/{number}"), folder)


def try_cases(
    kind: str, numbers: range, folder: Path, seed: int = 0, show: Callable[[], Any] = lambda: None
) -> tuple[Counter[str], list[str]]:
    """Outcomes of some cases by their kind, and the faults in words."""
    counts: Counter[str] = Counter()
    faults = []
    for number in numbers:
        case = draw(kind, number, seed, folder)
        outcome = judge(case)
        counts[outcome.kind] += 1
        if outcome.kind == "fault":
            faults.append(f"{kind}:{number} {case.what} {outcome.what}")
        show()
    return counts, faults


def main() -> int:
    """Try many cases with progress; print a table of what they came to, and all faults."""
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=list(KINDS), help="one kind alone, with all cases")
    parser.add_argument("--only", metavar="KIND:NUMBER", help="one case, with its traceback")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fuzz"))
    fuzz_records.make_base(folder)
    fuzz_logs.make_logs(folder)
    try:
        if options.only:
            kind, _, number = options.only.partition(":")
            case = draw(kind, int(number), options.seed, folder)
            print(case.what, judge(case))
            case = draw(kind, int(number), options.seed, folder)
            try:
                print(case.run())
            except BaseException:
                traceback.print_exc()
            return 0
        out = Console(markup=False)
        table = Table(title=f"{options.cases:,} hostile cases, seed {options.seed}")
        for heading in ("kind", "works", "refused", "faults"):
            table.add_column(heading)
        all_faults = []
        for kind in [options.kind] if options.kind else KINDS:
            num = options.cases if options.kind else round(options.cases * SHARES[kind])
            progress = iter(track(range(num), description=kind, console=Console(stderr=True)))
            counts, faults = try_cases(kind, range(num), folder, options.seed, partial(next, progress, None))
            table.add_row(kind, *(f"{counts[outcome]:,}" for outcome in ("works", "refused", "fault")))
            all_faults += faults
        for fault in all_faults:
            out.print(fault, highlight=False, soft_wrap=True)
        out.print(table)
        return 1 if all_faults else 0
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
