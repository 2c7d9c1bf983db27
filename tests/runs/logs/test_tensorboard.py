"""Event files: what TensorBoard's own reader finds in them, torn ones, damaged ones, several in a folder."""

import struct
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter

from lightning_spectral import Run
from lightning_spectral.runs.logs import tensorboard

LOSSES = [3.0, 2.0, 1.5, 1.25]


def events(folder: Path, losses: list[float] = LOSSES, first: int = 1, **kwargs: bool) -> Path:
    with SummaryWriter(str(folder)) as writer:
        writer.add_histogram("h", np.arange(10.0), first)
        for step, loss in enumerate(losses, start=first):
            writer.add_scalar("val_loss", loss, step, walltime=1.7e9 + step, **kwargs)
    return folder


def file_of(folder: Path) -> Path:
    return next(folder.glob("events*"))


@pytest.mark.parametrize("form", [{}, {"new_style": True}, {"new_style": True, "double_precision": True}])
def test_scalars_are_those_that_tensorboard_reads(form: dict[str, bool], tmp_path: Path) -> None:
    run = Run(events(tmp_path, **form))
    accumulator = EventAccumulator(str(tmp_path)).Reload()
    if not form:
        found = accumulator.Scalars("val_loss")
        assert [one.step for one in found] == run.history.step.tolist()
        assert [one.value for one in found] == run.history.val_loss.tolist()
    np.testing.assert_array_equal(run.history.step, [1, 2, 3, 4])  # no column of epochs: they are what was done
    np.testing.assert_array_equal(run.history.val_loss, LOSSES)
    np.testing.assert_allclose(np.diff(run.history.seconds), 1)


def test_the_clock_is_that_of_the_losses_and_not_of_what_counts_other_steps(tmp_path: Path) -> None:
    """As Lightning does with what validation logs for each of its batches."""
    with SummaryWriter(str(tmp_path)) as writer:
        for step, loss in enumerate(LOSSES, start=1):
            writer.add_scalar("val_loss", loss, 10 * step, walltime=1.7e9 + step)
            for batch in range(3):
                writer.add_scalar("val_accuracy_step", 0.5, batch, walltime=1.7e9 + step + 0.5)
    run = Run(tmp_path)
    np.testing.assert_array_equal(run.history.step, [10, 20, 30, 40])
    np.testing.assert_allclose(np.diff(run.history.seconds), 1)


def test_a_torn_event_does_not_count(tmp_path: Path) -> None:
    file = file_of(events(tmp_path))
    file.write_bytes(file.read_bytes()[:-5])
    np.testing.assert_array_equal(Run(tmp_path).history.step, [1, 2, 3])


def test_a_damaged_length_is_refused_before_it_is_believed(tmp_path: Path) -> None:
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    file = file_of(events(tmp_path))
    content, length = file.read_bytes(), struct.pack("<Q", 2**40)
    file.write_bytes(length + struct.pack("<I", masked_crc32c(length)) + content[12:])
    with pytest.raises(ValueError, match="it has an event of 1,099,511,627,776 bytes, more than"):
        Run(tmp_path)
    file.write_bytes(length + content[8:])
    with pytest.raises(ValueError, match=r"run has a broken log: .* cannot be read .it is damaged, or no file of ev"):
        Run(tmp_path)


def test_files_of_a_resumed_run_follow_each_other(tmp_path: Path) -> None:
    file = file_of(events(tmp_path / "a"))
    later = file_of(events(tmp_path / "b", [1.4, 1.0], first=3))
    (tmp_path / "c").mkdir()
    file.rename(tmp_path / "c/events.out.tfevents.1700000009.host.7.1")
    later.rename(tmp_path / "c/events.out.tfevents.1700000010.host.7.0")
    run = Run(tmp_path / "c")
    np.testing.assert_array_equal(run.history.step, [1, 2, 3, 4])
    np.testing.assert_allclose(run.history.val_loss, [3.0, 2.0, 1.4, 1.0], rtol=1e-6)
    assert run.about["machines"] == ["host"]


def test_nobody_trained_between_two_files(tmp_path: Path) -> None:
    """Of a run that was resumed a day later, and whose first minute went by before anything was logged."""
    for begun, first, losses in ((1_700_000_000, 1, [3.0, 2.0]), (1_700_086_400, 3, [1.5, 1.0])):
        with SummaryWriter(str(tmp_path / "one")) as writer:
            for step, loss in enumerate(losses, start=first):
                writer.add_scalar("val_loss", loss, step, walltime=begun + 60 + step)
        file = file_of(tmp_path / "one")
        # The writer's own first event says when this test ran.
        with file.open("rb") as events_of_run:
            records = list(tensorboard._records(events_of_run))
        opened = Event.FromString(records[0])
        opened.wall_time = begun
        (tmp_path / "both").mkdir(exist_ok=True)
        with (tmp_path / f"both/events.out.tfevents.{begun}.host.7.0").open("wb") as written:
            for record in (opened.SerializeToString(), *records[1:]):
                RecordWriter(written).write(record)
        file.unlink()
    run = Run(tmp_path / "both")
    np.testing.assert_array_equal(run.history.step, [1, 2, 3, 4])
    np.testing.assert_allclose(run.history.seconds, [61, 62, 62 + 63, 62 + 64])
    assert run.columns["seconds"] == "wall_time (the clock on the wall, 1 pause left out)"


def test_a_folder_without_events_is_none(tmp_path: Path) -> None:
    (tmp_path / "events.out.x").touch()
    assert not tensorboard.is_log(tmp_path)
    assert not tensorboard.is_log(tmp_path / "nothing")
