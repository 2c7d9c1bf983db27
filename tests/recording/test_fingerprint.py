"""The fingerprint of validation data is that of its samples, not of how they are batched, dealt out or converted."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_spectral.recording.fingerprint import Fingerprint

CPU = torch.device("cpu")
SAMPLES = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))


def fingerprint(batches: list[Tensor], rank: int = 0, world: int = 1) -> int:
    found = Fingerprint(rank, world)
    for batch in batches:
        found.add({"x": batch}, 0)
    return int(found.agree(1, CPU)["0"], 16)


@pytest.mark.parametrize("size", [1, 3, 16, 40])
def test_batches_do_not_matter(size: int) -> None:
    assert fingerprint(list(SAMPLES.split(size))) == fingerprint([SAMPLES])


@pytest.mark.parametrize("world", [2, 3, 6, 16, 32])
def test_ranks_do_not_matter(world: int) -> None:
    """Ranks are dealt samples one by one, and their sums are added up."""
    parts = [fingerprint(list(SAMPLES[rank::world].split(2)), rank, world) for rank in range(world)]
    assert sum(parts) == fingerprint([SAMPLES])


@pytest.mark.parametrize("convert", [Tensor.bfloat16, Tensor.double], ids=["bfloat16", "float64"])
def test_precision_does_not_matter(convert: Callable[[Tensor], Tensor]) -> None:
    assert fingerprint([convert(SAMPLES)]) == fingerprint([SAMPLES])


def test_data_do() -> None:
    assert fingerprint([SAMPLES + 1]) != fingerprint([SAMPLES])
    assert fingerprint([SAMPLES.flip(1)]) != fingerprint([SAMPLES])


def test_loaders_are_told_apart_and_odd_batches_are_not_known() -> None:
    found = Fingerprint(0, 1)
    found.add({"x": SAMPLES}, 0)
    found.add({"x": SAMPLES + 1}, 1)
    found.add(object(), 2)
    prints = found.agree(4, CPU)
    assert prints["0"] != prints["1"]
    assert prints["3"] == "0"  # of a loader without a batch


def test_an_object_that_cannot_be_cut_is_not_known() -> None:
    class Odd:
        def __init__(self) -> None:
            self.x = SAMPLES

    found = Fingerprint(0, 1)
    found.add(Odd(), 0)
    assert found.agree(1, CPU) == {}
