"""Event files, read back."""

from pathlib import Path

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from torch import Tensor

from lightning_spectral.boards import Margin, boards_of, log10_histogram


@pytest.fixture
def logger(tmp_path: Path) -> TensorBoardLogger:
    return TensorBoardLogger(tmp_path)


def read(logger: TensorBoardLogger) -> EventAccumulator:
    logger.experiment.close()
    return EventAccumulator(logger.log_dir, size_guidance={"tensors": 0}).Reload()


def test_a_histogram_keeps_its_bins(logger: TensorBoardLogger, spectrum: Tensor) -> None:
    histogram = log10_histogram(spectrum, -7.0, 4.0)
    (board,) = boards_of([logger])
    board.histogram("activation/blocks.0", histogram, step=20)
    (event,) = read(logger).Histograms("activation/blocks.0")
    held = event.histogram_value
    assert event.step == 20
    assert held.bucket == histogram.counts.tolist()
    assert held.bucket_limit == [round(-7 + index / 5, 1) for index in range(56)]
    assert (held.min, held.max) == (histogram.lowest, histogram.highest)
    assert (held.num, held.sum) == (len(spectrum), histogram.logs.sum())
    assert held.sum_squares == (histogram.logs**2).sum()


def test_a_figure_is_an_image(logger: TensorBoardLogger, figure: Figure) -> None:
    (board,) = boards_of([logger])
    board.figure("activation/spectra", figure, step=20)
    (image,) = read(logger).Images("activation/spectra")
    assert image.step == 20
    assert (image.width, image.height) == (640, 440)
    assert image.encoded_image_string.startswith(b"\x89PNG")


def test_the_last_layout_holds_all_charts(logger: TensorBoardLogger) -> None:
    charts = {"alpha": ["activation/blocks.0/alpha_tail", "activation/blocks.1/alpha_tail"]}
    for _ in range(2):  # boards are made anew for each report
        (board,) = boards_of([logger])
        board.charts("activation spectra", charts)
        board.charts("drift", {"overlap": ["drift/blocks.0/overlap"]})
    layouts = read(logger).Tensors("custom_scalars__config__")
    assert len(layouts) == 2
    layout = Layout.FromString(layouts[-1].tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == ["activation spectra", "drift"]
    (chart,) = layout.category[0].chart
    assert list(chart.multiline.tag) == [
        r"^activation/blocks\.0/alpha_tail$",
        r"^activation/blocks\.1/alpha_tail$",
    ]


def test_a_margin_is_drawn_as_one(logger: TensorBoardLogger) -> None:
    (board,) = boards_of([logger])
    board.charts("forecast", {"tokens": Margin("forecast/tokens", "forecast/low", "forecast/high")})
    content = read(logger).Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0]
    (chart,) = Layout.FromString(content).category[0].chart
    (series,) = chart.margin.series
    assert (chart.title, series.value, series.lower, series.upper) == (
        "tokens",
        "forecast/tokens",
        "forecast/low",
        "forecast/high",
    )
