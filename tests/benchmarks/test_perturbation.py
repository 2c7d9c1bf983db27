"""Spectra by perturbation theory are those of exact solves, to the order that they claim."""

import math

import pytest
import torch
from torch import Tensor

from benchmarks.findings.leave_one_out import METHODS, by_method, judge
from benchmarks.findings.leave_one_out_report import totals, write_report
from benchmarks.findings.perturbation import first_order, leading_vectors, rotated, second_order
from lightning_spectral.functional import moments, principal_angles

WIDTH = 12
VALUES = torch.arange(1, WIDTH + 1, dtype=torch.float64).flip(0)


def disturbed(size: float) -> tuple[Tensor, Tensor]:
    """A symmetric matrix in the basis of eigenvectors, off by so much, and what it is in another basis."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=generator)
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=generator)).Q
    matrix = torch.diag(VALUES) + size * (noise + noise.T)
    return matrix, basis @ matrix @ basis.T


@pytest.mark.parametrize(("method", "order"), [(first_order, 2), (second_order, 3)])
def test_errors_are_of_the_next_order(method, order: int) -> None:
    sizes = (1e-2, 1e-3)
    errors = [(method(disturbed(s)[0]) - torch.linalg.eigvalsh(disturbed(s)[0]).flip(-1)).norm() for s in sizes]
    assert math.log10(errors[0] / errors[1]) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("gap", [0.0, 1e-9, 0.1, 5.0])
def test_a_pair_is_exact_however_close(gap: float) -> None:
    matrix = torch.tensor([[2 + gap, 0.7], [0.7, 2.0]], dtype=torch.float64)
    found = second_order(matrix)
    if gap > 0:
        torch.testing.assert_close(found, torch.linalg.eigvalsh(matrix).flip(-1), rtol=1e-12, atol=0)
    else:  # which of equals goes up nobody can tell
        assert found.tolist() == [2.0, 2.0]


def test_the_leading_subspace_is_right_to_first_order() -> None:
    size = 1e-4
    matrix, _ = disturbed(size)
    expected = torch.linalg.eigh(matrix)[1].flip(-1)[:, :3]
    plain = torch.eye(WIDTH, dtype=torch.float64)
    assert principal_angles(plain[:, :3], expected).max() > size / 10
    assert principal_angles(leading_vectors(matrix, plain, 3), expected).max() < 100 * size**2


def test_rotation_leaves_eigenvalues_and_makes_the_undisturbed_diagonal() -> None:
    _, whole = disturbed(0.0)
    values, vectors = torch.linalg.eigh(whole)
    torch.testing.assert_close(rotated(whole, vectors), torch.diag(values), rtol=0, atol=1e-12)


def test_all_methods_agree_on_rows_and_are_told(tmp_path) -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(1, 25, dtype=torch.float64) ** -1.2
    draws = [
        by_method(moments(torch.randn(4, 600, 24, dtype=torch.float64, generator=generator) * truth.sqrt()))
        for _ in range(4)
    ]
    found = {method: judge([draw[method] for draw in draws], truth) for method in METHODS}
    for method in METHODS[1:]:
        for name in ("tail", "head", "RankMe", "head share"):
            right = found["float64"][name]
            assert found[method][name]["stderr"] == pytest.approx(right["stderr"], rel=0.1)
            if method != "first order":  # which has no bias to correct
                assert abs(found[method][name]["corrected"] - right["corrected"]) < 0.1 * right["stderr"]
    seconds = dict.fromkeys(
        ("eigvalsh", "eigvalsh, float32", "eigh", "eigh, float32", "product", "product, float32"), 1.0
    )
    seconds |= dict.fromkeys(("product of a band", "repulsion", "repulsion, float32"), 0.5)
    assert totals(seconds)["float64"] == totals(seconds)["float32"] == 5
    cells = [
        {"name": "rows", "ratio": ratio, "num_draws": 20, "in_float32": 1.0, "methods": found} for ratio in (4, 100)
    ]
    costs = [{"width": 24, "device": "cpu", "seconds": seconds}]
    path = tmp_path / "report.md"
    write_report({"environment": {"date": "today"}, "costs": costs, "cells": cells}, path)
    text = path.read_text()
    assert "| 24 | 5.000 | 1.00 |" in text
    assert text.count("\n| rows | 4 |") == text.count("\n| rows | 100 |") == 5  # four quantities and the floors
