"""Where things are kept follows from what is free; what a device computes is added in order and whenever it comes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_spectral.measurement.collector import Collector
from lightning_spectral.measurement.placement import CPU, SHARE, Behind, placed

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("keep", "needed", "free", "expected"),
    [
        ("auto", 100, 400, GPU),
        ("auto", 101, 400, CPU),
        ("auto", 1, 0, CPU),
        ("device", 10**15, 0, GPU),
        ("cpu", 1, 10**15, CPU),
    ],
)
def test_auto_takes_the_device_up_to_a_share_of_what_is_free(keep, needed, free, expected) -> None:
    asked = []
    found = placed(keep, needed, GPU, lambda device: asked.append(device) or free)
    assert (found.device, found.needed, found.budget) == (expected, needed, int(SHARE * free))
    assert asked == [GPU]


@pytest.mark.parametrize("keep", ["auto", "device", "cpu"])
def test_a_cpu_has_nowhere_else(keep) -> None:
    found = placed(keep, 10**15, CPU, lambda device: 4)
    assert (found.device, found.budget) == (CPU, 1)


class Slow:
    """A device whose copies arrive when they are waited for."""

    def __init__(self) -> None:
        self.most = self.under_way = 0

    def begin(self, part: torch.Tensor):
        copy = torch.full_like(part, torch.nan)
        self.under_way += 1
        self.most = max(self.most, self.under_way)

        def wait() -> None:
            self.under_way -= 1
            copy.copy_(part)

        return copy, wait


@pytest.mark.parametrize("most", [0, 1, 4, 10**6])
@pytest.mark.parametrize("num_groups", [1, 3])
def test_sums_that_come_late_are_the_same_to_the_bit(num_groups: int, most: int) -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = [torch.randn(size, 5, 200, generator=generator) for size in (3, 7, 1, 6, 4, 2, 9)]
    found = []
    for behind in (None, Behind(most, Slow().begin)):
        collector = Collector(["layer", "other"], 10**6, num_groups, True, torch.float32, CPU)
        collector._behind = behind
        for report in range(2):
            for output in outputs[report:]:
                collector.begin_batch(len(output), None)
                collector.add("layer", output)
                collector.add("other", output * 2)
            if report == 0:
                collector.drop(["other"])
                collector.add("other", outputs[-1])
            ((_, parts, *_),) = collector.pool()
            found.append(parts)
            assert not collector.failures
            collector.reset()
    for plain, late in zip(found[:2], found[2:], strict=True):
        assert all(map(torch.equal, plain, late))


@given(st.lists(st.integers(0, 2), max_size=20), st.integers(0, 5))
def test_what_is_behind_is_added_in_order(places: list[int], most: int) -> None:
    device, totals, expected = Slow(), torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64)
    behind = Behind(most, device.begin)
    generator = torch.Generator().manual_seed(0)
    for place in places:
        part = torch.randn(4, generator=generator) * 10.0 ** float(torch.randint(-8, 8, (), generator=generator))
        behind.add(totals[place], part)
        expected[place].add_(part)
    assert device.under_way == min(most, len(places))
    behind.settle()
    assert torch.equal(totals, expected)  # to the bit, which another order would not be
    assert device.under_way == 0
    assert device.most <= most + 1
