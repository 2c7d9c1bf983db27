"""From the moments of groups to each layer's spectrum, with all groups and without each; ranks share the solving."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_spectral.capture.one_line import reason_of
from lightning_spectral.functional.estimate import Spectrum
from lightning_spectral.functional.moments import Moments, covariance, pool
from lightning_spectral.functional.single_precision import spectra_of_parts
from lightning_spectral.functional.spectrum import beyond_rank, eigenvectors, spectrum
from lightning_spectral.metrics.collectives import Together, all_reduce, rank_and_world

SOLVED, NOT_FINITE, BROKEN = 1.0, 2.0, 3.0
"""What came of a matrix, as ranks tell each other: eigenvalues, perhaps NaN; nothing, for its rows; an error. Zero is
what nobody has solved."""

SINGLE_FROM = {"cpu": 256}
"""By type of device the least width at which what is left without a group is solved in float32, if products were in it
too and where error bars allow that. Measured by ``python -m benchmarks.findings.leave_one_out``: a narrower layer takes
a few milliseconds in all. Other devices were not measured, nor how their solvers round: there all is in float64."""

SOLVED_TOGETHER = 2**23
"""Numbers of the matrices that a GPU solves at a time, 64 MiB. An H200 took 8 ms for each of width 768 and 20 ms for
each of 1600, 5 or 25 at a time: more of them would only take memory."""

SINGLE_COST = 0.55
"""Of a solve in float32 beside one in float64."""


def matrices_at_a_time(width: int, device: torch.device) -> int:
    """How many of a width are solved at a time: on a CPU, whose solver takes one after the other anyway, one."""
    return 1 if device.type == "cpu" else max(1, SOLVED_TOGETHER // width**2)


@dataclass
class Pooled:
    """Moments, by group, of layers of one width: the same on all ranks."""

    names: list[str]
    """The L layers."""
    parts: Moments
    """num_rows ``(L, G)``."""
    failures: Mapping[str, str]
    """What this rank knows of failures, by name."""
    dtypes: Sequence[str] | None = None
    """Of the products of each layer, ``"float32"`` or ``"float64"``; None for float64. Eigenvalues below their rounding
    are zero."""
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    """What is known of failures on other ranks."""
    device: torch.device | None = None
    """Where matrices are solved and the process group can reduce, of one type on all ranks; None for where the moments
    are. One rank may keep these on its GPU, and another, short of memory, on the CPU."""

    def __post_init__(self) -> None:
        self.dtypes = ["float64"] * len(self.names) if self.dtypes is None else self.dtypes

    @property
    def width(self) -> int:
        """Channels of a row."""
        return self.parts.mean.shape[-1]

    @property
    def home(self) -> torch.device:
        """Where matrices are solved."""
        return self.parts.scatter.device if self.device is None else self.device

    def moments(self, layer: int) -> Moments:
        """Those of one layer's groups."""
        return Moments(*(part[layer].to(self.home) for part in self.parts))

    def is_single(self, layer: int) -> bool:
        """Whether what is left of a layer without a group is solved in float32, where its error bars allow that."""
        assert self.dtypes is not None
        least = SINGLE_FROM.get(self.home.type)
        return least is not None and self.width >= least and self.dtypes[layer] == "float32"

    def cost(self, layer: int, union: int) -> float:
        """Of solving a matrix, by its width and type."""
        return self.width**3 * (SINGLE_COST if union > 0 and self.is_single(layer) else 1.0)

    @property
    def members(self) -> Tensor:
        """``(K, G)`` unions of groups of which there is a matrix: of all groups, and without each."""
        num_groups = self.parts.num_rows.shape[-1]
        without_each = 1 - torch.eye(num_groups) if num_groups > 1 else torch.ones(0, 1)
        return torch.cat([torch.ones(1, num_groups), without_each])

    def rounding(self, layer: int) -> float:
        """Share of a layer's largest eigenvalue below which others are rounding."""
        assert self.dtypes is not None
        if self.dtypes[layer] == "float32":
            # Products in float32 leave about 1e-8 of it in rows of any direction; in float64 only the solver rounds.
            return torch.finfo(torch.float32).eps
        return self.width * torch.finfo(torch.float64).eps


class Matrix(NamedTuple):
    """What one rank solves: of one of the widths, a layer's matrix of one union of groups."""

    width: int
    layer: int
    union: int


