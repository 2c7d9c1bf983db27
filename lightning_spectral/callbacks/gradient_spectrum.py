"""The callback that watches the singular values of per-sample gradients."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import isnan, nan
from typing import Any, Literal

from torch import nn
from torch.nn.parameter import is_lazy
from typing_extensions import override

from lightning_spectral.advice import BatchNoise, Fact
from lightning_spectral.callbacks.bands import DEFAULT_HEAD, Bands
from lightning_spectral.callbacks.display import Display
from lightning_spectral.callbacks.host import Host
from lightning_spectral.callbacks.smoothed_noise import SmoothedNoise
from lightning_spectral.callbacks.spectral_callback import SpectralCallback
from lightning_spectral.capture.batch import load_cutter
from lightning_spectral.capture.parameters import trainable_parameters
from lightning_spectral.capture.shadow import load_loss
from lightning_spectral.functional.estimate import Exponent, Spectrum
from lightning_spectral.functional.noise import NoiseSums
from lightning_spectral.measurement import (
    GradientMeasurement,
    GradientReport,
    GradientRequest,
    ParameterGradients,
    Session,
)
from lightning_spectral.recording import RunRecorder, StepSize
from lightning_spectral.terminal import number, with_error, with_interval

WEIGHTS_RATIO = "gradient/sample_weights_ratio"

WHOLE_MODEL = ""
"""What stands for a parameter's name where all are meant."""

MEASURED = "*"
"""What stands for one where those are meant that are measured, together."""

NOISE_QUANTITIES = ("noise_scale", "noise_scale_low", "noise_scale_high", "noise_scale_smoothed")

SHARDING = ("FSDP", "DeepSpeed")
"""Parts of the names of Lightning's strategies that leave no rank a whole parameter, and no layer its own."""


