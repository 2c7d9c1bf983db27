"""Rows come back from their store as they were written: in order, in the type asked for, and without a spare copy."""

import weakref

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_spectral.measurement import row_store
from lightning_spectral.measurement.placement import Placement
from lightning_spectral.measurement.row_store import RowStore

SIZES = {"weight": 6, "bias": 3}
CAPACITY = 7
CPU = torch.device("cpu")


ELSEWHERE = torch.device("cpu", 0)
"""Another device than the CPU that tensors lie on, to whoever compares."""


def store_of(dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> RowStore:
    return RowStore(SIZES, CAPACITY, dtype, device)


def rows_of(num_samples: int, seed: int) -> dict[str, Tensor]:
    generator = np.random.default_rng(seed)
    return {name: torch.tensor(generator.normal(size=(num_samples, size))) for name, size in SIZES.items()}


def write(store: RowStore, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    opened = store.open(len(rows["weight"]))
    for name, target in opened.items():
        target.copy_(rows[name])
    return opened


@pytest.mark.parametrize(
    ("dtype", "given", "rounding"),
    [
        (torch.float32, torch.float32, 2**-24),
        (torch.float64, torch.float64, 0),
        (torch.bfloat16, torch.float32, 2**-8),
    ],
    ids=str,
)
def test_rows_come_back_in_order_and_no_coarser_than_their_type(
    dtype: torch.dtype, given: torch.dtype, rounding: float
) -> None:
    store, parts = store_of(dtype), [rows_of(2, seed=0), rows_of(4, seed=1)]
    for part in parts:
        assert {rows.dtype for rows in write(store, part).values()} == {given}
        store.commit()
    assert (store.count, store.room) == (6, 1)
    for name in SIZES:
        found, expected = store.take(name), torch.cat([part[name] for part in parts])
        assert found.dtype == dtype
        np.testing.assert_allclose(found.double().numpy(), expected.numpy(), rtol=rounding)


def test_rows_of_the_same_type_and_device_are_written_in_place() -> None:
    store = store_of()
    write(store, rows_of(2, seed=0))
    store.commit()
    opened = store.open(3)
    assert all(rows._is_view() for rows in opened.values())
    store.commit()
    for name, rows in opened.items():
        assert store.take(name)[2:].data_ptr() == rows.data_ptr()


def test_rows_of_another_type_are_kept_only_once_committed() -> None:
    store = store_of(torch.bfloat16)
    first, second = rows_of(2, seed=0), rows_of(2, seed=1)
    write(store, first)
    # A step that came to nothing: its rows are opened and never kept.
    opened = write(store, second)
    assert store.count == 0
    store.commit()
    store.commit()
    assert store.count == 2
    for rows in opened.values():
        rows.fill_(99.0)
    assert torch.equal(store.take("weight"), second["weight"].bfloat16())


def test_memory_is_taken_with_the_first_rows_and_given_back_with_the_last() -> None:
    store = store_of()
    assert not store._kept
    write(store, rows_of(2, seed=0))
    store.commit()
    kept = {name: weakref.ref(rows.untyped_storage()) for name, rows in store._kept.items()}
    assert {name: kept[name]().nbytes() for name in kept} == {name: 4 * CAPACITY * p for name, p in SIZES.items()}
    assert store.take("weight").shape == (2, 6)
    assert kept["weight"]() is None
    assert kept["bias"]() is not None
    store.clear()
    assert kept["bias"]() is None
    assert (store.count, store.room) == (0, CAPACITY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_was_never_written_is_empty(dtype: torch.dtype) -> None:
    rows = store_of(dtype).take("weight")
    assert rows.shape == (0, 6)
    assert rows.dtype == dtype


def test_a_store_without_room_opens_and_keeps_nothing() -> None:
    store = RowStore(SIZES, 0, torch.float32, CPU)
    assert store.room == 0
    assert {rows.shape for rows in store.open(0).values()} == {(0, 6), (0, 3)}
    store.commit()
    assert store.take("bias").shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_taken_early_are_all_there_and_leave_no_memory_behind(dtype: torch.dtype) -> None:
    store, parts = store_of(dtype), [rows_of(2, seed=0), rows_of(4, seed=1)]
    write(store, parts[0])
    store.commit()
    opened = store.open(4)
    opened["weight"].copy_(parts[1]["weight"])
    kept = weakref.ref(store._kept["weight"].untyped_storage())
    found = store.take_early("weight")
    expected = torch.cat([part["weight"] for part in parts]).to(torch.float32).to(dtype)
    assert torch.equal(found, expected)
    del found
    assert kept() is None
    opened["bias"].copy_(parts[1]["bias"])
    store.commit()
    assert store.count == 6
    assert store.take("bias").shape == (6, 3)


def test_memory_is_taken_for_what_is_written_alone() -> None:
    store = store_of()
    store.open(2)["bias"].zero_()
    assert list(store._kept) == ["bias"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_are_kept_elsewhere_are_the_same(dtype: torch.dtype) -> None:
    here, elsewhere = store_of(dtype), store_of(dtype, ELSEWHERE)
    for seed in range(3):
        for store in (here, elsewhere):
            opened = write(store, rows_of(2, seed))
            assert all(rows._is_view() for rows in opened.values()) == (store is here and dtype == torch.float32)
            store.commit()
    for name in SIZES:
        assert torch.equal(here.take(name), elsewhere.take(name))


@pytest.mark.parametrize(("by_layer", "numbers"), [(False, 9), (True, 6)])
def test_the_place_is_chosen_by_what_is_there_at_a_time(by_layer: bool, numbers: int) -> None:
    store = store_of(torch.bfloat16)
    assert store.placement is None
    opened = store.open(2, by_layer)
    assert store.placement is None
    opened["bias"].zero_()
    assert store.placement is not None
    assert store.placement.needed == 2 * CAPACITY * numbers


def test_without_memory_rows_go_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    make, gpu = row_store.room, torch.device("cuda", 0)

    def room(*shape: int, dtype: torch.dtype, device: torch.device, beside: torch.device) -> Tensor:
        if device == gpu:
            raise torch.OutOfMemoryError("no memory left")
        return make(*shape, dtype=dtype, device=device, beside=CPU)

    monkeypatch.setattr(row_store, "room", room)
    found = RowStore(SIZES, CAPACITY, torch.float32, gpu, "auto")
    found.placement = Placement(gpu, 0, 0)
    assert found._room_for(6, False).device == CPU
    assert found.placement.device == CPU
    forced = RowStore(SIZES, CAPACITY, torch.float32, gpu, "device")
    forced.placement = Placement(gpu, 0, 0)
    with pytest.raises(torch.OutOfMemoryError):
        forced._room_for(6, False)
