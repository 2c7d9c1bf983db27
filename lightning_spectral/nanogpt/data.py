"""Text as bytes: a data module whose order is a function of (seed, epoch) and resumes in mid-epoch."""

import itertools
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

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


def _files(path: str | None) -> list[Path]:
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        files = [file for file in _walk(root, skip=_NOT_EVERYWHERE) if file.suffix == ".py"]
        if not files:
            raise ValueError(
                f"path must name a text file or folder, got None, but the standard library in {root} has no sources"
            )
        return files
    root = Path(path).expanduser()
    if not root.exists():
        raise ValueError(f"path must be a text file or a folder of them, got {path!r}, which does not exist")
    if root.is_file():
        return [root]
    files = [file for file in _walk(root) if _is_text(file)]
    if not files:
        raise ValueError(f"path must hold at least one text file, got {path!r}: hidden and binary files do not count")
    return files


class Blocks(Dataset[dict[str, Tensor]]):
    """Non-overlapping windows of a text, each with the token that follows every one of its tokens.

    Block i has the tokens from `i * block_size` on as `input_ids` and those from `i * block_size + 1` on as
    `labels`; what is left after the last whole block is not used.

    Args:
        tokens: The text, `(num_tokens,)`, of any integer type; it is neither copied nor widened.
        block_size: Tokens of a block.
    """

    def __init__(self, tokens: np.ndarray, block_size: int) -> None:
        self.tokens = tokens
        self.block_size = block_size

    def __len__(self) -> int:
        return max(len(self.tokens) - 1, 0) // self.block_size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in [0, {len(self)}), got {index}")
        start = index * self.block_size
        block = torch.from_numpy(self.tokens[start : start + self.block_size + 1].astype(np.int64))
        return {"input_ids": block[:-1], "labels": block[1:]}


class BlockSampler(DistributedSampler[int]):
    """Deals blocks to ranks like cards: rank r of R gets every R-th one, no block twice.

    Being a `DistributedSampler` it is told the epoch by Lightning, which also puts no sampler of its own in its place.
    Shuffled, the order is a function of (seed, epoch) alone, and a batch on each of R ranks holds the same blocks as
    one R times larger batch on a single rank. All ranks get the same number of batches, since a strategy that
    communicates in the forward would wait forever for a missing one: blocks that cannot be dealt evenly are left out
    if shuffled (another epoch will have them), else only if they would make a batch of their own.

    Args:
        num_blocks: How many blocks there are.
        batch_size: Blocks in a rank's batch.
        num_replicas: Number of ranks, R.
        rank: Which of them this is, from 0.
        shuffle: Whether to permute the blocks anew in each epoch.
        seed: Of the permutations.
    """

    def __init__(
        self,
        num_blocks: int,
        batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        dataset: Any = range(num_blocks)  # only its length matters
        super().__init__(dataset, num_replicas, rank, shuffle=shuffle, seed=seed, drop_last=True)
        self.num_blocks = num_blocks
        self.start = 0  # samples of this rank to leave out from the next iteration
        even = num_blocks // num_replicas
        self.total_size = even * num_replicas if shuffle or even % batch_size == 0 else num_blocks
        self.num_samples = len(range(rank, self.total_size, num_replicas))

    def __iter__(self) -> Iterator[int]:
        order = np.arange(self.num_blocks)
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self.num_blocks)
        return iter(order[self.rank : self.total_size : self.num_replicas][self.start :].tolist())


