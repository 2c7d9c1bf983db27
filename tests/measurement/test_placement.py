"""Where things are kept follows from what is free; what a device computes is added in order and whenever it comes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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
    assert found.fits == (4 * needed <= free)
    assert asked == [GPU]


@pytest.mark.parametrize("keep", ["auto", "device", "cpu"])
def test_a_cpu_has_nowhere_else(keep) -> None:
    found = placed(keep, 10**15, CPU, lambda device: 4)
    assert (found.device, found.budget, found.fits) == (CPU, 1, False)


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
