"""Collected moments against a float64 computation from all rows, and what is refused without an exception."""

import re

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from lightning_spectral.functional import Spectrum
from lightning_spectral.functional.moments import Moments, covariance, pool
from lightning_spectral.measurement.collector import RMS_EPS, Collector, inverse_rms
from lightning_spectral.measurement.decomposition import decompose
from tests._reference import contiguous_groups

WIDTH = 12


def collector(num_tokens: int = 10**6, num_groups: int = 4, normalize: bool = False, dtype=torch.float64) -> Collector:
    return Collector(["layer"], num_tokens, num_groups, normalize, dtype, torch.device("cpu"))


def batches(*sizes: int, length: int = 5, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, WIDTH + 1.0) ** -0.5
    return [(torch.randn(size, length, WIDTH, generator=generator) * scale + 3).to(dtype) for size in sizes]


def pooled(of: Collector) -> Moments:
    """Moments of the one layer, by group."""
    ((names, parts, *_),) = of.pool()
    assert names == ["layer"]
    return Moments(*(part[0] for part in parts))


def spectrum(of: Collector) -> Spectrum:
    ((names, parts, *_),) = of.pool()
    return decompose(names, parts, of.failures)["layer"]


def assert_moments(found: Moments, groups: list[np.ndarray], rtol: float = 1e-10) -> None:
    """Group by group, what NumPy makes of the same rows in float64."""
    for group, rows in enumerate(groups):
        assert float(found.num_rows[group]) == len(rows)
        if len(rows) > 1:
            np.testing.assert_allclose(found.mean[group], rows.mean(0), rtol=rtol)
            scatter = np.cov(rows, rowvar=False) * (len(rows) - 1)
            np.testing.assert_allclose(found.scatter[group], scatter, rtol=rtol, atol=rtol * np.abs(scatter).max())


def groups_of(samples: list[np.ndarray], num_groups: int = 4) -> list[np.ndarray]:
    empty = np.zeros((0, WIDTH))
    groups = contiguous_groups([sample for sample in samples if len(sample)], num_groups)
    found = [empty] * num_groups
    for place, group in enumerate(groups):
        found[num_groups * place // len(groups)] = np.concatenate(group)
    return found


def test_groups_are_stretches_of_samples_across_batches() -> None:
    outputs = batches(3, 4, 1, 6)
    found = collector()
    for output in outputs:
        found.begin_batch(len(output), None)
        found.add("layer", output)
    samples = [sample for output in outputs for sample in output.double().numpy()]
    assert_moments(pooled(found), groups_of(samples))


@pytest.mark.parametrize("num_groups", [1, 2, 3, 5])
def test_whole_is_that_of_all_rows_whatever_the_groups(num_groups: int) -> None:
    outputs = batches(3, 4, 7)
    found = collector(num_groups=num_groups)
    for output in outputs:
        found.begin_batch(len(output), None)
        found.add("layer", output)
    rows = torch.cat(outputs).double().reshape(-1, WIDTH).numpy()
    whole = pool(pooled(found))
    np.testing.assert_allclose(covariance(whole), np.cov(rows, rowvar=False), rtol=1e-10)


def test_where_the_first_axis_is_not_the_batch_groups_are_stretches_of_forwards() -> None:
    outputs = [output.transpose(0, 1) for output in batches(3, 4, 2, 3, 7)]
    found = collector()
    for output in outputs:
        found.begin_batch(output.shape[1], None)
        found.add("layer", output)
    assert_moments(pooled(found), groups_of([output.double().reshape(-1, WIDTH).numpy() for output in outputs]))


def test_unknown_batch_is_one_sample() -> None:
    (output,) = batches(4)
    found = collector()
    found.begin_batch(None, None)
    found.add("layer", output)
    assert pooled(found).num_rows.tolist() == [20, 0, 0, 0]


def test_rows_without_a_token_axis() -> None:
    outputs = [output[:, 0] for output in batches(30, 25)]
    found = collector()
    for output in outputs:
        found.begin_batch(len(output), None)
        found.add("layer", output)
    samples = [row[None] for output in outputs for row in output.double().numpy()]
    assert_moments(pooled(found), groups_of(samples))


def test_images_have_rows_at_every_position() -> None:
    output = batches(5, length=6)[0].view(5, 2, 3, WIDTH)
    found = collector()
    found.begin_batch(5, None)
    found.add("layer", output)
    assert_moments(pooled(found), groups_of(list(output.double().reshape(5, 6, WIDTH).numpy())))


@pytest.mark.parametrize("batch_first", [True, False])
def test_masked_rows_do_not_count_whatever_they_hold(batch_first: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    found = collector()
    samples = []
    for output in batches(5, 6, length=7):
        mask = torch.rand(output.shape[:2], generator=generator) < 0.6
        spoilt = output.masked_fill(~mask.unsqueeze(-1), torch.nan)
        found.begin_batch(len(output), mask if batch_first else mask.T)
        found.add("layer", spoilt if batch_first else spoilt.transpose(0, 1))
        kept = [sample[keep].double().numpy() for sample, keep in zip(output, mask, strict=True)]
        samples += kept if batch_first else [np.concatenate(kept)]
    assert_moments(pooled(found), groups_of(samples))
    assert found.offered("layer") == sum(map(len, samples))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e3])
