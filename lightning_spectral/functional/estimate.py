"""A spectrum as one report knows it, with and without each group of rows, and what is estimated from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import nan
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from lightning_spectral.functional.arguments import check_int, check_parts, to_count, to_tensor
from lightning_spectral.functional.jackknife import jackknife
from lightning_spectral.functional.powerlaw import (
    MIN_VALUES,
    Band,
    PowerLaw,
    check_band,
    power_law,
    resolve_band,
)
from lightning_spectral.functional.spectrum import rankme


class Exponent(NamedTuple):
    """A band's power-law exponent with what is known of its error; plain floats, NaN where there is none."""

    value: float
    stderr: float
    """Standard error of ``value``, by the delete-a-group jackknife."""
    corrected: float
    """``value`` less its first-order bias of few rows; NaN for spectra whose bias is none of first order."""
    r2: float
    num_values: int
    """Positive values of the band; there is an exponent only where that is all of them."""
    band: tuple[int, int] | None
    """First and last rank, 1-based and inclusive; None where the spectrum has no such ranks."""
    reason: str | None
    """Why a number above is NaN; None if there is nothing to say."""


class Estimate(NamedTuple):
    """A number with its standard error by the delete-a-group jackknife; NaN where there is none."""

    value: float
    stderr: float


WIDER = {"float32": "dtype='float64' does, 'auto' from the next report on", "bfloat16": "row_dtype='float32' does"}
"""What resolves smaller values than a type does."""

COPIES = "without any one group the number is the same, as of groups that hold copies of the same rows"
"""Why a standard error of zero is none."""

