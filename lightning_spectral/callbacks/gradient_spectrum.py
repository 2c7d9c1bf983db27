"""The callback that watches the singular values of per-sample gradients."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from math import isnan
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_spectral import tensorboard
from lightning_spectral.callbacks.arguments import check_choice, check_positive
from lightning_spectral.callbacks.display import Line, SpectrumDisplay
from lightning_spectral.callbacks.loss_scale import loss_scale
from lightning_spectral.callbacks.run_about import check_notes
from lightning_spectral.callbacks.staged_callback import DEFAULT_HEAD, StagedCallback
from lightning_spectral.capture.parameters import resolve_parameters, trainable_parameters
from lightning_spectral.capture.shadow import BatchLoss, check_loss, load_loss
from lightning_spectral.functional.powerlaw import Band, check_band, resolve_band
from lightning_spectral.functional.spectrum import rankme
from lightning_spectral.measurement import (
    GradientMeasurement,
    GradientReport,
    GradientRequest,
    ParameterSpectrum,
    WeightSpectrum,
)
from lightning_spectral.measurement.report import Exponent
from lightning_spectral.terminal import number, with_error

SHARDING = ("FSDP", "DeepSpeed", "ModelParallel")
"""Parts of the names of Lightning's strategies that leave no rank a whole parameter."""


