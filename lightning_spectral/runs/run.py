"""A run read back: its history, its spectra, and where it reached a loss."""

from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from lightning_spectral.functional.estimate import Spectrum
from lightning_spectral.runs.arguments import check_path
from lightning_spectral.runs.course import BASES, Course
from lightning_spectral.runs.history import History
from lightning_spectral.runs.logs import Columns
from lightning_spectral.runs.run_spectra import RunSpectra
from lightning_spectral.runs.source import open_source


class Matched(NamedTuple):
    """A run where its loss first came down to a value; NaN where it never did."""

    run: "Run"
    loss: float
    step: float
    tokens: float
    seconds: float

    def spectrum(self, kind: str, name: str) -> Spectrum:
        """A spectrum there, see :meth:`Run.spectrum_at`.

        Args:
            kind: ``"activation"``, ``"gradient"``, ``"weight"``, or one series, such as ``"activation-train"``.
            name: Layer or parameter.

        Returns:
            Interpolated between the reports on both sides; NaN, with the reason, where there are none.

        Raises:
            ValueError: If the run has no spectrum of that kind and name.
        """
        return self.run.spectrum_at(kind, name, self.tokens)

    def spectra(self, kind: str) -> dict[str, Spectrum]:
        """All spectra of a kind there, without eigenvectors; see :meth:`Run.spectra_at`.

        Args:
            kind: As for :meth:`spectrum`.

        Returns:
            By layer or parameter.
        """
        return self.run.spectra_at(kind, self.tokens, without=BASES)


class Run(RunSpectra):
    """What one training run left behind: the record of our callbacks, or the log of another tool.

    Without a record the log directory is read as a run without spectra: a CSVLogger's ``metrics.csv``, TensorBoard's
    event files, a run's folder of MLflow's file store; or a file, an exported history of W&B (CSV or JSON with
    ``_step``) or of MLflow (``run.json``). Which of its columns is what is found by rules, stands in :attr:`columns`,
    and can be said.

    Args:
        path: The run's log directory, the ``spectra`` folder in it, or a file of another tool.
        loss: Of a log, the column of the loss; None for the first of ``val_loss``, ``val/loss``, ``eval_loss``,
            ``train_loss``, ``train/loss``, ``loss`` and the like.
        step: The column of optimizer steps that were done; None for ``step``, of W&B ``trainer/global_step`` or else
            ``_step``. Lightning's, which count from 0, are raised by one; one that is named is not.
        tokens: The column of training tokens so far; None for ``tokens``, ``tokens_seen``, ``total_tokens``.
        seconds: The column of training time; None for the clock of the log (``_runtime``, times of events), which
            counts validation too.
        batch_tokens: Tokens of a step, where there is no column of them: a number, or a product of numbers and
            hyperparameters, such as ``"batch_size*256"``; None for the hyperparameter ``batch_tokens``.
        family: Name of the family.

    Raises:
        ValueError: If there is no record and no log, or it is broken; if the rules find no step or no loss in a log;
            if anything is said of a run with a record.

    Example::

        run = Run("lightning_logs/version_0")
        run.tokens_to(2.0)
        run.spectrum("activation", "gpt.blocks.3", step=600).exponent((0.125, 0.5))
        Run("csv_logs/version_3", loss="val/nll", batch_tokens="batch_size*1024").tokens_to(2.0)
    """

    def __init__(
        self,
        path: str | Path,
        loss: str | None = None,
        step: str | None = None,
        tokens: str | None = None,
        seconds: str | None = None,
        batch_tokens: float | str | None = None,
        family: str | None = None,
    ) -> None:
        check_path("path", path)
        super().__init__(open_source(Path(path), Columns(loss, step, tokens, seconds, batch_tokens, family)))
        self.folder = self._source.folder
        """The record's own folder, or the log."""
        self.path = self._source.path
        """The log directory, or the file."""
        self.about = self._source.about
        """The description of the run: family, tags, series, batch, world size, versions."""
        self.columns = dict(self._source.columns)
        """Of a log its ``tool``, and what was taken for ``loss``, ``step``, ``tokens``, ``seconds``; else empty."""

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def id(self) -> str:
        """What tells it from other runs; a run that was resumed into another directory has one in both."""
        return str(self.about.get("id") or self.folder.resolve())

    @property
    def family(self) -> str:
        """Name that runs of one model and configuration share."""
        return str(self.about.get("family") or "")

    @property
    def tags(self) -> dict[str, Any]:
        """What the user said of the run."""
        return dict(self.about.get("tags") or {})

    @property
    def advice(self) -> list[dict[str, str]]:
        """What was said at the end of the run of what moved beyond its floors: ``text``, and ``url`` of a page on it.

        Empty where nothing did, and where the run has not come to its end.
        """
        return [{"text": one["text"], "url": one["url"]} for one in self.about.get("advice") or ()]

    @cached_property
    def history(self) -> History:
        """Steps, tokens, seconds and losses; one entry per step, ascending."""
        return self._source.history()

    @cached_property
    def forecasts(self) -> list[dict[str, Any]]:
        """What forecasters said as the run went on: step, tokens, ``prefix`` and values; None for what is not known."""
        return self._source.forecasts()

    def course(self, kind: str) -> Course:
        """Numbers of a kind's spectra at any number of tokens, for many of them; see :class:`Course`."""
        series = self.series(kind)
        return self._courses.setdefault(f"{kind} of {series}", Course(self, kind))

    def tokens_to(self, loss: float) -> float:
        """Training tokens until the loss first came down to a value.

        Args:
            loss: The value, of the validation loss, or of the training loss in a run without validation.

        Returns:
            Interpolated between two entries of the history, log tokens against loss; NaN if it never came down to it,
            or was below it from the first entry on.

        Raises:
            ValueError: For what is no number.
        """
        return self.at_loss(loss).tokens

    def at_loss(self, loss: float) -> Matched:
        """The run where its loss first came down to a value.

        Args:
            loss: The value, as for :meth:`tokens_to`.

        Returns:
            Step, tokens and seconds, interpolated, and spectra on demand; NaN where :meth:`tokens_to` is.

        Raises:
            ValueError: For what is no number.
        """
        point = self.history.first_at(loss)
        return Matched(self, float(loss), *point)
