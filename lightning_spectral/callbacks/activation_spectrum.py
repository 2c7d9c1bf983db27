"""The callback that watches the eigenvalues of layers' activation covariance."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import isfinite, nan
from typing import Any, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_spectral.advice import Fact, Moved, Number, are_as_many
from lightning_spectral.boards import Board
from lightning_spectral.callbacks.bands import DEFAULT_HEAD, Bands
from lightning_spectral.callbacks.display import Display
from lightning_spectral.callbacks.host import Host
from lightning_spectral.callbacks.layers_callback import LayersCallback
from lightning_spectral.callbacks.overview import mean_of_all
from lightning_spectral.callbacks.rankme_alarm import ALARM, RankMeAlarm
from lightning_spectral.callbacks.readout import ReadoutMember
from lightning_spectral.capture.batch import load_cutter
from lightning_spectral.functional.estimate import Exponent, Spectrum
from lightning_spectral.functional.powerlaw import Band
from lightning_spectral.functional.spectrum import head_share
from lightning_spectral.measurement import ActivationRequest, Report, Session
from lightning_spectral.measurement.readout import ReadoutRequest
from lightning_spectral.recording import RunRecorder
from lightning_spectral.terminal import number, with_error


class ActivationSpectrum(LayersCallback):
    """Logs the spectrum of the activation covariance of chosen layers while a model trains.

    No extra forward pass: the training (or validation) pass itself is read, by forward hooks that change nothing. Each
    report logs, per layer, the power-law exponents of the eigenvalues' head and tail with jackknife errors, RankMe, the
    share of the head and the number of rows; TensorBoard also gets histograms of log10 eigenvalues, a log-log figure
    and a chart with all layers. ``fit`` ends with a table of the first report and the last.

    Values lie under ``activation/{layer}/``: ``alpha_tail``, ``alpha_tail_stderr``, ``alpha_tail_corrected`` (bias of
    few rows removed), ``r2_tail``, ``alpha_head``, ``alpha_head_stderr``, ``rankme``, ``head_share``, ``num_tokens``;
    with ``activation/failed`` (layer spectra that could not be had so far, logged as NaN) and ``spectral/seconds``.
    They can be monitored by ModelCheckpoint and EarlyStopping (with ``check_finite=False``, since they are NaN until
    the first report).

    With ``WeightAveraging`` a validation pass runs on the averaged weights, and ``stage="validate"`` measures those;
    ``stage="train"`` measures the weights that are trained. Layers are looked up again for each report: one that was
    replaced is followed, new ones that the patterns match join, and one that is gone is NaN. Each layer is read in the
    last steps before a report that hold ``num_tokens`` of its own rows.

    Args:
        layers: Glob patterns over module names, ``"all"`` for each block of the stack of equal blocks, None for five
            blocks spread evenly over it.
        every_n_steps: Optimizer steps between reports; between measured validation runs at the least.
        stage: ``"train"`` reads the last training batches before a report, ``"validate"`` rows spread over
            a validation run, the first where its length is not known (``docs/error-bars.md``). Runs are compared on
            validation rows, which do not change.
        num_tokens: Rows per report over all ranks, after the mask. The exponent of the tail depends on rows per
            channel: compare runs at equal numbers. The default is 16 rows a channel at width 4,096: in all blocks of a
            small trained GPT, 16 bring the corrected exponent to within 0.011 of its truth on average and spread it by
            0.045; 64, as at width 1,024, to 0.005 and 0.03, with the uncorrected one 0.02 too high
            (``benchmarks/findings``, study 1).
        head: Band of the head exponent and of ``head_share``: two ints, 1-based inclusive ranks, or two fractions of
            the width. Ranks 1 to 10 as in *Spectral Lens*.
        tail: Band of the tail exponent, likewise. An eighth to a half of the width holds the bands of *Spectral Lens*
            at widths 768 to 1600; (30, 150) is that of its released scripts.
        num_groups: Groups of whole samples, neighbours together, for the delete-a-group jackknife; 1 for no error bars.
            Each, and one more, takes about 4 d^2 bytes for a layer of width d until the report: four of five layers 69
            MB at width 768, 276 MB at 1,600 (``docs/memory.md``). Errors are those of other rows of the same
            population, not of other data or seeds (``docs/error-bars.md``).
        normalize: Apply a parameter-free RMSNorm to each row first, as in *Spectral Lens*.
        dtype: Type of the products; sums are in float64, and solves but some for error bars (``docs/error-bars.md``).
            ``"float32"`` is good to 1e-5 for eigenvalues above 1e-3 of the largest and resolves none below 1e-7 of it,
            ``"float64"`` is good to 1e-5 above 1e-6, at about twice the cost of the products, and all its solves are in
            float64. A band of which some ranks lie below is NaN, with a warning. ``"auto"``
            measures in float32, and in float64, from the next report on, the layers of which a report has shown that
            float32 does not resolve head or tail; one warning says so. The record has the type of each spectrum.
        mask: Key of the batch, with dots where it is nested: a mask with 1 for real tokens, labels with negative
            numbers for those that do not count, or an additive mask (:class:`lightning_spectral.capture.masks.Mask`).
            It is of one tower; where it is of encoder and decoder, say, ``layers`` has a pattern for each.
        prefix: Put before every key, to tell two of these callbacks apart.
        dataloader_idx: Which validation loader to read.
        channel_dim: Axis of the channels in the layers' outputs. None finds it: the axis on which the layer's own last
            module with weights works, 1 for convolutions and their norms, the last for linear layers and theirs.
        batch_dim: Axis of the samples in the tensors of a batch, and where as long in outputs; None for 0.
        samples: ``samples(batch) -> list of batches of one``, or its import path, for batches without such an axis.
        readout: Name of the linear layer that makes the logits, ``"lm_head"`` say, for ``activation/{readout}/``:
            ``task_power``, how much of the loss that layer alone could still take away, summed over the modes of its
            input, and ``task_head_share``, the share of it in the modes of the head
            (:func:`lightning_spectral.theory.task_power`), with a curve in the figure and the power of each mode in the
            record (:meth:`lightning_spectral.Run.readout`). Read in training's own passes, ``stage="train"``, of the
            rows as the layer takes them, in all of the window's steps. Loss: a mean cross-entropy with a label a row,
            which is checked. Takes 8 d (d + classes) bytes, and 8 bytes more a class while a batch is read.
        sums_device: Where the sums of a report are kept from the first rows to it: on the model's ``"device"``, the
            ``"cpu"``, or by ``"auto"`` on the device if those of all layers take at most a quarter of its free memory,
            else on the CPU. Numbers are the same. Where several callbacks share a measurement, the first says it.
        overlap: Solve for eigenvalues in a thread while training goes on; only with ``stage="train"``. A report is then
            published with the step that it is of as soon as all ranks have solved their share, and before the next one,
            a validation run, a checkpoint or the end of training at the latest; its sums are kept until then beside
            those of the next. ``"auto"`` does so on a GPU, True on a CPU as well, where the thread needs a core that
            training leaves to it. What monitors the reports of training step by step needs False; with ``readout`` it
            is False.
        alarm_rankme_below: Share of the width below which, by more than its error, a layer's RankMe is an alarm: a
            warning, once for each layer, and ``activation/alarm``, the number of layers in alarm now, which is there to
            be monitored where an alarm is asked for. None for none: no share is right for all models, so look at
            RankMe of a run that went well first.
        alarm_rankme_fall: Share of what it was by which, and by more than its floor, a fall of RankMe within
            ``alarm_reports`` reports is an alarm, likewise; needs ``num_groups`` of two or more.
        alarm_reports: Reports that a fall may take.

    Raises:
        ValueError: For arguments out of range; at the start of ``fit`` for patterns that match nothing, a mask for
            several towers and keys that two callbacks would write; in the first batch for bands beyond the width, masks
            that can mean anything and layers whose channels may be on two axes.

    References:
        Liu, Paquette, Sous, *Spectral Lens: Activation and Gradient Spectra as Diagnostics of LLM Optimization*,
        arXiv 2605.05683 (2026).

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[ActivationSpectrum(every_n_steps=50)], logger=False)
    """

    kind = "activation"
    quantities = (
        "alpha_tail",
        "alpha_tail_stderr",
        "alpha_tail_corrected",
        "r2_tail",
        "alpha_head",
        "alpha_head_stderr",
        "rankme",
        "head_share",
        "num_tokens",
    )
    headlines = ("tail_exponent", "rankme_share")

    def __init__(
        self,
        layers: str | Sequence[str] | None = None,
        every_n_steps: int = 100,
        stage: Literal["train", "validate"] = "train",
        num_tokens: int = 65536,
        head: tuple[int, int] | tuple[float, float] = DEFAULT_HEAD,
        tail: tuple[int, int] | tuple[float, float] = (0.125, 0.5),
        num_groups: int = 4,
        normalize: bool = True,
        dtype: Literal["auto", "float32", "float64"] = "auto",
        mask: str | None = None,
        prefix: str = "",
        dataloader_idx: int = 0,
        channel_dim: int | None = None,
        batch_dim: int | None = None,
        samples: str | Callable[[Any], Sequence[Any]] | None = None,
        readout: str | None = None,
        sums_device: Literal["auto", "device", "cpu"] = "auto",
        overlap: bool | Literal["auto"] = "auto",
        alarm_rankme_below: float | None = None,
        alarm_rankme_fall: float | None = None,
        alarm_reports: int = 5,
    ) -> None:
        if readout is not None and overlap is True:
            raise ValueError(
                "overlap must be False or 'auto' with readout=, got True: what is known of heads comes with the report"
            )
        request = ActivationRequest(
            stage=stage,
            every_n_steps=every_n_steps,
            num_tokens=num_tokens,
            num_groups=num_groups,
            normalize=normalize,
            dtype=dtype,
            mask=mask,
            dataloader_idx=dataloader_idx,
            channel_dim=channel_dim,
            batch_dim=batch_dim,
            samples=load_cutter(samples),
            sums_device=sums_device,
            overlap=overlap if readout is None else False,
        )
        super().__init__(layers, request, prefix)
        self.bands = Bands.of(head, tail)
        self._alarm = RankMeAlarm(alarm_rankme_below, alarm_rankme_fall, alarm_reports)
        if alarm_rankme_fall is not None and num_groups < 2:
            raise ValueError(
                f"alarm_rankme_fall needs error bars, got num_groups={num_groups}: give 2 groups or more, 4 are usual"
            )
        self._readout: ReadoutMember | None = None
        if readout is not None:
            self._readout = ReadoutMember(
                ReadoutRequest(
                    stage=stage,
                    every_n_steps=every_n_steps,
                    num_groups=num_groups,
                    num_tokens=num_tokens,
                    readout=readout,
                    is_wide=dtype == "float64",
                )
            )
        self.display = Display(
            self.kind,
            charts={
                name: [name] for name in ("alpha_tail", "alpha_tail_corrected", "alpha_head", "rankme", "head_share")
            },
            columns={
                "alpha_tail": with_error("alpha_tail", 3),
                "corrected": number("alpha_tail_corrected", 3),
                "r2": number("r2_tail", 3),
                "alpha_head": number("alpha_head", 3),
                "RankMe": number("rankme", 1),
                "rows": number("num_tokens", 0),
            },
            category="activation spectra",
        )

    @override
    def settings(self) -> dict[str, Any]:
        return super().settings() | self.bands.settings()

    @override
    def keys(self) -> list[str]:
        alarm = [ALARM] if self._alarm.is_set else []
        return [*super().keys(), *([] if self._readout is None else self._readout.keys), *alarm]

    @override
    def join(self, host: Host) -> Session[RunRecorder]:
        session = super().join(host)
        if self._readout is not None:
            self._readout.join(session, host)
        return session

    @override
    def leave(self) -> None:
        super().leave()
        if self._readout is not None:
            self._readout.leave()

    @override
    def summary(self) -> dict[str, Any]:
        readout = {} if self._readout is None else {"readout": dict(self._readout.state())}
        return super().summary() | readout | ({"alarm": self._alarm.state()} if self._alarm.is_set else {})

    @override
    def restore(self, summary: dict[str, Any]) -> None:
        super().restore(summary)
        self._alarm.restore(summary.get("alarm", {}))
        if self._readout is not None:
            self._readout.restore(summary.get("readout", {}))

    @override
    def looks_at(self) -> list[Band]:
        return list(self.bands)

    @override
    def check_widths(self, widths: dict[str, int]) -> None:
        for width in widths.values():
            self.bands.check(width)

    @override
    def measured(self, report: Report) -> dict[str, float]:
        rows = {name: self._describe(spectrum) for name, spectrum in self.spectra(report).items()}
        assert self.display is not None
        self.display.note(report.step, rows)
        beside: dict[str, float] = {}
        if self._readout is not None:
            beside = self._readout.measured(report.step, self.bands.head[1])
        if self._alarm.is_set:
            beside[ALARM] = self._sound_alarm(report)
        return beside | {f"activation/{name}/{key}": row[key] for name, row in rows.items() for key in self.quantities}

    @override
    def headline(self) -> dict[str, float]:
        rows = self.last_rows
        return {
            "tail_exponent": mean_of_all(row["alpha_tail"] for row in rows),
            "rankme_share": mean_of_all(row["rankme"] / row["width"] for row in rows),
        }

    def _sound_alarm(self, report: Report) -> float:
        for message in self._alarm.look(report.step, self.spectra(report)):
            rank_zero_warn(f"{type(self).__name__} {message}")  # each layer's own, which the warner takes for one cause
        return self._alarm.num_layers

    @override
    def failures(self, report: Report) -> Iterator[tuple[str, Spectrum]]:
        yield from super().failures(report)
        if self._readout is not None and (reason := self._readout.failure(report.step)) is not None:
            yield f"readout={self._readout.request.readout!r}", Spectrum.missing(reason, step=report.step)

    @override
    def draw_figure(self, boards: list[Board], report: Report) -> None:
        curve = {} if self._readout is None else self._readout.curve(report.step)
        assert self.display is not None
        self.display.draw_figure(boards, self.prefix, report.step, self.title(report), self.fits(report), curve)

    def _describe(self, spectrum: Spectrum) -> dict[str, float]:
        head, tail = spectrum.exponent(self.bands.head), spectrum.exponent(self.bands.tail)
        rankme = spectrum.rankme()
        for band in self.bands:
            self.warn_of(spectrum, band)
        return {
            "alpha_tail": tail.value,
            "alpha_tail_stderr": tail.stderr,
            "alpha_tail_corrected": tail.corrected,
            "r2_tail": tail.r2,
            "alpha_head": head.value,
            "alpha_head_stderr": head.stderr,
            "rankme": rankme.value,
            "head_share": self._head_share(spectrum),
            "num_tokens": float(spectrum.count),
            # Not logged.
            "rankme_stderr": rankme.stderr,
            "width": float(len(spectrum.values)) or nan,
        }

    def _head_share(self, spectrum: Spectrum) -> float:
        width, hi = len(spectrum.values), self.bands.head[1]
        if spectrum.failure is not None:
            return nan
        return float(head_share(spectrum.values, min(hi, width) if isinstance(hi, int) else max(1, int(hi * width))))

    @override
    def facts(self) -> Iterable[Fact]:
        assert self.display is not None
        if self._alarm.is_set and (alarmed := self._alarm.fact(self.prefix)) is not None:
            yield alarmed
        if self.display.reports is None:
            return
        first, last = self.display.reports
        for quantity, of in (("alpha_tail", "alpha_tail"), ("rankme_share", "rankme")):
            pairs = [
                (_number(before, of), _number(row, of))
                for name, row in last["rows"].items()
                if (before := first["rows"].get(name)) is not None and _are_alike(before, row)
            ]
            known = [pair for pair in pairs if all(isfinite(part) for number in pair for part in number)]
            yield Moved(
                prefix=self.prefix,
                quantity=quantity,  # type: ignore[arg-type]
                first=Number.mean([before for before, _ in known]),
                last=Number.mean([after for _, after in known]),
                num_layers=len(known),
                num_groups=self.request.num_groups,
                steps=(first["step"], last["step"]),
            )

    @override
    def fits(self, report: Report) -> Mapping[str, tuple[Spectrum, Exponent]]:
        spectra = self.spectra(report).items()
        return {name: (one, one.exponent(self.bands.tail)) for name, one in spectra if one.failure is None}

    @override
    def title(self, report: Report | None = None) -> str:
        if report is None:
            return f"activation spectra, {self.source}{self.rows_in_words()}"
        return f"activation covariance, {self.source}, step {report.step}"


def _number(row: Mapping[str, float], quantity: str) -> Number:
    """A quantity of one layer with its error; RankMe as a share of the width."""
    scale = row.get("width", nan) if quantity == "rankme" else 1.0
    return Number(row[quantity] / scale, row.get(f"{quantity}_stderr", nan) / scale)


def _are_alike(first: Mapping[str, float], last: Mapping[str, float]) -> bool:
    """Whether two reports of a layer compare: of as many rows, which move both numbers, and of one width."""
    return are_as_many(first["num_tokens"], last["num_tokens"]) and first.get("width") == last.get("width")
