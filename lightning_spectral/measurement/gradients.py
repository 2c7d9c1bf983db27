"""The measurement of per-sample gradients: rows of samples become Grams, exchanged between ranks and decomposed."""

from collections.abc import Callable, Mapping
from functools import partial
from math import isnan
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from typing_extensions import override

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
from lightning_spectral.capture.shadow import BatchLoss, LossFunction
from lightning_spectral.functional.estimate import Spectrum
from lightning_spectral.measurement.gradient_check import GradientCheck
from lightning_spectral.measurement.gradient_report import GradientReport, ParameterGradients, decompose_grams
from lightning_spectral.measurement.gradient_request import ROW_DTYPES, GradientRequest
from lightning_spectral.measurement.measurement import Measurement, Scene
from lightning_spectral.measurement.row_store import RowStore
from lightning_spectral.measurement.sharded_parameters import ShardedParameters
from lightning_spectral.measurement.stopwatch import settle
from lightning_spectral.measurement.stretches import groups_of
from lightning_spectral.measurement.weight_spectra import matrices_of, weight_spectra
from lightning_spectral.metrics.collectives import OtherRankError, largest, world_size
from lightning_spectral.metrics.exchange import gram_blocks, gram_share, sum_over_ranks
from lightning_spectral.metrics.layout import Layout, are_sharded
from lightning_spectral.metrics.reduction import gather_numbers

UNLIKE = 1e-2
"""Relative difference between squared norms of rows that ranks with the same data may have by rounding."""

VMAP = "use method='vmap'"


def without_vmap(reason: str) -> str:
    """A reason with a remedy that there is where parameters are sharded."""
    for remedy in (VMAP + ", or choose other parameters", VMAP + ", or 'loop'", VMAP):
        reason = reason.replace(remedy, "choose other parameters")
    return reason


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
        self.check = GradientCheck(request.check, scene.loss_fn is not None)
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

    def ask_shadow(self, batch: Any, step: int) -> None:
        """The loss of a batch as a shadow has it, before training asks for it, in the same state."""
        schedule, check = self.schedule, self.check
        belongs = schedule.rows_per_step is not None or (step + 1) % schedule.every_n_steps == 0
        if self.stage != "train" or check.was_asked or not belongs or not check.is_due:
            return
        check.was_asked = True
        if self._is_sharded():
            return
        if self.request.loss_fn is not None and self._loss_to_check is None:
            check.leave_out("loss_fn has one of its own", "loss")
            return
        check.ask(lambda: self._make_loss(self._loss_to_check), batch, self.batch_idx)

    @property
    def _loss_to_check(self) -> LossFunction | None:
        """What the shadow computes to be compared with training's loss; None for what training itself computes."""
        return None

    def _is_sharded(self) -> bool:
        """Whether there can be no shadow; the self-check then says that it was not made."""
        if self._layout.has_replicas or are_sharded(self._module):
            self.check.leave_out("a module whose parameters are sharded cannot be copied")
            return True
        return False

    @override
    def before_backward(self, scale: Callable[[], float], loss: Tensor | None = None) -> None:
        # The first of the batch's, at the weights that the shadow has.
        if self.check.awaits_loss and loss is not None:
            with self.stopwatch.running():
                self.check.compare(float(loss) / scale())

    def look_at_span(
        self, loss: BatchLoss, kept: Kept, batch: Any, rows: Mapping[str, Tensor] | None, has_run: bool
    ) -> None:
        """See whether the loss of a batch is a mean of its samples' losses."""
        names = [name for name in self.parameters if name not in self._failures]
        is_scaled_as_mean = self.method == "hooks" and self.request.loss_reduction == "mean"
        self.check.look_at_span(loss, kept, names, batch, rows, is_scaled_as_mean, has_run)

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
            if reason := self.check.refuses:
                # What came to nothing by itself has its own reason.
                for name in self.parameters:
                    self._failures.setdefault(name, reason)
            self.check.end_report()
            with torch.inference_mode(False), torch.no_grad():
                self._weight_spectra = weight_spectra(self.weights, step) if self.request.weights else {}

    @override
    def make_report(self, step: int) -> None:
        self.read_weights(step)
        with self.stopwatch.running():
            with torch.inference_mode(False), torch.no_grad():
                parameters = self._decompose(step)
                weights = self._weights_of_all(step)
            span = (self._span[0], self._span[-1]) if self._span else (step, step)
            checked, ratio = self.check.in_words, self.check.weights_ratio
            self.report = GradientReport.of(step, parameters, weights, self.method, span, checked, ratio)
            self.reset()

    @override
    def missing_report(self, step: int, reason: str) -> GradientReport:
        missing = {name: ParameterGradients.missing(name, 0, reason, True) for name in self.names}
        weights = {name: Spectrum.missing(reason, name=name, step=step) for name in matrices_of(self.weights)}
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
        ratio = 0 if isnan(self.check.weights_ratio) else int(min(self.check.weights_ratio, 1e9) * 2**20)
        of_ranks = gather_numbers([self._store.count, self._offered, ratio, *good], self._device)
        if world_size() > 1:
            of_all = of_ranks[:, 2]
            self.check.weights_ratio = float(of_all.max()) / 2**20 if bool((of_all > 0).any()) else torch.nan
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
