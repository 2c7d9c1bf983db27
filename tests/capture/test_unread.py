"""A stand-in for what must not be read lies in a batch as that would, and refuses every way of reading it."""

from typing import Any

import numpy as np
import pytest
import torch

from lightning_spectral.capture.batch import copied
from lightning_spectral.capture.unread import Unread


@pytest.mark.parametrize(
    "read",
    [
        len,
        list,
        bool,
        str,
        hash,
        sorted,
        torch.tensor,
        torch.as_tensor,
        np.asarray,
        lambda some: some[0],
        lambda some: some.count(3),
        lambda some: some == [3],
        lambda some: 3 in some,
        lambda some: f"{some}",
        lambda some: [*some],
        lambda some: some * 2,
        lambda some: torch.ones(2) * some,
        lambda some: np.ones(2) * some,
        lambda some: some.append(3),
        lambda some: dict(zip("ab", some, strict=True)),
    ],
)
@pytest.mark.parametrize("kind", [list, tuple, np.ndarray])
def test_reading_is_refused(read: Any, kind: type) -> None:
    some = Unread("the list names is not to be read", kind)
    with pytest.raises(ValueError, match=r"^the list names is not to be read$"):
        read(some)


def test_a_batch_that_it_lies_in_is_copied_and_branched_on() -> None:
    some, x = Unread("no", list), torch.ones(2)
    found = copied({"x": x, "nested": [{"some": some}, (some,)]})
    assert found["nested"][0]["some"] is some
    assert found["nested"][1][0] is some
    assert found["x"] is not x
    assert isinstance(some, list)
    assert not isinstance(some, tuple)
