"""The measurement of per-sample gradients: samples collected, rows made, exchanged between ranks and decomposed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_spectral.capture.backward import NO_GRADIENT, BackwardReader, check_contracts
from lightning_spectral.capture.batch import hold, num_samples, take
from lightning_spectral.capture.contraction import LayerRows
from lightning_spectral.capture.engines import ByVmapOrLoop, Method, engine_of
from lightning_spectral.capture.per_sample import fill_rows, fitting_chunk, isolated
from lightning_spectral.capture.shadow import BatchLoss
from lightning_spectral.functional.singular import gram, singular_values
from lightning_spectral.measurement.gradient_report import (
    GradientReport,
    ParameterSpectrum,
    WeightSpectrum,
    decompose_grams,
    missing,
)
from lightning_spectral.measurement.row_store import RowStore
from lightning_spectral.measurement.staged import Stage, StagedMeasurement
from lightning_spectral.measurement.stopwatch import Stopwatch, settle
from lightning_spectral.metrics.exchange import gram_share, sum_over_ranks
from lightning_spectral.metrics.reduction import gather_numbers, world_size

ROW_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class GradientRequest:
    """What is measured, and when."""

    stage: Stage
    every_n_steps: int
    num_samples: int
    method: Method
    chunk_size: int | None
    loss_reduction: Literal["mean", "sum"]
    weights: bool
    num_groups: int
    row_dtype: Literal["float32", "bfloat16", "float64"]
    row_device: str | None
    dataloader_idx: int = 0


class GradientMeasurement(StagedMeasurement):
    """Makes a row of each of the last samples before a report, and singular values of all ranks' rows.

    By hooks in training, rows are read off the backward passes as they happen. Otherwise the batches wait for the
    report and their rows are made then, at one and the same weights, by passes over a shadow of the module.

    Args:
        request: What to measure.
        parameters: The chosen parameters by name.
        module: The module they belong to.
        make_loss: Makes the loss of a batch from the module as it is.
        device: Where the module is, and the process group exchanges.
        stopwatch: Counts the time that measuring takes.

    Raises:
        ValueError: For ``method="hooks"`` with parameters of other layers than it reads.
    """

    def __init__(
        self,
        request: GradientRequest,
        parameters: dict[str, nn.Parameter],
        module: nn.Module,
        make_loss: Callable[[], BatchLoss],
        device: torch.device,
        stopwatch: Stopwatch,
    ) -> None:
        super().__init__(request.stage, request.every_n_steps, request.num_samples, stopwatch)
        self.request = request
        self.report: GradientReport | None = None
        self.chunk_size = request.chunk_size
        """Samples at a time; None until the first report has found out."""
        self.halved = False
        """Whether fewer samples fit into memory at a time than were tried first."""
        self._parameters = parameters
        self._make_loss = make_loss
        self._device = torch.device("cpu") if device.type == "mps" else device
        self._engine = engine_of(request.method, request.loss_reduction)
        self._world = world_size()
        self._rank = dist.get_rank() if self._world > 1 else 0
        share, rest = divmod(request.num_samples, self._world)
        store_device = torch.device(request.row_device) if request.row_device else device
        self._store = RowStore(
            {name: p.numel() for name, p in parameters.items()},
            share + (self._rank < rest),
            ROW_DTYPES[request.row_dtype],
            store_device,
            device,
        )
        self._batches: list[tuple[Any, int]] = []
        self._waiting = 0
        self._offered = 0
        self._span: list[int] = []
        self._failures: dict[str, str] = {}
        self._grams: dict[str, Tensor] = {}
        self._rows: LayerRows | None = None
        self._had_backward = False
        self._reader: BackwardReader | None = None
        if request.method == "hooks":
            check_contracts(module, parameters)
            if request.stage == "train":
                self._reader = BackwardReader(stopwatch.running)
                for name, parameter in parameters.items():
                    self._reader.add(name, parameter, module)

    @property
    def method(self) -> str:
        """The engine that makes rows."""
        if isinstance(self._engine, ByVmapOrLoop):
            return "vmap" if self._engine.cause is None else "loop"
        return self.request.method

    @property
    def cause(self) -> str | None:
        """Why ``method="auto"`` fell back to a loop; None if it did not."""
        return self._engine.cause if isinstance(self._engine, ByVmapOrLoop) else None

    def remove(self) -> None:
        """Take every hook off and give all memory back."""
        if self._reader is not None:
            self._reader.remove()
        self._forget()

    def open(self, batch: Any, step: int, has_right_stage: bool) -> None:
        """Take note of a batch, or open the hooks for it.

        Args:
            batch: The batch.
            step: The trainer's ``global_step``.
            has_right_stage: Not used.
        """
        if not self.is_collecting:
            return
        with self.stopwatch.running():
            try:
                self._collect(batch, step)
            except Exception as error:  # a batch of another kind, no memory for the rows
                self._fail(error)

    def _collect(self, batch: Any, step: int) -> None:
        size = num_samples(batch)
        if size is None:
            raise ValueError("the batch holds no tensor with an axis of samples")
        self._offered += size
        if self._reader is None:
            wanted = min(size, self._store.room - self._waiting)
            if wanted > 0:
                self._batches.append((take(hold(batch), 0, wanted), wanted))
                self._waiting += wanted
        elif self._store.room > 0 and len(self._failures) < len(self._parameters):
            wanted = min(size, self._store.room)
            mean_of = float(size) if self.request.loss_reduction == "mean" else 1.0
            self._rows = LayerRows(size, self._store.open(wanted), mean_of)
            self._had_backward = False
            is_last = wanted == self._store.room and self._world == 1
            self._reader.begin(self._rows, self._reduce if is_last else None)
            self._span = [*self._span[:1], step]

    @torch.no_grad()
    def _reduce(self, name: str) -> None:
        """Let go of rows that no other will join: layer by layer, they never are all there at a time."""
        rows = self._store.take_early(name)
        self._grams[name] = gram_share(rows, [len(rows)], self._device)

    def before_backward(self, scale: Callable[[], float]) -> None:
        """Learn how the gradients that follow are scaled.

        Args:
            scale: Tells the factor between the gradients that the pass gives and those of the batch's own loss.
        """
        self._had_backward = True
        if self._rows is not None:
            samples = self._rows.num_samples if self.request.loss_reduction == "mean" else 1
            self._rows.scale = samples / scale()

    def close(self) -> None:
        """The batch has ended: keep its rows."""
        if self._reader is None or self._rows is None:
            return
        with self.stopwatch.running():
            rows, self._rows = self._reader.end(), None
            assert rows is not None
            if not (rows.seen or rows.failures or self._had_backward):
                return  # a training step that gave no loss
            unseen = {name: NO_GRADIENT for name in self._parameters if name not in rows.seen}
            self._failures |= unseen | rows.failures
            self._store.commit()

    def agree_on_rows(self) -> float:
        """Samples of the first optimizer step over all ranks; a collective."""
        return float(gather_numbers([self._offered], self._device).sum())

    def make_report(self, step: int) -> None:
        """Make the rows that are still to be made, and the report; a collective.

        Args:
            step: The trainer's ``global_step``.
        """
        settle(self._device)
        with self.stopwatch.running():
            if self._reader is None:
                self._fill_store()
                self._span = [step]
            with torch.inference_mode(False), torch.no_grad():
                parameters = self._decompose()
                weights = self._weights() if self.request.weights else {}
            span = (self._span[0], self._span[-1]) if self._span else (step, step)
            self.report = GradientReport(step, self.method, span, parameters, weights)
            self.reset()

    def reset(self) -> None:
        """Forget all samples and rows."""
        super().reset()
        self._forget()

    def _forget(self) -> None:
        self._batches, self._span, self._failures, self._grams = [], [], {}, {}
        self._waiting = self._offered = 0
        self._store.clear()

    def _fail(self, error: BaseException) -> None:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        self._failures.update(dict.fromkeys(self._parameters, reason))

    def _fill_store(self) -> None:
        names = list(self._parameters)
        try:
            loss = self._make_loss()
            # Once for all batches, so that each sample meets a mask of its own.
            with isolated():
                for batch, size in self._batches:
                    rows = self._store.open(size)
                    self.chunk_size = self.chunk_size or fitting_chunk(loss, names, batch)
                    used = fill_rows(self._engine, loss, names, batch, rows, self.chunk_size)
                    if used < min(self.chunk_size, size):
                        self.chunk_size, self.halved = used, True
                    self._store.commit()
        except Exception as error:  # whatever the model's loss does to be unfit for this
            self._fail(error)
        self._batches = []

    def _decompose(self) -> dict[str, ParameterSpectrum]:
        names = list(self._parameters)
        good = [int(name not in self._failures) for name in names]
        of_ranks = gather_numbers([self._store.count, self._offered, *good], self._device)
        counts = [int(count) for count in of_ranks[:, 0]]
        if self.steps_collected:
            self.schedule.rows_per_step = float(of_ranks[:, 1].sum()) / self.steps_collected
        num_rows = sum(counts)
        spectra = {
            name: missing(
                name, num_rows, self._failures.get(name, "another rank could not measure it"), name in self._failures
            )
            for name, is_good in zip(names, of_ranks[:, 2:].min(0).values.tolist(), strict=True)
            if not is_good
        }
        wanted = [name for name in names if name not in spectra]
        if num_rows == 0:
            spectra |= {name: missing(name, 0, "no sample was seen", False) for name in wanted}
        elif wanted:
            try:
                shares = torch.stack([self._share(name, counts) for name in wanted])
            except RuntimeError as error:
                if self._world > 1:
                    raise  # the other ranks wait in a collective
                reason = str(error).partition("\n")[0]
                spectra |= {name: missing(name, num_rows, reason, True) for name in wanted}
            else:
                grams = dict(zip(wanted, sum_over_ranks(shares), strict=True))
                spectra |= self._solve(grams, counts)
        return {name: spectra[name] for name in names}

    def _share(self, name: str, counts: list[int]) -> Tensor:
        early = self._grams.pop(name, None)
        return gram_share(self._store.take(name), counts, self._device) if early is None else early

    def _solve(self, grams: dict[str, Tensor], counts: list[int]) -> dict[str, ParameterSpectrum]:
        sizes = {name: parameter.numel() for name, parameter in self._parameters.items()}
        num_groups = self.request.num_groups
        # Sample i of a rank belongs to group (rank + i) mod G, as for activations.
        groups = torch.cat([(torch.arange(count) + rank) % num_groups for rank, count in enumerate(counts)])
        try:
            solved = decompose_grams(grams, sizes, groups.to(self._device), num_groups, self._store.dtype)
        except RuntimeError as error:  # out of memory, most likely; past the collectives, so that no rank waits
            reason = str(error).partition("\n")[0]
            return {name: missing(name, sum(counts), reason, True) for name in grams}
        return {spectrum.name: spectrum for spectrum in solved}

    def _weights(self) -> dict[str, WeightSpectrum]:
        """Singular values of the matrices among the parameters; those of one shape are solved together."""
        matrices = {name: p.detach().flatten(1) for name, p in self._parameters.items() if p.ndim >= 2}
        by_shape: dict[torch.Size, list[str]] = {}
        for name, matrix in matrices.items():
            by_shape.setdefault(matrix.shape, []).append(name)
        spectra = {}
        for (height, width), names in by_shape.items():
            try:
                small = [gram(matrices[name] if height <= width else matrices[name].mT) for name in names]
                for name, values in zip(names, singular_values(torch.stack(small)).cpu(), strict=True):
                    spectra[name] = WeightSpectrum(values)
            except RuntimeError as error:  # out of memory, most likely
                unknown = torch.full((min(height, width),), torch.nan, dtype=torch.float64)
                failed = WeightSpectrum(unknown, str(error).partition("\n")[0])
                spectra |= dict.fromkeys(names, failed)
        return {name: spectra[name] for name in matrices}
