"""What all tests share: hypothesis judges results, not the speed of the machine, and no test outlives a power cut."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from lightning_spectral.runs import writing
from tests.models import TESTED_ON

# Comet reports errors home from every second process that imports it, and transformers imports it where it finds it.
os.environ["COMET_ERROR_TRACKING_ENABLE"] = "false"

if TESTED_ON == "cuda":
    # What is compared bit by bit must give the same bits each time.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)

settings.register_profile("default", deadline=None)
settings.load_profile("default")


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_disks() -> Iterator[None]:
    """A report that is safe from power cuts costs milliseconds of waiting, and tests write thousands."""
    sync = writing.sync
    writing.sync = lambda descriptor: None
    yield
    writing.sync = sync