class ResumableLoader(DataLoader[dict[str, Tensor]]):
    """A loader over a `BlockSampler` that goes on from where it was, in mid-epoch too, loading nothing twice.

    Each iteration gives as many batches as an epoch has and the next one goes on from there, so that what follows is
    a function of the blocks handed out before and of nothing else: not of `Trainer(limit_train_batches=...)`, nor of
    the epoch that Lightning counts, which after a resumption between two epochs may run ahead. The position counts
    blocks on all ranks together: batches that workers hold ready do not count, and it keeps its meaning if the batch
    size or the number of ranks changes.
    """

    sampler: BlockSampler
    batch_size: int
    _epoch = 0
    _num_batches = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # Being a generator, this body runs at the first `next`: Lightning calls `iter` before it has restored its
        # loops, and with workers a plain DataLoader would then fetch the wrong batches.
        if not isinstance(self.sampler, BlockSampler):  # Trainer(overfit_batches=...) puts in another one
            yield from super().__iter__()
            return
        left = len(self)
        while left:
            if self._num_batches >= len(self):
                self._epoch, self._num_batches = self._epoch + 1, 0
            self.sampler.set_epoch(self._epoch)
            self.sampler.start = self._num_batches * self.batch_size
            for batch in itertools.islice(super().__iter__(), left):
                self._num_batches += 1
                left -= 1
                yield batch

    @property
    def _blocks_per_batch(self) -> int:
        return self.batch_size * self.sampler.num_replicas

    def state_dict(self) -> dict[str, int]:
        """Give the position after the last batch handed out.

        Returns:
            The epoch, the blocks handed out in it on all ranks, and how many there are; empty for a sampler that is
            not ours.
        """
        if not isinstance(self.sampler, BlockSampler):
            return {}
        num_blocks = self._num_batches * self._blocks_per_batch
        return {"epoch": self._epoch, "num_blocks": num_blocks, "total": self.sampler.num_blocks}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Make the next iteration go on from a position.

        Args:
            state_dict: What `state_dict` returned.
        """
        if not state_dict or not isinstance(self.sampler, BlockSampler):
            return
        if state_dict["total"] != self.sampler.num_blocks:
            warnings.warn(
                f"The text has {self.sampler.num_blocks} blocks, {state_dict['total']} when the checkpoint was "
                "written: the batches that follow are not those of the interrupted run.",
                stacklevel=2,
            )
        self._epoch = state_dict["epoch"]
        self._num_batches = state_dict["num_blocks"] // self._blocks_per_batch


class TextData(pl.LightningDataModule):
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
        super().__init__()
        for name, value, least in (
            ("block_size", block_size, 1),
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must be between 0 and 1, both excluded, got {val_fraction}: 0.1 is usual")
        # not logged: the model has a block_size of its own, and Lightning refuses equal names with different values
        self.save_hyperparameters(logger=False)
        self.path = path
        self.block_size = block_size
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.seed = seed
        self.num_workers = num_workers
        self._train: Blocks | None = None
        self._val: Blocks | None = None
        self._loader: ResumableLoader | None = None
        self._resume_at: dict[str, int] | None = None

    @property
    def vocab_size(self) -> int:
        """Number of token values: 256, as tokens are bytes."""
        return 256

    @property
    def train_blocks(self) -> Blocks:
        """The blocks for training; reads the text if need be."""
        self.setup()
        assert self._train is not None
        return self._train

    @property
    def val_blocks(self) -> Blocks:
        """The blocks held out; reads the text if need be."""
        self.setup()
        assert self._val is not None
        return self._val

    @property
    def num_train_tokens(self) -> int:
        """Tokens in the blocks for training, that is, in an epoch."""
        return len(self.train_blocks) * self.block_size

    @property
    def num_val_tokens(self) -> int:
        """Tokens in the blocks held out."""
        return len(self.val_blocks) * self.block_size

    def setup(self, stage: str | None = None) -> None:
        """Read the text, once, and split it.

        Args:
            stage: Not used: the whole text is read for all of them.

        Raises:
            ValueError: If the path does not exist, holds no text, or too little for a block on each side.
        """
        if self._train is not None:
            return
        text = np.frombuffer(b"".join(file.read_bytes() for file in _files(self.path)), dtype=np.uint8)
        num_train = len(text) - round(len(text) * self.val_fraction)
        train, val = (Blocks(part, self.block_size) for part in (text[:num_train], text[num_train:]))
        if not len(train) or not len(val):
            raise ValueError(
                f"path must hold text for a block of block_size + 1 = {self.block_size + 1} bytes on both sides of the "
                f"split, got {self.path!r} with {num_train} + {len(text) - num_train} bytes: "
                "take more text, a smaller block_size or another val_fraction"
            )
        self._train, self._val = train, val

    def train_dataloader(self) -> ResumableLoader:
        """Build the loader of this rank's training batches.

        Returns:
            A loader that Lightning can save and restore.

        Raises:
            ValueError: If there are fewer blocks than one batch on each rank.
        """
        sampler = self._sampler(self.train_blocks, shuffle=True)
        if sampler.num_samples < self.batch_size:
            raise ValueError(
                f"batch_size must be at most {sampler.num_samples}, the number of training blocks on each of "
                f"{sampler.num_replicas} ranks, got {self.batch_size}: take more text or a smaller block_size"
            )
        loader: ResumableLoader = self._build_loader(ResumableLoader, self.train_blocks, sampler, drop_last=True)
        if self._resume_at is not None:
            loader.load_state_dict(self._resume_at)
            self._resume_at = None
        self._loader = loader
        return loader

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Build the loader of this rank's validation batches.

        Returns:
            A loader that goes through the blocks in order; its last batch may be smaller.
        """
        sampler = self._sampler(self.val_blocks, shuffle=False)
        return self._build_loader(DataLoader, self.val_blocks, sampler, drop_last=False)

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Build the loader for testing.

        Returns:
            The same as for validation.
        """
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Build the loader for prediction.

        Returns:
            The same as for validation.
        """
        return self.val_dataloader()

    def state_dict(self) -> dict[str, int]:
        """Give the position in the training data, for the checkpoint.

        Returns:
            The position of the last training loader; empty before there is one.
        """
        return {} if self._loader is None else self._loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from a position in the training data.

        Lightning restores loaders that have a state, but not if something asked for
        `trainer.estimated_stepping_batches` before, as most schedules do in `configure_optimizers`. So the position
        goes through the data module as well.

        Args:
            state_dict: What `state_dict` returned.
        """
        if self.trainer is None or self.trainer.state.fn != "fit":  # validating a checkpoint must not move training
            return
        in_use = self.trainer.train_dataloader is self._loader
        if self._loader is not None and in_use:  # sharded checkpoints are read after the loader was built
            self._loader.load_state_dict(state_dict)
        else:
            self._resume_at = dict(state_dict)

    def _sampler(self, blocks: Blocks, shuffle: bool) -> BlockSampler:
        num_replicas, rank = (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
        return BlockSampler(len(blocks), self.batch_size, num_replicas, rank, shuffle, self.seed)

    def _build_loader(self, kind: type[Any], blocks: Blocks, sampler: BlockSampler, drop_last: bool) -> Any:
        return kind(
            blocks,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            drop_last=drop_last,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else every epoch would draw a seed from the global random stream
        )
