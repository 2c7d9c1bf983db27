"""What is too large to be copied is only read, or saved when first written to, or locked; and then as it was."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_spectral.capture import kept as kept_module
from lightning_spectral.capture.kept import Kept
from lightning_spectral.capture.large import Large
from lightning_spectral.capture.per_sample import per_sample_gradients
from lightning_spectral.capture.shadow import BatchLoss

table = torch.zeros(50, 10)
rows = table[3:5]
array = np.arange(500.0)
part_of_array = array[10:490]
small = torch.zeros(3)


@pytest.fixture(autouse=True)
def _little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_module, "ROOM", 100)


def reading(module: nn.Module, x: Tensor) -> Tensor:
    offset = float(part_of_array[2] + array[0]) + torch.from_numpy(array)[1].float()
    return (module(x) + table[:2, :2].mean() + offset).square().sum(1).mean()


def writing(module: nn.Module, x: Tensor) -> Tensor:
    rows[0, :2] += 1
    table.data[9].fill_(float(rows[0, 0]))
    torch.add(rows[1], 1, out=rows[1])
    small.add_(table[9].mean())
    return (module(x) + table[9, :2] + rows[1, :2]).square().sum(1).mean() * small[0]


def writing_to_array(module: nn.Module, x: Tensor) -> Tensor:
    part_of_array[0] = 7
    return module(x).square().mean()


@pytest.mark.parametrize("method", ["loop", "auto", "hooks"])
@pytest.mark.parametrize("loss_fn", [reading, writing])
def test_rows_are_those_of_a_first_call_and_all_is_as_it_was(loss_fn: Any, method: Any) -> None:
    module, x = nn.Linear(4, 2), torch.randn(5, 4)
    before = table.clone(), array.copy(), small.clone()
    found = per_sample_gradients(module, x, "weight", method, loss_fn=loss_fn)["weight"]
    assert torch.equal(table, before[0])
    assert np.array_equal(array, before[1])
    assert torch.equal(small, before[2])
    assert array.flags.writeable
    assert part_of_array.flags.writeable
    for index, one in enumerate(x.split(1)):
        (expected,) = torch.autograd.grad(loss_fn(module, one), module.weight)
        table.copy_(before[0]), small.copy_(before[2])
        torch.testing.assert_close(found[index], expected.flatten())


def test_what_is_read_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    module, saved = nn.Linear(4, 2), []
    kept = Kept([reading])
    save = Large.save
    monkeypatch.setattr(Large, "save", lambda large, written: (saved.append(written.shape), save(large, written)))
    with kept.large.watched():
        out = torch.zeros(2)
        out += reading(module, torch.ones(1, 4)).detach()
        kept.put_back()
    assert saved == [out.shape]
    assert not kept.large._saved


def test_arrays_that_a_step_writes_to_are_refused_in_one_line() -> None:
    before = array.copy()
    with pytest.raises(ValueError, match="writes to a NumPy array that is too large") as caught:
        per_sample_gradients(nn.Linear(4, 2), torch.randn(5, 4), "weight", "loop", loss_fn=writing_to_array)
    assert "\n" not in str(caught.value)
    assert np.array_equal(array, before)
    assert array.flags.writeable
    assert part_of_array.flags.writeable


def test_arrays_that_nobody_can_write_to_are_left_alone(tmp_path: Path) -> None:
    np.arange(1000.0).tofile(tmp_path / "data.bin")
    data = np.memmap(tmp_path / "data.bin", dtype=np.float64, mode="r")
    kept = Kept([{"data": data}])
    assert not kept.large.has_arrays
    with kept.large.watched():
        assert data[3] == 3
    kept.put_back()
    assert not data.flags.writeable


class Step(LightningModule):
    """Writes, by way of its Trainer, to what is too large to be copied."""

    def __init__(self, data: Any) -> None:
        super().__init__()
        self.net = nn.Linear(4, 2)
        self.write = data

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean() * self.write(self.trainer)


def add_to_tensor(trainer: Any) -> Tensor:
    trainer.datamodule.data[0] += 1
    return trainer.datamodule.data[0, 0]


def fill_array(trainer: Any) -> float:
    trainer.datamodule.data[0] = 7
    return 1.0


def add_in_a_mode(trainer: Any) -> Tensor:
    with TorchDispatchMode():
        return add_to_tensor(trainer)


def trainer_of(data: Any) -> Any:
    return SimpleNamespace(callback_metrics={}, datamodule=SimpleNamespace(data=data))


def test_what_a_trainer_leads_to_is_watched_from_when_it_is_asked_for() -> None:
    trainer, x = trainer_of(torch.zeros(50, 10)), torch.randn(3, 4)
    loss = BatchLoss(Step(add_to_tensor), trainer=trainer)
    with loss.isolated(x):
        values = []
        for _ in range(3):
            values.append(loss(x).item())
            loss.reset()
            assert not trainer.datamodule.data.any()
    assert values[0] > 0
    assert len(set(values)) == 1
    assert torch._C._len_torch_dispatch_stack() == 0


@pytest.mark.parametrize(
    ("write", "data", "reason"),
    [
        (fill_array, np.zeros(500), "writes to a NumPy array that is too large"),
        (add_in_a_mode, torch.zeros(50, 10), "by way of the Trainer and within a TorchDispatchMode"),
    ],
)
def test_where_that_cannot_be_it_is_refused_in_one_line(write: Any, data: Any, reason: str) -> None:
    trainer, x = trainer_of(data), torch.randn(3, 4)
    loss = BatchLoss(Step(write), trainer=trainer)
    for _ in range(2):
        with loss.isolated(x), pytest.raises(ValueError, match=reason) as caught:
            loss(x)
        assert "\n" not in str(caught.value)
    assert not data.any()
    assert getattr(data, "flags", np.zeros(1).flags).writeable
