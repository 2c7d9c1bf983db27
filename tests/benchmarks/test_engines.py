"""The table of engines is that of its results, and a handful of its cells are true."""

from typing import Any

import pytest
import torch

from benchmarks import engines
from benchmarks.engine_runs import ENGINES, expected, found_by


@pytest.fixture(scope="module")
def right() -> dict[str, Any]:
    return expected()


def test_the_page_has_the_newest_tables() -> None:
    text = engines.PAGE.read_text()
    assert engines.page(text, engines.newest()) == text


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("precision", ["64-true", "32-true", "bf16-mixed"])
def test_cells_of_one_device(engine: str, precision: str, right: dict[str, Any]) -> None:
    cell = engines.cell(found_by(engine, precision=precision), right, precision)
    kind = "rounding" if precision == "bf16-mixed" else "exact"
    assert cell.startswith(f"{kind} (")
    assert engines.newest()["precisions"][precision][engine].startswith(f"{kind} (")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("engine", "kind"), [("activations", "exact ("), ("hooks", "refused: "), ("loop", "exact (")])
def test_cells_of_compiled_blocks(engine: str, kind: str, right: dict[str, Any]) -> None:
    found = found_by(engine, precision="32-true", compiled="blocks in place")
    torch._dynamo.reset()
    assert engines.cell(found, right, "32-true").startswith(kind)
    assert engines.newest()["compiled"]["blocks in place"][engine].startswith(kind)


def test_what_cannot_run_here_is_said_to_be_untried_or_refused() -> None:
    for name in engines.UNTRIED:
        cells = engines.of_untried(name)
        assert cells["activations"].startswith("not tried, for on this machine Lightning says ")
        assert "strategy must leave each rank whole parameters, got" in cells["hooks"]
        assert engines.newest()["strategies"][name]["hooks"] == cells["hooks"]


def test_a_wrong_spectrum_is_not_called_exact(right: dict[str, Any]) -> None:
    values = right["activation"]["blocks.0"]
    for factor, cell in ((1 + 1e-3, "off (1e-03)"), (1 + 1e-9, "exact (1e-09)")):
        found = {"blocks.0": {"values": [factor * value for value in values], "failure": None}}
        assert engines.cell(found, right, "64-true") == cell
    short = {"blocks.0": {"values": values[:-1], "failure": None}}
    assert engines.cell(short, right, "64-true") == "off (inf)"
    assert engines.cell({"blocks.0": {"values": [], "failure": "why"}}, right, "64-true") == "NaN: why"
