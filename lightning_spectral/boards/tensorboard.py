"""TensorBoard: histograms, figures, and a layout of scalar charts."""

import re
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from lightning_spectral.boards.board import Board, Margin
from lightning_spectral.boards.histogram import Histogram

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_layouts: "weakref.WeakKeyDictionary[Any, dict[str, dict[str, Any]]]" = weakref.WeakKeyDictionary()


class TensorBoardBoard(Board):
    """Writes through the logger's SummaryWriter."""

    @classmethod
    @override
    def serves(cls, logger: Any) -> bool:
        """Any logger whose experiment takes finished histograms: loggers of one's own around a SummaryWriter, too."""
        return hasattr(getattr(logger, "experiment", None), "add_histogram_raw")

    @override
    def histogram(self, tag: str, histogram: Histogram, step: int) -> None:
        """To the histogram and distribution dashboards."""
        self.logger.experiment.add_histogram_raw(
            tag,
            # TensorBoard closes the outer bins with these: with those of the values the bins would overlap.
            min=float(histogram.lowest),
            max=float(histogram.highest),
            num=int(histogram.counts.sum()),
            sum=float(histogram.logs.sum()),
            sum_squares=float((histogram.logs**2).sum()),
            bucket_limits=list(histogram.edges),
            bucket_counts=histogram.counts.tolist(),
            global_step=step,
        )

    @override
    def figure(self, tag: str, figure: "Figure", step: int) -> None:
        """To the image dashboard."""
        self.logger.experiment.add_figure(tag, figure, global_step=step)

    @override
    def charts(self, category: str, charts: Mapping[str, Sequence[str]]) -> None:
        """The last layout in a run replaces those before it, so the union of all that was asked is written again."""
        layout = _layouts.setdefault(self.logger.experiment, {})
        wanted = {title: _chart(tags) for title, tags in charts.items()}
        if layout.get(category, {}).items() >= wanted.items():
            return
        layout.setdefault(category, {}).update(wanted)
        self.logger.experiment.add_custom_scalars(layout)


def _chart(tags: Sequence[str]) -> list[Any]:
    """As SummaryWriter has it: a margin's tags are taken as they are, those of lines are patterns."""
    return (
        ["Margin", list(tags)] if isinstance(tags, Margin) else ["Multiline", [f"^{re.escape(tag)}$" for tag in tags]]
    )
