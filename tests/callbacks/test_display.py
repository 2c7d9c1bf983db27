"""What boards are handed: histograms at every report, figure and table at milestones, and only what they take."""

from pathlib import Path
from typing import Any, ClassVar

import pytest

from lightning_spectral import ActivationSpectrum, Run, boards
from lightning_spectral.boards import Board
from lightning_spectral.callbacks import display
from tests.models import LanguageModel, NoLogDir, tiny_trainer, token_loader

BLOCK = "activation/network.blocks.0"


class Shelf(NoLogDir):
    """A logger with a board of its own."""


class ShelfBoard(Board):
    """Keeps what it is handed."""

    logger_class = "Shelf"
    held: ClassVar[list[tuple[Any, ...]]] = []

    def histogram(self, tag: str, histogram: Any, step: int) -> None:
        self.held.append(("histogram", tag, step, int(histogram.counts.sum())))

    def table(self, tag: str, columns: Any, step: int) -> None:
        self.held.append(("table", tag, step, {name: list(column) for name, column in columns.items()}))


class Gallery(ShelfBoard):
    """Takes figures, too."""

    def figure(self, tag: str, figure: Any, step: int) -> None:
        self.held.append(("figure", tag, step, [text.get_text() for text in figure.axes[0].get_legend().get_texts()]))


@pytest.mark.parametrize("board", [ShelfBoard, Gallery])
def test_each_board_gets_what_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, board: type[Board]) -> None:
    drawn = []
    draw = display.spectrum_figure
    monkeypatch.setattr(display, "spectrum_figure", lambda *args: (drawn.append(args[0]), draw(*args))[1])
    monkeypatch.setattr(boards, "BOARDS", (board,))
    monkeypatch.setattr(ShelfBoard, "held", [])
    spectrum = ActivationSpectrum("*.blocks.0", every_n_steps=2, num_tokens=64, num_groups=1)
    trainer = tiny_trainer(tmp_path, callbacks=[spectrum], logger=Shelf(tmp_path), max_steps=10, limit_val_batches=0)
    trainer.fit(LanguageModel(), token_loader(), token_loader())
    held = ShelfBoard.held
    assert [one[1:] for one in held if one[0] == "histogram"] == [
        (f"{BLOCK}/log10_eigenvalues", step, 32) for step in (2, 4, 6, 8, 10)
    ]
    # The 1st, 2nd and 4th report, and the last.
    tables = {step: columns for what, tag, step, columns in held if (what, tag) == ("table", "activation/values")}
    assert list(tables) == [2, 4, 8, 10]
    assert tables[2]["name"] == ["network.blocks.0"] * 32
    assert tables[2]["rank"] == list(range(1, 33))
    values = Run(tmp_path / "project" / "run7").spectrum("activation", "network.blocks.0", 10).values
    assert tables[10]["value"] == values.tolist()
    figures = [(tag, step) for what, tag, step, _ in held if what == "figure"]
    expected = [2, 4, 8, 10] if board is Gallery else []
    assert figures == [("activation/spectra", step) for step in expected]
    assert len(drawn) == len(expected)
