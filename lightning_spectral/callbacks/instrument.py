"""What every instrument does with the reports of its measurement: claim keys, log, draw, warn, keep state."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar, cast

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from typing_extensions import override

from lightning_spectral.boards import Board, boards_of
from lightning_spectral.callbacks.display import Display
from lightning_spectral.callbacks.host import Host
from lightning_spectral.callbacks.overview import FAILED, GROUP, overview_charts
from lightning_spectral.callbacks.participant import Participant
from lightning_spectral.functional.arguments import describe
from lightning_spectral.functional.estimate import Exponent, Spectrum
from lightning_spectral.measurement import Report, Request, Session
from lightning_spectral.recording import RunRecorder
from lightning_spectral.runs.kinds import KINDS
from lightning_spectral.warner import Warner

SECONDS = "spectral/seconds"
"""Key of the time that measuring has cost so far; one for all callbacks of a Trainer with the same prefix."""


ReportT = TypeVar("ReportT", bound=Report)


class Instrument(Participant, Generic[ReportT]):
    """Takes the reports of a measurement and logs what they are worth; a failure never stops the training run.

    A subclass says what it writes (``kind``, :meth:`keys`), what is to be watched for it (:meth:`watch`) and what a
    report comes to (:meth:`measured`); it may show spectra (``display``, :meth:`fits`), and keep a summary over a
    resume (:meth:`summary`, :meth:`restore`).

    Args:
        request: What is measured, and when.
        prefix: Put before every key.

    Raises:
        ValueError: If the prefix is not a string.
    """

    kind: str
    """First part of the keys: a row of the table of kinds."""
    display: Display | None = None
    """How reports are shown; None for a callback that only logs."""
    headlines: tuple[str, ...] = ()
    """What it says in the overview that stands first on a board, see :meth:`headline`."""

    def __init__(self, request: Request, prefix: str) -> None:
        super().__init__()
        if not isinstance(prefix, str):
            raise ValueError(f"prefix must be a string, got {describe(prefix)}: '' puts nothing before the keys")
        self.prefix = prefix
        self.stage = request.stage
        self.num_failed = 0
        """Measurements that came to nothing so far; logged as ``{kind}/failed``."""
        self.names: list[str] = []
        """Layers or parameters of the run under way."""
        self._request = request
        self._warner = Warner(type(self).__name__)
        self._seen: ReportT | None = None
        self._writes_seconds = self._writes_failed = False
        self._has_average = False
        self._restored: dict[str, Any] | None = None
        self._kept: dict[str, Any] | None = None

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_seen": None}

    def keys(self) -> list[str]:
        """The keys this callback writes, without the prefix; known once it has joined."""
        raise NotImplementedError

    def watch(self, module: nn.Module) -> list[str]:
        """Tell the measurement what to watch; returns names of layers or parameters, raises ValueError for none."""
        raise NotImplementedError

    def measured(self, report: ReportT) -> dict[str, float]:
        """What a report comes to, by key without the prefix; it may hold more than was asked for here."""
        raise NotImplementedError

    def headline(self) -> dict[str, float]:
        """What the report that was measured just now comes to over all layers, by name, for the overview."""
        return {}

    @property
    def last_rows(self) -> list[dict[str, float]]:
        """What the ``display`` was told of each name at the latest report."""
        reports = None if self.display is None else self.display.reports
        return [] if reports is None else list(reports[1]["rows"].values())

    def follow(self, module: nn.Module) -> None:
        """Take up, before a report, what the measurement has come to know of a module that has changed."""

    def check_early(self) -> None:
        """Refuse settings that do not fit the model, after each batch, for what only shows then."""

    def fits(self, report: ReportT) -> Mapping[str, tuple[Spectrum, Exponent]]:
        """The spectra to show with the fit that is drawn, by name."""
        return {}

    def title(self, report: ReportT | None = None) -> str:
        """Heading of one report, or of all; for a callback with a ``display``."""
        raise NotImplementedError

    @property
    def source(self) -> str:
        """Where rows come from, for a heading: the stage, and whose weights it reads where there are two sets."""
        return f"{self.stage} ({self._weights_read} weights)" if self._has_average else self.stage

    @property
    def _weights_read(self) -> str:
        return "averaged" if self._has_average and self.stage == "validate" else "trained"

    @override
    def settings(self) -> dict[str, Any]:
        return self._request.settings() | {"weights_read": self._weights_read}

    def spectra(self, report: ReportT) -> dict[str, Spectrum]:
        """This callback's own spectra in a report, by name."""
        found = report.spectra[KINDS[self.kind].series]
        return {name: found[name] for name in self.names}

    def failures(self, report: ReportT) -> Iterator[tuple[str, Spectrum]]:
        """What could not be measured, by what it is called in a warning."""
        return ((name, spectrum) for name, spectrum in self.spectra(report).items() if spectrum.failure is not None)

    def draw(self, boards: list[Board], report: ReportT) -> None:
        """Histograms at every report, the figure at the 1st, 2nd, 4th, 8th, ... and the last, the chart once."""
        if self.display is not None:
            self.display.draw(boards, self.prefix, report.step, self.fits(report))
            if self.display.is_milestone:
                self.draw_figure(boards, report)

    def draw_figure(self, boards: list[Board], report: ReportT) -> None:
        """The figure, and the spectra as a table, where there is a ``display`` of spectra."""
        if self.display is not None:
            self.display.draw_figure(boards, self.prefix, report.step, self.title(report), self.fits(report))

    def print_tables(self) -> None:
        """Print what closes a run; on the rank that prints."""
        if self.display is not None:
            self.display.print(f"{self.prefix}{self.title()}")

    def summary(self) -> dict[str, Any]:
        """What to find again after a resume: plain numbers, strings, lists, dictionaries and tensors."""
        return {} if self.display is None else self.display.state()

    def restore(self, summary: dict[str, Any]) -> None:
        """Take up what :meth:`summary` gave, or begin anew with an empty one."""
        if self.display is not None:
            self.display.restore(summary)

    @override
    def join(self, host: Host) -> Session[RunRecorder]:
        session = super().join(host)
        self.measurement = session.share(self, self._request, host.scene())
        self.names = self.watch(host.module)
        session.claim((self.prefix + key for key in self.own_keys), self)
        self._writes_seconds = session.claim_shared(self.prefix + SECONDS, self)
        self._writes_failed = session.claim_shared(self.prefix + FAILED, self)
        self._take_up()
        self._has_average = host.lends_averages
        self.set_unknown(host)
        shows = not host.is_global_zero or boards_of(host.loggers) or not host.loggers
        if not shows and session.is_first("a warning of missing histograms"):
            rank_zero_warn(
                "lightning-spectral draws histograms and figures into TensorBoard, W&B, MLflow and Comet only, and no "
                "logger is one: add a TensorBoardLogger to see them. Scalars go to every logger."
            )
        return session

    def join_names(self, names: list[str]) -> list[str]:
        """Take in layers or parameters that are there only now; returns those whose keys nobody else writes."""
        joined = []
        for name in names:
            known, self.names = self.names, [*self.names, name]
            try:
                if self.session is not None:
                    self.session.claim((self.prefix + key for key in self.keys()), self)
                joined.append(name)
            except ValueError as error:  # at the start it would have been refused
                self.names = known
                self.warn(f"goes without {name}, which is new to the model: {error}")
        return joined

    @override
    def leave(self) -> None:
        if self.session is not None:
            self._kept = self._state(self.session)
        super().leave()
        self._seen = self._restored = None

    def set_unknown(self, host: Host) -> None:
        """Set all keys to NaN: EarlyStopping and ModelCheckpoint refuse a key that is not there."""
        self._set_metrics(host, dict.fromkeys(self.all_keys, math.nan))

    @property
    def own_keys(self) -> list[str]:
        """The keys that nobody else may write, without the prefix."""
        return [*self.keys(), *(f"{GROUP}/{name}" for name in self.headlines)]

    @property
    def all_keys(self) -> list[str]:
        """With those that it writes for all who have its prefix."""
        shared = {SECONDS: self._writes_seconds, FAILED: self._writes_failed}
        return [*self.own_keys, *(key for key, is_mine in shared.items() if is_mine)]

    def publish(self, host: Host, values: dict[str, float], step: int) -> None:
        """Send values, by key without the prefix, to every logger and to the metrics that others monitor."""
        if self._writes_seconds and self.session is not None:
            values = {**values, SECONDS: self.session.stopwatch.seconds}
        sent = {self.prefix + key: value for key, value in self.for_loggers(values).items()}
        for logger in host.loggers if sent else ():
            logger.log_metrics(dict(sent), step=step)
        self._set_metrics(host, values)

    def for_loggers(self, values: dict[str, float]) -> dict[str, float]:
        """What of values, by key without the prefix, loggers are sent; the metrics hold all."""
        return values

    def _set_metrics(self, host: Host, values: dict[str, float]) -> None:
        # Not through self.log: the numbers are the same on all ranks already, and self.log would reduce each again.
        tensors = {self.prefix + key: torch.tensor(value, dtype=torch.float64) for key, value in values.items()}
        host.metrics.update(tensors)

    def warn(self, message: str, on_this_rank: bool = False) -> None:
        """Warn once per cause, see :class:`Warner`."""
        self._warner.warn(message, on_this_rank)

    def begin(self) -> None:
        """Forget an earlier run of this object, perhaps of another model, unless it goes on from a state."""
        if self._restored is None:
            self.num_failed, self._kept = 0, None
            self._warner.clear()
            self.restore({})

    @override
    def start_training(self, host: Host) -> None:
        self.set_unknown(host)  # a sanity check clears what was there

    def check_loader(self, num_loaders: int) -> None:
        """Refuse, by a ValueError, to read a validation loader that is not there."""
        index = self._request.dataloader_idx
        if index >= num_loaders:
            raise ValueError(
                f"dataloader_idx must be below {num_loaders}, the number of validation loaders, got {index}"
            )

    @override
    def close(self, host: Host) -> None:
        is_new = self._restored is None and host.is_fitting and host.step > 0
        if is_new and self.stage == "validate" and self._seen is None and host.has_validation:
            self.warn(
                f"made no report, for no validation run that was due has ended, with every_n_steps="
                f"{self._request.every_n_steps}: validate more often (val_check_interval), or use stage='train'"
            )
        if self.display is not None and (report := self._seen) is not None and not self.display.is_milestone:
            self._show(host, report, is_last=True)
        try:
            self.print_tables()
        except Exception as error:  # a terminal that cannot print is not a reason to fail a finished run
            self.warn(f"could not print its table: {error!r}")

    @override
    def take_report(self, host: Host) -> None:
        self.check_early()
        if self.measurement is None or self.session is None or self.measurement.report is self._seen:
            return
        report = self._seen = cast(ReportT, self.measurement.report)
        self.follow(host.module)
        with self.session.stopwatch.running():
            values = self._values(report)
            self._show(host, report)
        self.publish(host, values, report.step)

    def _show(self, host: Host, report: ReportT, is_last: bool = False) -> None:
        if not host.is_global_zero:
            return
        try:
            if boards := boards_of(host.loggers):
                charts = overview_charts(self.prefix, (key for one in self._beside for key in one.all_keys))
                for board in boards:
                    board.charts("overview", charts)  # before all others, and so above them
                (self.draw_figure if is_last else self.draw)(boards, report)
        except Exception as error:  # a full disk is not a reason to stop training
            self.warn(f"could not draw into {', '.join(type(board).__name__ for board in boards)}: {error!r}")

    def _values(self, report: ReportT) -> dict[str, float]:
        """The values of all keys; NaN for what failed, whatever the cause."""
        num_before = self.num_failed
        for name, spectrum in self.failures(report):
            self.num_failed += 1
            self.warn(f"at step {report.step}, {name}: NaN, because {spectrum.failure}", spectrum.failed_here)
        values = dict.fromkeys(self.own_keys, math.nan)
        try:
            values |= self.measured(report)
            values |= {f"{GROUP}/{name}": value for name, value in self.headline().items()}
        except Exception as error:  # whatever it is, the training run is worth more than the measurement
            self.num_failed += 1
            self.warn(f"at step {report.step}: NaN, because {error!r}")
        values[f"{self.kind}/failed"] = float(self.num_failed)
        if self._writes_failed or self.num_failed > num_before:
            values[FAILED] = float(sum(one.num_failed for one in self._beside))
        return values

    @property
    def _beside(self) -> "list[Instrument[Any]]":
        """All who write under this prefix."""
        return [one for one in self.companions if isinstance(one, Instrument) and one.prefix == self.prefix]

    def state(self) -> dict[str, Any] | None:
        """What :meth:`load_state_dict` takes; of the latest run, and None before any."""
        return self._kept if self.session is None else self._state(self.session)

    def _state(self, session: Session[RunRecorder]) -> dict[str, Any]:
        return {
            "measurement": {} if self.measurement is None else self.measurement.state_dict(),
            "seconds": session.stopwatch.seconds,
            "num_failed": self.num_failed,
            "summary": self.summary(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what :meth:`state` gave; before training."""
        self._restored = state_dict
        self.num_failed = state_dict["num_failed"]
        self.restore(state_dict["summary"])
        self._take_up()

    def _take_up(self) -> None:
        if self._restored is None or self.session is None or self.measurement is None:
            return
        # Whoever has a state gives it: others of the measurement, or of the session, may be new to this run.
        self.measurement.load_state_dict(self._restored["measurement"])
        # Before any clock runs that leaves this time out.
        stopwatch = self.session.stopwatch
        stopwatch.seconds = max(stopwatch.seconds, self._restored["seconds"])
