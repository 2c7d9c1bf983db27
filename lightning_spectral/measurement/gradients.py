"""The measurement of per-sample gradients: rows of samples become Grams, exchanged between ranks and decomposed."""

from collections.abc import Callable, Mapping
from functools import partial
from math import isnan
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from typing_extensions import override

from lightning_spectral.capture.engines import is_out_of_memory
from lightning_spectral.capture.kept import Kept
from lightning_spectral.capture.one_line import reason_of
from lightning_spectral.capture.parameters import (
    Weight,
    named_parameters,
    renamed,
    resolve_parameters,
    resolve_parameters_again,
    weights_of,
)
from lightning_spectral.capture.self_check import check_span, rounding
from lightning_spectral.capture.shadow import BatchLoss, LossFunction
from lightning_spectral.functional.estimate import Spectrum
from lightning_spectral.functional.singular import gram, singular_values
from lightning_spectral.measurement.gradient_report import GradientReport, ParameterGradients, decompose_grams
from lightning_spectral.measurement.gradient_request import ROW_DTYPES, GradientRequest
from lightning_spectral.measurement.measurement import Measurement, Scene
from lightning_spectral.measurement.row_store import RowStore
from lightning_spectral.measurement.sharded_parameters import ShardedParameters
from lightning_spectral.measurement.stopwatch import settle
from lightning_spectral.measurement.stretches import groups_of
from lightning_spectral.metrics.collectives import OtherRankError, largest, world_size
from lightning_spectral.metrics.exchange import gram_blocks, gram_share, sum_over_ranks
from lightning_spectral.metrics.layout import Layout, are_sharded, is_distributed
from lightning_spectral.metrics.reduction import gather_numbers

CHECK_EVERY = 10
"""Reports from one self-check to the next."""

LOSS_TOLERANCE = 1e-3
"""Relative difference of a loss between training and the shadow: kernels may differ, compiled ones for example."""

LOSS_TOLERANCE_IN_SHORT = 3e-2

UNLIKE = 1e-2
"""Relative difference between squared norms of rows that ranks with the same data may have by rounding."""

VMAP = "use method='vmap'"


def without_vmap(reason: str) -> str:
    """A reason with a remedy that there is where parameters are sharded."""
    for remedy in (VMAP + ", or choose other parameters", VMAP + ", or 'loop'", VMAP):
        reason = reason.replace(remedy, "choose other parameters")
    return reason


def loss_tolerance(loss: BatchLoss) -> float:
    """Relative difference that rounding alone may make between two evaluations of a loss."""
    return LOSS_TOLERANCE_IN_SHORT if rounding(loss) > LOSS_TOLERANCE else LOSS_TOLERANCE


UNEQUAL_MEAN = 0.05
"""By how much the weights of samples in a mean may miss a sum of one: rounding, not another reduction."""


