"""What is shown on every board, and a watch over the network: what is written there is read back from disk alone."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightning_spectral.boards import spectrum_figure

COLUMNS = {"name": ["blocks.0", "blocks.0", "blocks.1"], "rank": [1, 2, 1], "value": [0.1, 1e-300, 2.0 / 3]}


@pytest.fixture(scope="session")
def columns() -> dict[str, list[Any]]:
    return COLUMNS


@pytest.fixture(scope="session")
def spectrum() -> Tensor:
    """Values for each bin that is special: an exact zero, one below all edges, one above, and the interior."""
    return torch.cat([torch.tensor([0.0, 1e-9, 1e6]), torch.logspace(-3, 1, 40, dtype=torch.float64)])


@pytest.fixture
def figure() -> Figure:
    values = torch.arange(1, 101, dtype=torch.float64) ** -1.5
    return spectrum_figure("step 20", {"blocks.0": values, "blocks.1": 2 * values}, {"blocks.0": ((5, 50), 1.5)})


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A record as the callbacks leave it: files, and files in folders."""
    folder = tmp_path_factory.mktemp("record")
    (folder / "spectra").mkdir()
    (folder / "meta.json").write_text("{}")
    (folder / "spectra" / "step_000020.bin").write_bytes(b"spectrum")
    return folder


@pytest.fixture(autouse=True, scope="module")
def no_network() -> Iterator[None]:
    """Nothing here looks up a host: offline means offline."""
    lookup, hosts = socket.getaddrinfo, []

    def noted(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host in (None, "localhost", "127.0.0.1", "::1"):
            return lookup(host, *args, **kwargs)
        hosts.append(host)
        raise OSError(f"a test must need no network, it looked up {host}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", noted)
        yield
    assert not hosts