class Decomposition:
    """The spectra of layers, of all widths of a report: each matrix is solved once, on one of the ranks.

    :meth:`solve` is this rank's share of the work, and no collective; :meth:`spectra` brings the shares together. What
    fails in solving, out of memory say, is NaN for its layers alone, on all ranks, with the reason.

    Args:
        pooled: Moments by width.
        step: Optimizer steps so far.
        num_vectors: How many leading eigenvectors to keep, 0 for none.
    """

    def __init__(self, pooled: Sequence[Pooled], step: float = torch.nan, num_vectors: int = 0) -> None:
        self.pooled = pooled
        self._device = pooled[0].home if pooled else torch.device("cpu")
        self._step, self._num_vectors = step, num_vectors
        rank, self._world = rank_and_world()
        matrices = [
            Matrix(width, layer, union)
            for width, one in enumerate(pooled)
            for layer in range(len(one.names))
            for union in range(len(one.members))
        ]
        costs = [pooled[one.width].cost(one.layer, one.union) for one in matrices]
        self.share = [matrices[index] for index in shares(costs, self._world)[rank]]
        """What this rank solves."""
        self._num_vectors_of = [min(num_vectors, one.width) for one in pooled]
        sizes = [1 + one.width * (1 + k) for one, k in zip(pooled, self._num_vectors_of, strict=True)]
        self._shapes = [(len(one.names), len(one.members), n) for one, n in zip(pooled, sizes, strict=True)]
        self._found: list[tuple[Matrix, Tensor]] = []
        self._before: dict[tuple[int, int], Tensor] = {}
        self._reason: str | None = None

    def solve(self) -> None:
        """Solve this rank's share."""
        for _ in self.steps():
            pass

    def steps(self) -> Iterator[None]:
        """Solve this rank's share, some matrices with each item."""
        waiting = list(self._at_a_time())[::-1]
        while waiting:
            some = waiting.pop()
            width = some[0].width
            try:
                found = self._solve(some)
            except Exception as error:  # out of memory, say
                if len(some) > 1:  # which may be that of all together, or due to one of them
                    waiting += [[one] for one in reversed(some)]
                    continue
                self._reason = reason_of(error)
                found = torch.full((len(some), self._shapes[width][-1]), torch.nan, dtype=torch.float64)
                found[:, 0] = BROKEN
            self._found += zip(some, found, strict=True)
            yield

    def _at_a_time(self) -> Iterator[list[Matrix]]:
        for width, one in enumerate(self.pooled):
            share = [matrix for matrix in self.share if matrix.width == width]
            size = matrices_at_a_time(one.width, one.home)
            yield from (share[start : start + size] for start in range(0, len(share), size))

    def _solve(self, some: list[Matrix]) -> Tensor:
        """``(M, 1 + d + d k)`` what came of matrices of one width, their eigenvalues and leading eigenvectors."""
        pooled, num_vectors = self.pooled[some[0].width], self._num_vectors_of[some[0].width]
        members = pooled.members
        unions = [pool(pooled.moments(one.layer), members[one.union : one.union + 1]) for one in some]
        sample = unions[0] if len(unions) == 1 else Moments(*map(torch.cat, zip(*unions, strict=True)))
        shares_of_largest = [[pooled.rounding(one.layer)] for one in some]
        rtol = torch.tensor(shares_of_largest, dtype=torch.float64, device=sample.scatter.device)
        if any(pooled.is_single(one.layer) for one in some):
            values, vectors = self._eigen_of_parts(some, sample, num_vectors, rtol)
        else:
            values, vectors = _eigen(sample, num_vectors, rtol)
        is_finite = sample.scatter.isfinite().all(-1).all(-1)
        flags = torch.where(is_finite, SOLVED, NOT_FINITE).to(values)
        return torch.cat([flags.unsqueeze(-1), values, vectors.flatten(-2)], -1).cpu()

    def _eigen_of_parts(
        self, some: list[Matrix], sample: Moments, num_vectors: int, rtol: Tensor
    ) -> tuple[Tensor, Tensor]:
        pooled = self.pooled[some[0].width]
        total = torch.stack([pooled.parts.num_rows[one.layer].sum() for one in some]).to(pooled.home)
        is_single = torch.tensor([pooled.is_single(one.layer) for one in some], device=total.device)
        total = torch.where(is_single, total, sample.num_rows)  # as of a part that is all there is
        layers = [(one.width, one.layer) for one in some]
        # What this rank has solved of these layers, with all groups or without another one, tells whether float32 does.
        before = torch.stack([self._before[layer] for layer in layers]) if set(layers) <= set(self._before) else None
        values, vectors = spectra_of_parts(sample, total, num_vectors, rtol, before)
        self._before |= zip(layers, values, strict=True)
        return values, vectors

    def spectra(self, together: Together | None = None) -> dict[str, Spectrum]:
        """Spectra of all layers, by name, after :meth:`solve`; a collective where there are several ranks.

        Args:
            together: Under which ranks share the reasons of what has failed; None for one of its own.

        Returns:
            Error bars where all of two or more groups received rows.
        """
        if not self.pooled:
            return {}
        found = [torch.zeros(shape, dtype=torch.float64) for shape in self._shapes]
        for (width, layer, union), numbers in self._found:
            found[width][layer, union] = numbers
        if self._world > 1:
            flat = torch.cat([slots.flatten() for slots in found]).to(self._device)
            all_reduce(flat)
            sizes = [slots.numel() for slots in found]
            found = [part.view(shape) for part, shape in zip(flat.cpu().split(sizes), self._shapes, strict=True)]
        reason = self._reason
        if self._world > 1 and any(bool((slots[..., 0] == BROKEN).any()) for slots in found):
            reason = (Together(self._device) if together is None else together).reasons(reason)
        spectra: dict[str, Spectrum] = {}
        for one, slots, num_vectors in zip(self.pooled, found, self._num_vectors_of, strict=True):
            spectra |= self._of_width(one, slots, num_vectors, reason or "")
        return spectra

    def _of_width(self, pooled: Pooled, slots: Tensor, num_vectors: int, reason: str) -> dict[str, Spectrum]:
        flags, values = slots[..., 0], slots[..., 1 : 1 + pooled.width]
        vectors = slots[..., 1 + pooled.width :].unflatten(-1, (pooled.width, num_vectors)) if num_vectors else None
        assert pooled.dtypes is not None
        spectra = {}
        for layer, (name, dtype, count) in enumerate(
            zip(pooled.names, pooled.dtypes, pooled.parts.num_rows.cpu(), strict=True)
        ):
            failure = pooled.failures.get(name)
            if failure is None and bool(count.isnan().any()):
                failure = pooled.elsewhere.get(name) or "another rank could not measure it"
            if failure is None and not bool(((flags[layer] == SOLVED) | (flags[layer] == NOT_FINITE)).all()):
                spectra[name] = Spectrum.missing(
                    reason or "no rank has solved it", name=name, step=self._step, count_without=0
                )
                continue
            failure = failure or _why_no_spectrum(flags[layer, 0], values[layer, 0], count)
            kept = slice(1, None if bool((count > 0).all()) else 1)
            spectra[name] = Spectrum(
                values[layer, 0] if failure is None else torch.full_like(values[layer, 0], torch.nan),
                values[layer, kept],
                None if vectors is None else vectors[layer, 0],
                None if vectors is None else vectors[layer, kept],
                count=int(count.sum().nan_to_num()),
                count_without=int((count.sum() - count.max()).nan_to_num()),
                failure=failure,
                failed_here=name in pooled.failures,
                dtype=dtype,
                name=name,
                step=self._step,
            )
        return spectra