NO_GROUPS = torch.empty(0, 0, dtype=torch.float64)
"""What a spectrum without error bars has in the place of values without each group."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Eigenvalues or singular values of one set of rows, alive in a report or read back; to NumPy an array of them.

    Only the first four fields may be batched over leading axes, as sampling floors take them.

    Args:
        values: ``(n,)`` float64, descending, on the CPU; NaN if the measurement failed.
        leave_one_out: ``(G, m)`` values without each of G groups of rows; G = 0 for no error bars.
        vectors: ``(n, k)`` leading eigenvectors as columns, where they were asked for.
        leave_one_out_vectors: ``(G, n, k)`` those without each group.
        count: Rows behind the values, over all ranks; 0 for a matrix that has none, such as a weight.
        count_without: Rows left without the largest group, of spectra that rows must span; None for others.
        failure: Why there are no values; None if there are.
        failed_here: Whether the failure is one that other ranks may not know of.
        dtype: Type whose rounding is the floor of the values, below which they are zero: ``"float32"`` or ``"float64"``
            of products, ``"bfloat16"`` of rows that were kept in it; empty where it is not known.
        corrects_bias: Whether the bias of exponents falls with the number of rows, so that the jackknife mends it: true
            of covariances, not of the singular values of as many rows as there are.
        rows: What tells the rows behind the values, and their groups, from others; empty where that is not known.
        name: Layer or parameter.
        step: Optimizer steps at the report.
        tokens: Training tokens at the report, where they were counted.

    Raises:
        ValueError: If values are negative, infinite, rise or are no real numbers, or parts have shapes that do not go
            together.

    Example:
        >>> spectrum = Spectrum(torch.arange(1, 101.0) ** -1.5)
        >>> round(spectrum.exponent((10, 50)).value, 6), spectrum.exponent((10, 50)).band
        (1.5, (10, 50))
    """

    values: Tensor
    leave_one_out: Tensor = NO_GROUPS
    vectors: Tensor | None = None
    leave_one_out_vectors: Tensor | None = None
    count: int = 0
    count_without: int | None = None
    failure: str | None = None
    failed_here: bool = False
    corrects_bias: bool = True
    dtype: str = ""
    rows: str = ""
    name: str = ""
    step: float = nan
    tokens: float = nan
    _fits: dict[Band, Exponent] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_parts(self.values, self.leave_one_out, self.vectors, self.leave_one_out_vectors)
        check_int(0, 2**53, count=self.count)

    @classmethod
    def missing(cls, failure: str, failed_here: bool = False, **facts: Any) -> "Spectrum":
        """What stands for one that could not be measured: no values, and the reason."""
        return cls(torch.empty(0, dtype=torch.float64), failure=failure, failed_here=failed_here, **facts)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        values = self.values.detach().cpu().numpy()
        return values.astype(dtype) if dtype is not None else values.copy() if copy else values

    def exponent(self, band: Band) -> Exponent:
        """Power-law exponent over a band of ranks, with jackknife error and bias correction; fitted once per band.

        Ranks are those of the full spectrum: without a group the same ranks are fitted. All of them must be there: a
        line through those that happen to lie above rounding would be that of another band.

        Args:
            band: Two ranks or two fractions, see :func:`lightning_spectral.functional.power_law`.

        Returns:
            The fit; what is not to be had is NaN, with the reason.

        Raises:
            ValueError: If that is no band.
        """
        check_band("band", band)
        band = cast(Band, tuple(band))
        if band not in self._fits:
            self._fits[band] = self._fit(band)
        return self._fits[band]

    def _fit(self, band: Band, fits: "_Fits | None" = None, index: int = 0, with_error: bool = True) -> Exponent:
        ranks = None
        reason = self.failure
        if reason is None:
            try:
                ranks = resolve_band(band, len(self.values))
            except ValueError as error:
                reason = str(error)
        if ranks is None:
            return Exponent(nan, nan, nan, nan, 0, None, reason)
        lo, hi = ranks
        if hi - lo + 1 < MIN_VALUES:
            reason = f"band {band} of {len(self.values)} values spans {max(hi - lo + 1, 0)}, and a line needs"
            return Exponent(nan, nan, nan, nan, 0, None, f"{reason} {MIN_VALUES}: widen it")
        fits = _Fits([self]) if fits is None else fits
        value, r2, num_values, is_finite = fits.plain(index, ranks)
        reason = self._why_no_value(band, ranks, num_values, is_finite)
        if reason is not None:
            return Exponent(nan, nan, nan, nan, num_values, None, reason)
        reason = self._why_no_error(hi) if with_error else "no error bar: none was asked for"
        corrected = stderr = nan
        if reason is None:
            corrected, stderr, is_whole = fits.errors(index, ranks)
            if not is_whole:
                rows_without = self.count if self.count_without is None else self.count_without
                remedy = self._remedy(hi, self.leave_one_out, rows_without)
                reason = f"no error bar: without one group band {band} loses positive values: {remedy}"
                corrected = stderr = nan
            elif stderr <= COPIES_AGREE * abs(value):
                stderr, reason = nan, f"no error bar: {COPIES}"
        if not self.corrects_bias:
            corrected = nan
        return Exponent(value, stderr, corrected, r2, num_values, ranks, reason)

    def _why_no_value(self, band: Band, ranks: tuple[int, int], num_values: int, is_finite: bool) -> str | None:
        lo, hi = ranks
        if not is_finite:
            return "its values are not finite"
        if num_values == hi - lo + 1:
            return None
        if self.is_zero:
            return "all its values are exactly zero, as those of gradients behind a zero-initialised layer are at first"
        held = f"band {band}, ranks {lo} to {hi}, holds {num_values} positive values of {hi - lo + 1}"
        return f"{held}: {self._remedy(hi, self.values, self.count)}"

    def _why_no_error(self, hi: int) -> str | None:
        """Why estimates without each group are none, or are of another stretch of the spectrum."""
        num_groups, num_left = self.leave_one_out.shape
        if num_groups < 2:
            return "no error bar: a group of samples received no rows, or there are fewer than 2"
        if hi > num_left:
            return f"no error bar: without one group rank {hi} lies beyond the {num_left} samples left: take more"
        width = len(self.values)
        if self.count_without is not None and self.count_without - 1 < min(width, self.count - 1):
            return f"no error bar: without one group {self.count_without} rows do not span {width} channels: take more"
        return None

    def _remedy(self, hi: int, values: Tensor, num_rows: int) -> str:
        # Zero are the values that the rows do not span, and those below the rounding of the products.
        if 0 < num_rows <= hi + 1:
            return "it needs more rows"
        if self.dtype in WIDER:
            return f"{self.dtype} resolves no smaller ones, {WIDER[self.dtype]}"
        return f"beyond rank {int((values > 0).sum(-1).min())} all are zero or rounding, so lower its end"

    def is_cut_by_dtype(self, band: Band) -> bool:
        """Whether rows that span a band leave values of it, with or without a group, below the rounding of dtype."""
        if self.failure is not None or self.dtype not in WIDER or self.is_zero:
            return False
        try:
            lo, hi = resolve_band(band, len(self.values))
        except ValueError:
            return False
        without = self.leave_one_out if hi < (self.count_without or 0) else self.leave_one_out[:0]
        return hi < self.count and any(bool((values[..., lo - 1 : hi] == 0).any()) for values in (self.values, without))

    @property
    def is_zero(self) -> bool:
        """Whether every value is exactly zero."""
        return self.failure is None and not bool(self.values.any())

    def rankme(self) -> Estimate:
        """Effective rank, see :func:`lightning_spectral.functional.rankme`; NaN without values."""
        if self.failure is not None or not len(self.values):
            return Estimate(nan, nan)
        plain = rankme(self.values)
        stderr = jackknife(plain, rankme(self.leave_one_out)).stderr
        return Estimate(float(plain), nan if is_of_copies(stderr, plain) else float(stderr))

    def leading(self, num_vectors: int) -> "Spectrum":
        """A copy with so many eigenvectors at the most, and memory of its own: those of a report are parts of more."""
        cut: dict[str, Any] = {
            name: None if part is None else part[..., :num_vectors].clone() for name, part in self._bases.items()
        }
        return replace(self, values=self.values.clone(), leave_one_out=self.leave_one_out.clone(), **cut)

    @property
    def _bases(self) -> dict[str, Tensor | None]:
        return {"vectors": self.vectors, "leave_one_out_vectors": self.leave_one_out_vectors}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: tensors, numbers and strings."""
        return {name: value for name, value in vars(self).items() if name != "_fits"}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Spectrum":
        """The inverse of :meth:`state`, on the CPU."""
        here: dict[str, Any] = {name: part.cpu() if isinstance(part, Tensor) else part for name, part in state.items()}
        return cls(**here)

    def arrays(self, values: str, count: str | None) -> dict[str, Any]:
        """What a record keeps, NumPy arrays by field.

        Args:
            values: Name of the field of values, ``"eigenvalues"`` for example.
            count: Name of the field of rows; None for a spectrum of no rows, which has no groups either.

        Returns:
            Those that there are.
        """
        tensors = {values: self.values, "leave_one_out": None if count is None else self.leave_one_out}
        # Of a basis seven digits are plenty, and it is the largest part of a record.
        tensors |= {name: None if part is None else part.float() for name, part in self._bases.items()}
        numbers = {} if count is None else {count: self.count}
        if self.count_without is not None:
            numbers["num_rows_without"] = self.count_without
        words = {"failure": self.failure or ""} | ({"rows": self.rows} if self.rows else {})
        arrays = {name: tensor.numpy() for name, tensor in tensors.items() if tensor is not None}
        facts = {name: torch.tensor(number).numpy() for name, number in numbers.items()}
        return arrays | facts | words | {"dtype": self.dtype}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any], values: str, count: str | None, **facts: Any) -> "Spectrum":
        """The inverse of :meth:`arrays`.

        Args:
            arrays: What it gave; a field may be missing, but that of values.
            values: As there.
            count: As there.
            facts: Further fields, such as ``name`` and ``step``.

        Returns:
            The spectrum, in float64.

        Raises:
            ValueError: If a field is of another type or shape, naming it.
        """

        def tensor(name: str) -> Tensor | None:
            return to_tensor(name, arrays[name]) if name in arrays else None

        found = tensor(values)
        assert found is not None
        if found.ndim != 1:
            raise ValueError(f"{values} must be a vector, got shape {tuple(found.shape)}")
        without = tensor("leave_one_out")
        return cls(
            found,
            NO_GROUPS if without is None else without,
            tensor("vectors"),
            tensor("leave_one_out_vectors"),
            count=0 if count is None else to_count(count, arrays.get(count, 0)),
            count_without=to_count("num_rows_without", arrays["num_rows_without"])
            if "num_rows_without" in arrays
            else None,
            failure=str(arrays.get("failure", "")) or None,
            dtype=str(arrays.get("dtype", "")),
            rows=str(arrays.get("rows", "")),
            **facts,
        )


COPIES_AGREE = 1e-12
"""Relative size of a standard error that is zero but for rounding: groups of different rows never agree so well."""


def is_of_copies(stderr: Tensor, value: Tensor) -> bool:
    """Whether a standard error is zero, but for rounding."""
    return bool(stderr <= COPIES_AGREE * value.abs())


class _Fits:
    """Power laws through spectra of one shape over one band, made for all of them when the first is asked for."""

    def __init__(self, spectra: Sequence[Spectrum]) -> None:
        self._spectra = spectra
        self._laws: PowerLaw | None = None
        self._plain: list[tuple[float, float, int, bool]] = []
        self._errors: list[tuple[float, float, bool]] = []

    def plain(self, index: int, ranks: tuple[int, int]) -> tuple[float, float, int, bool]:
        """Exponent, r2 and number of values of one, and whether all its values are finite."""
        if not self._plain:
            values = torch.stack([spectrum.values for spectrum in self._spectra])
            self._laws = power_law(values, ranks)
            parts = (*self._laws, values.isfinite().all(-1))
            self._plain = list(zip(*(part.tolist() for part in parts), strict=True))
        return self._plain[index]

    def errors(self, index: int, ranks: tuple[int, int]) -> tuple[float, float, bool]:
        """Corrected exponent and standard error of one, and whether the band is whole without each group."""
        if not self._errors:
            assert self._laws is not None
            without = power_law(torch.stack([spectrum.leave_one_out for spectrum in self._spectra]), ranks)
            is_whole = (without.num_values == self._laws.num_values[:, None]).all(-1)
            parts = (*jackknife(self._laws.exponent, without.exponent), is_whole)
            self._errors = list(zip(*(part.tolist() for part in parts), strict=True))
        return self._errors[index]


def fit_all(spectra: Sequence[Spectrum], band: Band, with_errors: bool = True) -> list[Exponent]:
    """Exponents of many spectra over one band, fitted together where they are of one shape.

    Args:
        spectra: Any number.
        band: As for :meth:`Spectrum.exponent`.
        with_errors: Whether errors are wanted; without them fits cost less than half.

    Returns:
        What that gives for each, which keeps its own, unless it is one without an error.
    """
    fits: dict[int, Exponent] = {}
    alike: dict[tuple[Any, ...], list[Spectrum]] = {}
    for spectrum in spectra:
        if band not in spectrum._fits and spectrum.failure is None:
            alike.setdefault((spectrum.values.shape, spectrum.leave_one_out.shape), []).append(spectrum)
    for same in alike.values():
        together = _Fits(same)
        for index, spectrum in enumerate(same):
            fits[id(spectrum)] = spectrum._fit(band, together, index, with_errors)
            if with_errors:
                spectrum._fits[band] = fits[id(spectrum)]
    return [fits.get(id(spectrum)) or spectrum.exponent(band) for spectrum in spectra]


def rankme_all(spectra: Sequence[Spectrum]) -> list[float]:
    """RankMe of many spectra, without errors, together where they are of one length; NaN for those without values."""
    found = [nan] * len(spectra)
    alike: dict[int, list[int]] = {}
    for index, spectrum in enumerate(spectra):
        if spectrum.failure is None and len(spectrum.values):
            alike.setdefault(len(spectrum.values), []).append(index)
    for same in alike.values():
        values = rankme(torch.stack([spectra[index].values for index in same])).tolist()
        for index, value in zip(same, values, strict=True):
            found[index] = value
    return found
