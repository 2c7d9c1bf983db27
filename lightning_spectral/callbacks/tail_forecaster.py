"""The callback that forecasts, from what runs of a family showed early, how many tokens a run will need."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from typing_extensions import override

from lightning_spectral.advice import Awaited, Fact
from lightning_spectral.boards import Board, Margin
from lightning_spectral.callbacks.forecast_table import ForecastTable
from lightning_spectral.callbacks.forecaster import Forecaster
from lightning_spectral.callbacks.host import Host
from lightning_spectral.callbacks.layers_callback import LayersCallback
from lightning_spectral.callbacks.noise_beside import gradients_of, noise_seen
from lightning_spectral.callbacks.watched_loss import WatchedLoss
from lightning_spectral.capture.batch import load_cutter
from lightning_spectral.capture.layers import resolve_layers_again, towers_spanned
from lightning_spectral.functional.arguments import describe, is_finite_number
from lightning_spectral.functional.estimate import Spectrum
from lightning_spectral.functional.forecast import NO_SKILL
from lightning_spectral.functional.powerlaw import Band, check_band, resolve_band
from lightning_spectral.measurement import ActivationRequest, Report
from lightning_spectral.measurement.arguments import check_key
from lightning_spectral.runs.logarithms import log_of
from lightning_spectral.runs.predicting import BY, Seen, Shown
from lightning_spectral.runs.reference_numbers import Look
from lightning_spectral.runs.references import References, Wanted, asked_of


class TailForecaster(LayersCallback):
    r"""Forecasts the training tokens until a loss is reached, and says what the spectra add to it.

    At each report the loss, the batch, and the tail, head and RankMe of the deepest layer are set against those of
    finished runs of the family *at the same number of tokens*, by a stack of simple predictors of ln tokens-to-target
    (:func:`lightning_spectral.functional.stack`) with an 80% prediction interval; so is the gradient noise scale, where
    a GradientSpectrum measures it in this run and did so alike in all references. Nothing later enters it. Two stacks
    are made, by loss and batch alone and with the spectra; which is used is decided by how well either forecasts the
    references from each other.

    In *Spectral Lens* a steeper early tail goes with more tokens. On 40 runs of a small GPT the sign of tail against
    tokens depended on how far the target lay, and on the stage: the exponent rises to a peak at 32 to 128 optimizer
    steps and falls from there on, so that runs of few steps and of many, at equal tokens, lie on both sides of it. By
    itself (``predictor="tail"``) it was no match for loss and batch size (``benchmarks/README.md``).

    The rule is that of ``lightning-spectral forecast``, which says of the run's record at that step the same.

    Values lie under ``forecast/``; loggers are sent those that are known:

    - ``tokens_to_target``, ``low``, ``high``: the forecast and its interval, in tokens. Once the run has come into the
      interval, they are those of what is left of it; past nearly all of it there is no forecast, and a warning.
    - ``steps``: the same in optimizer steps: those so far, and the rest at the tokens a step since the loss before.
    - ``relative``: the forecast over the fewest tokens that a reference needed; 1 is as good as the best.
    - ``num_references``, ``num_settings``: how many were usable here, and of how many settings (runs that differ by
      their seeds alone are of one, see :func:`lightning_spectral.runs.settings.settings_of`); with fewer than four, or
      of fewer than three settings, all forecasts are NaN. By the loss, alone or in the stack, references that have
      reached the target by now are none.
    - ``extrapolated``: 1 where this run lies beyond the references in a number that is gone by, and the interval is the
      wider; 0 inside. Beyond them by more than half their range there is no forecast.
    - ``skill``, ``median_error``: how well the references forecast each other at this point: rank correlation of
      forecasts from the other settings with the truth, and their median relative error. Where that skill is what runs
      without any relation show, or cannot be told, a warning says so.
    - ``spectral_gain``, ``spectral_gain_low``, ``spectral_gain_high``: what the spectra take off the error of
      forecasting the references from each other, as a share, with its 80% interval; NaN for predictors other than the
      stack.
    - ``alpha_tail``: this run's exponent.
    - ``actual``: the tokens it took, once the target is reached; from then on there are no forecasts.
    - ``failed``: measurements that came to nothing so far.

    A table of the forecasts closes the run. Forecasts and truth also go into its record, and a finished run is a
    reference for the next. A reference must be of the same family, have reached the target, and have been validated on
    the same data: of this run they are known at the end of its first validation run, before which there is no forecast,
    and references whose first samples were others are left out then, with a warning. Those that do not say, as logs of
    other tools, serve. Its spectra are used if all references have them, of the same layer, stage, normalisation and
    number of rows. Exponents are taken anew from its eigenvalues, whatever its bands. Forecasts are made at the end of
    a validation run: an EarlyStopping that monitors them comes after this callback in the Trainer's list.

    Args:
        target_loss: Value of ``monitor`` to be reached from above.
        monitor: Key of the loss in ``trainer.callback_metrics``.
        references: Log directories of finished runs, or glob patterns of them, which all ranks must be able to read;
            ``"bundled:tiny"`` for runs of the tiny GPT of ``examples/nanogpt.yaml`` that the package carries, validated
            on the standard library of Python 3.11.7; on that of another Python they serve with a warning. Logs of other
            tools (CSVLogger, TensorBoard, exports of W&B and MLflow) serve by loss and batch, as runs of this family,
            for you give them as such; where their columns are not found by the rules of
            :class:`lightning_spectral.Run`, say them in a mapping: ``{"path": "csv_logs/*", "loss": "val/nll",
            "batch_tokens": "batch_size*1024"}``. The loss is the column ``monitor`` unless it is said.
        layer: Name of the layer, or a pattern that one layer matches; None for the last block of the stack.
        stage: ``"validate"`` reads rows spread over a validation run, which are the same in all runs; ``"train"`` the
            last training batches before a report.
        every_n_steps: Optimizer steps between forecasts; between measured validation runs at the least.
        num_tokens: Rows per report over all ranks, after the mask; for the default see :class:`ActivationSpectrum`.
        tail: Band of the tail's exponent: two ints, 1-based inclusive ranks, or two fractions of the width.
        head: Band of the head's exponent, likewise.
        predictor: ``"stack"`` as above; ``"loss"``, ``"tail"`` or ``"head"`` for a line in the loss, or in that
            exponent, alone; ``"batch"`` for the law of the batch size alone. By the tail there is no forecast before 32
            optimizer steps, and a warning names references on the other side of their own tail's peak than this run.
        num_groups: Groups of whole samples for error bars; give that of an ActivationSpectrum to share its measurement.
        normalize: Apply a parameter-free RMSNorm to each row first, as in *Spectral Lens*.
        dtype: Type of the products, see :class:`ActivationSpectrum`; ``"auto"`` goes to float64 where float32 does not
            resolve the tail.
        mask: Key of the batch, with dots where it is nested: a mask with 1 for real tokens, labels with negative
            numbers for those that do not count, or an additive mask (:class:`lightning_spectral.capture.masks.Mask`).
            Of a model of several towers ``layer`` is then to be named.
        stop_if_relative_above: End training where even the interval's low end is more than so many times what the best
            reference needed, and the references forecast each other better than chance (p <= 0.1); None for never.
        prefix: Put before every key, to tell two of these callbacks apart.
        dataloader_idx: Which validation loader to read.
        channel_dim: Axis of the channels in the layers' outputs. None finds it: the axis on which the layer's own last
            module with weights works, 1 for convolutions and their norms, the last for linear layers and theirs.
        batch_dim: Axis of the samples in the tensors of a batch, and where as long in outputs; None for 0.
        samples: ``samples(batch) -> list of batches of one``, or its import path, for batches without such an axis.
        sums_device: Where the sums of a report are kept, see :class:`ActivationSpectrum`.
        overlap: Solve while training goes on, see :class:`ActivationSpectrum`.

    Raises:
        ValueError: For arguments out of range; at the start of ``fit`` where no validation will run to give
            ``monitor``, or ``layer`` matches no layer or several, or has to be named for ``mask``; after the first
            validation where ``monitor`` is not logged.

    References:
        Liu, Paquette, Sous, *Spectral Lens: Activation and Gradient Spectra as Diagnostics of LLM Optimization*,
        arXiv 2605.05683 (2026).

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[TailForecaster(2.0, references=["logs/*"])], logger=False)
    """

    kind = "forecast"
    argument = "layer"
    headlines = ("tokens_to_target",)
    quantities = (
        "tokens_to_target",
        "low",
        "high",
        "relative",
        "steps",
        "num_references",
        "num_settings",
        "extrapolated",
        "skill",
        "median_error",
        "spectral_gain",
        "spectral_gain_low",
        "spectral_gain_high",
        "alpha_tail",
        "actual",
    )

    def __init__(
        self,
        target_loss: float,
        monitor: str = "val_loss",
        references: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]] = (),
        layer: str | None = None,
        stage: Literal["train", "validate"] = "validate",
        every_n_steps: int = 100,
        num_tokens: int = 65536,
        tail: tuple[int, int] | tuple[float, float] = (0.125, 0.5),
        head: tuple[int, int] | tuple[float, float] = (1, 10),
        predictor: Literal["stack", "tail", "head", "loss", "batch"] = "stack",
        num_groups: int = 4,
        normalize: bool = True,
        dtype: Literal["auto", "float32", "float64"] = "auto",
        mask: str | None = None,
        stop_if_relative_above: float | None = None,
        prefix: str = "",
        dataloader_idx: int = 0,
        channel_dim: int | None = None,
        batch_dim: int | None = None,
        samples: str | Callable[[Any], Sequence[Any]] | None = None,
        sums_device: Literal["auto", "device", "cpu"] = "auto",
        overlap: bool | Literal["auto"] = "auto",
    ) -> None:
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
            overlap=overlap,
        )
        super().__init__(layer, request, prefix)
        if not is_finite_number(target_loss):
            raise ValueError(f"target_loss must be a finite number, got {describe(target_loss)}")
        limit = stop_if_relative_above
        if limit is not None and not (is_finite_number(limit) and limit >= 1):
            raise ValueError(
                f"stop_if_relative_above must be at least 1, the best of the family, got {describe(limit)}: try 3"
            )
        check_key(monitor=monitor)
        asked_of(references)
        check_band("tail", tail)
        check_band("head", head)
        if not isinstance(predictor, str) or predictor not in BY:
            raise ValueError(f"predictor must be one of {', '.join(BY)}, got {describe(predictor)}: try 'stack'")
        self.target_loss = float(target_loss)
        self.monitor = monitor
        self.references = tuple(references) if isinstance(references, (list, tuple)) else (references,)
        self.tail, self.head = cast(Band, tuple(tail)), cast(Band, tuple(head))
        self.predictor = predictor
        self.stop_if_relative_above = stop_if_relative_above
        self._loss = WatchedLoss(monitor, self.target_loss)
        self._forecaster = Forecaster(References([], {}), None, self.target_loss, predictor, self.warn)
        self._described: dict[str, Any] = {}
        self._table = ForecastTable()
        self._awaited: tuple[float, ...] | None = None

    @property
    def actual(self) -> float:
        """Tokens that the target took; NaN until it is reached."""
        return self._loss.actual

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(
            layer=self.layers, stage=self.stage, target=self.target_loss, prefix=self.prefix
        )

    @override
    def keys(self) -> list[str]:
        return [f"forecast/{quantity}" for quantity in (*self.quantities, "failed")]

    @override
    def settings(self) -> dict[str, Any]:
        return super().settings() | {"tail": list(self.tail), "head": list(self.head)}

    @override
    def looks_at(self) -> list[Band]:
        return [self.tail]

    @override
    def choose_layers(self, module: nn.Module) -> dict[str, nn.Module]:
        found = super().choose_layers(module)
        if self.layers is None:
            name, block = list(found.items())[-1]
            if self.request.mask is not None and towers_spanned(module, None):
                raise ValueError(
                    f"layer must be one that mask is of, got None with mask={self.request.mask!r} for a model of "
                    f"several towers: name it, layer={name!r} for example"
                )
            return {name: block}
        if len(found) > 1:
            raise ValueError(f"layer must name one layer, got {self.layers!r}: it matches {', '.join(found)}")
        return found

    @override
    def choose_again(self, module: nn.Module) -> dict[str, nn.Module]:
        return resolve_layers_again(module, None, self.names)  # it is one layer's forecast

    @override
    def check_widths(self, widths: dict[str, int]) -> None:
        for width in widths.values():
            resolve_band(self.tail, width, "tail")
            resolve_band(self.head, width, "head")

    @override
    def summary(self) -> dict[str, Any]:
        known = None if self._awaited is None else list(self._awaited)
        return {**self._loss.state(), "awaited": known}

    @override
    def restore(self, summary: dict[str, Any]) -> None:
        self._loss = WatchedLoss(self.monitor, self.target_loss, summary)
        self._table = ForecastTable()
        awaited = summary.get("awaited")
        self._awaited = None if awaited is None else tuple(awaited)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.enable_validation and (self.stage == "validate" or "val" in self.monitor):
            raise ValueError(
                f"monitor must be logged during fit, got {self.monitor!r}, but no validation will run: "
                "give the Trainer validation data, or monitor a training loss with stage='train'"
            )
        super().on_fit_start(trainer, pl_module)

    @override
    def start_training(self, host: Host) -> None:
        super().start_training(host)
        (layer,) = self.names
        self._described = {}
        # The family of the run is known now.
        reached = (host.session.recorder.family, self.target_loss, self.monitor)
        names = ("stage", "normalize", "num_tokens", "mask", "dataloader_idx", "channel_dim")
        needs_spectra = self.predictor in ("tail", "head")
        settings = {name: getattr(self.request, name) for name in names}
        _, gradients = gradients_of(host.session)
        wanted = Wanted(*reached, layer, settings, needs_spectra, gradients)
        look = Look(layer, self.tail, self.head)
        self._forecaster = Forecaster.find(host, self.references, wanted, look, self.predictor, self.warn)
        if (data := host.session.recorder.validation_data) is not None:  # of a run that is resumed
            self._forecaster.take_data(data)

    @override
    def take_report(self, host: Host) -> None:
        is_new = self.measurement is not None and self.measurement.report is not self._seen
        takes_loss = is_new and host.is_fitting and not host.has_validation
        if takes_loss:
            self._take_loss(host)
        super().take_report(host)
        if takes_loss:
            self._stop_if_hopeless(host)

    @override
    def end_validation_rows(self, host: Host) -> None:
        # In training the loss of this validation run is known at its end.
        if not host.is_fitting:
            super().end_validation_rows(host)

    @override
    def end_validation(self, host: Host) -> None:
        if host.is_fitting:
            self._take_loss(host)
            if not host.is_checking:
                self._forecaster.take_data(host.session.recorder.validation_data)
                self.take_report(host)
                self._stop_if_hopeless(host)

    @override
    def print_tables(self) -> None:
        self._table.print(f"{self.prefix}{self._title()}", self.actual)

    @override
    def facts(self) -> Iterable[Fact]:
        if self._awaited is not None and math.isnan(self.actual) and self.session is not None:
            value, low, high, p_value = self._awaited
            yield Awaited(
                prefix=self.prefix,
                monitor=self.monitor,
                target=self.target_loss,
                tokens=self.session.recorder.tokens,
                forecast=value,
                low=low,
                high=high,
                p_value=p_value,
            )

    def _title(self) -> str:
        by = {"stack": "loss, batch and spectra", "loss": "the loss", "batch": "the batch size"}
        of = f" of {self.names[0]}" if self.names else ""
        return (
            f"Tokens to {self.monitor} {self.target_loss:g}, by {by.get(self.predictor, f'the {self.predictor}{of}')}"
        )

    @override
    def measured(self, report: Report) -> dict[str, float]:
        (spectrum,) = self.spectra(report).values()
        values = dict.fromkeys(self.quantities, math.nan)
        exponent = spectrum.exponent(self.tail)
        if math.isnan(exponent.value):
            self.warn_of(spectrum, self.tail)
        shown = self._shown(spectrum).late_enough(report.step)
        per_step = self._loss.tokens_per_step
        values |= self._forecaster.forecast(shown, report.step, self.tokens, per_step, self._loss.is_there)
        values |= {"alpha_tail": exponent.value, "actual": self.actual}
        self._record_forecast(report.step, values)
        self._table.note(report.step, self.tokens, values)
        self._awaited = values["tokens_to_target"], values["low"], values["high"], self._forecaster.p_value
        return {f"forecast/{quantity}": value for quantity, value in values.items()}

    @override
    def headline(self) -> dict[str, float]:
        return {"tokens_to_target": math.nan if self._awaited is None else self._awaited[0]}

    def _shown(self, spectrum: Spectrum) -> Shown:
        assert self.session is not None
        numbers = {
            "alpha_tail": spectrum.exponent(self.tail).value,
            "alpha_head": spectrum.exponent(self.head).value,
            "rankme": log_of(spectrum.rankme().value),
        }
        spectral = {name: Seen(self.tokens, value) for name, value in numbers.items()}
        spectral |= noise_seen(self.session)
        loss, log_batch = self._loss, log_of(self.session.recorder.batch_tokens)
        return Shown(loss.tokens, loss.log_gap, log_batch, loss.curve.log_tokens_to(self.target_loss), spectral)

    def _take_loss(self, host: Host) -> None:
        own = self._loss.read(host)
        if host.is_checking or self.session is None:
            return
        recorder = self.session.recorder
        # Every rank may have logged its own; all must see the same to act alike, and what the record says.
        loss = recorder.over_ranks(self.monitor, own)
        if self._loss.add(float(host.step), recorder.tokens, math.nan if loss is None else loss):
            self.publish(host, {"forecast/actual": self.actual}, host.step)
        facts = {"target_loss": self.target_loss, "monitor": self.monitor, "layer": self.names[0]}
        facts |= {"actual": _known(self.actual)}
        if facts != self._described:
            self._described = facts
            recorder.describe(forecast=recorder.described("forecast") | {self.prefix: facts})

    def _record_forecast(self, step: int, values: dict[str, float]) -> None:
        if self.session is not None:
            known = {key: _known(value) for key, value in ({"tokens": self.tokens} | values).items()}
            self.session.recorder.add_forecast({"prefix": self.prefix, "step": step, **known})

    def _stop_if_hopeless(self, host: Host) -> None:
        if self.stop_if_relative_above is None or self._loss.is_there:
            return
        # A rank that could not read a reference goes by other numbers: those that are logged count, on all.
        low, p_value = host.broadcast((self._forecaster.low, self._forecaster.p_value))
        if low > self.stop_if_relative_above and p_value <= NO_SKILL:
            host.stop()
            rank_zero_info(
                f"TailForecaster ends training: it is to take at least {low:.2f} times the tokens of the family's best "
                f"run, the low end of its interval, which is more than stop_if_relative_above="
                f"{self.stop_if_relative_above:g}; its references forecast each other better than chance "
                f"(p = {p_value:.3f}, {NO_SKILL:g} at most)"
            )

    @override
    def for_loggers(self, values: dict[str, float]) -> dict[str, float]:
        # Charts draw NaN as a flat line of marks: once the target is reached there would seem to be forecasts still.
        return {key: value for key, value in values.items() if key == "forecast/alpha_tail" or not math.isnan(value)}

    @override
    def draw(self, boards: list[Board], report: Report) -> None:
        start = f"{self.prefix}forecast"

        def within(quantity: str, *ends: str) -> Margin:
            return Margin(*(f"{start}/{name}" for name in (quantity, *ends)))

        charts: dict[str, Sequence[str]] = {
            f"{start}/tokens_to_target": within("tokens_to_target", "low", "high"),
            f"{start}/actual": [f"{start}/tokens_to_target", f"{start}/actual"],
            f"{start}/skill": [f"{start}/skill"],
            f"{start}/median_error": [f"{start}/median_error"],
            f"{start}/spectral_gain": within("spectral_gain", "spectral_gain_low", "spectral_gain_high"),
        }
        for board in boards:
            board.charts("forecast", charts)


def _known(value: float) -> float | None:
    """JSON knows no NaN."""
    return None if math.isnan(value) else value
