"""What can be reached from a loss is put back as it was; what a copy holds for its own is not looked at in the end."""

import collections
import copy
import dataclasses
import functools
import itertools
import random
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_spectral.capture import kept as kept_module
from lightning_spectral.capture.kept import Kept

counts = {"calls": 0}
generator = torch.Generator()
number = 0


class Loss:
    """Holds what a loss may hold."""

    calls = 0

    def __init__(self) -> None:
        self.weight, self.table, self.names = torch.zeros(3), np.zeros(3), ["a"]
        self.dice, self.bits, self.old_bits = random.Random(0), np.random.default_rng(0), np.random.RandomState(0)

    def compute(self, module: Any, batch: Any, *, cache: dict[str, Tensor]) -> None:
        global number
        number += 1
        counts["calls"] += 1
        type(self).calls += 1
        self.weight.data.add_(1)
        self.table += 1
        self.names.append("b")
        self.latest = batch
        cache["batch"] = batch
        self.dice.random(), self.bits.random(), self.old_bits.rand()
        torch.rand(1, generator=generator)


def state(loss: Loss, cache: dict[str, Tensor]) -> list[Any]:
    generators = [loss.dice.getstate(), str(loss.bits.bit_generator.state), str(loss.old_bits.get_state())]
    held = [loss.weight.tolist(), loss.table.tolist(), list(loss.names), sorted(vars(loss)), dict(cache)]
    return [number, dict(counts), Loss.calls, generator.get_state().tolist(), *generators, *held]


def test_all_that_a_loss_reaches_is_put_back() -> None:
    loss, cache = Loss(), {}
    bound = functools.partial(loss.compute, cache=cache)
    before = state(loss, cache)
    kept = Kept([bound])
    for _ in range(2):
        bound(None, torch.ones(1))
        assert state(loss, cache) != before
        kept.put_back()
        assert state(loss, cache) == before


def test_between_two_losses_generators_go_on() -> None:
    loss, cache = Loss(), {}
    bound = functools.partial(loss.compute, cache=cache)
    kept = Kept([bound])
    drawn = kept.random_state()
    for _ in range(3):
        bound(None, torch.ones(1))
        kept.reset()
        assert loss.weight.tolist() == [0, 0, 0]
        assert loss.names == ["a"]
        assert counts["calls"] == 0
        assert kept.random_state() != drawn
        drawn = kept.random_state()
    kept.put_back()
    assert kept.random_state() == Kept([bound]).random_state() != drawn


def test_a_copy_begins_again_from_its_original() -> None:
    module = nn.BatchNorm1d(2)
    memo: dict[int, Any] = {}
    shadow = copy.deepcopy(module, memo)
    originals = {id(memo[id(part)]): part for part in memo[id(memo)]}
    kept = Kept([shadow], originals)
    shadow(torch.randn(4, 2))
    shadow.register_buffer("queue", torch.ones(1))
    kept.reset()
    assert all(map(torch.equal, shadow.buffers(), module.buffers()))
    assert not hasattr(shadow, "queue")


def test_iterators_are_refused() -> None:
    drawn = iter(range(3))
    with pytest.raises(ValueError, match=r"training_step must not draw from an iterator .* got a range_iterator"):
        Kept([lambda: next(drawn)])


@dataclasses.dataclass(slots=True, frozen=True)
class Frozen:
    """What is frozen can be written to all the same."""

    size: int


class Slotted:
    """Keeps a number where no dictionary is, under a name of the class's own, and leaves a place empty."""

    __slots__ = ("__hidden", "empty", "frozen")

    def __init__(self) -> None:
        self.__hidden, self.frozen = 0, Frozen(0)

    def move(self) -> None:
        self.__hidden += 1
        self.empty = self.__hidden
        object.__setattr__(self.frozen, "size", self.frozen.size + 1)

    def state(self) -> tuple[int, int, bool]:
        return self.__hidden, self.frozen.size, hasattr(self, "empty")


class Table(dict):
    """A container with an attribute."""

    size = 0


def counted(function: Any) -> Any:
    @functools.wraps(function)
    def call(*args: Any) -> Any:
        call.calls += 1
        return function(*args)

    call.calls = 0
    return call


slotted, entries, measure = Slotted(), Table(), counted(nn.functional.mse_loss)


def moving(x: Tensor) -> Tensor:
    slotted.move()
    entries.size += 1
    return measure(x, x)


def test_slots_and_attributes_of_functions_and_of_containers_are_put_back() -> None:
    kept = Kept([moving])
    for put_back in (kept.reset, kept.reset, kept.put_back):
        moving(torch.ones(1))
        assert (slotted.state(), entries.size, measure.calls) == ((1, 1, True), 1, 1)
        put_back()
        assert (slotted.state(), vars(entries), measure.calls) == ((0, 0, False), {}, 0)


def test_an_iterator_that_a_copy_holds_is_refused_unless_its_attributes_say_how_far_it_is() -> None:
    class Turns:
        def __init__(self) -> None:
            self.turn = 0

        def __iter__(self) -> "Turns":
            return self

        def __next__(self) -> int:
            self.turn += 1
            return self.turn

    turns, numbers = Turns(), itertools.count()
    kept = Kept([[turns]], {id(turns): turns})
    for _ in range(2):
        assert next(turns) == 1
        kept.reset()
    with pytest.raises(ValueError, match="must not draw from an iterator that a copy holds, got a count: give loss_fn"):
        Kept([[numbers]], {id(numbers): numbers})


def test_of_what_is_asked_of_training_the_nearest_is_noted_and_less_than_of_what_a_step_names(monkeypatch: Any) -> None:
    class Part:
        pass

    data, kept = Part(), Kept([])
    data.far, data.near, data.lines, data.steps = [[[[0]]] for _ in range(9)], [0], collections.deque([iter([1])]), 0
    with pytest.raises(ValueError, match="must not draw from an iterator that a copy shares with training"):
        kept.follow_training(None, "datamodule", data)
    with pytest.raises(ValueError, match="must not draw from an iterator that a copy shares with training"):
        kept.follow_training(None, "datamodule", data)
    monkeypatch.setattr(kept_module, "NEAREST", 8)
    del data.lines
    data.guarded, data.guarded.lock, data.guarded.waiting = Part(), threading.Lock(), 0
    data.loader = DataLoader([0], num_workers=0)
    data.loader.__dict__["_iterator"] = iter(data.loader)
    kept = Kept([])
    kept.follow_training(None, "datamodule", data)
    data.steps, data.near[0], data.far[0][0][0][0], data.guarded.waiting = 1, 1, 1, 1
    kept.put_back()
    assert (data.steps, data.near, data.far[0], data.guarded.waiting) == (0, [0], [[[1]]], 1)


def test_a_generator_that_is_met_late_has_not_been_drawn_from() -> None:
    kept, dice = Kept([]), random.Random(0)
    before = kept.random_state()
    kept.follow_training(None, "dice", [dice])
    assert kept.random_state() == before
    dice.random()
    assert kept.random_state() != before