def test_inverse_rms_is_what_rms_norm_multiplies_by(kind: torch.dtype, size: float) -> None:
    rows = (size * torch.randn(2, 5, 37, generator=torch.Generator().manual_seed(0))).to(kind)
    expected = torch.nn.functional.rms_norm(rows.double(), (37,), eps=RMS_EPS)
    for dtype, rtol in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        if torch.promote_types(kind, dtype) == dtype:
            found = inverse_rms(rows, dtype)
            assert found.dtype == dtype
            torch.testing.assert_close(found.double() * rows.double(), expected, rtol=rtol, atol=0)


def test_float64_rows_may_be_multiplied_in_float32() -> None:
    (output,) = batches(8, dtype=torch.float64)
    for normalize in (True, False):
        found = collector(normalize=normalize, dtype=torch.float32)
        found.begin_batch(8, None)
        found.add("layer", output)
        assert not found.failures
        kept = torch.nn.functional.rms_norm(output, (WIDTH,), eps=RMS_EPS) if normalize else output
        assert_moments(pooled(found), groups_of(list(kept.numpy())), rtol=1e-5)


def test_normalized_rows_are_rms_normed() -> None:
    (output,) = batches(8)
    found = collector(normalize=True)
    found.begin_batch(8, None)
    found.add("layer", output)
    rows = output.double().numpy()
    rows /= np.sqrt((rows**2).mean(-1, keepdims=True) + 1e-6)
    assert_moments(pooled(found), groups_of(list(rows)))


@pytest.mark.parametrize(("dtype", "floor"), [(torch.float32, 1e-3), (torch.float64, 1e-6)], ids=["float32", "float64"])
@pytest.mark.parametrize("offset", [0.0, 1e3], ids=["centred", "mean of 1000 spreads"])
@pytest.mark.parametrize("rows_dtype", [torch.float32, torch.bfloat16], ids=["float32 rows", "bfloat16 rows"])
@pytest.mark.parametrize("seed", range(3))
def test_eigenvalues_are_as_precise_as_promised(
    dtype: torch.dtype, floor: float, offset: float, rows_dtype: torch.dtype, seed: int
) -> None:
    """Relative error at most 1e-5 for eigenvalues above ``floor`` of the largest."""
    width, generator = 96, torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    scale = torch.logspace(0, -3.5, width, dtype=torch.float64)
    found = Collector(["layer"], 10**6, 4, False, dtype, torch.device("cpu"))
    rows = []
    for _ in range(6):
        # Each batch has a mean of its own, a spread away from that of the pivot.
        shift = torch.randn(width, generator=generator, dtype=torch.float64)
        noise = torch.randn(8, 64, width, generator=generator, dtype=torch.float64)
        output = ((noise * scale + shift * scale) @ basis.T + offset).to(rows_dtype)
        found.begin_batch(8, None)
        found.add("layer", output)
        rows.append(output.double().reshape(-1, width).numpy())
    truth = np.linalg.eigvalsh(np.cov(np.concatenate(rows), rowvar=False))[::-1]
    counts = truth > floor * truth[0]
    np.testing.assert_allclose(spectrum(found).values.numpy()[counts], truth[counts], rtol=1e-5)


