"""A run in MLflow's database, read back through its client."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import MLFlowLogger
from matplotlib.figure import Figure
from PIL import Image

from lightning_spectral.boards import boards_of


@pytest.fixture(scope="module")
def logger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MLFlowLogger]:
    """One database for all: its tables take seconds to make."""
    home = tmp_path_factory.mktemp("mlflow")
    # The database's migrations set up logging anew, and switch all loggers off that there were.
    loggers = [one for one in logging.Logger.manager.loggerDict.values() if isinstance(one, logging.Logger)]
    before = {one: one.disabled for one in loggers}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.chdir(home)  # whatever it may put beside the database
        yield MLFlowLogger(tracking_uri=f"sqlite:///{home}/runs.db", artifact_location=f"file://{home}/artifacts")
    for one, is_disabled in before.items():
        one.disabled = is_disabled


def fetch(logger: MLFlowLogger, path: str, to: Path) -> Path:
    return Path(logger.experiment.download_artifacts(logger.run_id, path, str(to)))


def test_a_figure_is_an_image_of_its_step(logger: MLFlowLogger, figure: Figure, tmp_path: Path) -> None:
    (board,) = boards_of([logger])
    board.figure("activation/spectra", figure, step=20)
    with Image.open(fetch(logger, "activation/spectra/step_000020.png", tmp_path)) as image:
        assert image.size == (640, 440)


def test_a_table_holds_the_columns(logger: MLFlowLogger, columns: dict[str, Any], tmp_path: Path) -> None:
    (board,) = boards_of([logger])
    board.table("activation/values", columns, step=20)
    held = json.loads(fetch(logger, "activation/values/step_000020.json", tmp_path).read_text())
    assert held == {heading: list(column) for heading, column in columns.items()}


def test_the_folder_is_there(logger: MLFlowLogger, folder: Path, tmp_path: Path) -> None:
    (board,) = boards_of([logger])
    board.artifact(folder, "spectral_record")
    held = fetch(logger, "spectral_record", tmp_path)
    assert sorted(path.name for path in held.rglob("*.*")) == ["meta.json", "step_000020.bin"]
    assert (held / "spectra" / "step_000020.bin").read_bytes() == b"spectrum"
