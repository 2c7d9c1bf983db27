"""An offline experiment of Comet, read back from the archive that would be sent."""

import json
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from torch import Tensor

from lightning_spectral.boards import Board, boards_of, log10_histogram


class CometLogger:
    """Lightning's own makes no offline experiment: without the network it disables the one it makes."""

    def __init__(self, experiment: Any) -> None:
        self.experiment = experiment


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Board]:
    monkeypatch.setenv("COMET_DISABLE_AUTO_LOGGING", "1")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    from comet_ml import OfflineExperiment

    silent = dict.fromkeys(
        ("log_code", "log_git_metadata", "log_env_details", "auto_output_logging", "parse_args"), False
    )
    experiment = OfflineExperiment(offline_directory=str(tmp_path), display_summary_level=0, **silent)
    (board,) = boards_of([CometLogger(experiment)])
    yield board
    experiment.end()


def uploads(board: Board, folder: Path) -> list[tuple[dict[str, Any], bytes]]:
    board.logger.experiment.end()
    (archive,) = folder.glob("*.zip")
    with zipfile.ZipFile(archive) as files:
        messages = map(json.loads, files.read("messages.json").splitlines())
        payloads = [message["payload"] for message in messages if message["type"] == "file_upload"]
        return [(payload["additional_params"], files.read(payload["file_path"])) for payload in payloads]


def test_everything_is_in_the_archive(
    board: Board, spectrum: Tensor, figure: Figure, columns: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    histogram = log10_histogram(spectrum, -7.0, 4.0)
    board.histogram("activation/blocks.0", histogram, step=20)
    board.figure("activation/figure", figure, step=20)
    board.table("activation/spectra", columns, step=20)
    board.artifact(folder, "spectral_record")
    (bins, held), (drawn, image), (table, text), *files = uploads(board, tmp_path)
    assert (bins["fileName"], bins["step"], bins["type"]) == ("activation/blocks.0", 20, "histogram3d")
    assert sum(count for _, count in json.loads(held)["index_values"]) == len(spectrum)
    assert (drawn["figName"], drawn["step"]) == ("activation/figure", 20)
    assert b"<svg" in image
    assert table["fileName"] == "activation/spectra/step_000020.csv"
    heading, *rows = text.decode().split()
    assert heading.split(",") == list(columns)
    assert np.allclose([float(row.split(",")[-1]) for row in rows], columns["value"], atol=0)
    assert [(file["fileName"], content) for file, content in files] == [
        ("spectral_record/meta.json", b"{}"),
        ("spectral_record/spectra/step_000020.bin", b"spectrum"),
    ]