def test_only_whole_samples_are_taken_up_to_the_share() -> None:
    outputs = batches(3, 4, 4)
    found = collector(num_tokens=24)
    for output in outputs:
        found.begin_batch(len(output), None)
        found.add("layer", output)
    samples = [sample for output in outputs for sample in output.double().numpy()]
    assert_moments(pooled(found), groups_of(samples[:4]))
    assert found.offered("layer") == 55


def test_one_sample_is_taken_however_small_the_share() -> None:
    (output,) = batches(3)
    found = collector(num_tokens=2)
    found.begin_batch(3, None)
    found.add("layer", output)
    assert pooled(found).num_rows.tolist() == [5, 0, 0, 0]


def test_one_sample_with_real_tokens_is_taken_after_empty_ones() -> None:
    (output,) = batches(3)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[0] = False
    found = collector(num_tokens=2)
    found.begin_batch(3, mask)
    found.add("layer", output)
    assert pooled(found).num_rows.tolist() == [5, 0, 0, 0]


def test_empty_batch_is_no_failure() -> None:
    found = collector()
    for output in batches(0, 3):
        found.begin_batch(len(output), torch.ones(output.shape[:2], dtype=torch.bool))
        found.add("layer", output)
    assert found.failures == {}
    assert pooled(found).num_rows.tolist() == [5, 5, 5, 0]


@pytest.mark.parametrize(
    ("outputs", "mask", "reason"),
    [
        pytest.param(
            [torch.zeros(2, 5, 4)], torch.ones(2, 4).bool(), r"mask has shape \(2, 4\), .* \(2, 5\)", id="mask"
        ),
        pytest.param([torch.zeros(2, 5, 4), torch.zeros(2, 5, 3)], None, "width changed from 4 to 3", id="width"),
        pytest.param([torch.empty(0, 0)], None, "no floating-point tensor", id="no rows"),
        pytest.param([torch.full((2, 5, 4), torch.nan)], None, "NaN or infinity", id="nan"),
        pytest.param([torch.ones(2, 5, 4), torch.full((2, 5, 4), torch.inf)], None, "NaN or infinity", id="inf"),
        pytest.param([torch.ones(1, 1, 4)], None, "at least 2 rows, got 1", id="one row"),
    ],
)
def test_failure_is_noted_and_harms_no_other_layer(outputs: list[Tensor], mask: Tensor | None, reason: str) -> None:
    found = Collector(["bad", "good"], 10**6, 2, False, torch.float32, torch.device("cpu"))
    good = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    for report in range(2):  # what failed is tried anew in the next report
        for output in outputs:
            found.begin_batch(len(output), mask)
            found.add("bad", output)
            found.begin_batch(2, None)
            found.add("good", good)
        failures = dict(found.failures)
        spectra = {}
        for names, parts, *_ in found.pool():
            spectra |= decompose(names, parts, found.failures)
        if "bad" in spectra:
            assert torch.isnan(spectra["bad"].values).all(), report
            failures["bad"] = spectra["bad"].failure
        assert spectra["good"].failure is None
        assert re.search(reason, failures["bad"])
        found.reset()


def test_nothing_slides_into_the_next_report() -> None:
    first, second = batches(4, 5)
    found = collector()
    for output in (first, second):
        found.begin_batch(len(output), None)
        found.add("layer", output)
        moments = pooled(found)
        assert_moments(moments, groups_of(list(output.double().numpy())))
        found.reset()


@pytest.fixture
def _medium_precision():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def precision_settings() -> tuple[str, ...]:
    backends = torch.backends
    if not hasattr(backends.mkldnn, "matmul"):  # torch<2.9 has one setting for all, whose best is ieee
        chosen = torch.get_float32_matmul_precision()
        return chosen, chosen, *("ieee" if chosen == "highest" else chosen for _ in range(2))
    return (
        torch.get_float32_matmul_precision(),
        *(backend.fp32_precision for backend in (backends, backends.cuda.matmul, backends.mkldnn.matmul)),
    )


