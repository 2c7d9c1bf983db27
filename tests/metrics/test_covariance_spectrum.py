"""The metric against singular values of all rows at once, however they arrived."""

import copy
import pickle
import re

import numpy as np
import pytest
import torch
from torchmetrics import MeanMetric, MetricCollection

from lightning_spectral.functional import covariance_spectrum
from lightning_spectral.metrics import CovarianceSpectrum
from tests import _reference

WIDTH = 6


@pytest.fixture
def batches():
    """Batches of unequal length about a mean of 1e3 spreads, with eigenvalues from 1 down to 1e-8."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(0, -4, WIDTH, dtype=torch.float64)
    return [
        torch.randn(n, WIDTH, dtype=torch.float64, generator=generator) * spread + 1e3 for n in (7, 1, 40, 0, 16, 100)
    ]


@pytest.fixture
def expected(batches):
    return _reference.covariance_spectrum(torch.cat(batches))


def metric_of(*batches):
    metric = CovarianceSpectrum(WIDTH)
    for batch in batches:
        metric.update(batch)
    return metric


def at_once(batches):
    return metric_of(torch.cat(batches))


def by_batch(batches):
    return metric_of(*batches)


def by_row(batches):
    return metric_of(*torch.cat(batches))


def in_reverse(batches):
    return metric_of(*reversed(batches))


def by_forward(batches):
    metric = CovarianceSpectrum(WIDTH)
    for batch in (
        batches[0],
        *(torch.cat(pair) for pair in zip(batches[1::2], batches[2::2], strict=False)),
        batches[5],
    ):
        metric(batch)
    return metric


def pickled_midway(batches):
    metric = pickle.loads(pickle.dumps(metric_of(*batches[:3])))
    for batch in batches[3:]:
        metric.update(batch)
    return metric


def copied_midway(batches):
    original = metric_of(*batches[:3])
    metric = copy.deepcopy(original)
    original.update(batches[0])
    for batch in batches[3:]:
        metric.update(batch)
    return metric


def merged_with_a_metric(batches):
    metric = metric_of(*batches[:2])
    metric.merge_state(metric_of(*batches[2:]))
    return metric


def merged_with_a_state(batches):
    metric = metric_of(*batches[:2])
    metric.merge_state(metric_of(*batches[2:]).metric_state)
    return metric


def merged_into_an_empty_one(batches):
    metric = CovarianceSpectrum(WIDTH)
    metric.merge_state(metric_of(*batches))
    return metric


def merged_after_compute(batches):
    metric = metric_of(*batches[2:])
    metric.compute()
    metric.merge_state(metric_of(*batches[:2]))
    return metric


def reset_midway(batches):
    metric = metric_of(*batches)
    metric.reset()
    for batch in batches:
        metric.update(batch)
    return metric


def from_a_checkpoint(batches):
    metric, saved = CovarianceSpectrum(WIDTH), metric_of(*batches)
    saved.persistent(True)
    metric.persistent(True)
    metric.load_state_dict(saved.state_dict())
    metric.update(torch.empty(0, WIDTH))
    return metric


def in_inference_mode(batches):
    with torch.inference_mode():
        metric = metric_of(*batches[:3])
    for batch in batches[3:]:
        metric.update(batch)
    return metric


WAYS = [
    at_once,
    by_batch,
    by_row,
    in_reverse,
    by_forward,
    pickled_midway,
    copied_midway,
    merged_with_a_metric,
    merged_with_a_state,
    merged_into_an_empty_one,
    merged_after_compute,
    reset_midway,
    from_a_checkpoint,
    in_inference_mode,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_way_to_the_same_rows_gives_their_spectrum(batches, expected, way):
    actual = way(batches).compute().numpy()
    large = expected > 1e-6 * expected[0]
    np.testing.assert_allclose(actual[large], expected[large], rtol=1e-8)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_forward_returns_the_spectrum_of_its_batch(batches):
    metric = metric_of(batches[0])
    torch.testing.assert_close(metric(batches[2]), covariance_spectrum(batches[2]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("drift", [0.0, 1.0, 1e3], ids="drift_{}".format)
def test_a_drifting_mean_costs_no_digits(drift):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 25, WIDTH, dtype=torch.float64, generator=generator)
    rows += drift * torch.linspace(0, 1, 40).view(40, 1, 1)
    expected = _reference.covariance_spectrum(rows.reshape(-1, WIDTH))
    np.testing.assert_allclose(metric_of(*rows).compute(), expected, rtol=1e-8)


@pytest.mark.parametrize("mean", [0.0, 1e3], ids=["centred", "mean_1e3_spreads"])
@pytest.mark.parametrize("num_features", [3, 96])
def test_small_eigenvalues_keep_five_digits(num_features, mean):
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((num_features, num_features)))[0]
    rows = rng.standard_normal((1000, num_features)) * np.geomspace(1, 1e-4, num_features) @ basis.T + mean
    metric = CovarianceSpectrum(num_features)
    for batch in torch.tensor(rows).split(130):
        metric.update(batch)
    expected = _reference.covariance_spectrum(rows)
    large = expected > 1e-6 * expected[0]
    np.testing.assert_allclose(metric.compute()[large], expected[large], rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_rows_of_any_dtype_are_summed_in_float64(dtype):
    rows = (torch.randn(3, 50, WIDTH, generator=torch.Generator().manual_seed(0)) + 10).to(dtype)
    values = metric_of(*rows).compute()
    assert values.dtype == torch.float64
    np.testing.assert_allclose(values, _reference.covariance_spectrum(rows.double().reshape(-1, WIDTH)), rtol=1e-10)


@pytest.mark.parametrize("shape", [(WIDTH,), (1, WIDTH), (2, 3, WIDTH), (2, 0, WIDTH), (2, 1, 3, 4, WIDTH)], ids=str)
def test_all_leading_axes_are_rows(batches, shape):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        metric_of(*batches, x).compute(),
        covariance_spectrum(torch.cat([*batches, x.reshape(-1, WIDTH)])),
        rtol=1e-5,
        atol=0,
    )


def test_fewer_rows_than_features_leave_exact_zeros(batches):
    values = metric_of(*batches[2][:4]).compute()
    assert (values[:3] > 0).all()
    assert (values[3:] == 0).all()


def test_rows_with_a_graph_leave_none_in_the_metric(batches):
    metric = CovarianceSpectrum(WIDTH)
    values = metric(batches[2].requires_grad_())
    assert not metric.packed.requires_grad
    assert not values.requires_grad


CASTS = {
    "bfloat16": lambda module: module.bfloat16(),
    "to_bfloat16": lambda module: module.to(torch.bfloat16),
    "half": lambda module: module.half(),
    "to_half": lambda module: module.to(torch.float16),
    "float": lambda module: module.float(),
    "type": lambda module: module.type(torch.float32),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
@pytest.mark.parametrize("nested", [False, True], ids=["alone", "in_a_module"])
def test_a_cast_does_not_reach_the_state(batches, expected, cast, nested):
    metric = metric_of(*batches[:3])
    cast(torch.nn.ModuleDict({"metric": metric, "layer": torch.nn.Linear(2, 2)}) if nested else metric)
    assert metric.packed.dtype == torch.float64
    for batch in batches[3:]:
        metric.update(batch)
    np.testing.assert_allclose(metric.compute(), expected, rtol=1e-5)
    metric.reset()
    assert metric.packed.dtype == torch.float64


def test_the_state_follows_a_move_but_not_the_cast_beside_it(batches):
    metric = metric_of(*batches)
    torch.nn.ModuleDict({"metric": metric}).to("meta", torch.bfloat16)
    metric.reset()
    assert (metric.packed.device.type, metric.device.type, metric.packed.dtype) == ("meta", "meta", torch.float64)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_rows_come_from_anywhere(batches, expected):
    model = torch.nn.ModuleDict({"metric": metric_of(*batches[:3])}).to("cuda", torch.bfloat16)
    for batch, device in zip(batches[3:], ("cpu", "cuda", "cpu"), strict=True):
        model["metric"].update(batch.to(device))
    values = model["metric"].compute()
    assert values.device.type == "cuda"
    np.testing.assert_allclose(values.cpu(), expected, rtol=1e-5)


def test_it_lives_in_a_collection(batches, expected):
    collection = MetricCollection(
        {"spectrum": CovarianceSpectrum(WIDTH), "again": CovarianceSpectrum(WIDTH), "mean": MeanMetric()}
    )
    for batch in batches:
        if len(batch):
            collection.update(batch)
    values = collection.compute()
    np.testing.assert_allclose(values["spectrum"], expected, rtol=1e-5)
    torch.testing.assert_close(values["again"], values["spectrum"], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (torch.ones(0, WIDTH), "at least 2 rows, got 0"),
        (torch.ones(1, WIDTH), "at least 2 rows, got 1"),
        (torch.full((4, WIDTH), torch.nan), "NaN or infinity"),
        (torch.full((4, WIDTH), -torch.inf), "NaN or infinity"),
    ],
    ids=["none", "one", "nan", "inf"],
)
def test_rows_without_a_spectrum_give_nan_and_the_reason(rows, reason):
    metric = metric_of(rows)
    with pytest.warns(UserWarning, match=f"CovarianceSpectrum.compute returns NaN: .*{reason}"):
        values = metric.compute()
    assert values.shape == (WIDTH,)
    assert values.isnan().all()


def test_rows_that_are_not_finite_are_forgotten_by_a_reset(batches, expected):
    metric = metric_of(torch.full((4, WIDTH), torch.nan))
    metric.reset()
    for batch in batches:
        metric.update(batch)
    np.testing.assert_allclose(metric.compute(), expected, rtol=1e-5)


def test_a_failed_solve_says_so(monkeypatch, batches):
    def fail(_):
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigvalsh", fail)
    with pytest.warns(UserWarning, match="CovarianceSpectrum.compute returns NaN: the eigensolver did not converge"):
        assert metric_of(*batches).compute().isnan().all()


@pytest.mark.parametrize("num_features", [0, -3, 2.0, "6", True, None])
def test_the_number_of_features_must_be_a_positive_int(num_features):
    message = re.escape(f"num_features must be a positive int, the length of a row, got {num_features!r}")
    with pytest.raises(ValueError, match=message):
        CovarianceSpectrum(num_features)


@pytest.mark.parametrize("shape", [(), (0,), (5,), (6, 5)], ids=str)
def test_rows_of_another_length_are_refused(shape):
    what = f"{WIDTH} features in its last axis" if shape else "at least one axis"
    message = re.escape(f"x must have {what}, got shape {shape}")
    with pytest.raises(ValueError, match=message):
        CovarianceSpectrum(WIDTH).update(torch.ones(shape))


def test_a_metric_of_another_width_cannot_be_merged(batches):
    with pytest.raises(ValueError, match="incoming_state must have 2 features, 7 numbers, got 43"):
        CovarianceSpectrum(2).merge_state(metric_of(*batches))


def test_what_is_no_state_cannot_be_merged():
    with pytest.raises(ValueError, match="Expected incoming state to be a dict or an instance of Metric"):
        CovarianceSpectrum(2).merge_state([torch.zeros(7)])
