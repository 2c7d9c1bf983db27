"""Weights & Biases: histograms, figures, tables, and the folder as an artifact of the run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import override

from lightning_spectral.boards.board import Board
from lightning_spectral.boards.histogram import Histogram

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class WandbBoard(Board):
    """Writes through `log_metrics`, which knows the prefix, and puts the global step where its charts look for it."""

    logger_class = "WandbLogger"

    @override
    def histogram(self, tag: str, histogram: Histogram, step: int) -> None:
        """A heat map over steps."""
        import wandb

        drawn = wandb.Histogram(np_histogram=(histogram.counts, histogram.bounds))
        self.logger.log_metrics({tag: drawn}, step)

    @override
    def figure(self, tag: str, figure: "Figure", step: int) -> None:
        """An image: handed over as it is, the figure would be redrawn by plotly."""
        import wandb

        self.logger.log_metrics({tag: wandb.Image(figure)}, step)

    @override
    def table(self, tag: str, columns: Mapping[str, Sequence[float | str]], step: int) -> None:
        """A table of up to 200,000 rows, by which runs compare where their histograms do not."""
        import wandb

        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        self.logger.log_metrics({tag: wandb.Table(columns=list(columns), data=rows)}, step)

    @override
    def artifact(self, folder: Path, name: str) -> None:
        """Named after the run as Lightning names its checkpoints: artifacts of one name are versions of one another."""
        import wandb

        artifact = wandb.Artifact(f"{name}-{self.logger.experiment.id}", type=name)
        artifact.add_dir(str(folder))
        self.logger.experiment.log_artifact(artifact)