class GradientSpectrum(StagedCallback):
    r"""Logs the singular values of per-sample gradients of chosen weights while a model trains.

    The gradient of each sample's own loss is a row of an N x P matrix; its singular values, neither centred nor scaled
    as in *Spectral Lens*, come from the N x N Gram matrix in float64. Each report logs, per parameter, the power-law
    exponents of their head and tail with jackknife errors, RankMe, the simple gradient noise scale and the norm of the
    mean gradient; TensorBoard also gets histograms of log10 singular values, a log-log figure and a chart with all
    parameters. ``fit`` ends with a table of the first report and the last.

    A sample's own loss is that of ``training_step`` on a batch of one, called on a shadow of the module that shares its
    weights, with logging, metrics and hooks off, or ``loss_fn``. Under ``stage="train"`` the module is in training mode
    (dropout draws a fresh mask for each sample, the run's random stream stays where it is), under ``stage="validate"``
    in evaluation mode.

    **Methods.** ``"vmap"`` vectorises over samples (:mod:`torch.func`); ``"loop"`` makes one backward pass a sample, of
    all parameters together, and works wherever autograd works; ``"auto"`` takes vmap, else the loop, with one warning
    that names the cause. All samples of a report then meet the same weights: those after its step. ``"hooks"`` reads
    linear layers and embeddings. In training it adds no pass at all: rows are read off the backward passes of the last
    steps before a report, at weights that move with these steps (the figure's title has the span); loss scaling,
    accumulation and the mean over the batch are undone. Where samples weigh differently in the batch's mean, its rows
    differ from those of the other methods: under a mean over tokens, the row of sample b with n_b of them is
    :math:`n_b B / \sum n` times its own gradient. In validation it makes one forward and backward pass for all.

    Values lie under ``gradient/{parameter}/``: ``alpha_tail``, ``alpha_tail_stderr``, ``r2_tail``, ``alpha_head``,
    ``alpha_head_stderr``, ``alpha_tail_centred`` (of the rows about their mean), ``rankme`` (of singular values),
    ``noise_scale`` (samples), ``grad_norm``, ``num_samples``; with ``gradient/noise_scale`` of the whole model if all
    trainable parameters are chosen, ``gradient/failed`` and ``spectral/seconds``. With ``weights``, also
    ``weight/{parameter}/`` ``alpha_tail``, ``r2_tail``, ``alpha_head`` and ``rankme`` of the singular values of each
    weight itself (of a convolution's, output channels by the rest). The exponents depend on N: compare runs at equal
    ``num_samples``.

    **Cost.** vmap and loop: about a forward and backward pass of ``num_samples`` samples every ``every_n_steps`` steps.
    Memory: rows of N x P numbers on each of W ranks, N = ``num_samples`` / W, P summed over parameters, and for vmap
    about one and a half times what autograd saves for ``chunk_size`` samples and their gradients
    (:func:`lightning_spectral.capture.per_sample.fill_rows` has the formula).

    Args:
        parameters: Glob patterns over parameter names, ``"all"`` for every trainable parameter, None for the attention
            output projections of five blocks spread evenly over the depth, as in *Spectral Lens*.
        every_n_steps: Optimizer steps between reports; between measured validation runs at the least.
        stage: ``"train"`` takes the last training samples before a report, ``"validate"`` the first of a validation
            run.
        num_samples: Samples N per report over all ranks; 512 in *Spectral Lens*.
        method: How per-sample gradients are had.
        chunk_size: Samples at a time, for all methods but ``"loop"``; None for as many as fit into a quarter of the
            free memory and are of use. Halved when memory runs out.
        loss_fn: ``loss_fn(module, batch) -> loss``, or its import path; None for ``training_step``.
        loss_reduction: For ``"hooks"``: whether the loss of a batch is the mean over its samples or their sum.
        weights: Log the spectra of the weights themselves, too.
        head: Band of the head exponent: two ints, 1-based inclusive ranks, or two fractions of min(N, P).
        tail: Band of the tail exponent, likewise; (30, 150) is that of the released scripts.
        num_groups: Groups of samples for the delete-a-group jackknife; 1 for no error bars.
        prefix: Put before every key, to tell two of these callbacks apart.
        row_dtype: In which rows are kept. ``"bfloat16"`` halves their memory; singular values below 2e-3 of the typical
            gradient norm are then rounding, and zero.
        row_device: Where rows are kept, ``"cpu"`` for many parameters on a small GPU; None for where they are made.
        dataloader_idx: Which validation loader to read.
        family: Name that comparable runs share in their records; None for one made of the model's class and its
            configuration, without batch size, learning rate and seed.
        tags: Whatever else the record of the run is to say, JSON-like.
        tokens_per_sample: For the record, how training tokens are counted: so many a sample, or the key of a tensor
            whose elements count, without those that are 0 in a mask or -100 in labels. None counts the elements of
            ``input_ids``, else of the first integer tensor of two or more axes, else samples.

    Raises:
        ValueError: For arguments out of range; at the start of ``fit`` for patterns that match nothing, keys that two
            callbacks would write, bands beyond the number of singular values, a module without a loss for one sample,
            parameters that ``"hooks"`` cannot read and strategies that shard parameters.

    References:
        Liu, Paquette, Sous, *Spectral Lens: Activation and Gradient Spectra as Diagnostics of LLM Optimization*,
        arXiv 2605.05683 (2026); McCandlish et al., *An Empirical Model of Large-Batch Training*, arXiv 1812.06162
        (2018) for the noise scale.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[GradientSpectrum(every_n_steps=100, method="hooks")], logger=False)
    """

    kind = measures = "gradient"
    quantities = (
        "alpha_tail",
        "alpha_tail_stderr",
        "r2_tail",
        "alpha_head",
        "alpha_head_stderr",
        "alpha_tail_centred",
        "rankme",
        "noise_scale",
        "grad_norm",
        "num_samples",
    )
    weight_quantities = ("alpha_tail", "r2_tail", "alpha_head", "rankme")

    def __init__(
        self,
        parameters: str | Sequence[str] | None = None,
        every_n_steps: int = 500,
        stage: Literal["train", "validate"] = "train",
        num_samples: int = 512,
        method: Literal["auto", "vmap", "hooks", "loop"] = "auto",
        chunk_size: int | None = None,
        loss_fn: str | Callable[..., Any] | None = None,
        loss_reduction: Literal["mean", "sum"] = "mean",
        weights: bool = False,
        head: tuple[int, int] | tuple[float, float] = DEFAULT_HEAD,
        tail: tuple[int, int] | tuple[float, float] = (0.125, 0.5),
        num_groups: int = 4,
        prefix: str = "",
        row_dtype: Literal["float32", "bfloat16", "float64"] = "float32",
        row_device: str | None = None,
        dataloader_idx: int = 0,
        family: str | None = None,
        tags: dict[str, Any] | None = None,
        tokens_per_sample: int | str | None = None,
    ) -> None:
        notes = check_notes(family, tags, tokens_per_sample)
        super().__init__(every_n_steps, stage, num_groups, dataloader_idx, prefix, notes)
        check_positive(num_samples=num_samples)
        if num_samples < 2:
            raise ValueError(f"num_samples must be at least 2, got {num_samples}: 512 are usual")
        if chunk_size is not None:
            check_positive(chunk_size=chunk_size)
        check_choice("method", method, ("auto", "vmap", "hooks", "loop"))
        check_choice("loss_reduction", loss_reduction, ("mean", "sum"))
        check_choice("row_dtype", row_dtype, ("float32", "bfloat16", "float64"))
        if parameters is not None and not (
            isinstance(parameters, Sequence) and all(isinstance(name, str) for name in parameters)
        ):
            raise ValueError(f"parameters must be None, 'all', a pattern or a list of patterns, got {parameters!r}")
        try:
            row_device = None if row_device is None else str(torch.device(row_device))
        except RuntimeError as error:
            raise ValueError(f"row_device must be a device such as 'cpu', or None, got {row_device!r}") from error
        check_band("head", head)
        check_band("tail", tail)
        self.parameters = parameters
        self.head = cast(Band, tuple(head))
        self.tail = cast(Band, tuple(tail))
        self.loss_fn = load_loss(loss_fn)
        rows = (num_samples, method, chunk_size, loss_reduction, weights, num_groups, row_dtype, row_device)
        self.request = GradientRequest(stage, every_n_steps, *rows, dataloader_idx)
        self._measurement: GradientMeasurement | None = None
        self._parameters: dict[str, nn.Parameter] = {}
        self._is_whole_model = False
        self.display = self._display = SpectrumDisplay(
            "gradient",
            "parameter",
            "singular value",
            tensorboard.SINGULAR_VALUE_EDGES,
            ("alpha_tail", "alpha_head", "rankme", "noise_scale", "grad_norm"),
            {
                "alpha_tail": with_error("alpha_tail", 3),
                "r2": number("r2_tail", 3),
                "alpha_head": number("alpha_head", 3),
                "RankMe": number("rankme", 1),
                "noise scale": number("noise_scale", 1),
                "norm": number("grad_norm", 4),
                "samples": number("num_samples", 0),
            },
        )

    @property
    def state_key(self) -> str:
        """Name of the state in a checkpoint; callbacks with equal ones would write equal keys."""
        return self._generate_state_key(parameters=self.parameters, stage=self.stage, prefix=self.prefix)

    def keys(self) -> list[str]:
        """The keys this callback writes."""
        keys = [f"gradient/{name}/{quantity}" for name in self._parameters for quantity in self.quantities]
        if self.request.weights:
            keys += [f"weight/{name}/{quantity}" for name in self._matrices() for quantity in self.weight_quantities]
        if self._is_whole_model:
            keys.append("gradient/noise_scale")
        return [*keys, "gradient/failed"]

    def settings(self) -> dict[str, Any]:
        """How the measurement is made and its spectra are summed up.

        Returns:
            JSON-like values by name.
        """
        bands = {"head": list(self.head), "tail": list(self.tail)}
        return asdict(self.request) | {"parameters": list(self._parameters)} | bands

    def _matrices(self) -> list[str]:
        return [name for name, parameter in self._parameters.items() if parameter.ndim >= 2]

    def join(self, trainer: Trainer, pl_module: LightningModule) -> GradientMeasurement:
        """Find the parameters and get ready to measure them.

        Args:
            trainer: The Trainer.
            pl_module: The module that is trained.

        Returns:
            A measurement of this callback's own.

        Raises:
            ValueError: For what cannot be measured, see the class.
        """
        strategy = type(trainer.strategy).__name__
        if any(word in strategy for word in SHARDING):
            raise ValueError(f"strategy must leave each rank whole parameters, got {strategy}: use 'ddp'")
        if self.request.method != "hooks" or self.stage != "train":
            check_loss(pl_module, self.loss_fn)
        self._parameters = resolve_parameters(pl_module, self.parameters)
        trained = trainable_parameters(pl_module).values()
        self._is_whole_model = {id(p) for p in trained} == {id(p) for p in self._parameters.values()}
        self._check_bands()

        def make_loss() -> BatchLoss:
            context = trainer.precision_plugin.train_step_context
            return BatchLoss(pl_module, self.loss_fn, context, trainer, loss_scale(trainer))

        session = self.open(trainer)
        try:
            return GradientMeasurement(
                self.request, self._parameters, pl_module, make_loss, pl_module.device, session.stopwatch
            )
        except ValueError:
            self.close()
            raise

    def _check_bands(self) -> None:
        for parameter in self._parameters.values():
            num_values = min(self.request.num_samples, parameter.numel())
            # A vector of few numbers has neither head nor tail; nobody asked for it by rank.
            if isinstance(self.tail[0], int) and parameter.ndim >= 2:
                resolve_band(self.tail, num_values, "tail")
            if self.head != DEFAULT_HEAD and parameter.ndim >= 2:
                resolve_band(self.head, num_values, "head")

    def leave(self, measurement: Any) -> None:
        """Take the hooks off.

        Args:
            measurement: What :meth:`join` returned.
        """
        measurement.remove()

    def failures(self, report: GradientReport) -> Iterator[tuple[str, str, bool]]:
        """The parameters and weights that could not be measured.

        Args:
            report: The report.

        Yields:
            Name, reason, and whether other ranks may not know it.
        """
        for name, spectrum in report.parameters.items():
            if spectrum.failure is not None:
                yield name, spectrum.failure, spectrum.failed_here
        for name, weight in report.weights.items():
            if weight.failure is not None:
                yield f"the weights of {name}", weight.failure, True

    def measured(self, report: GradientReport) -> dict[str, float]:
        """The logged values of each parameter.

        Args:
            report: The report.

        Returns:
            Values by key, without the prefix.
        """
        self._warn_of_remedies()
        rows = {name: self._describe(report.step, spectrum) for name, spectrum in report.parameters.items()}
        self._display.note(report.step, rows)
        values = {f"gradient/{name}/{key}": value for name, row in rows.items() for key, value in row.items()}
        for name, spectrum in report.weights.items():
            values |= {f"weight/{name}/{key}": value for key, value in self._describe_weight(spectrum).items()}
        if self._is_whole_model:
            values["gradient/noise_scale"] = report.noise_scale
        return values

    def _warn_of_remedies(self) -> None:
        measurement = self._measurement
        if measurement is None:
            return
        if measurement.cause is not None:
            self.warn(f"method='auto' loops over samples, because vmap cannot: {measurement.cause}")
        if measurement.halved:
            self.warn(f"ran out of memory at chunk_size={self.request.chunk_size}: now at {measurement.chunk_size}")

    def _describe(self, step: int, spectrum: ParameterSpectrum) -> dict[str, float]:
        head, tail = spectrum.exponent(self.head), spectrum.exponent(self.tail)
        if spectrum.failure is None:
            for exponent in (tail, head):
                if exponent.reason is not None and self._is_worth_a_warning(exponent, spectrum):
                    self.warn(f"at step {step}, {spectrum.name}: NaN, because {exponent.reason}")
        has_values = spectrum.failure is None
        return {
            "alpha_tail": tail.value,
            "alpha_tail_stderr": tail.stderr,
            "r2_tail": tail.r2,
            "alpha_head": head.value,
            "alpha_head_stderr": head.stderr,
            "alpha_tail_centred": spectrum.centred_exponent(self.tail),
            "rankme": float(rankme(spectrum.singular_values)) if has_values else torch.nan,
            "noise_scale": float(spectrum.moments.noise_scale),
            "grad_norm": spectrum.grad_norm,
            "num_samples": float(spectrum.num_samples),
        }

    def _is_worth_a_warning(self, exponent: Exponent, spectrum: ParameterSpectrum) -> bool:
        if isnan(exponent.value):
            # A bias, or a matrix with fewer singular values than the default head, has no band; that is no news.
            is_long = len(spectrum.singular_values) >= min(DEFAULT_HEAD[1], self.request.num_samples)
            return spectrum.is_zero or (is_long and self._parameters[spectrum.name].ndim >= 2)
        return self.request.num_groups > 1

    def _describe_weight(self, spectrum: WeightSpectrum) -> dict[str, float]:
        tail, head = spectrum.exponent(self.tail), spectrum.exponent(self.head)
        return {
            "alpha_tail": tail.value,
            "r2_tail": tail.r2,
            "alpha_head": head.value,
            "rankme": float(rankme(spectrum.singular_values)),
        }

    def lines(self, report: GradientReport) -> dict[str, Line]:
        """The spectra to show.

        Args:
            report: The report.

        Returns:
            Those that were measured.
        """
        return {
            name: Line.of(spectrum.singular_values, self.tail, spectrum.exponent(self.tail).value)
            for name, spectrum in report.parameters.items()
            if spectrum.failure is None
        }

    def title(self, report: GradientReport | None = None) -> str:
        """What is shown.

        Args:
            report: One report, or None for all.

        Returns:
            A heading.
        """
        if report is None:
            return f"gradient spectra, {self.stage}"
        first, last = report.span
        steps = f"step {report.step}" if first == last else f"step {report.step} (rows of steps {first} to {last})"
        return f"per-sample gradients, {self.stage}, {report.method}, {steps}"
