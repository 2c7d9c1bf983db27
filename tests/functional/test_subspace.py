"""Principal angles and overlap against SciPy, closed forms, and rotations by angles down to 1e-9."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_spectral.functional import principal_angles, subspace_overlap


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize(("num_u", "num_v"), [(3, 3), (2, 5), (5, 2), (1, 1), (7, 7)])
def test_angles_are_scipys_for_any_bases(rng, num_u, num_v):
    u, v = rng.normal(size=(7, num_u)), rng.normal(size=(7, num_v)) * 10.0 ** np.arange(num_v)
    angles = principal_angles(torch.tensor(u), torch.tensor(v))
    assert angles.shape == (min(num_u, num_v),)
    np.testing.assert_allclose(angles, scipy.linalg.subspace_angles(u, v), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("angle", [1e-12, 1e-9, 1e-4, 0.3, math.pi / 4, 1.2, math.pi / 2])
def test_a_rotation_by_an_angle_has_that_angle(rng, angle):
    basis = scipy.linalg.qr(rng.normal(size=(8, 8)))[0]
    turned = basis[:, :3].copy()
    turned[:, 1] = math.cos(angle) * basis[:, 1] + math.sin(angle) * basis[:, 5]
    # Any other basis of the same plane says the same.
    u, v = basis[:, :3] @ rng.normal(size=(3, 3)), turned @ rng.normal(size=(3, 3))
    angles = principal_angles(torch.tensor(u), torch.tensor(v))
    np.testing.assert_allclose(angles, [angle, 0, 0], rtol=1e-5, atol=1e-14)
    np.testing.assert_allclose(angles, scipy.linalg.subspace_angles(u, v), rtol=1e-4, atol=1e-14)
    assert float(subspace_overlap(torch.tensor(u), torch.tensor(v))) == pytest.approx((2 + math.cos(angle) ** 2) / 3)


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 9),
    ranks=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    batch=st.sampled_from([(), (3,), (2, 1)]),
    seed=st.integers(0, 10**6),
)
def test_overlap_is_the_mean_squared_cosine_for_any_shape(width, ranks, batch, seed):
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.randn(*batch, width, min(rank, width), generator=generator) for rank in ranks)
    angles, overlap = principal_angles(u, v), subspace_overlap(u, v)
    assert angles.dtype == overlap.dtype == torch.float64
    assert overlap.shape == batch
    assert (angles.diff() <= 0).all()
    torch.testing.assert_close(overlap, angles.cos().square().mean(-1), rtol=0, atol=1e-12)
    torch.testing.assert_close(principal_angles(v, u), angles, rtol=0, atol=1e-7)
    for index in np.ndindex(*batch):
        single = scipy.linalg.subspace_angles(u[index].double().numpy(), v[index].double().numpy())
        np.testing.assert_allclose(angles[index], single, rtol=0, atol=1e-7)


def test_leading_axes_are_broadcast(rng):
    u, v = torch.tensor(rng.normal(size=(5, 2))), torch.tensor(rng.normal(size=(4, 5, 3)))
    expected = torch.stack([principal_angles(u, other) for other in v])
    torch.testing.assert_close(principal_angles(u, v), expected, rtol=0, atol=1e-14)


def test_columns_that_are_not_finite_cost_the_others_nothing(rng):
    u = torch.tensor(rng.normal(size=(3, 6, 2)))
    v = torch.tensor(rng.normal(size=(3, 6, 2)))
    expected = principal_angles(u, v), subspace_overlap(u, v)
    u[1, 0, 0], v[2, 3, 1] = torch.nan, torch.inf
    angles, overlap = principal_angles(u, v), subspace_overlap(u, v)
    assert overlap.isnan().tolist() == [False, True, True]
    assert angles.isnan().all(-1).tolist() == [False, True, True]
    torch.testing.assert_close((angles[0], overlap[0]), (expected[0][0], expected[1][0]), rtol=0, atol=0)


@pytest.mark.parametrize("function", [principal_angles, subspace_overlap])
@pytest.mark.parametrize(
    ("u", "v", "message"),
    [
        pytest.param((4, 2), (5, 2), r"^u and v must have columns of the same length, got 4 and 5: ", id="widths"),
        pytest.param((2, 3), (2, 2), r"^u must hold 1 to d columns .*, got shape \(2, 3\): ", id="too many"),
        pytest.param((4, 2), (4, 0), r"^v must hold 1 to d columns .*, got shape \(4, 0\): ", id="none"),
        pytest.param((4,), (4, 1), r"^u must hold 1 to d columns .*, got shape \(4,\): ", id="no matrix"),
    ],
)
def test_shapes_that_span_nothing_are_refused(function, u, v, message):
    with pytest.raises(ValueError, match=message) as raised:
        function(torch.ones(u), torch.ones(v))
    assert "\n" not in str(raised.value)
