"""MLflow: figures, tables and the folder as files of the run; it knows no histograms."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import override

from lightning_spectral.boards.board import Board

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class MLFlowBoard(Board):
    """Writes through the logger's client; a tag is a folder with a file for each step."""

    logger_class = "MLFlowLogger"

    @override
    def figure(self, tag: str, figure: "Figure", step: int) -> None:
        """A PNG."""
        self.logger.experiment.log_figure(self.logger.run_id, figure, f"{tag}/step_{step:06d}.png")

    @override
    def table(self, tag: str, columns: Mapping[str, Sequence[float | str]], step: int) -> None:
        """JSON, a list for each column; MLflow's own tables need pandas."""
        held = {heading: list(column) for heading, column in columns.items()}
        self.logger.experiment.log_dict(self.logger.run_id, held, f"{tag}/step_{step:06d}.json")

    @override
    def artifact(self, folder: Path, name: str) -> None:
        """Its files, in a folder of that name."""
        self.logger.experiment.log_artifacts(self.logger.run_id, str(folder), name)
