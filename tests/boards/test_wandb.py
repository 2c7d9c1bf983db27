"""An offline run of Weights & Biases, read back from the file that would be sent."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from torch import Tensor

from lightning_spectral.boards import boards_of, log10_histogram, spectrum_figure


def records(data: bytes) -> Iterator[Any]:
    """LevelDB's log: blocks of 32 KiB with pieces of records, each after its checksum, length and kind."""
    from wandb.proto.wandb_internal_pb2 import Record

    start, record = len(b":W&B") + 3, b""
    while start + 7 <= len(data):
        if (left := -start % 32768) and left < 7:  # too little for a header: the block was filled up
            start += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, start)
        record += data[start + 7 : start + 7 + length]
        start += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield Record.FromString(record)
            record = b""


class Held:
    """What the run wrote."""

    def __init__(self, run: Path) -> None:
        (file,) = run.glob("*.wandb")
        self.files = run / "files"
        self.rows: list[dict[str, Any]] = []
        self.artifacts: dict[str, list[str]] = {}
        for record in records(file.read_bytes()):
            if record.HasField("history"):
                items = record.history.item
                self.rows.append({"/".join(item.nested_key): json.loads(item.value_json) for item in items})
            if record.HasField("artifact"):
                self.artifacts[record.artifact.type] = [file.path for file in record.artifact.manifest.contents]
                self.artifacts[f"{record.artifact.type} name"] = [record.artifact.name]

    def row(self, key: str) -> dict[str, Any]:
        (row,) = [row for row in self.rows if key in row]
        return row


@pytest.fixture(scope="module")
def held(
    tmp_path_factory: pytest.TempPathFactory, spectrum: Tensor, columns: dict[str, Any], folder: Path
) -> Iterator[Held]:
    """One run for all: its service takes a second to start."""
    import wandb

    home = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DIR", "DATA_DIR", "CACHE_DIR", "CONFIG_DIR", "ARTIFACT_DIR"):
            patch.setenv(f"WANDB_{name}", str(home))
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_CONSOLE", "off")
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        logger = WandbLogger(save_dir=home, offline=True, prefix="mine", id="abc")
        (board,) = boards_of([logger])
        board.histogram("activation/blocks.0", log10_histogram(spectrum, -7.0, 4.0), step=20)
        board.figure(
            "activation/figure",
            spectrum_figure("step 20", {"blocks.0": spectrum.sort(descending=True).values}, {}),
            step=20,
        )
        board.table("activation/spectra", columns, step=20)
        board.artifact(folder, "spectral_record")
        run = Path(logger.experiment.dir).parent
        wandb.finish()
        wandb.teardown()
        yield Held(run)


def test_a_histogram_keeps_its_bins(held: Held, spectrum: Tensor) -> None:
    histogram = log10_histogram(spectrum, -7.0, 4.0)
    row = held.row("mine-activation/blocks.0/values")
    assert row["mine-activation/blocks.0/values"] == histogram.counts.tolist()
    np.testing.assert_allclose(row["mine-activation/blocks.0/bins"], histogram.bounds)
    assert row["trainer/global_step"] == 20


def test_a_figure_is_an_image(held: Held) -> None:
    row = held.row("mine-activation/figure/path")
    with Image.open(held.files / row["mine-activation/figure/path"]) as image:
        assert image.size == (640, 440)
    assert row["trainer/global_step"] == 20


def test_a_table_holds_the_columns(held: Held, columns: dict[str, Any]) -> None:
    row = held.row("mine-activation/spectra/path")
    table = json.loads((held.files / row["mine-activation/spectra/path"]).read_text())
    assert table["columns"] == list(columns)
    assert list(zip(*table["data"], strict=True)) == [tuple(column) for column in columns.values()]
    assert row["trainer/global_step"] == 20


def test_the_folder_is_an_artifact_of_the_run(held: Held) -> None:
    assert held.artifacts["spectral_record"] == ["meta.json", "spectra/step_000020.bin"]
    assert held.artifacts["spectral_record name"] == ["spectral_record-abc"]
