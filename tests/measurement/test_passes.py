"""Which samples of a pass are read: the same however they are batched, spread over it, never beyond the share."""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    SequentialSampler,
    TensorDataset,
)

from lightning_spectral.capture.batch import Samples
from lightning_spectral.measurement.collector import Collector
from lightning_spectral.measurement.passes import Pass, pass_of
from lightning_spectral.measurement.same_rows import SameRows
from tests import _reference

WIDTH = 3


def read(lengths: list[int], num_tokens: int, batch_size: int, is_known: bool = True, calls: int = 1) -> list[int]:
    """Samples that are read of a pass over samples of so many rows each, told by the values of their rows."""
    longest, count = max(lengths), len(lengths)
    rows = torch.arange(1, count + 1.0)[:, None, None].expand(count, longest, WIDTH)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    found = Collector(["layer"], num_tokens, 1, False, torch.float64, torch.device("cpu"))
    of = Pass(math.ceil(count / batch_size), count if is_known else None, batch_size)
    taken: list[int] = []
    accumulate = found._accumulate
    found._accumulate = lambda sums, slot, part, kept, *rest: (  # type: ignore[method-assign]
        taken.extend(int(sample) - 1 for sample, keep in zip(part[:, 0, 0], kept, strict=True) if keep.any()),
        accumulate(sums, slot, part, kept, *rest),
    )[0]
    for index, (batch, real) in enumerate(zip(rows.split(batch_size), mask.split(batch_size), strict=True)):
        found.begin_batch(len(batch), real, of.place(index))
        for _ in range(calls):
            found.add("layer", batch)
    return taken


@given(st.lists(st.integers(1, 9), min_size=1, max_size=60), st.integers(1, 300), st.sampled_from([1, 2, 5, 16, 64]))
@settings(max_examples=150, deadline=None)
def test_samples_are_those_of_a_slow_twin_however_they_are_batched(
    lengths: list[int], num_tokens: int, batch_size: int
) -> None:
    samples = [[index] * length for index, length in enumerate(lengths)]
    expected = [sample[0] for sample in _reference.spread_samples(samples, num_tokens)]
    assert read(lengths, num_tokens, batch_size) == expected


def test_equal_samples_are_read_at_equal_distances() -> None:
    assert read([4] * 60, 4 * 6, 8) == [0, 10, 20, 30, 40, 50]
    assert read([4] * 60, 4 * 60, 8) == list(range(60))
    assert read([4] * 60, 10**6, 8) == list(range(60))


@pytest.mark.parametrize("last", [1, 3])
def test_an_unequal_last_batch_is_read_too(last: int) -> None:
    count = 16 + last
    assert read([4] * count, 4 * count, 16) == list(range(count))
    # Where only the number of batches is known, the last counts as whole.
    assert read([4] * count, 4 * 32, 16, is_known=False) == list(range(count))


def test_a_layer_that_is_called_often_does_not_use_up_its_share_at_the_start() -> None:
    found = read([4] * 64, 4 * 32, 8, calls=4)
    assert len(found) == 32  # eight samples, four times each
    assert max(found) >= 48


def test_the_share_is_never_exceeded_by_more_rows() -> None:
    lengths = [1 + (7 * index) % 9 for index in range(50)]
    for num_tokens in range(9, 200, 13):
        assert sum(lengths[index] for index in read(lengths, num_tokens, 8)) <= num_tokens


class Stream(IterableDataset):
    """Without a length."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.zeros(10, 2))


def test_a_pass_is_as_long_as_its_loader_says() -> None:
    data = TensorDataset(torch.zeros(50, 2))
    assert pass_of(DataLoader(data, batch_size=16), 4) == Pass(4, 50, 16, 50)
    assert pass_of(DataLoader(data, batch_size=16), 2) == Pass(2, 32, 16, 32)
    sampler = DistributedSampler(data, num_replicas=4, rank=1, shuffle=False)  # pads 50 to 52
    assert pass_of(DataLoader(data, batch_size=4, sampler=sampler), 4) == Pass(4, 13, 4, 16)
    assert pass_of(DataLoader(data, batch_sampler=[[0, 1], [2]]), 2) == Pass(2)
    handed_over = DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 3, drop_last=False))
    assert pass_of(handed_over, 4) == pass_of(DataLoader(data, 3), 4)
    assert pass_of([1, 2, 3], 3) == Pass(3)
    assert pass_of(DataLoader(Stream()), 5) == Pass(5)
    assert pass_of(DataLoader(Stream()), math.inf) is None
    assert pass_of(DataLoader(data), 0) is None


@pytest.mark.parametrize(("count", "size", "share"), [(490 * 16, 16, 512), (6, 3, 4), (50, 16, 50), (33, 16, 20)])
def test_whole_batches_are_spread_and_come_to_the_share(count: int, size: int, share: int) -> None:
    of, read, at = Pass(-(-count // size), count, size), 0, []
    for index in range(of.num_batches):
        if of.place(index).needs(read, share) and read < share:
            read += min(size, count - index * size, share - read)
            at.append(index)
    assert read == share
    gaps = torch.tensor([*at, of.num_batches]).diff()
    assert int(gaps.max()) <= of.num_batches * size / share + 1


def code(samples: torch.Tensor, batch_size: int, is_known: bool = True) -> str:
    found = SameRows(Samples())
    of = Pass(math.ceil(len(samples) / batch_size), len(samples), batch_size)
    for index, batch in enumerate(samples.split(batch_size)):
        found.look({"x": batch}, of.place(index) if is_known else None)
    return found.agree(torch.device("cpu"))


def test_codes_tell_rows_apart_and_not_batches() -> None:
    samples = torch.randn(75, 4, 2, generator=torch.Generator().manual_seed(0))
    assert code(samples, 16) == code(samples, 7) == code(samples, 75) != ""
    assert code(samples.flip(0), 16) != code(samples, 16)
    assert code(samples[:74], 16) != code(samples, 16)
    late = samples.clone()
    late[70:] += 1  # the last that is looked at is the 71st
    assert code(late, 16) != code(samples, 16)
    assert code(samples, 16, is_known=False) == code(samples, 5, is_known=False) != code(samples, 16)
    assert code(samples.flip(0), 16, is_known=False) != code(samples, 16, is_known=False)


def test_batches_that_cannot_be_cut_have_no_code() -> None:
    found = SameRows(Samples())
    found.look(object(), Pass(2).place(0))
    assert found.agree(torch.device("cpu")) == ""