class GradientMeasurement(Measurement):
    """Keeps a row of each of the last samples before a report, and makes singular values of all ranks' rows.

    How rows come about is up to two subclasses: from training's own backward passes, or from passes at the report.

    Args:
        request: What to measure.
        scene: For what.

    Raises:
        ValueError: For patterns that match nothing, and what the subclass cannot read.
    """

    method: str
    """The engine that makes rows."""
    cause: str | None = None
    """Why ``method="auto"`` fell back to a loop; None if it did not."""
    chunk_size: int | None = None
    """Samples at a time; None until the first report has found out, and where all of a batch are."""
    halved = False
    """Whether fewer samples fit into memory at a time than were tried first."""

    def __init__(self, request: GradientRequest, scene: Scene) -> None:
        self._device = torch.device("cpu") if scene.device.type == "mps" else scene.device
        super().__init__(request, request.num_samples, scene.stopwatch, self._device)
        self.request = request
        self.parameters: dict[str, nn.Parameter] = resolve_parameters(scene.module, request.parameters)
        """Those that are measured, by clean name."""
        self.names = list(self.parameters)
        """Of all that are, or were, measured."""
        self.weights: dict[str, Weight] = {}
        """The weights that layers use, of these parameters, by clean name."""
        self.renamed: dict[str, str] = {}
        """Own names of parameters that are called by the weight that is made of them."""
        self._module = scene.module
        self._absent: dict[str, str] = {}
        self._weight_spectra: dict[str, Spectrum] | None = None
        self._is_finished = False
        layout = Layout.of_world() if scene.layout is None else scene.layout
        self._layout, self._world, self._rank = layout, layout.world, layout.rank
        self._sharded = ShardedParameters(layout)
        share, rest = divmod(request.num_samples, self._world)
        self._store = RowStore(
            sizes={},
            capacity=share + (self._rank < rest),
            dtype=ROW_DTYPES[request.row_dtype],
            device=scene.device,
            keep=request.row_device,
        )
        self._offered = 0
        self._has_seen_samples = False
        self._span: list[int] = []
        self._failures: dict[str, str] = {}
        self._make_loss: Callable[[LossFunction | None], BatchLoss] = scene.make_loss
        self._is_told = scene.loss_fn is not None
        self._num_reports = 0
        self._expected: tuple[float, float] | None = None
        self._was_asked = False
        self.doubts: dict[str, str] = {}
        """Why the rows are not what they are taken for, by the part of the latest self-check that says so."""
        self.checked: dict[str, str] = {}
        """What each part of the latest self-check came to, ``"passed"``, ``"failed"`` or why it was not made."""
        self.weights_ratio = torch.nan
        """Largest over smallest weight of a sample in its batch's loss, by the latest self-check."""
        self.residual = torch.nan
        """Share of a batch's gradient outside the span of its samples' gradients, by the latest self-check."""
        self.losses = (torch.nan, torch.nan)
        """Of a batch, as the shadow has it and as training has it, by the latest self-check."""
        self._take_up()

    @override
    def renew(self) -> None:
        self.parameters, self._absent = resolve_parameters_again(self._module, self.request.parameters, self.names)
        self.names += [name for name in self.parameters if name not in self.names]
        self._take_up()

    def _take_up(self) -> None:
        """Know of the parameters what can be known before the first batch: some are made by it."""
        for name in [name for name, p in self.parameters.items() if p.is_complex()]:
            self._absent[name] = "it is complex, and its gradients are no rows of real numbers"
            del self.parameters[name]
        held = named_parameters(self._module)
        self.weights = weights_of(self._module, {name: held[name] for name in self.names if name in held})
        self.renamed = renamed(self._module, self.parameters)
        made = {name: p for name, p in self.parameters.items() if not is_lazy(p)}
        self._sharded.take_up(self._module, made)
        self._store.sizes.update({name: self._sharded.numel(name, p) for name, p in made.items()})

    @property
    def is_checking(self) -> bool:
        """Whether the report that is being collected is one with a self-check."""
        return self.request.check != "off" and self._num_reports % CHECK_EVERY == 0

    def ask_shadow(self, batch: Any, step: int) -> None:
        """The loss of a batch as a shadow has it, before training asks for it, in the same state."""
        schedule = self.schedule
        belongs = schedule.rows_per_step is not None or (step + 1) % schedule.every_n_steps == 0
        if self.stage != "train" or self._was_asked or not belongs or not self.is_checking:
            return
        self._was_asked = True
        if self._is_sharded():
            return
        if self.request.loss_fn is not None and self._loss_to_check is None:
            self.checked["loss"] = "loss_fn has one of its own"
            return
        try:
            loss = self._make_loss(self._loss_to_check)
            loss.batch_idx = self.batch_idx
            try:
                with loss.isolated(batch), torch.no_grad():
                    value = loss.of_training(batch)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                # A step may differentiate something itself, as a force is an energy's slope.
                with loss.isolated(batch):
                    value = loss.of_training(batch)
            self._expected = value, loss_tolerance(loss)
        except Exception as error:  # for the report to say, where it matters
            self.checked["loss"] = reason_of(error)

    @property
    def _loss_to_check(self) -> LossFunction | None:
        """What the shadow computes to be compared with training's loss; None for what training itself computes."""
        return None

    def _is_sharded(self) -> bool:
        """Whether there can be no shadow; the self-check then says that it was not made."""
        if self._layout.has_replicas or are_sharded(self._module):
            self.checked |= dict.fromkeys(("loss", "span"), "a module whose parameters are sharded cannot be copied")
            return True
        return False

    @override
    def before_backward(self, scale: Callable[[], float], loss: Tensor | None = None) -> None:
        # The first of the batch's, at the weights that the shadow has.
        if self._expected is not None and loss is not None:
            with self.stopwatch.running():
                self.compare(float(loss) / scale())

    def compare(self, found: float) -> None:
        """Compare the shadow's loss of a batch with what training got for it."""
        assert self._expected is not None
        (value, tolerance), self._expected = self._expected, None
        self.losses = value, found
        if abs(value - found) <= tolerance * abs(found) or value == found or isnan(found):
            self.checked["loss"] = "passed"
            self.doubts.pop("loss", None)
            return
        self.checked["loss"] = "failed"
        if self._is_told:
            self.doubts["loss"] = (
                f"training's loss of a batch was {found:.6g}, and loss_fn gives {value:.6g} on a copy of the module in "
                "the same state: have it do what the loop does"
            )
            return
        self.doubts["loss"] = (
            f"training_step gave {found:.6g} for a batch and {value:.6g} on a copy of the module in the same state: "
            "its loss depends on what a copy does not have; give loss_fn"
        )

    def check_span(self, loss: BatchLoss, kept: Kept, batch: Any, rows: Mapping[str, Tensor] | None) -> None:
        """See whether the loss of a batch is a mean of its samples' losses."""
        try:
            names = [name for name in self.parameters if name not in self._failures]
            found = check_span(loss, kept, names, batch, rows)
        except Exception as error:  # a batch that cannot be cut so, or does not fit into memory
            self.checked["span"] = reason_of(error)
            return
        if found is None:
            self.checked["span"] = "too few samples or numbers, none that are finite, or reentrant checkpoints"
            return
        self.weights_ratio, self.residual = found.ratio, found.residual
        failure = found.failure or self._why_of_another_size(found.total)
        self.checked["span"] = "passed" if failure is None else "failed"
        if failure is None:
            self.doubts.pop("span", None)
        else:
            self.doubts["span"] = failure

    def _why_of_another_size(self, total: float) -> str | None:
        """Rows off a backward pass are of their own size only if a mean is a mean, with weights that sum to one."""
        if self.method != "hooks" or self.request.loss_reduction != "mean" or not abs(total - 1) > UNEQUAL_MEAN:
            return None
        return (
            f"the loss of a batch is {total:.3g} times the mean of its samples' losses, for which "
            "loss_reduction='mean' takes it: give loss_reduction='sum' if it is their sum, or method='vmap'"
        )

    def collect(self, batch: Any, step: int) -> None:
        """Take in a batch of a report; whatever it raises is noted as a failure."""
        raise NotImplementedError

    def finish(self, step: int) -> None:
        """Make the rows that are still to be made at a report."""

    def early_gram(self, name: str) -> Tensor | None:
        """The Gram matrix of a parameter whose rows were let go of before the report."""
        return None

    @override
    def remove(self) -> None:
        self.forget()

    @override
    def open(self, batch: Any, step: int, has_right_stage: bool) -> None:
        if has_right_stage and not self._has_seen_samples:
            # Bad input should show early, and stop what would never come to anything.
            with self.stopwatch.running():
                self.samples.cut(batch)
            self._has_seen_samples = True
        if self.is_collecting:
            with self.stopwatch.running():
                try:
                    self.ask_shadow(batch, step)
                    self.collect(batch, step)
                except Exception as error:  # a batch of another kind, no memory for the rows
                    self.fail(error)

    @override
    def close(self) -> None:
        pass

    @override
    def agree_on_rows(self) -> float:
        return float(gather_numbers([self._offered], self._device)[list(self._layout.holders)].sum())

    @override
    def read_weights(self, step: int) -> None:
        if self._is_finished:
            return
        self._is_finished = True
        settle(self._device)
        with self.stopwatch.running():
            self.finish(step)
            if self.doubts and self.request.check == "refuse":
                # What came to nothing by itself has its own reason.
                for name in self.parameters:
                    self._failures.setdefault(name, "; ".join(self.doubts.values()))
            self._num_reports += 1
            self._was_asked, self._expected = False, None
            with torch.inference_mode(False), torch.no_grad():
                self._weight_spectra = self._weights(step) if self.request.weights else {}

    @override
    def make_report(self, step: int) -> None:
        self.read_weights(step)
        with self.stopwatch.running():
            with torch.inference_mode(False), torch.no_grad():
                parameters = self._decompose(step)
                weights = self._weights_of_all(step)
            span = (self._span[0], self._span[-1]) if self._span else (step, step)
            checked = "; ".join(f"{part}: {result}" for part, result in sorted(self.checked.items()))
            self.report = GradientReport.of(step, parameters, weights, self.method, span, checked, self.weights_ratio)
            self.reset()

    @override
    def missing_report(self, step: int, reason: str) -> GradientReport:
        missing = {name: ParameterGradients.missing(name, 0, reason, True) for name in self.names}
        weights = {name: Spectrum.missing(reason, name=name, step=step) for name in self._matrices()}
        return GradientReport.of(step, missing, weights if self.request.weights else {}, self.method, (step, step))

    @override
    def reset(self) -> None:
        super().reset()
        self.forget()

    def forget(self) -> None:
        """Let go of all samples and rows."""
        self._span, self._failures = [], {}
        self._offered = 0
        self._weight_spectra, self._is_finished = None, False
        self._sharded.forget()
        self._store.clear()

    def fail(self, error: BaseException) -> None:
        """All parameters are NaN in this report, for one reason."""
        self._failures.update(dict.fromkeys(self.parameters, reason_of(error)))

    def _decompose(self, step: int) -> dict[str, ParameterGradients]:
        names = self.names
        self._failures |= self._absent
        good = [int(name not in self._failures) for name in names]
        # The numbers that travel are integers.
        ratio = 0 if isnan(self.weights_ratio) else int(min(self.weights_ratio, 1e9) * 2**20)
        of_ranks = gather_numbers([self._store.count, self._offered, ratio, *good], self._device)
        if world_size() > 1:
            of_all = of_ranks[:, 2]
            self.weights_ratio = float(of_all.max()) / 2**20 if bool((of_all > 0).any()) else torch.nan
        holders = list(self._layout.holders)
        counts = [int(count) for count in of_ranks[holders, 0]]
        if self.steps_collected:
            self.schedule.rows_per_step = float(of_ranks[holders, 1].sum()) / self.steps_collected
        num_rows = sum(counts)
        missing = ParameterGradients.missing
        found = {}
        for name, is_good in zip(names, of_ranks[:, 3:].min(0).values.tolist(), strict=True):
            if not is_good:
                elsewhere = self.together.reasons(self._failures.get(name))
                reason = self._failures.get(name, elsewhere)
                found[name] = missing(name, num_rows, reason, name in self._failures)
        wanted = [name for name in names if name not in found]
        if num_rows == 0:
            found |= {name: missing(name, 0, "no sample was seen", False) for name in wanted}
        else:
            self._check_replicas(of_ranks[:, 0])
            shares: dict[str, Tensor] = {}
            for name in wanted:
                try:
                    shares[name] = self.together.attempt(partial(self._share, name, counts))
                except Exception as error:  # no memory, most likely
                    if self.together.ends(error):
                        raise
                    found[name] = missing(name, num_rows, reason_of(error), not isinstance(error, OtherRankError))
            for name in self.together.attempt(lambda: self._unlike(shares)):
                del shares[name]
                reason = "its rows differ between ranks that hold the same data: choose other parameters"
                found[name] = missing(name, num_rows, reason, True)
            if shares:
                try:
                    found |= self.together.attempt(lambda: self._solve(shares, counts, step))
                except Exception as error:
                    if self.together.ends(error):
                        raise
                    is_here = not isinstance(error, OtherRankError)
                    found |= {name: missing(name, num_rows, reason_of(error), is_here) for name in shares}
        for name, reason in self._absent.items():
            found[name] = ParameterGradients.absent(name, reason)
        return {name: found[name] for name in names}

    def _share(self, name: str, counts: list[int]) -> Tensor:
        early = self.early_gram(name)
        return self._gram(self._store.take(name), counts) if early is None else early

    def _gram(self, rows: Tensor, counts: list[int]) -> Tensor:
        if self._layout.has_replicas and len(self._layout.peers) == 1:
            return gram_blocks(rows, self._device)
        return gram_share(rows, counts, self._device, group=self._layout.data_group)

    def _check_replicas(self, of_ranks: Tensor) -> None:
        """Of ranks that hold the same data each must have read as many samples: their columns are put together."""
        layout = self._layout
        if bool((of_ranks != of_ranks[list(layout.holders)][list(layout.data_ranks)]).any()):
            raise ValueError("ranks that hold the same data have read unequally many samples")

    def _unlike(self, shares: Mapping[str, Tensor]) -> list[str]:
        """Parameters that ranks with the same data hold whole, each with other rows: a collective."""
        names = [name for name in shares if name not in self._sharded]
        if not self._layout.has_replicas or not names:
            return []
        squares = torch.stack([shares[name].diagonal() for name in names])
        highest, lowest = largest(torch.stack([squares, -squares]), self._layout.replica_group)
        is_alike = (highest + lowest).amax(1) <= UNLIKE * highest.amax(1)
        flags = [int(not alike) for alike in (is_alike | ~highest.isfinite().all(1)).tolist()]
        found = gather_numbers(flags, self._device).amax(0)
        return [name for name, flag in zip(names, found.tolist(), strict=True) if flag]

    def _solve(self, shares: dict[str, Tensor], counts: list[int], step: int) -> dict[str, ParameterGradients]:
        if not self._layout.counts:
            # Columns that others have, too, are theirs to add.
            shares = {name: share * (name in self._sharded) for name, share in shares.items()}
        grams = dict(zip(shares, sum_over_ranks(torch.stack(list(shares.values()))), strict=True))
        num_groups = self.request.num_groups
        of_ranks = (groups_of(count, num_groups, rank, self._world) for rank, count in enumerate(counts))
        groups = torch.tensor([group for of_rank in of_ranks for group in of_rank])
        sizes = {name: self.parameters[name].numel() for name in shares}
        return decompose_grams(grams, sizes, groups.to(self._device), num_groups, self._store.dtype, step)

    def _weights(self, step: int) -> dict[str, Spectrum]:
        """Singular values of the matrices among the parameters; those of one shape are solved together."""
        matrices, spectra = {}, {}
        for name in self._matrices():
            try:
                matrices[name] = self._matrix(name)
            except Exception as error:  # of whatever kind a weight, or what makes it, may be
                spectra[name] = Spectrum.missing(reason_of(error), corrects_bias=False, name=name, step=step)
        by_shape: dict[torch.Size, list[str]] = {}
        for name, matrix in matrices.items():
            by_shape.setdefault(matrix.shape, []).append(name)
        for (height, width), names in by_shape.items():
            failure = None
            try:
                small = [gram(matrices[name] if height <= width else matrices[name].mT) for name in names]
                values = singular_values(torch.stack(small)).cpu()
            except RuntimeError as error:  # out of memory, most likely
                values = torch.full((len(names), min(height, width)), torch.nan, dtype=torch.float64)
                failure = reason_of(error)
            for name, row in zip(names, values, strict=True):
                facts: dict[str, Any] = {"failure": failure, "failed_here": failure is not None, "dtype": "float64"}
                spectra[name] = Spectrum(row, corrects_bias=False, name=name, step=step, **facts)
        return {name: spectra[name] for name in self._matrices()}

    def _weights_of_all(self, step: int) -> dict[str, Spectrum]:
        """The spectra of weights, those missing that some rank, of all that have the same, could not have."""
        weights = dict(self._weight_spectra or {})
        if self._world > 1 and weights:
            num_failed = gather_numbers([int(one.failure is not None) for one in weights.values()], self._device).sum(0)
            for name in [name for name, number in zip(weights, num_failed.tolist(), strict=True) if number]:
                reason = self.together.reasons(weights[name].failure)
                if weights[name].failure is None:
                    weights[name] = Spectrum.missing(reason, corrects_bias=False, name=name, step=step)
        return weights

    def _matrices(self) -> list[str]:
        return [name for name, weight in self.weights.items() if weight.ndim >= 2]

    def _matrix(self, name: str) -> Tensor:
        weight = self.weights[name].compute().detach()
        if is_distributed(weight):
            raise ValueError("it is sharded over ranks, and weights=True needs it whole")
        if weight.is_complex() or weight.layout is not torch.strided:
            raise ValueError("it is no dense tensor of real numbers")
        return weight.flatten(1)
