"""Spectra of parts of rows are SciPy's in float64, but for a rounding that error bars do not show."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import eigh, eigvalsh
from torch import Tensor

from lightning_spectral.functional import Moments, jackknife, moments, power_law, principal_angles, rankme
from lightning_spectral.functional.moments import covariance, pool
from lightning_spectral.functional.single_precision import LEAST, SHARE, UNIT, spectra_of_parts

NUM_GROUPS, WIDTH = 4, 48
DOUBLE = torch.tensor([WIDTH * torch.finfo(torch.float64).eps])
SINGLE = torch.tensor([torch.finfo(torch.float32).eps], dtype=torch.float64)


def parts_of(
    power: float, num_rows: int = 400, width: int = WIDTH, seed: int = 0, scale: float = 1.0
) -> tuple[Moments, Tensor]:
    """Moments of all rows, of eigenvalues j^-power in no special basis, and without each group; their number."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator)).Q
    spread = scale * torch.arange(1, width + 1, dtype=torch.float64) ** (-power / 2)
    rows = torch.randn(NUM_GROUPS, num_rows, width, dtype=torch.float64, generator=generator) * spread @ basis + scale
    members = torch.cat([torch.ones(1, NUM_GROUPS), 1 - torch.eye(NUM_GROUPS)])
    return pool(moments(rows), members), torch.tensor(float(NUM_GROUPS * num_rows), dtype=torch.float64)


def exact(sample: Moments) -> Tensor:
    return torch.tensor(np.stack([eigvalsh(matrix)[::-1] for matrix in covariance(sample).numpy()]))


@pytest.fixture
def solves(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, torch.dtype]]:
    """Solver and type of each matrix that is solved."""
    found: list[tuple[str, torch.dtype]] = []

    def spied(name: str) -> Callable[[Tensor], Any]:
        solver = getattr(torch.linalg, name)

        def spy(matrices: Tensor) -> Any:
            found.extend([(name, matrices.dtype)] * matrices.shape[:-2].numel())
            return solver(matrices)

        return spy

    for name in ("eigvalsh", "eigh"):
        monkeypatch.setattr(torch.linalg, name, spied(name))
    return found