@pytest.mark.usefixtures("_medium_precision")
def test_users_choice_of_fast_products_is_kept_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = precision_settings()
    during: list[tuple[str, ...]] = []
    found = collector(dtype=torch.float32)
    accumulate = found._accumulate

    def watched(*args) -> None:
        during.append(precision_settings()[2:])
        accumulate(*args)

    monkeypatch.setattr(found, "_accumulate", watched)
    (output,) = batches(64)
    found.begin_batch(64, None)
    with torch.autocast("cpu", torch.bfloat16):
        found.add("layer", output)
    assert set(during) == {("ieee", "ieee")}
    assert precision_settings() == chosen
    assert chosen[0] == "medium"
    assert_moments(pooled(found), groups_of(list(output.double().numpy())), rtol=1e-6)


def test_the_hooks_never_ask_for_a_value_that_a_gpu_would_have_to_be_waited_for() -> None:
    with FakeTensorMode():  # tensors without values: whatever asks for one fails
        found = collector(normalize=True, dtype=torch.float32)
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            found.begin_batch(6, None)
            found.add("layer", torch.empty(6, 5, WIDTH, dtype=dtype))
        assert not found.failures
        assert found.offered("layer") == 90
        with pytest.raises(DataDependentOutputException):
            torch.ones(2).sum().item()


@pytest.mark.parametrize("has_samples", [True, False], ids=["samples first", "one forward"])
def test_a_layer_called_several_times_in_a_batch_keeps_samples_in_their_groups(has_samples: bool) -> None:
    """As weight sharing, recurrence and closures do; the batch of 3 samples is no multiple of the 4 groups."""
    found = collector(num_groups=4, num_tokens=10**6)
    outputs = torch.randn(5, 3, 3, 2, WIDTH, dtype=torch.float64)  # (batches, calls, samples, rows, d)
    for batch in outputs:
        found.begin_batch(3 if has_samples else None, None)
        for output in batch:
            found.add("layer", output)
    ((_, parts, *_),) = found.pool()
    samples = outputs.transpose(1, 2).reshape(15, 6, WIDTH) if has_samples else outputs.reshape(5, 18, WIDTH)
    for group, found_samples in enumerate(contiguous_groups(list(samples), 4)):
        rows = torch.cat(found_samples)
        assert int(parts.num_rows[0, group]) == len(rows)
        torch.testing.assert_close(parts.mean[0, group], rows.mean(0), rtol=1e-5, atol=1e-6)


def test_rows_of_closed_layers_go_by() -> None:
    found = collector(num_groups=1, num_tokens=10**6)
    found.begin_batch(3, None)
    found.closed = ["layer"]
    found.add("layer", torch.randn(3, 2, WIDTH))
    found.closed = []
    found.add("layer", torch.randn(3, 2, WIDTH))
    found.drop(["layer"])
    found.add("layer", torch.randn(3, 2, WIDTH))
    ((_, parts, offered, _),) = found.pool()
    assert (int(parts.num_rows), offered) == (6, [6])


@pytest.mark.parametrize("num_samples", [4, None, 3], ids=["as many", "unknown", "others"])
@pytest.mark.parametrize("masked", [False, True])
def test_samples_of_unequal_lengths_go_to_groups_whole(num_samples: int | None, masked: bool) -> None:
    lengths = [2, 0, 5, 1]
    mask = torch.arange(6) < torch.tensor(lengths).unsqueeze(1) if masked else None
    found, rows = collector(num_groups=2), [batch[0] for batch in batches(1, 1, length=sum(lengths))]
    for batch in rows:
        found.begin_batch(num_samples, mask)
        found.add("layer", batch, lengths)
    if num_samples == 3:  # what it is of is not known: whole batches
        groups = groups_of([batch.double().numpy() for batch in rows], 2)
    else:
        samples = [sample.double().numpy() for batch in rows for sample in batch.split(lengths)]
        groups = groups_of(samples, 2)
    assert_moments(pooled(found), groups)
    assert found.offered("layer") == 2 * sum(lengths)


def test_a_mask_that_leaves_other_rows_than_a_nested_tensor_has_is_refused() -> None:
    found = collector()
    found.begin_batch(2, torch.tensor([[True, True], [True, False]]))
    found.add("layer", torch.randn(4, WIDTH), [2, 2])
    assert "nested tensor of other lengths than mask" in found.failures["layer"]
