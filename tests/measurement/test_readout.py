"""The readout on two processes: rows of all ranks, however they are dealt, and one failure for all."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_spectral.callbacks.readout import ReadoutMember
from lightning_spectral.measurement import Scene, Session
from lightning_spectral.measurement.readout import ReadoutMeasurement, ReadoutReport, ReadoutRequest
from lightning_spectral.measurement.stopwatch import Stopwatch
from lightning_spectral.metrics.layout import Layout
from tests.distributed import run_distributed

WIDTH, CLASSES = 6, 4
SIZES = {"uneven": (5, 11), "one without": (16, 0)}


def data(num: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        3 + torch.randn(num, WIDTH, generator=generator, dtype=torch.float64),
        torch.randint(CLASSES, (num,), generator=generator),
    )


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES)).double()


def read(module: nn.Module, rows: Tensor, labels: Tensor, is_sum: bool = False) -> ReadoutReport:
    """One step's report of rows in two micro-batches, the losses of which are scaled."""
    request = ReadoutRequest(stage="train", every_n_steps=1, num_groups=1, readout="2", num_tokens=10**6, is_wide=True)
    measurement = ReadoutMeasurement(
        request, Scene(module, torch.device("cpu"), Stopwatch(), lambda _: None, Layout.of_world())
    )
    measurement.start_training(0)
    for part, label in zip(rows.chunk(2), labels.chunk(2), strict=True):
        measurement.start_train_batch((part, label), 0)
        if len(part):
            loss = F.cross_entropy(module(part), label, reduction="sum" if is_sum else "mean") * 64
            measurement.before_backward(lambda: 64.0, loss.detach())
            loss.backward()
            measurement.after_backward(is_last=True)
        measurement.end_train_batch(0)
    measurement.end_train_batch(1)
    measurement.remove()
    assert not module[2]._forward_hooks
    report = measurement.report
    assert isinstance(report, ReadoutReport)
    return report


def on_a_rank(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, sizes in SIZES.items():
        rows, labels = (part.split(sizes)[rank] for part in data())
        found[name] = read(model(), rows, labels).readout
    rows, labels = (part.chunk(2)[rank] for part in data())
    found["one fails"] = read(model(), rows, labels, is_sum=rank == 1).readout
    return found


def test_ranks_pool_their_rows_and_fail_together() -> None:
    expected = read(model(), *data()).readout
    ranks = run_distributed(on_a_rank, 2)
    for found in ranks:
        for name in SIZES:
            one = found[name]
            assert one.num_rows == 16
            assert one.loss == pytest.approx(expected.loss)
            torch.testing.assert_close(one.eigenvalues, expected.eigenvalues)
            torch.testing.assert_close(one.power, expected.power)
            # Bit by bit the same on both.
            assert torch.equal(one.power, ranks[0][name].power)
        assert "is not that of a cross-entropy" in found["one fails"].failure


def test_rows_of_the_report_and_the_closed_form() -> None:
    rows, labels = data()
    found = read(model(), rows, labels).readout
    with torch.no_grad():
        hidden = model()[:2](rows)
        logits = model()[2](hidden)
    errors = logits.softmax(-1) - F.one_hot(labels, CLASSES)
    # About the mean: what least squares on centred rows takes off the squared error, of unit curvature.
    hidden, errors = hidden - hidden.mean(0), errors - errors.mean(0)
    best = torch.linalg.lstsq(hidden, errors).solution
    gain = errors.square().sum() - (errors - hidden @ best).square().sum()
    assert float(found.power.sum()) == pytest.approx(float(gain / len(rows)))
    assert found.loss == pytest.approx(float(F.cross_entropy(logits, labels)))


def test_rows_that_are_not_finite_are_said_to_be() -> None:
    rows, labels = data()
    rows[3] = torch.nan
    assert read(model(), rows, labels).readout.failure == "its rows, or their gradients, hold NaN or infinity"


def test_a_head_of_the_same_rows_only_has_no_modes() -> None:
    rows, labels = data()
    assert read(model(), rows[:1].expand(16, -1), labels).readout.failure == "all rows of its input are the same"


def request() -> ReadoutRequest:
    return ReadoutRequest(stage="train", every_n_steps=1, num_groups=1, readout="2", num_tokens=1, is_wide=True)


def test_ranks_that_hold_the_same_data_are_refused() -> None:
    layout = Layout(rank=0, world=1, data_ranks=(0, 0), replicas=(0, 1))
    scene = Scene(model(), torch.device("cpu"), Stopwatch(), lambda _: None, layout)
    with pytest.raises(
        ValueError, match="readout='2' reads heads that are whole on each rank, got a model of DTensors"
    ):
        ReadoutMeasurement(request(), scene)


def test_strategies_that_shard_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="readout='2' reads heads that are whole on each rank, got strategy FSDP"):
        ReadoutMember(request()).join(Session(lambda _: None), SimpleNamespace(strategy="FSDPStrategy"))


class Pooling(nn.Linear):
    """A linear layer's subclass that gives one row for many."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean(0, keepdim=True)


def test_a_head_that_does_not_work_row_by_row_is_nan() -> None:
    module = model()
    module[2] = Pooling(WIDTH, CLASSES).double()
    rows, _ = data()
    found = read(module, rows, torch.tensor([0, 1])).readout
    assert found.failure == "its head makes (1, 4) of (8, 6), which is not row by row"


def test_a_head_that_is_gone_is_nan_and_a_new_one_is_followed() -> None:
    module, (rows, labels) = model(), data()
    measurement = ReadoutMeasurement(
        request(), Scene(module, torch.device("cpu"), Stopwatch(), lambda _: None, Layout.of_world())
    )
    measurement.start_training(0)
    heads = [None, nn.Linear(WIDTH, CLASSES, bias=False).double()]
    reasons = []
    for step, head in enumerate(heads):
        module[2] = nn.Identity() if head is None else head
        measurement.start_train_batch((rows, labels), step)
        loss = F.cross_entropy(module(rows)[:, :CLASSES], labels)
        measurement.before_backward(lambda: 1.0, loss.detach())
        loss.backward()
        measurement.after_backward(is_last=True)
        measurement.end_train_batch(step + 1)
        assert isinstance(measurement.report, ReadoutReport)
        reasons.append(measurement.report.readout.failure)
    assert "readout must name a linear layer" in (reasons[0] or "")
    assert reasons[1] is None
    measurement.remove()
