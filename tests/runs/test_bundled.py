"""The runs that the package carries: complete, small, of one family, and found by their name."""

import os

import numpy as np
import pytest

from lightning_spectral import Run
from lightning_spectral.runs.bundled import FOLDER, bundled
from lightning_spectral.runs.references import Wanted, find_references

TARGET = 2.0
SETTINGS = {"stage": "validate", "normalize": True, "num_tokens": 32768, "mask": None}


def test_all_serve_as_references_of_the_demo() -> None:
    family = Run(bundled("bundled:tiny")[0]).family
    found = find_references(["bundled:tiny"], Wanted(family, TARGET, "val_loss", "gpt.blocks.3", SETTINGS))
    assert len(found.usable) == len(bundled("bundled:tiny")) >= 4
    assert not found.skipped
    settings = {(run.run.about["batch_tokens"], str(run.run.about["setting"])) for run in found.usable}
    assert len(settings) == len(found.usable)
    for reference in found.usable:
        first = reference.run.steps("activation")[0]
        assert reference.run.tokens_at("activation", first) <= 65_536
        assert np.isfinite(reference.run.course("activation").exponent("gpt.blocks.3", (0.125, 0.5), 65_536))


def test_they_are_small_and_say_nothing_of_where_they_were_made() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file() and path.suffix != ".py" and path.suffix != ".pyc"]
    assert sum(map(os.path.getsize, files)) < 1_500_000
    for run in map(Run, bundled("bundled:tiny")):
        assert run.about["machines"] == []
        for path in run.folder.glob("*.npz"):
            with np.load(path) as arrays:
                assert not any(array.ndim and array.dtype != np.float32 for array in arrays.values())


def test_wrong_name_is_one_line_that_lists_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"got 'bundled:large': there are bundled:tiny$") as raised:
        bundled("bundled:large")
    assert "\n" not in str(raised.value)
    assert bundled("logs/*") == []
