"""Text as bytes: a data module whose order is a function of (seed, epoch) and resumes in mid-epoch."""

import os
import sysconfig
from pathlib import Path

import numpy as np
from typing_extensions import override

from lightning_spectral.nanogpt.arguments import check_number, check_path
from lightning_spectral.nanogpt.blocks import BlockData, Blocks

# Folders that distributions of Python leave out or ship apart, and those where users' packages go.
_NOT_EVERYWHERE = frozenset(
    {
        *("site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3"),
        *("tkinter", "turtledemo", "ensurepip", "distutils", "__pycache__"),
    }
)


def _walk(root: Path, skip: frozenset[str] = frozenset()) -> list[Path]:
    """All files under `root` that are not hidden, nor in a folder that is hidden or named in `skip`, by path."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skip]
        found += [Path(folder, name) for name in files if not name.startswith(".")]
    return sorted(found, key=lambda file: file.relative_to(root).as_posix())


def _is_text(file: Path) -> bool:
    if not file.is_file():  # sockets, pipes, dangling links
        return False
    with file.open("rb") as stream:
        return b"\0" not in stream.read(8192)


def text_files(path: str | None) -> list[Path]:
    """Text files of a folder, by path; None for the sources of Python's standard library. ValueError for none."""
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        files = [file for file in _walk(root, skip=_NOT_EVERYWHERE) if file.suffix == ".py"]
        if not files:
            raise ValueError(
                f"path must name a text file or folder, got None, but the standard library in {root} has no sources"
            )
        return files
    root = Path(path).expanduser()
    if not os.path.exists(root):
        raise ValueError(f"path must be a text file or a folder of them, got {path!r}, which does not exist")
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise ValueError(f"path must be a text file or a folder of them, got {path!r}, a pipe or a device")
    files = [file for file in _walk(root) if _is_text(file)]
    if not files:
        raise ValueError(f"path must hold at least one text file, got {path!r}: hidden and binary files do not count")
    return files


class TextData(BlockData):
    """Any text, read as bytes, in blocks for language modelling; by default text that every machine has.

    A batch is a dict of `input_ids` and `labels`, both int64 of shape `(batch_size, block_size)`; the labels are the
    inputs shifted by one. Files are concatenated in the order of their paths relative to the folder. Training goes
    through the blocks of the text's beginning, each once an epoch, in an order that depends on (seed, epoch) only;
    validation, test and prediction go through the blocks of its end, in order. Ranks share the blocks without
    overlap. A run that is resumed from a checkpoint of Lightning's, even from the middle of an epoch, sees the
    batches that the uninterrupted run would have seen.

    Args:
        path: A text file, or a folder whose text files are read: those that are not hidden, nor in a hidden folder,
            and have no NUL byte in their first 8 KiB. None reads the sources of Python's own standard library (about
            11 MB; without tests and the other parts that distributions leave out).
        block_size: Tokens of a sequence, at most the model's block_size. The default is a page of code.
        batch_size: Sequences in a batch of one rank. The default suits a CPU with two cores.
        val_fraction: Fraction of the text, in (0, 1), taken from its end, that is held out.
        seed: Of the order of training blocks, not negative.
        num_workers: Processes that prepare batches; 0, the default, does it in the training process, which is cheap.

    Raises:
        ValueError: If an argument is out of its range; a path that cannot be used is reported by `setup`.
    """

    def __init__(
        self,
        path: str | None = None,
        block_size: int = 256,
        batch_size: int = 16,
        val_fraction: float = 0.1,
        seed: int = 42,
        num_workers: int = 0,
    ) -> None:
        super().__init__(block_size, batch_size, num_workers, seed)
        check_number(hint="0.1 is usual", val_fraction=val_fraction)
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must be between 0 and 1, both excluded, got {val_fraction}: 0.1 is usual")
        if path is not None:
            check_path(hint="a text file or a folder of them", path=path)
        # not logged: the model has a block_size of its own, and Lightning refuses equal names with different values
        self.save_hyperparameters(logger=False)
        self.path = path
        self.val_fraction = val_fraction

    @property
    def vocab_size(self) -> int:
        """Number of token values: 256, as tokens are bytes."""
        return 256

    @override
    def setup(self, stage: str | None = None) -> None:
        """Read the text, once, and split it; ValueError if there is none, or too little for a block on each side."""
        if self._train is not None:
            return
        text = np.frombuffer(b"".join(file.read_bytes() for file in text_files(self.path)), dtype=np.uint8)
        num_train = len(text) - round(len(text) * self.val_fraction)
        train, val = (Blocks(part, self.block_size) for part in (text[:num_train], text[num_train:]))
        if not len(train) or not len(val):
            raise ValueError(
                f"path must hold text for a block of block_size + 1 = {self.block_size + 1} bytes on both sides of the "
                f"split, got {self.path!r} with {num_train} + {len(text) - num_train} bytes: "
                "take more text, a smaller block_size or another val_fraction"
            )
        self._train, self._val = train, val
