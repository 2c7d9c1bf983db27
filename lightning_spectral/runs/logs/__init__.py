"""Logs of other tools, read as runs without spectra: a file for each tool, and rules for which column is what."""

from pathlib import Path

from lightning_spectral.runs.logs import csv_logger, mlflow, tensorboard, wandb
from lightning_spectral.runs.logs.columns import Columns
from lightning_spectral.runs.logs.log import Log, Reader

READERS: tuple[Reader, ...] = (wandb.READER, mlflow.READER, csv_logger.READER, tensorboard.READER)
"""Each is asked in turn whether a path is a log of its tool; a folder with a CSV and event files is read by the CSV."""


def reader_of(path: Path) -> Reader | None:
    """Who reads the log that a path is; None for what is no log."""
    return next((reader for reader in READERS if reader.is_log(path)), None)


__all__ = ["READERS", "Columns", "Log", "Reader", "reader_of"]
