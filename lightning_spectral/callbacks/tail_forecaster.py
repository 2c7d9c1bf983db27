"""The callback that forecasts, from an early tail exponent, how many tokens a run will need."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from typing_extensions import override

from lightning_spectral.boards import Board
from lightning_spectral.callbacks.layers_callback import LayersCallback
from lightning_spectral.capture.batch import load_cutter
from lightning_spectral.capture.layers import resolve_layers, resolve_layers_again
from lightning_spectral.functional.arguments import describe, is_finite_number
from lightning_spectral.functional.forecast import MIN_REFERENCES, backtest, forecast_tokens
from lightning_spectral.functional.powerlaw import Band, check_band, resolve_band
from lightning_spectral.measurement import ActivationRequest, Report
from lightning_spectral.measurement.arguments import check_key
from lightning_spectral.runs.arguments import check_paths
from lightning_spectral.runs.course import Course
from lightning_spectral.runs.history import History
from lightning_spectral.runs.references import Reference, References, Wanted, find_references
from lightning_spectral.runs.settings import settings_of

NO_SKILL = 0.1
"""Above this p-value the rank correlation of forecasts and truths is what references without any relation show."""


class TailForecaster(LayersCallback):
    r"""Forecasts the training tokens until a loss is reached, from the tail of the deepest layer's spectrum.

    In *Spectral Lens* the tail exponent of the activation covariance, early in training, goes with the tokens that runs
    of a family need: a steeper tail, more tokens. At each report the exponent of this run is set against those of
    finished runs of its family *at the same number of tokens*, and the line of log tokens-to-target on the exponent
    gives the forecast, with an 80% prediction interval. Nothing later than the report enters it.

    Values lie under ``forecast/``:

    - ``tokens_to_target``, ``low``, ``high``: the forecast and its interval, in tokens.
    - ``relative``: the forecast over the fewest tokens that a reference needed; 1 is as good as the best.
    - ``num_references``, ``num_settings``: how many were usable here, and of how many settings (runs that differ by
      their seeds alone are of one, see :func:`lightning_spectral.runs.settings.settings_of`); with fewer than four, or
      of fewer than three settings, all forecasts are NaN.
    - ``extrapolated``: 1 where this run's exponent lies beyond those of the references, and the interval holds the
      curvature that they do not exclude; 0 inside. Beyond them by more than half their range there is no forecast.
    - ``skill``, ``median_error``: how well the references forecast each other at this point: rank correlation of
      forecasts from the other settings with the truth, and their median relative error. Where that skill is what runs
      without any relation show, or cannot be told, a warning says so.
    - ``alpha_tail``: this run's exponent.
    - ``actual``: the tokens it took, once the target is reached.
    - ``failed``: measurements that came to nothing so far.

    Forecasts and truth also go into the record of the run, and a finished run is a reference for the next. A reference
    must be of the same family (see ``family``), have reached the target, and have measured the same layer on the same
    stage, normalisation and number of rows; exponents are taken anew from its eigenvalues, whatever its bands.

    Args:
        target_loss: Value of ``monitor`` to be reached from above.
        monitor: Key of the loss in ``trainer.callback_metrics``.
        references: Log directories of finished runs, or glob patterns of them; all ranks must be able to read them.
        layer: Name of the layer, or a pattern that one layer matches; None for the last block of the stack.
        stage: ``"validate"`` reads rows spread over a validation run, which are the same in all runs; ``"train"`` the
            last training batches before a report.
        every_n_steps: Optimizer steps between forecasts; between measured validation runs at the least.
        num_tokens: Rows per report over all ranks, after the mask; for the default see :class:`ActivationSpectrum`.
        tail: Band of the exponent: two ints, 1-based inclusive ranks, or two fractions of the width. On 40 runs of a
            small GPT none of two others forecast better than the default at each of three early points, and from the
            second on the early loss did better than all (``benchmarks/findings``, study 3): ask ``skill`` of your runs.
        num_groups: Groups of whole samples for error bars; give that of an ActivationSpectrum to share its measurement.
        normalize: Apply a parameter-free RMSNorm to each row first, as in *Spectral Lens*.
        dtype: Type of the products, see :class:`ActivationSpectrum`; ``"auto"`` goes to float64 where float32 does not
            resolve the tail.
        mask: Key of the batch, with dots where it is nested: a mask with 1 for real tokens, labels with negative
            numbers for those that do not count, or an additive mask (:class:`lightning_spectral.capture.masks.Mask`).
        stop_if_relative_above: End training where ``relative`` is larger, whatever the skill; None for never.
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
            ``monitor``, or ``layer`` matches no layer or several; after the first validation where ``monitor`` is not
            logged.

    References:
        Liu, Paquette, Sous, *Spectral Lens: Activation and Gradient Spectra as Diagnostics of LLM Optimization*,
        arXiv 2605.05683 (2026).

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[TailForecaster(2.0, references=["logs/*"])], logger=False)
    """

    kind = "forecast"
    quantities = (
        "tokens_to_target",
        "low",
        "high",
        "relative",
        "num_references",
        "num_settings",
        "extrapolated",
        "skill",
        "median_error",
        "alpha_tail",
        "actual",
    )

    def __init__(
        self,
        target_loss: float,
        monitor: str = "val_loss",
        references: str | Sequence[str] = (),
        layer: str | None = None,
        stage: Literal["train", "validate"] = "validate",
        every_n_steps: int = 100,
        num_tokens: int = 65536,
        tail: tuple[int, int] | tuple[float, float] = (0.125, 0.5),
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
        check_paths("references", references)
        check_band("tail", tail)
        self.target_loss = float(target_loss)
        self.monitor = monitor
        self.references = tuple(references) if isinstance(references, (list, tuple)) else (references,)
        self.tail = cast(Band, tuple(tail))
        self.stop_if_relative_above = stop_if_relative_above
        self.actual = math.nan
        """Tokens that the target took; NaN until it is reached."""
        self._found = References([], {})
        self._settings: list[int] = []
        self._courses: dict[str, Course] = {}
        self._losses: list[list[float]] = []
        self._relative = math.nan
        self._described: dict[str, Any] = {}

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
        return super().settings() | {"tail": list(self.tail)}

    @override
    def looks_at(self) -> list[Band]:
        return [self.tail]

    @override
    def choose_layers(self, pl_module: LightningModule) -> dict[str, nn.Module]:
        try:
            found = resolve_layers(pl_module, self.layers)
        except ValueError as error:
            raise ValueError(str(error).replace("layers", "layer", 1)) from None
        if self.layers is None:
            return dict([list(found.items())[-1]])
        if len(found) > 1:
            raise ValueError(f"layer must name one layer, got {self.layers!r}: it matches {', '.join(found)}")
        return found

    @override
    def choose_again(self, pl_module: LightningModule) -> dict[str, nn.Module]:
        return resolve_layers_again(pl_module, None, self.names)  # it is one layer's forecast

    @override
    def check_widths(self, widths: dict[str, int]) -> None:
        for width in widths.values():
            resolve_band(self.tail, width, "tail")

    @override
    def summary(self) -> dict[str, Any]:
        return {"losses": self._losses, "relative": self._relative, "actual": self.actual}

    @override
    def restore(self, summary: dict[str, Any]) -> None:
        self._losses, self._relative = list(summary.get("losses", [])), summary.get("relative", math.nan)
        self.actual = summary.get("actual", math.nan)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.enable_validation and (self.stage == "validate" or "val" in self.monitor):
            raise ValueError(
                f"monitor must be logged during fit, got {self.monitor!r}, but no validation will run: "
                "give the Trainer validation data, or monitor a training loss with stage='train'"
            )
        super().on_fit_start(trainer, pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        assert self.session is not None
        recorder = self.session.recorder
        (layer,) = self.names
        self._courses, self._described = {}, {}
        # The family of the run is known now.
        reached = (recorder.family, self.target_loss, self.monitor)
        names = ("stage", "normalize", "num_tokens", "mask", "dataloader_idx", "channel_dim")
        wanted = Wanted(*reached, layer, {name: getattr(self.request, name) for name in names})
        found = References([], {})
        if trainer.is_global_zero:
            found = find_references(self.references, wanted, recorder.run_id)
        # Ranks that look by themselves, while other runs come to their end, might find different ones.
        self._found = trainer.strategy.broadcast(found)
        self._settings = settings_of([reference.run for reference in self._found.usable])
        if (num_usable := len(self._found.usable)) < MIN_REFERENCES:
            reasons = self._found.reasons()
            self.warn(
                f"makes no forecast: it needs {MIN_REFERENCES} reference runs and has {num_usable}"
                f"{f', besides {reasons}' if reasons else ''}. Train runs of this family to a loss of "
                f"{self.target_loss:g}, with this callback or an ActivationSpectrum of the same settings, and give "
                "their log directories as references"
            )
        elif self._found.skipped:
            rank_zero_info(f"TailForecaster uses {num_usable} references, and not: {self._found.reasons()}")

    @override
    def take_report(self, trainer: Trainer) -> None:
        # Without validation, the loss is looked at with each report.
        before = self._seen
        super().take_report(trainer)
        if not trainer.enable_validation and self._seen is not before:
            self._watch_loss(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == "fit":
            self._watch_loss(trainer)

    @override
    def measured(self, report: Report) -> dict[str, float]:
        ((name, spectrum),) = self.spectra(report).items()
        values = dict.fromkeys(self.quantities, math.nan)
        exponent = spectrum.exponent(self.tail)
        values |= self._forecast(name, exponent.value) | {"alpha_tail": exponent.value, "actual": self.actual}
        if math.isnan(exponent.value):
            self.warn_of(spectrum, self.tail)
        self._relative = values["relative"]
        self._record_forecast(report.step, values)
        return {f"forecast/{quantity}": value for quantity, value in values.items()}

    def _forecast(self, layer: str, alpha: float) -> dict[str, float]:
        """What the references make of this run's exponent, at its tokens."""
        here = [self._alpha_of(reference, layer) for reference in self._found.usable]
        known = [index for index, value in enumerate(here) if math.isfinite(value)]
        settings = torch.tensor([self._settings[index] for index in known])
        num_settings = len(settings.unique())
        values = {"num_references": float(len(known)), "num_settings": float(num_settings)}
        if len(known) < MIN_REFERENCES:
            if len(self._found.usable) >= MIN_REFERENCES:
                self.warn(f"makes no forecast where fewer than {MIN_REFERENCES} references have reports on both sides")
            return values
        alphas = torch.tensor([here[index] for index in known], dtype=torch.float64)
        tokens = torch.tensor([self._found.usable[index].tokens_to_target for index in known], dtype=torch.float64)
        forecast, skill = forecast_tokens(alphas, tokens, alpha, settings=settings), backtest(alphas, tokens, settings)
        if forecast.reason is not None and math.isfinite(alpha):
            self.warn(f"makes no forecast at {self.tokens:,.0f} tokens: {forecast.reason}")
        elif forecast.extrapolated:
            self.warn(
                f"forecasts beyond its references at {self.tokens:,.0f} tokens: with a tail exponent of {alpha:.3f}, "
                f"and theirs from {float(alphas.min()):.3f} to {float(alphas.max()):.3f}, the interval is the wider"
            )
        if math.isnan(skill.p_value):
            self.warn(
                f"cannot tell its skill at {self.tokens:,.0f} tokens: its references are of {num_settings} settings, "
                "or alike in their exponents or their tokens. Train references of other batch sizes or learning rates"
            )
        elif skill.p_value > NO_SKILL:
            self.warn(
                f"has no skill at {self.tokens:,.0f} tokens: its references forecast each other with a rank "
                f"correlation of {skill.rank_correlation:.2f} (p = {skill.p_value:.2f}), as runs without a relation do"
            )
        is_known = math.isfinite(forecast.value)
        return values | {
            "tokens_to_target": forecast.value,
            "low": forecast.low,
            "high": forecast.high,
            "relative": forecast.value / self._found.best,
            "extrapolated": float(forecast.extrapolated) if is_known else math.nan,
            "skill": skill.rank_correlation,
            "median_error": skill.median_error,
        }

    def _alpha_of(self, reference: Reference, layer: str) -> float:
        """A reference's exponent at this run's tokens; NaN for one that cannot be read."""
        try:
            key = str(reference.run.folder)
            if key not in self._courses:  # training moves on, and what lies behind is not asked for again
                self._courses[key] = Course(reference.run, reference.series, keep=2)
            course = self._courses[key]
            exponent = course.exponent(layer, self.tail, self.tokens)
            if math.isnan(exponent) and (why := course.why_unknown(layer, self.tail, self.tokens)) is not None:
                self.warn(f"goes without {reference.run.path} at {self.tokens:,.0f} tokens, because at {why}")
            return exponent
        except ValueError as error:
            self.warn(f"goes without {reference.run.path}: {error}", on_this_rank=True)
            return math.nan

    def _watch_loss(self, trainer: Trainer) -> None:
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(key for key in trainer.callback_metrics if "loss" in key) or "no losses"
            raise ValueError(f"monitor must be a metric that is logged, got {self.monitor!r}: there are {known}")
        if trainer.sanity_checking or self.session is None:
            return
        # Every rank logs its own loss, unless the module says otherwise; all must see the same to act alike.
        seen = trainer.callback_metrics[self.monitor].detach().to(trainer.strategy.root_device, torch.float32)
        loss = float(trainer.strategy.reduce(seen, reduce_op="mean"))
        self._losses = [*self._losses[-1:], [float(trainer.global_step), self.session.recorder.tokens, loss]]
        if math.isnan(self.actual) and loss <= self.target_loss:
            self.actual = self._crossing()
            self.publish(trainer, {"forecast/actual": self.actual}, trainer.global_step)
        facts = {"target_loss": self.target_loss, "monitor": self.monitor, "layer": self.names[0]}
        facts |= {"actual": _known(self.actual)}
        if facts != self._described:
            self._described, recorder = facts, self.session.recorder
            recorder.describe(forecast=recorder.described("forecast") | {self.prefix: facts})
        self._stop_if_hopeless(trainer, loss)

    def _crossing(self) -> float:
        """Tokens at which the target was crossed since the look at the loss before; NaN if this is the first."""
        steps, tokens, losses = np.asarray(self._losses[-2:], dtype=np.float64).T
        point = History(steps, tokens, np.zeros_like(steps), losses, losses).first_at(self.target_loss)
        return point.tokens

    def _record_forecast(self, step: int, values: dict[str, float]) -> None:
        if self.session is not None:
            known = {key: _known(value) for key, value in ({"tokens": self.tokens} | values).items()}
            self.session.recorder.add_forecast({"prefix": self.prefix, "step": step, **known})

    def _stop_if_hopeless(self, trainer: Trainer, loss: float) -> None:
        if self.stop_if_relative_above is None:
            return
        relative = self._relative
        is_hopeless = loss > self.target_loss and relative > self.stop_if_relative_above
        if trainer.strategy.reduce_boolean_decision(is_hopeless, all=False):
            trainer.should_stop = True
            rank_zero_info(
                f"TailForecaster ends training: it forecasts {relative:.2f} times the tokens of the family's best run, "
                f"more than stop_if_relative_above={self.stop_if_relative_above:g}"
            )

    @override
    def draw(self, boards: list[Board], report: Report) -> None:
        start = f"{self.prefix}forecast"
        tokens = [f"{start}/{quantity}" for quantity in ("tokens_to_target", "low", "high", "actual")]
        trust = [f"{start}/{quantity}" for quantity in ("skill", "median_error", "extrapolated")]
        charts = {f"{start}/tokens_to_target": tokens, f"{start}/skill": trust}
        for board in boards:
            board.charts("forecast", charts)


def _known(value: float) -> float | None:
    """JSON knows no NaN."""
    return None if math.isnan(value) else value
