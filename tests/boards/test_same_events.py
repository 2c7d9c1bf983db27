"""The TensorBoard board against the module it takes over from: equal events."""

from pathlib import Path

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from torch import Tensor

from lightning_spectral import tensorboard
from lightning_spectral.boards import EIGENVALUE_EDGES, boards_of, log10_histogram, spectrum_figure


def summaries(logger: TensorBoardLogger) -> list[bytes]:
    logger.experiment.close()
    (file,) = Path(logger.log_dir).glob("events*")
    events = map(Event.FromString, RawEventFileLoader(str(file)).Load())
    return [event.summary.SerializeToString(deterministic=True) for event in events if event.HasField("summary")]


def test_events_are_equal(tmp_path: Path, spectrum: Tensor) -> None:
    before, now = TensorBoardLogger(tmp_path / "before"), TensorBoardLogger(tmp_path / "now")
    writer, (board,) = before.experiment, boards_of([now])
    spectra = {
        "blocks.0": torch.arange(1, 101, dtype=torch.float64) ** -1.5,
        "blocks.1": spectrum.sort().values.flip(0),
    }
    fits = {"blocks.0": ((5, 50), 1.5)}
    for step in (1, 2):
        for name, values in {**spectra, "float32": spectrum.float(), "none": spectrum[:0]}.items():
            tensorboard.add_log10_histogram(writer, name, values, step, EIGENVALUE_EDGES)
            if (histogram := log10_histogram(values, EIGENVALUE_EDGES)) is not None:
                board.histogram(name, histogram, step)
        writer.add_figure("spectra", tensorboard.spectrum_figure("a title", spectra, fits), global_step=step)
        board.figure("spectra", spectrum_figure("a title", spectra, fits), step)
        for category in ("activation", "gradient"):
            tensorboard.add_charts(writer, category, {"alpha": ["a/alpha"], str(step): ["b"]})
            board.charts(category, {"alpha": ["a/alpha"], str(step): ["b"]})
    assert len(summaries(now)) == 12
    assert summaries(now) == summaries(before)