class GradientSpectrum(SpectralCallback[GradientReport]):
    r"""Logs the singular values of per-sample gradients of chosen weights while a model trains.

    The gradient of each sample's own loss is a row of an N x P matrix; its singular values, neither centred nor scaled
    as in *Spectral Lens*, come from the N x N Gram matrix in float64. Each report logs, per parameter, the power-law
    exponents of their head and tail with jackknife errors, RankMe, the simple gradient noise scale and the norm of the
    mean gradient; TensorBoard also gets histograms of log10 singular values, a log-log figure and a chart with all
    parameters. ``fit`` ends with a table of the first report and the last.

    A sample's own loss is that of ``training_step`` on a batch of one with the index of its batch and the step that it
    began at, called on a shadow of the module (a copy, parameters included, without logging), or ``loss_fn``. What a
    step reaches beside the copy, globals, generators or ``self.trainer.datamodule`` say, is put back; one that draws
    from an iterator is refused. Under ``stage="train"`` the module is in training mode (dropout draws a fresh mask for
    each sample, the run's random stream stays where it is), under ``stage="validate"`` in evaluation mode.

    **Methods.** ``"vmap"`` vectorises over samples (:mod:`torch.func`); ``"loop"`` makes one backward pass a sample, of
    all parameters together, and works wherever autograd works; ``"auto"`` takes vmap, else the loop, with one warning
    that names the cause. All samples of a report then meet the same weights, those after its step, and whatever else a
    step writes, buffers and attributes (a queue of keys, a carried state), as that step has left it. ``"hooks"`` reads
    linear layers and embeddings, where the weight is the parameter itself. In training it adds no pass at all: rows are
    read off the backward passes of the last steps before a report, at weights that move with these steps (the figure's
    title has the span); loss scaling, accumulation and the mean over the batch are undone. In every report the rows of
    a batch are compared with its gradient, so that what reaches a weight by other ways than its layers, a penalty for
    example, is NaN with the reason. Under manual optimisation rows are of the loss that ``backward`` is called on, by
    ``manual_backward`` or by itself: one that ``training_step`` divides before has a ``grad_norm`` as many times
    smaller, and all else as it is; a ``loss_fn``, which is then for the self-check, must divide it, too. Where samples
    weigh differently in the batch's mean, its rows differ from those of the other methods: under a mean over tokens,
    the row of sample b with n_b of them is :math:`n_b B / \sum n` times its own gradient. In validation it makes one
    forward and backward pass for all. Where parameters are sharded over ranks, by ``fully_shard`` or tensor
    parallelism, it is the only method there is, and what ``"auto"`` takes, with one warning.

    **Self-check.** At the first report and every tenth after two things are looked at. The shadow's loss on a whole
    batch must equal what ``training_step`` returned for it (not by a ``loss_fn``, under manual optimisation or in
    validation; by ``"hooks"`` under manual optimisation a ``loss_fn`` must equal what ``manual_backward`` is called on,
    if that is once a batch). And the gradient of up to 64 samples together must lie in the span of their own gradients,
    and in that of the gradients of two halves of them, up to a thousandth of its norm: true for every loss that is a
    weighted mean over samples, false for losses between samples (contrastive ones, batch statistics) and where a sample
    is not what it was taken for. Their weights, where they are known, must add up to one, as a mean's do, or to their
    number, a sum's; those of a root of a mean do not. Of networks that give one number for a sample the halves alone
    tell. So they do by ``"hooks"`` where a step fails for one sample, as batch norm's does; a step that fails for fewer
    samples than a batch, though not for the batch, is not seen to be a mean, and counts as none. A sample alone whose
    gradient is not finite counts as one without (nothing but padding, in a mean over tokens). It costs one forward pass
    of the batch and two passes of these samples; by ``"hooks"``, and where a step draws random numbers, of at most 16,
    and one of each. It is not made of fewer than two samples, where their gradients span fewer than four dimensions (a
    head of two logits and three inputs), under checkpointing that is reentrant or draws random numbers, where no copy
    can have the loss or memory is short; nor that of halves where ``samples`` cuts. By ``"hooks"`` passes of fewer
    samples also tell an axis of samples from one of positions, or of an expert's tokens, of which there may be as many;
    where none can be made, ``batch_dim`` must say which it is. The record says which parts ran, or why not.
    ``gradient/sample_weights_ratio`` is the largest over the smallest weight found: 1 if samples weigh the same; under
    a mean over tokens, the longest over the shortest sample. Far from 1 the mean of the rows is not the gradient that
    training follows, and by ``"hooks"`` rows differ from those of the other methods by these weights. NaN if weights
    are not known, or some are not positive.

    Values lie under ``gradient/{parameter}/``: ``alpha_tail``, ``alpha_tail_stderr``, ``r2_tail``, ``alpha_head``,
    ``alpha_head_stderr``, ``alpha_tail_centred`` (of the rows about their mean), ``rankme`` (of singular values),
    ``noise_scale`` (samples) with ``noise_scale_low``, ``noise_scale_high`` and ``noise_scale_smoothed``,
    ``grad_norm``, ``num_samples``; with ``gradient/sample_weights_ratio``, ``gradient/noise_scale`` and its three
    others of the whole model if all trainable parameters are chosen, ``gradient/failed`` and ``spectral/seconds``. With
    ``weights``, also ``weight/{parameter}/`` ``alpha_tail``, ``r2_tail``, ``alpha_head`` and ``rankme`` of the singular
    values of each weight itself (of a convolution's, output channels by the rest). The exponents depend on N: compare
    runs at equal ``num_samples``.

    **Noise scale.** The trace of the covariance of samples' gradients over the squared norm of their mean: the batch,
    in samples, whose gradient is as much noise as signal (times the tokens of a sample, in tokens). Both parts are
    estimated without bias, and their ratio scatters: where ``num_samples`` is far below it, half of the estimates are
    ``inf``, of samples that agree no more than noise does. So read it with its 80% interval, whose ``low`` is finite
    and whose ``high`` is ``inf`` where a gradient of zero cannot be excluded; it needs ``num_groups`` of three or more
    (:func:`lightning_spectral.functional.noise_interval.noise_interval`). ``smoothed`` is the ratio of exponential
    means of both parts over the reports so far, over a resume too; a failed report is passed over, and NaN itself.
    Where gradients shrink fast, as at the start, their larger past outweighs the present in it. Interval and
    ``smoothed`` take products of samples of different groups alone, ``noise_scale`` those of all; the interval is
    widened to hold it. Over rows in file order, whose neighbours are alike, ``noise_scale`` and ``low`` are too small,
    as their likeness passes for signal: there go by ``smoothed`` and ``high``. The whole
    model's come from the parts summed over parameters, so that the interval holds what parameters have in common. By
    ``"hooks"`` in training they are those of the rows as they are: of samples weighed as the batch's mean weighs them,
    at weights that move over the steps that are read, whose drift counts as noise.

    **Changing models.** Parameters are looked up again for each report: what is trained by then is measured, and what
    is frozen, or gone, is NaN under the keys it has. A parameter that a layer makes its weight of (``fc.weight_orig``
    under pruning and spectral norm, ``original`` of a parametrisation) goes by the name of the weight, ``fc.weight``,
    with a warning that says so: its gradient is that of the parameter, which is what is trained; where there are
    several for a weight (weight norm), each has its own name. ``weights`` are always those that layers use. With
    ``WeightAveraging``, whichever callback comes first, ``stage="validate"`` reads gradients and weights at the
    averaged weights, on which validation runs, and ``stage="train"`` at those that are trained.

    **Cost.** vmap and loop: about a forward and backward pass of ``num_samples`` samples every ``every_n_steps`` steps.
    Memory: a copy of the module while a report is made, rows of N x P numbers on each of W ranks, N = ``num_samples`` /
    W, P summed over parameters (``row_device`` says where), and for vmap about one and a half times what autograd saves
    for ``chunk_size`` samples and their gradients (:func:`lightning_spectral.capture.per_sample.fill_rows` has the
    formula).

    Args:
        parameters: Glob patterns over parameter names, ``"all"`` for every trainable parameter, None for the attention
            output projections of five blocks spread evenly over the depth, as in *Spectral Lens*.
        every_n_steps: Optimizer steps between reports; between measured validation runs at the least.
        stage: ``"train"`` takes the last training samples before a report, ``"validate"`` those of whole batches
            spread over a validation run, the first where its length is not known.
        num_samples: Samples N per report over all ranks; 512 in *Spectral Lens*.
        method: How per-sample gradients are had.
        chunk_size: Samples at a time, for all methods but ``"loop"``; None for as many as fit into a quarter of the
            free memory and are of use. Halved when memory runs out.
        loss_fn: ``loss_fn(module, batch) -> loss``, or its import path; None for ``training_step``. By ``"hooks"`` in
            training it is of use under manual optimisation alone, for the self-check.
        loss_reduction: For ``"hooks"``: whether the loss of a batch is the mean over its samples or their sum. The
            self-check refuses a sum that is taken for a mean, for rows would be of another size.
        weights: Log the spectra of the weights themselves, too.
        head: Band of the head exponent: two ints, 1-based inclusive ranks, or two fractions of min(N, P).
        tail: Band of the tail exponent, likewise; (30, 150) is that of the released scripts.
        num_groups: Groups of samples for the delete-a-group jackknife; 1 for no error bars.
        prefix: Put before every key, to tell two of these callbacks apart.
        row_dtype: In which rows are kept. ``"bfloat16"`` halves their memory; singular values below 4e-3 of the typical
            gradient norm are then rounding, and zero.
        row_device: Where rows are kept: on the ``"device"`` that makes them, the ``"cpu"``, or by ``"auto"`` on the
            device if they take at most a quarter of its free memory, else on the CPU. The Gram matrix is then made of
            blocks of their columns; spectra are the same. ``probe`` shows what they take, and the budget.
        dataloader_idx: Which validation loader to read.
        batch_dim: Axis of the samples in the tensors of a batch; None for 0, unless another fits better.
        samples: ``samples(batch) -> list of batches of one``, or its import path, for batches without such an axis;
            with ``"auto"`` and ``"loop"``.
        noise_decay: Weight of a report in ``noise_scale_smoothed`` relative to the next, from 0 up to 1: at the default
            of 0.9 it is a mean over about ten reports.
        check: What happens where the self-check fails: ``"refuse"`` logs NaN with the reason, ``"warn"`` the numbers
            with a warning; ``"off"`` checks nothing.

    Raises:
        ValueError: For arguments out of range; at the start of ``fit`` for patterns that match nothing, keys that two
            callbacks would write, bands beyond the number of singular values, a module without a loss for one sample,
            parameters that ``"hooks"`` cannot read, strategies that flatten parameters, and other methods and stages
            than ``"hooks"`` in training where parameters are sharded; in the first batch if it cannot be told where its
            samples are.

    References:
        Liu, Paquette, Sous, *Spectral Lens: Activation and Gradient Spectra as Diagnostics of LLM Optimization*,
        arXiv 2605.05683 (2026); McCandlish et al., *An Empirical Model of Large-Batch Training*, arXiv 1812.06162
        (2018) for the noise scale.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[GradientSpectrum(every_n_steps=100, method="hooks")], logger=False)
    """

    kind = "gradient"
    quantities = (
        "alpha_tail",
        "alpha_tail_stderr",
        "r2_tail",
        "alpha_head",
        "alpha_head_stderr",
        "alpha_tail_centred",
        "rankme",
        *NOISE_QUANTITIES,
        "grad_norm",
        "num_samples",
    )
    headlines = ("tokens_in_batch", "tokens_in_noise_scale")
    weight_quantities = ("alpha_tail", "r2_tail", "alpha_head", "rankme")
    measurement: GradientMeasurement | None

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
        row_device: Literal["auto", "device", "cpu"] = "auto",
        dataloader_idx: int = 0,
        batch_dim: int | None = None,
        samples: str | Callable[[Any], Sequence[Any]] | None = None,
        check: Literal["refuse", "warn", "off"] = "refuse",
        noise_decay: float = 0.9,
    ) -> None:
        if isinstance(noise_decay, bool) or not isinstance(noise_decay, (int, float)) or not 0 <= noise_decay < 1:
            raise ValueError(f"noise_decay must be from 0 up to 1, got {noise_decay!r}: 0.9 averages about ten reports")
        self.request = GradientRequest(
            stage=stage,
            every_n_steps=every_n_steps,
            num_samples=num_samples,
            method=method,
            chunk_size=chunk_size,
            loss_reduction=loss_reduction,
            weights=weights,
            num_groups=num_groups,
            row_dtype=row_dtype,
            row_device=row_device,
            dataloader_idx=dataloader_idx,
            batch_dim=batch_dim,
            samples=load_cutter(samples),
            parameters=tuple(parameters) if isinstance(parameters, list) else parameters,  # type: ignore[arg-type]
            loss_fn=load_loss(loss_fn),
            check=check,
        )
        super().__init__(self.request, prefix)
        self.parameters = parameters
        self.bands = Bands.of(head, tail)
        self._is_whole_model = False
        self._has_whole_key = False
        self._weights: list[str] = []
        self._unchecked: list[str] = []
        self._smoothed = SmoothedNoise(float(noise_decay))
        self._last_noise: dict[str, Any] = {}
        self._last_smoothed = nan
        self.display = Display(
            self.kind,
            charts={name: [name] for name in ("alpha_tail", "alpha_head", "rankme", "noise_scale", "grad_norm")},
            columns={
                "alpha_tail": with_error("alpha_tail", 3),
                "r2": number("r2_tail", 3),
                "alpha_head": number("alpha_head", 3),
                "RankMe": number("rankme", 1),
                "noise scale": with_interval("noise_scale"),
                "norm": number("grad_norm", 4),
                "samples": number("num_samples", 0),
            },
            category="gradient spectra",
        )

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(parameters=self.parameters, stage=self.stage, prefix=self.prefix)

    @override
    def keys(self) -> list[str]:
        keys = [f"gradient/{name}/{quantity}" for name in self.names for quantity in self.quantities]
        if self.request.weights:
            keys += [f"weight/{name}/{quantity}" for name in self._weights for quantity in self.weight_quantities]
        if self._has_whole_key:
            keys += [f"gradient/{quantity}" for quantity in NOISE_QUANTITIES]
        return [*keys, WEIGHTS_RATIO, "gradient/failed"]

    @override
    def settings(self) -> dict[str, Any]:
        return super().settings() | {"parameters": self.names} | self.bands.settings()

    @override
    def join(self, host: Host) -> Session[RunRecorder]:
        strategy = host.strategy
        if any(word in strategy for word in SHARDING):
            raise ValueError(
                f"strategy must leave each rank whole parameters, got {strategy}: use 'ddp', or "
                "ModelParallelStrategy with fully_shard"
            )
        return super().join(host)

    @override
    def watch(self, module: nn.Module) -> list[str]:
        assert self.measurement is not None
        self._has_whole_key = False
        self._weights = []
        self._see(module)
        self._unchecked = list(self.measurement.names)
        self.check_early()
        return list(self.measurement.names)

    def _see(self, module: nn.Module) -> None:
        """Look at what is measured now; keys that have been there stay."""
        assert self.measurement is not None
        parameters, weights = self.measurement.parameters, self.measurement.weights
        trained = trainable_parameters(module)
        # By name, too: fully_shard puts another tensor in a parameter's place while its layer runs.
        is_whole = trained.keys() == parameters.keys()
        self._is_whole_model = is_whole or {id(p) for p in trained.values()} == {id(p) for p in parameters.values()}
        self._has_whole_key |= self._is_whole_model
        new = [name for name, weight in weights.items() if weight.ndim >= 2 and name not in self._weights]
        self._weights = [*self._weights, *new]

    @override
    def check_early(self) -> None:
        parameters = {} if self.measurement is None else self.measurement.parameters
        for name in list(self._unchecked):
            parameter = parameters.get(name)
            if parameter is not None and is_lazy(parameter):
                continue  # the first batch makes it
            self._unchecked.remove(name)
            # A vector of few numbers has neither head nor tail; nobody asked for it by rank.
            if parameter is not None and parameter.ndim >= 2:
                self.bands.check(min(self.request.num_samples, parameter.numel()))

    @override
    def follow(self, module: nn.Module) -> None:
        assert self.measurement is not None
        self._see(module)
        self.join_names([name for name in self.measurement.names if name not in self.names])
        called = self.measurement.renamed
        if called:
            name, own = next(iter(called.items()))
            others = f" and {len(called) - 1} others likewise" if len(called) > 1 else ""
            self.warn(
                f"calls the gradient of {own} by {name}, the weight that is made of it{others}; spectra of weights are "
                "those of what the layer uses"
            )

    @override
    def failures(self, report: GradientReport) -> Iterator[tuple[str, Spectrum]]:
        yield from super().failures(report)
        for name, weight in report.spectra["weight"].items():
            if weight.failure is not None and name in self._weights:
                yield f"the weights of {name}", weight

    @override
    def measured(self, report: GradientReport) -> dict[str, float]:
        self._warn_of_remedies()
        rows = {name: self._describe(report.parameters[name]) for name in self.names}
        assert self.display is not None
        self.display.note(report.step, rows)
        values = {f"gradient/{name}/{key}": value for name, row in rows.items() for key, value in row.items()}
        for name in self._weights if self.request.weights else ():
            # One that nothing is left of keeps its keys.
            nothing = Spectrum.missing("the model has no such weight any more")
            spectrum = report.spectra["weight"].get(name, nothing)
            values |= {f"weight/{name}/{key}": value for key, value in self._describe_weight(spectrum).items()}
        values[WEIGHTS_RATIO] = report.sample_weights_ratio
        if self._has_whole_key:
            whole = report.noise if self._is_whole_model else NoiseSums.missing()
            values |= {f"gradient/{key}": value for key, value in self._noise(WHOLE_MODEL, whole).items()}
        self._note_noise(report, values["gradient/noise_scale_smoothed"] if self._is_whole_model else None)
        return values

    def _note_noise(self, report: GradientReport, smoothed: float | None) -> None:
        """Remember the noise scale of all that is measured; its smoothed one is known where that is the whole model."""
        together = report.noise
        interval = together.interval
        self._last_noise = {
            "scale": float(together.moments_between.noise_scale),  # of the pairs that the interval is of
            "low": float(interval.low),
            "high": float(interval.high),
            "num_parameters": None if self._is_whole_model else len(report.parameters),
            "step": report.step,
        }
        self._last_smoothed = self._smoothed.update(MEASURED, together) if smoothed is None else smoothed

    @override
    def headline(self) -> dict[str, float]:
        size = self._step_size
        noise_scale = self._last_smoothed * size.tokens_per_sample
        return {"tokens_in_batch": size.tokens, "tokens_in_noise_scale": noise_scale}

    @property
    def _step_size(self) -> StepSize:
        return StepSize(nan, nan) if self.session is None else self.session.recorder.step_size

    @override
    def facts(self) -> Iterable[Fact]:
        if self._last_noise:
            size = self._step_size
            yield BatchNoise(
                prefix=self.prefix,
                batch=size.samples,
                tokens_per_sample=size.tokens_per_sample,
                **self._last_noise,
            )

    def _warn_of_remedies(self) -> None:
        measurement = self.measurement
        if measurement is None:
            return
        if self.request.method == "auto" and measurement.method == "hooks":
            self.warn("method='auto' reads training's own backward passes, as 'hooks' does: parameters are sharded")
        if measurement.cause is not None:
            self.warn(f"method='auto' loops over samples, because vmap cannot: {measurement.cause}")
        if self.request.check == "warn":
            for doubt in measurement.check.doubts.values():
                self.warn(f"logs numbers that may mean nothing: {doubt}", on_this_rank=True)
        if measurement.halved:
            self.warn(f"ran out of memory at chunk_size={self.request.chunk_size}: now at {measurement.chunk_size}")

    def _describe(self, found: ParameterGradients) -> dict[str, float]:
        spectrum = found.spectrum
        head, tail = spectrum.exponent(self.bands.head), spectrum.exponent(self.bands.tail)
        centred = found.centred.exponent(self.bands.tail)
        if spectrum.failure is None:
            for exponent in (tail, head):
                if exponent.reason is not None and self._is_worth_a_warning(exponent, spectrum):
                    self.warn(f"at step {spectrum.step}, {spectrum.name}: NaN, because {exponent.reason}")
            if isnan(centred.value) and not isnan(tail.value):  # n rows about their mean span a dimension less
                self.warn(f"at step {spectrum.step}, {spectrum.name}: alpha_tail_centred NaN, because {centred.reason}")
        return {
            "alpha_tail": tail.value,
            "alpha_tail_stderr": tail.stderr,
            "r2_tail": tail.r2,
            "alpha_head": head.value,
            "alpha_head_stderr": head.stderr,
            "alpha_tail_centred": centred.value,
            "rankme": spectrum.rankme().value,
            **self._noise(spectrum.name, found.noise),
            "grad_norm": found.grad_norm,
            "num_samples": float(spectrum.count),
        }

    def _noise(self, name: str, sums: NoiseSums) -> dict[str, float]:
        interval = sums.interval
        numbers = (
            float(sums.noise_scale),
            float(interval.low),
            float(interval.high),
            self._smoothed.update(name, sums),
        )
        return dict(zip(NOISE_QUANTITIES, numbers, strict=True))

    @override
    def summary(self) -> dict[str, Any]:
        return {**super().summary(), "noise": self._smoothed.state(), "last_noise": self._last_noise}

    @override
    def restore(self, summary: dict[str, Any]) -> None:
        super().restore(summary)
        self._smoothed.restore(summary.get("noise", {}))
        self._last_noise = summary.get("last_noise", {})

    def _is_worth_a_warning(self, exponent: Exponent, spectrum: Spectrum) -> bool:
        if isnan(exponent.value):
            # A bias, or a matrix with fewer singular values than the default head, has no band; that is no news.
            is_long = len(spectrum.values) >= min(DEFAULT_HEAD[1], self.request.num_samples)
            return spectrum.is_zero or (is_long and self._is_matrix(spectrum.name))
        return self.request.num_groups > 1

    def _is_matrix(self, name: str) -> bool:
        parameter = None if self.measurement is None else self.measurement.parameters.get(name)
        return parameter is not None and parameter.ndim >= 2

    def _describe_weight(self, spectrum: Spectrum) -> dict[str, float]:
        tail, head = spectrum.exponent(self.bands.tail), spectrum.exponent(self.bands.head)
        for exponent in (tail, head):
            is_long = len(spectrum.values) >= DEFAULT_HEAD[1]
            if spectrum.failure is None and isnan(exponent.value) and is_long:
                self.warn(f"at step {spectrum.step}, the weights of {spectrum.name}: NaN, because {exponent.reason}")
        return {
            "alpha_tail": tail.value,
            "r2_tail": tail.r2,
            "alpha_head": head.value,
            "rankme": spectrum.rankme().value,
        }

    @override
    def fits(self, report: GradientReport) -> Mapping[str, tuple[Spectrum, Exponent]]:
        spectra = self.spectra(report).items()
        return {name: (one, one.exponent(self.bands.tail)) for name, one in spectra if one.failure is None}

    @override
    def title(self, report: GradientReport | None = None) -> str:
        if report is None:
            return f"gradient spectra, {self.source}"
        first, last = report.span
        steps = f"step {report.step}" if first == last else f"step {report.step} (rows of steps {first} to {last})"
        return f"per-sample gradients, {self.source}, {report.method}, {steps}"