def decompose(
    names: list[str],
    parts: Moments,
    failures: Mapping[str, str],
    step: float = torch.nan,
    num_vectors: int = 0,
    dtypes: Sequence[str] | None = None,
) -> dict[str, Spectrum]:
    """Solve all layers of one width, as :class:`Decomposition` does; a collective where there are several ranks."""
    decomposition = Decomposition([Pooled(names, parts, failures, dtypes)], step, num_vectors)
    decomposition.solve()
    return decomposition.spectra()


def shares(costs: Sequence[float], world: int) -> list[list[int]]:
    """Deal out work to ranks, the dearest first, each piece to whoever has the least to do; indices by rank, in order.

    Graham's rule of the longest processing time: the busiest has at most 4/3 of the least possible.
    """
    loads, dealt = [0.0] * world, [list[int]() for _ in range(world)]
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        rank = loads.index(min(loads))
        loads[rank] += costs[index]
        dealt[rank].append(index)
    return [sorted(mine) for mine in dealt]


def _eigen(sample: Moments, num_vectors: int, rtol: Tensor) -> tuple[Tensor, Tensor]:
    if num_vectors == 0:
        return spectrum(sample, rtol), sample.scatter[..., :0]
    values, vectors = eigenvectors(covariance(sample), num_vectors, rtol)
    return values.masked_fill(beyond_rank(sample) & ~values.isnan(), 0.0), vectors


def _why_no_spectrum(flag: Tensor, values: Tensor, count: Tensor) -> str | None:
    """As :func:`lightning_spectral.functional.spectrum.why_no_spectrum`, of what may lie on another rank."""
    if flag == NOT_FINITE:
        return "the rows hold NaN or infinity"
    if (num_rows := float(count.sum())) < 2:
        return f"a covariance needs at least 2 rows, got {num_rows:.0f}"
    return "the eigensolver did not converge" if bool(values.isnan().any()) else None