@pytest.mark.parametrize("power", [0.8, 1.2, 2.0])
def test_rounding_is_small_beside_the_scatter(power: float, solves: list[tuple[str, torch.dtype]]) -> None:
    sample, total = parts_of(power)
    found, _ = spectra_of_parts(sample, total, 0, DOUBLE)
    assert solves == [("eigvalsh", torch.float32)] * NUM_GROUPS + [("eigvalsh", torch.float64)]  # all rows: float64
    expected = exact(sample)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-10, atol=0)
    errors = (found[1:] - expected[1:]) / expected[1:]
    assert errors.abs().max() > 0
    scatter = math.sqrt(2 / (1200 - 1) - 2 / (1600 - 1))
    assert errors[:, WIDTH // 2 :].square().mean().sqrt() < SHARE * scatter
    for of in (lambda x: power_law(x, (6, 24)).exponent, lambda x: power_law(x, (24, 48)).exponent, rankme):
        (corrected, stderr), (right, bar) = (jackknife(of(x[0]), of(x[1:])) for x in (found, expected))
        torch.testing.assert_close(stderr, bar, rtol=0.01, atol=0)
        assert abs(corrected - right) < 0.01 * bar


def test_what_float32_does_not_resolve_is_solved_in_float64(solves: list[tuple[str, torch.dtype]]) -> None:
    sample, total = parts_of(4.0)
    found, _ = spectra_of_parts(sample, total, 0, DOUBLE)
    assert solves == [("eigvalsh", torch.float32)] * NUM_GROUPS + [("eigvalsh", torch.float64)] * (NUM_GROUPS + 1)
    torch.testing.assert_close(found, exact(sample), rtol=1e-8, atol=0)
    solves.clear()
    again, _ = spectra_of_parts(sample, total, 0, DOUBLE, before=found[0])
    assert solves == [("eigvalsh", torch.float64)] * (NUM_GROUPS + 1)
    assert torch.equal(again, found)


def test_where_it_begins_to_resolve() -> None:
    # Of diagonal matrices float32 rounds nothing but the entries: what is left of them tells the type.
    count = torch.tensor([3e4], dtype=torch.float64)
    scatter = SHARE * math.sqrt(2 / 3e4 - 2 / 4e4)
    least = max(UNIT / math.sqrt(WIDTH) / scatter, LEAST)
    for ratio, is_single in ((1.1 * least, True), (0.9 * least, False)):
        values = torch.linspace(1.0, ratio, WIDTH, dtype=torch.float64)
        sample = Moments(count, torch.zeros(1, WIDTH, dtype=torch.float64), torch.diag(values)[None] * (3e4 - 1))
        found, _ = spectra_of_parts(sample, torch.tensor(4e4, dtype=torch.float64), 0, DOUBLE)
        assert torch.allclose(found, values, rtol=1e-13, atol=0) != is_single
        torch.testing.assert_close(found[0], values, rtol=1e-6, atol=UNIT)


@pytest.mark.parametrize("power", [1.2, 4.0])
def test_vectors_span_what_they_should_and_leave_the_values_as_they_are(power: float) -> None:
    sample, total = parts_of(power)
    plain, none = spectra_of_parts(sample, total, 0, DOUBLE)
    values, vectors = spectra_of_parts(sample, total, 5, DOUBLE)
    assert none.shape == (NUM_GROUPS + 1, WIDTH, 0)
    assert vectors.dtype == values.dtype == torch.float64
    torch.testing.assert_close(values, plain, rtol=1e-9, atol=0)
    for found, matrix in zip(vectors, covariance(sample).numpy(), strict=True):
        expected = torch.tensor(eigh(matrix)[1][:, ::-1][:, :5].copy())
        assert principal_angles(found, expected).max() < 1e-5  # what a group moves them by is a thousand times that


@pytest.mark.parametrize("rtol", [SINGLE, DOUBLE], ids=["float32", "float64"])
def test_channels_that_are_dead_or_copies_stay_zero(rtol: Tensor, solves: list[tuple[str, torch.dtype]]) -> None:
    sample, total = parts_of(1.0)
    for part in (sample.scatter, sample.scatter.mT):
        part[..., 7, :] = 0
        part[..., 8, :] = part[..., 9, :]
    found, _ = spectra_of_parts(sample, total, 0, rtol)
    assert (found == 0).sum(-1).tolist() == [2] * (NUM_GROUPS + 1)
    # Zeros are told from small values where both are rounding by the caller's word alone.
    in_double = sum(dtype == torch.float64 for _, dtype in solves)
    assert in_double < NUM_GROUPS + 1 if rtol is SINGLE else in_double == NUM_GROUPS + 1
    torch.testing.assert_close(found[:, :-2], exact(sample)[:, :-2], rtol=1e-5, atol=0)


def test_too_few_rows_a_bad_matrix_and_a_solver_that_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    few, total = parts_of(1.0, num_rows=6)
    found, _ = spectra_of_parts(few, total, 0, DOUBLE)
    assert (found > 0).sum(-1).tolist() == [23] + [17] * NUM_GROUPS
    sample, total = parts_of(1.0)
    sample.scatter[2, 3, 4] = torch.inf
    found, _ = spectra_of_parts(sample, total, 0, DOUBLE)
    assert found.isnan().all(-1).tolist() == [False, False, True, False, False]
    sample, total = parts_of(1.0)
    expected, solver = exact(sample), torch.linalg.eigvalsh

    def give_up(matrices: Tensor) -> Tensor:
        if matrices.dtype == torch.float32:
            raise RuntimeError("no convergence")
        return solver(matrices)

    with monkeypatch.context() as patched:
        patched.setattr(torch.linalg, "eigvalsh", give_up)
        torch.testing.assert_close(spectra_of_parts(sample, total, 0, DOUBLE)[0], expected, rtol=1e-9, atol=0)
    solve_vectors = torch.linalg.eigh

    def give_vectors_up(matrices: Tensor) -> Any:
        if matrices.dtype == torch.float32:
            raise RuntimeError("no convergence")
        return solve_vectors(matrices)

    monkeypatch.setattr(torch.linalg, "eigh", give_vectors_up)
    values, vectors = spectra_of_parts(sample, total, 2, DOUBLE)
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=0)
    assert bool(vectors.isfinite().all())


@settings(max_examples=30, deadline=None)
@given(
    width=st.integers(1, 20),
    num_rows=st.integers(1, 40),
    power=st.floats(0, 6),
    seed=st.integers(0, 99),
    exponent=st.integers(-25, 25),
    is_single=st.booleans(),
)
def test_any_shape_and_scale(
    width: int, num_rows: int, power: float, seed: int, exponent: int, is_single: bool
) -> None:
    sample, total = parts_of(power, num_rows, width, seed, 10.0**exponent)
    rtol = SINGLE if is_single else DOUBLE
    batched = Moments(*(torch.stack([part, part]) for part in sample))
    found, vectors = spectra_of_parts(batched, total, min(2, width), rtol)
    assert found.shape == (2, NUM_GROUPS + 1, width)
    assert vectors.shape == (2, NUM_GROUPS + 1, width, min(2, width))
    assert torch.equal(found[0], found[1])
    if num_rows * (NUM_GROUPS - 1) < 2:
        return
    expected = exact(sample).clamp(min=0)
    largest = expected[:, :1]
    torch.testing.assert_close(found[0] / largest, expected / largest, rtol=1e-5, atol=2 * float(rtol) + 4 * UNIT)
    assert bool((found[0].diff(dim=-1) <= 0).all())
