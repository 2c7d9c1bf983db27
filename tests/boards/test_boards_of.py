"""Which board a logger gets, what boards take, and that no logger's library is imported for want of it."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from lightning_spectral.boards import BOARDS, Board, boards_of


class CometLogger:
    experiment = SimpleNamespace()


class OwnCometLogger(CometLogger):
    pass


class UnopenedWandbLogger(WandbLogger):
    def __init__(self) -> None:
        pass


def test_each_logger_gets_its_board(tmp_path: Path) -> None:
    loggers: list[Any] = [
        *(OwnCometLogger(), CSVLogger(tmp_path), UnopenedWandbLogger()),
        *(TensorBoardLogger(tmp_path), SimpleNamespace(experiment=SimpleNamespace(add_histogram_raw=print))),
    ]
    boards = boards_of(loggers)
    names = [type(board).__name__ for board in boards]
    assert names == ["CometBoard", "WandbBoard", "TensorBoardBoard", "TensorBoardBoard"]
    assert [board.logger for board in boards] == [loggers[0], *loggers[2:]]


TAKES = {
    "TensorBoardBoard": {"histogram", "figure", "charts"},
    "WandbBoard": {"histogram", "figure", "table", "artifact"},
    "MLFlowBoard": {"figure", "table", "artifact"},
    "CometBoard": {"histogram", "figure", "table", "artifact"},
}


@pytest.mark.parametrize("board", BOARDS)
def test_a_board_takes_what_it_overrides(board: type[Board]) -> None:
    assert board.takes == TAKES[board.__name__]


def test_a_board_passes_over_the_rest(tmp_path: Path) -> None:
    board = Board(None)
    assert not board.takes
    board.table("a", {"rank": [1]}, step=1)
    board.charts("a", {"b": ["c"]})
    board.artifact(tmp_path, "record")


LAZILY = """
import sys
import lightning_spectral
from lightning_spectral.boards import boards_of
assert not boards_of([object()])
imported = {"wandb", "mlflow", "comet_ml"} & set(sys.modules)
assert not imported, imported
"""


def test_no_library_is_imported_without_its_logger() -> None:
    subprocess.run([sys.executable, "-c", LAZILY], check=True)
