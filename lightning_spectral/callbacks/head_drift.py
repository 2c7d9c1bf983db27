"""The callback that watches how far the leading eigenvectors of layers' activation covariance move."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from torch import nn
from typing_extensions import override

from lightning_spectral.advice import Drift, Drifted, Fact, are_as_many
from lightning_spectral.callbacks.display import Display
from lightning_spectral.callbacks.layers_callback import LayersCallback
from lightning_spectral.callbacks.overview import mean_of_all
from lightning_spectral.callbacks.recorded_bases import RecordedBases
from lightning_spectral.capture.batch import load_cutter
from lightning_spectral.functional import drift
from lightning_spectral.functional.arguments import describe
from lightning_spectral.functional.estimate import Spectrum
from lightning_spectral.functional.powerlaw import Band
from lightning_spectral.measurement import ActivationRequest, Report
from lightning_spectral.measurement.arguments import check_positive
from lightning_spectral.terminal import number


class HeadDrift(LayersCallback):
    r"""Logs how far the head of each layer's activation covariance has moved from a reference, beside sampling floors.

    Each report compares the span of the ``rank`` leading eigenvectors, and the whole spectrum, with those of a
    reference. Values lie under ``drift/{layer}/``:

    - ``overlap``: mean squared cosine of the principal angles; 1 where nothing moved, rank/width for random spans.
    - ``max_angle``: the largest principal angle, in radians.
    - ``js``: Jensen-Shannon divergence of the spectra, each normalised to sum to one, in nats.
    - ``overlap_floor``, ``max_angle_floor``, ``js_floor``: how far two samples of one and the same process lie apart
      in 95 of 100 cases. Drift is an overlap *below* its floor, an angle or a divergence *above*.

    ``drift/failed`` counts layer spectra that could not be had so far, logged as NaN.

    **Floors** are read off the scatter of the report and its reference themselves: the spectra and vectors without each
    of ``num_groups`` groups of whole samples differ by sampling alone, whatever the distribution of rows and however
    tokens depend on each other within a sequence. They say what *another sample* of rows would show. Where a report and
    its reference are of the same validation rows, the groups' *differences* are what is read: what the rows do to both
    goes out, the floor falls as the two have more in common, and drift beyond it is one that other rows of the same
    population show too. Floors do not cover other data, nor other seeds: runs from those differ by far more than
    samples of one run, and a floor is no measure of what tells two *runs* apart (``docs/error-bars.md``).

    **Eigenvalues that are equal at the cut** leave the span of exactly ``rank`` vectors undetermined: sampling turns it
    freely among the equal ones. Overlap and angles are still those of exactly ``rank`` vectors, and it is the floors
    that know: with no gap beyond sampling error between eigenvalues ``rank`` and ``rank + 1`` the floor of the angle
    goes to pi/2, and that of the overlap falls by the directions that are free. Choose a ``rank`` with a gap behind it
    to see small rotations. With fewer than ``rank`` positive eigenvalues the vectors beyond are arbitrary, and overlap
    and angle are NaN, with a warning.

    Beside an :class:`ActivationSpectrum` with equal ``every_n_steps``, ``stage``, ``num_tokens``, ``num_groups``,
    ``normalize``, ``dtype``, ``mask``, ``dataloader_idx`` and ``overlap`` it sets no hooks and collects no rows of its
    own, and one eigensolve, with vectors, serves both. The reference is kept in checkpoints: (num_groups + 1) x
    (rank + 1) x width float64 numbers for each layer.

    Args:
        layers: Glob patterns over module names, ``"all"`` for each block of the stack of equal blocks, None for five
            blocks spread evenly over it.
        rank: Number of leading eigenvectors, at most the width. Ten are the head in *Spectral Lens*.
        reference: ``"first"`` report of the run, which is its own reference; the ``"previous"`` report, without which
            the first one is NaN; or the log directory of a recorded run of the same initialisation that had a
            ``HeadDrift`` of this rank or more, whose report nearest in tokens counts. All ranks must be able to read
            it. Against one that was validated on other data, as far as their first samples tell, validation rows have
            no drift but NaN, with a warning.
        every_n_steps: Optimizer steps between reports; between measured validation runs at the least.
        stage: ``"validate"`` reads rows spread over a validation run, the same at each report unless they are
            shuffled; ``"train"`` the last training batches before a report.
        num_tokens: Rows per report over all ranks, after the mask. The floor of angles falls with the root of it, that
            of JS in proportion (of two reports on a small trained GPT 2e-4 nats at 64 rows a channel, 6e-5 at 256:
            ``benchmarks/findings``, study 1), and a spectrum of fewer rows is steeper: a reference of another number
            of rows is warned of.
        num_groups: Groups of whole samples for the floors; 1 for none.
        normalize: Apply a parameter-free RMSNorm to each row first, as in *Spectral Lens*.
        dtype: Type of the products, see :class:`ActivationSpectrum`; ``"auto"`` goes to float64 where float32 does not
            resolve ``rank`` eigenvalues, and ``"first"`` is then the first report in float64.
        mask: Key of the batch, with dots where it is nested: a mask with 1 for real tokens, labels with negative
            numbers for those that do not count, or an additive mask (:class:`lightning_spectral.capture.masks.Mask`).
            It is of one tower; where it is of encoder and decoder, say, ``layers`` has a pattern for each.
        prefix: Put before every key, to tell two of these callbacks apart.
        dataloader_idx: Which validation loader to read.
        channel_dim: Axis of the channels in the layers' outputs. None finds it: the axis on which the layer's own last
            module with weights works, 1 for convolutions and their norms, the last for linear layers and theirs.
        batch_dim: Axis of the samples in the tensors of a batch, and where as long in outputs; None for 0.
        samples: ``samples(batch) -> list of batches of one``, or its import path, for batches without such an axis.
        sums_device: Where the sums of a report are kept, see :class:`ActivationSpectrum`.
        overlap: Solve while training goes on, see :class:`ActivationSpectrum`.

    Raises:
        ValueError: For arguments out of range; at the start of ``fit`` for patterns that match nothing, a mask for
            several towers and keys that two callbacks would write, and for a reference run that holds no such vectors;
            in the first batch for a rank beyond the width, masks that can mean anything and layers whose channels
            may be on two axes.

    References:
        Björck, Golub, *Numerical methods for computing angles between linear subspaces* (1973); Knyazev, Argentati,
        *Principal angles between subspaces in an A-based scalar product* (2002); Lin, *Divergence measures based on the
        Shannon entropy* (1991). For the floors see :mod:`lightning_spectral.functional.floor`.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[HeadDrift(rank=4, reference="previous")], logger=False)
    """

    kind = "drift"
    quantities = ("overlap", "overlap_floor", "max_angle", "max_angle_floor", "js", "js_floor")
    headlines = ("turned_beyond_floor",)

    def __init__(
        self,
        layers: str | Sequence[str] | None = None,
        rank: int = 10,
        reference: str = "first",
        every_n_steps: int = 100,
        stage: Literal["train", "validate"] = "validate",
        num_tokens: int = 65536,
        num_groups: int = 4,
        normalize: bool = True,
        dtype: Literal["auto", "float32", "float64"] = "auto",
        mask: str | None = None,
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
        super().__init__(layers, request, prefix)
        check_positive(rank=rank)
        if not isinstance(reference, str) or not reference:
            raise ValueError(f"reference must be 'first', 'previous' or the path of a run, got {describe(reference)}")
        self.rank = self.num_vectors = rank
        self.reference = reference
        self._bases: dict[str, Spectrum] = {}
        self._recorded: RecordedBases | None = None
        self.display = Display(
            self.kind,
            # Of their own: floors drawn beside drifts pass for drifts.
            charts={
                name: [name] for quantity in ("overlap", "max_angle", "js") for name in (quantity, f"{quantity}_floor")
            },
            columns={
                "overlap": number("overlap", 4),
                "its floor": number("overlap_floor", 4),
                "max angle": number("max_angle", 4),
                "angle floor": number("max_angle_floor", 4),
                "JS": number("js", 6),
                "JS floor": number("js_floor", 6),
                "rows": number("num_tokens", 0),
            },
            category="head drift",
        )

    @property
    @override
    def state_key(self) -> str:
        # A reference of another rank would be of no use.
        return self._generate_state_key(
            layers=self.layers, stage=self.stage, prefix=self.prefix, rank=self.rank, reference=self.reference
        )

    @override
    def title(self, report: Report | None = None) -> str:
        reference = f"the {self.reference} report" if self.reference in ("first", "previous") else self.reference
        heading = f"drift of {self.rank} leading eigenvectors from {reference}, {self.source}"
        return f"{heading}{self.rows_in_words()}" if report is None else f"{heading}, step {report.step}"

    @override
    def settings(self) -> dict[str, Any]:
        return super().settings() | {"rank": self.rank}

    @override
    def looks_at(self) -> list[Band]:
        return [(1, self.rank)] if self.rank > 1 else []  # the largest eigenvalue is always resolved

    @override
    def check_widths(self, widths: dict[str, int]) -> None:
        for name, width in widths.items():
            if self.rank > width:
                raise ValueError(f"rank must be at most {width}, the width of {name}, got {self.rank}: lower it")
            if self._recorded is not None:
                self._recorded.check_width(name, width)

    @override
    def summary(self) -> dict[str, Any]:
        return {**super().summary(), "bases": {name: basis.state() for name, basis in self._bases.items()}}

    @override
    def restore(self, summary: dict[str, Any]) -> None:
        super().restore(summary)
        self._bases = {name: Spectrum.from_state(state) for name, state in summary.get("bases", {}).items()}

    @override
    def watch(self, module: nn.Module) -> list[str]:
        names = super().watch(module)
        self._recorded = None
        if self.reference not in ("first", "previous"):
            self._recorded = RecordedBases(self.reference, self.stage, self.request.normalize)
            self._recorded.check(names, self.rank)
        return names

    @override
    def measured(self, report: Report) -> dict[str, float]:
        spectra = self.spectra(report)
        # A shared report may hold more vectors.
        bases = {name: one.leading(self.rank) for name, one in spectra.items() if one.failure is None}
        if self.reference == "first":
            # A layer whose first measurement failed, or lacks directions that the next will have, begins with the next.
            is_auto = self.request.dtype == "auto"
            known = {name: one for name, one in self._bases.items() if not (is_auto and self._is_cut(one))}
            self._bases = bases | known
        references = self._reference_for(report.step)
        rows = {name: self._describe(report.step, name, bases.get(name), references.get(name)) for name in spectra}
        if self.reference == "previous":
            self._bases = self._bases | bases
        assert self.display is not None
        tokens = {name: {"num_tokens": float(spectrum.count)} for name, spectrum in spectra.items()}
        self.display.note(report.step, {name: row | tokens[name] for name, row in rows.items()})
        return {f"drift/{name}/{quantity}": value for name, row in rows.items() for quantity, value in row.items()}

    @override
    def headline(self) -> dict[str, float]:
        beyond = (_beyond_floor(row["overlap"], row["overlap_floor"]) for row in self.last_rows)
        return {"turned_beyond_floor": mean_of_all(beyond)}

    @override
    def facts(self) -> Iterable[Fact]:
        assert self.display is not None
        if self.display.reports is not None:
            _, last = self.display.reports
            layers = tuple(Drift(name, row["overlap"], row["overlap_floor"]) for name, row in last["rows"].items())
            yield Drifted(
                prefix=self.prefix, rank=self.rank, reference=self.reference, layers=layers, step=last["step"]
            )

    def _reference_for(self, step: int) -> dict[str, Spectrum]:
        if self._recorded is None:
            return self._bases
        if math.isnan(self.tokens):
            self.warn("has no reference outside training, where tokens are not counted")
            return {}
        assert self.session is not None  # of which tokens are counted
        data = self.session.recorder.validation_data if self.stage == "validate" else None
        if data is not None and (reason := self._recorded.why_other(data, self.request.dataloader_idx)) is not None:
            self.warn(f"at step {step}: NaN, because {reason}")
            return {}
        # Every rank reads the file, so that all come to the same numbers.
        return self._recorded.nearest(self.tokens, self.names, self.rank)

    def _describe(self, step: int, name: str, basis: Spectrum | None, reference: Spectrum | None) -> dict[str, float]:
        row = dict.fromkeys(self.quantities, math.nan)
        if basis is None:
            return row
        if reference is not None and len(reference.values) != len(basis.values):
            # It was replaced by another layer, from which there is no drift.
            self.warn(f"at step {step}, {name}: NaN, because its width is not that of its reference any more")
            return row
        found = drift.drift_from(basis, reference)
        if math.isnan(found.js_floor) and self.request.num_groups > 1:
            self.warn(f"at step {step}, {name}: no floors, because not every group of samples received rows")
        samples = [basis] if reference is None else [basis, reference]
        if reference is not None:
            self._compare_rows(step, name, basis, reference)
        reason = self._why_no_vectors(found, samples)
        if reason is None:
            return {quantity: getattr(found, quantity) for quantity in self.quantities}
        if not (self._is_cut(basis) and self.is_widened(basis)):
            self.warn(f"at step {step}, {name}: overlap and angle are NaN, because {reason}")
        return row | {"js": found.js, "js_floor": found.js_floor}

    def _compare_rows(self, step: int, name: str, basis: Spectrum, reference: Spectrum) -> None:
        if not are_as_many(basis.count, reference.count):
            self.warn(
                f"at step {step}, {name}: compares {basis.count} rows with {reference.count}, "
                "and fewer rows alone make a spectrum steeper"
            )

    def _is_cut(self, spectrum: Spectrum) -> bool:
        return any(spectrum.is_cut_by_dtype(band) for band in self.looks_at())

    def _why_no_vectors(self, found: drift.Drift, samples: list[Spectrum]) -> str | None:
        if any(sample.vectors is None or sample.leave_one_out_vectors is None for sample in samples):
            return "the reference holds no eigenvectors"
        if found.reason is None:
            return None
        cut = next((sample.dtype for sample in samples if self._is_cut(sample)), None)
        remedy = "lower it" if cut is None else f"lower it, or give dtype='float64', for {cut} resolves no more"
        return f"{found.reason}: {remedy}"


def _beyond_floor(overlap: float, floor: float) -> float:
    """How much less of the head is left than sampling alone leaves; NaN where either is not known."""
    return math.nan if math.isnan(overlap + floor) else max(0.0, floor - overlap)
