"""Comet: histograms, figures, tables, and the folder as assets of the run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import override

from lightning_spectral.boards.board import Board
from lightning_spectral.boards.histogram import Histogram

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class CometBoard(Board):
    """Writes through the logger's experiment, online or offline."""

    logger_class = "CometLogger"

    @override
    def histogram(self, tag: str, histogram: Histogram, step: int) -> None:
        """Comet bins log10 values once more, a tenth of their size apart: it takes no bins of others."""
        self.logger.experiment.log_histogram_3d(histogram.logs, name=tag, step=step)

    @override
    def figure(self, tag: str, figure: "Figure", step: int) -> None:
        """A vector graphic, or an image where that would be too large."""
        self.logger.experiment.log_figure(tag, figure, step=step)

    @override
    def table(self, tag: str, columns: Mapping[str, Sequence[float | str]], step: int) -> None:
        """CSV, with the step in its name: tables have no other."""
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        self.logger.experiment.log_table(f"{tag}/step_{step:06d}.csv", rows, headers=list(columns))

    @override
    def artifact(self, folder: Path, name: str) -> None:
        """Its files as assets: Comet's artifacts are refused offline."""
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            self.logger.experiment.log_asset(
                str(path), file_name=f"{name}/{path.relative_to(folder).as_posix()}", overwrite=True
            )
