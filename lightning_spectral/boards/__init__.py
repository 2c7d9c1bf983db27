"""What loggers show of a report besides its numbers: one interface, and a file for each logger."""

from collections.abc import Sequence
from typing import Any

from lightning_spectral.boards import comet, mlflow, tensorboard, wandb
from lightning_spectral.boards.board import Board, Margin
from lightning_spectral.boards.figure import spectrum_figure
from lightning_spectral.boards.histogram import Histogram, log10_histogram

__all__ = [
    "BOARDS",
    "Board",
    "Histogram",
    "Margin",
    "boards_of",
    "log10_histogram",
    "spectrum_figure",
]

BOARDS: tuple[type[Board], ...] = (
    wandb.WandbBoard,
    mlflow.MLFlowBoard,
    comet.CometBoard,
    tensorboard.TensorBoardBoard,  # last, because it opens a logger's experiment to see whether it is one
)
"""One line for each logger; of several that serve one, the first is taken."""


def boards_of(loggers: Sequence[Any]) -> list[Board]:
    """The board of each logger that takes more than numbers, in the order of the loggers.

    Ask on rank zero: on other ranks Lightning puts dummies in the loggers, and those take everything.
    """
    kinds = [(next((kind for kind in BOARDS if kind.serves(logger)), None), logger) for logger in loggers]
    return [kind(logger) for kind, logger in kinds if kind is not None]
