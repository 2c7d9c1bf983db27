"""Floors of two spectra of the same rows: closed forms, and how much tighter they are than those of two samples."""

import dataclasses

import numpy as np
import pytest
import torch

from benchmarks.findings.stationary import PROCESSES, drawn, of_same_rows
from lightning_spectral.functional import (
    Spectrum,
    angle_floor,
    js_divergence,
    js_floor,
    overlap_floor,
    principal_angles,
    subspace_overlap,
)
from lightning_spectral.functional.paired import are_paired, basis_differences, spectral_differences


def unpaired(*samples: Spectrum) -> list[Spectrum]:
    return [dataclasses.replace(sample, rows="") for sample in samples]


def test_spectra_are_paired_where_rows_counts_and_groups_are_the_same() -> None:
    one = Spectrum(torch.ones(3), torch.ones(4, 3), rows="a", count=8)
    assert are_paired(one, dataclasses.replace(one, values=torch.tensor([3.0, 2.0, 0.5])), one)
    for other in ({"rows": "b"}, {"rows": ""}, {"count": 9}, {"leave_one_out": torch.ones(2, 3)}):
        assert not are_paired(one, dataclasses.replace(one, **other))
    assert not are_paired(*unpaired(one, one))


def test_the_same_numbers_leave_nothing() -> None:
    first, _ = of_same_rows(PROCESSES["steep"], 0.9, num_draws=3)
    torch.testing.assert_close(js_floor(first, first), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(overlap_floor(first, first), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(angle_floor(first, first), torch.zeros(3, dtype=torch.float64), atol=1e-7, rtol=0)


def test_differences_are_jensen_shannon_divergences_of_small_changes() -> None:
    first, second = (one for one in of_same_rows(PROCESSES["many rows"], 0.99, num_draws=2))
    distances, _ = spectral_differences(first, second)
    p, q = (one.values / one.values.sum(-1, keepdim=True) for one in (first, second))
    without = [one.leave_one_out / one.leave_one_out.sum(-1, keepdim=True) for one in (first, second)]
    difference = without[0] - without[1]
    for number, (g, h) in enumerate([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]):
        half = (difference[:, g] - difference[:, h]) / 2
        expected = js_divergence((p + q) / 2 + half, (p + q) / 2 - half)
        torch.testing.assert_close(distances[:, number], expected, rtol=1e-2, atol=0)


def test_a_rotation_of_everything_is_none_of_the_rows() -> None:
    """Whatever basis a model has, and however vectors are chosen in their span."""
    first, _ = of_same_rows(PROCESSES["steep"], 0.9, num_draws=2)
    width, rank = first.vectors.shape[-2:]
    rng = np.random.default_rng(0)
    # A rotation in the planes of one leading and one other direction is the direct one between the spans.
    for angle in (0.1, 1.2):
        turn = torch.eye(width, dtype=torch.float64)
        plane = torch.linalg.qr(torch.cat([first.vectors[0, :, :1], torch.tensor(rng.normal(size=(width, 1)))], 1)).Q
        plane[:, 1] -= first.vectors[0] @ (first.vectors[0].mT @ plane[:, 1])
        plane = torch.linalg.qr(plane).Q
        cosine, sine = np.cos(angle) - 1, np.sin(angle)
        turn += plane @ torch.tensor([[cosine, -sine], [sine, cosine]]) @ plane.mT
        mixed = torch.linalg.qr(torch.tensor(rng.normal(size=(rank, rank)))).Q
        one = dataclasses.replace(
            first,
            vectors=first.vectors[:1],
            leave_one_out_vectors=first.leave_one_out_vectors[:1],
            values=first.values[:1],
        )
        other = dataclasses.replace(
            one, vectors=turn @ one.vectors @ mixed, leave_one_out_vectors=turn @ one.leave_one_out_vectors @ mixed
        )
        assert float(basis_differences(one, other).abs().max()) < 1e-10
        assert (
            float(angle_floor(one, other))
            < 1e-6
            < angle - 0.01
            < float(principal_angles(one.vectors, other.vectors)[0, 0])
        )


def test_without_anything_in_common_the_expectation_is_that_of_two_samples() -> None:
    first, second = drawn(PROCESSES["Gaussian"], num_draws=200)
    paired = [dataclasses.replace(one, rows="same") for one in (first, second)]
    assert all(are_paired(*pair) for pair in [paired])
    distances, _ = spectral_differences(*paired)
    groups = first.leave_one_out.shape[-2]
    pairs = torch.combinations(torch.arange(groups))
    own = torch.stack(
        [js_divergence(one.leave_one_out[:, g], one.leave_one_out[:, h]) for one in (first, second) for g, h in pairs]
    )
    # (G - 1)^2 / G of one sample's, half of it of the difference's.
    assert float(distances.mean()) / 2 == pytest.approx(float(own.mean()), rel=0.03)


@pytest.mark.parametrize("common", [0.9, 0.99])
def test_what_is_common_goes_out(common: float) -> None:
    first, second = of_same_rows(PROCESSES["steep"], common, num_draws=50)
    tighter = 2.5 * (1 - common**2)
    assert float((js_floor(first, second) / js_floor(*unpaired(first, second))).median()) < tighter
    losses = [1 - overlap_floor(*pair) for pair in ((first, second), unpaired(first, second))]
    assert float((losses[0] / losses[1]).median()) < tighter
    # And what is left holds: the population spectra are the same.
    assert float((js_divergence(first.values, second.values) <= js_floor(first, second)).double().mean()) >= 0.94
    assert (
        float((subspace_overlap(first.vectors, second.vectors) >= overlap_floor(first, second)).double().mean()) >= 0.94
    )


def test_one_group_has_no_floor() -> None:
    one = Spectrum(torch.tensor([2.0, 1.0]), torch.ones(1, 2), rows="a", count=4)
    assert js_floor(one, one).isnan()
