"""Blocks of tokens, of bytes or words: how they are cut, dealt to ranks, loaded, and taken up again in mid-epoch."""

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from typing_extensions import override

from lightning_spectral.nanogpt.arguments import check_int

_MOST = {"block_size": 2**31, "batch_size": 2**31, "seed": 2**63 - 1, "num_workers": 4096}


class Blocks(Dataset[dict[str, Tensor]]):
    """Non-overlapping windows of a text, each with the token that follows every one of its tokens.

    Block i has the tokens from `i * block_size` on as `input_ids` and those from `i * block_size + 1` on as `labels`;
    what is left after the last whole block is not used. The tokens, `(num_tokens,)`, are of any integer type, or
    anything that has a length and gives an array for a slice; they are neither copied nor widened.
    """

    def __init__(self, tokens: Any, block_size: int) -> None:
        self.tokens = tokens
        self.block_size = block_size

    def __len__(self) -> int:
        return max(len(self.tokens) - 1, 0) // self.block_size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in [0, {len(self)}), got {index}")
        start = self.start(index)
        block = torch.from_numpy(self.tokens[start : start + self.block_size + 1].astype(np.int64))
        return {"input_ids": block[:-1], "labels": block[1:]}

    def start(self, index: int) -> int:
        """Index in the text of a block's first token."""
        return index * self.block_size


class BlockSampler(DistributedSampler[int]):
    """Deals blocks to ranks like cards: rank r of R gets every R-th one, no block twice.

    Being a `DistributedSampler` it is told the epoch by Lightning, which also puts no sampler of its own in its place.
    Shuffled, the order is a function of (seed, epoch) alone, and a batch on each of R ranks holds the same blocks as
    one R times larger batch on a single rank. All ranks get the same number of batches, since a strategy that
    communicates in the forward would wait forever for a missing one: blocks that cannot be dealt evenly are left out if
    shuffled (another epoch will have them), else only if they would make a batch of their own.
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
        """Give the position after the last batch: the epoch, the blocks had in it on all ranks, and how many there are.

        Empty for a sampler that is not ours.
        """
        if not isinstance(self.sampler, BlockSampler):
            return {}
        num_blocks = self._num_batches * self._blocks_per_batch
        return {"epoch": self._epoch, "num_blocks": num_blocks, "total": self.sampler.num_blocks}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Make the next iteration go on from what `state_dict` returned."""
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


class BlockData(pl.LightningDataModule):
    """What data modules of blocks have in common: loaders of this rank's batches and a position that is restored.

    Subclasses give `setup`, which puts blocks into `_train` and `_val`; they may have samplers and a loader of their
    own.
    """

    _resumable: type[ResumableLoader] = ResumableLoader

    def __init__(self, block_size: int, batch_size: int, num_workers: int, seed: int = 0) -> None:
        super().__init__()
        for name, value, least in (
            ("block_size", block_size, 1),
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("num_workers", num_workers, 0),
        ):
            check_int(least, _MOST[name], "", **{name: value})
        self.block_size = block_size
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self._train: Blocks | None = None
        self._val: Blocks | None = None
        self._loader: ResumableLoader | None = None
        self._resume_at: dict[str, int] | None = None

    @override
    def setup(self, stage: str | None = None) -> None:
        """Put blocks into `_train` and `_val`, once; subclasses do it."""
        raise NotImplementedError

    @property
    def train_blocks(self) -> Blocks:
        """The blocks for training; sets up if need be."""
        self.setup()
        assert self._train is not None
        return self._train

    @property
    def val_blocks(self) -> Blocks:
        """The blocks held out; sets up if need be."""
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

    @override
    def train_dataloader(self) -> ResumableLoader:
        """Build the loader of this rank's training batches, which Lightning can save and restore.

        ValueError if there are fewer blocks than one batch on each rank.
        """
        sampler = self._sampler(self.train_blocks, shuffle=True)
        most = len(self.train_blocks) // sampler.num_replicas
        if most < self.batch_size:
            raise ValueError(
                f"batch_size must be at most {most}, the number of training blocks on each of "
                f"{sampler.num_replicas} ranks, got {self.batch_size}: take more data or a smaller block_size"
            )
        loader: ResumableLoader = self._build_loader(self._resumable, self.train_blocks, sampler, drop_last=True)
        if self._resume_at is not None:
            loader.load_state_dict(self._resume_at)
            self._resume_at = None
        self._loader = loader
        return loader

    @override
    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Build the loader of this rank's validation batches, in order; the last may be smaller."""
        sampler = self._sampler(self.val_blocks, shuffle=False)
        return self._build_loader(DataLoader, self.val_blocks, sampler, drop_last=False)

    @override
    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self.val_dataloader()

    @override
    def predict_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self.val_dataloader()

    @override
    def state_dict(self) -> dict[str, int]:
        """Give the position of the last training loader, for the checkpoint; empty before there is one."""
        return {} if self._loader is None else self._loader.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from a position in the training data.

        Lightning restores loaders that have a state, but not if something asked for
        `trainer.estimated_stepping_batches` before, as most schedules do in `configure_optimizers`. So the position
        goes through the data module as well.
        """
        if self.trainer is None or self.trainer.state.fn != "fit":  # validating a checkpoint must not move training
            return
        in_use = self.trainer.train_dataloader is self._loader
        if self._loader is not None and in_use:  # sharded checkpoints are read after the loader was built
            self._loader.load_state_dict(state_dict)
        else:
            self._resume_at = dict(state_dict)

    def _replicas_and_rank(self) -> tuple[int, int]:
        if self.trainer is None:
            return 1, 0
        # Ranks of a tensor-parallel dimension have the same data.
        told = getattr(getattr(self.trainer, "strategy", None), "distributed_sampler_kwargs", None) or {}
        return told.get("num_replicas", self.trainer.world_size), told.get("rank", self.trainer.global_rank)

    def _sampler(self, blocks: Blocks, shuffle: bool) -> Any:
        return BlockSampler(len(blocks), self.batch_size, *self._replicas_and_rank(), shuffle, self.seed)

    def _build_loader(self, kind: type[Any], blocks: Blocks, sampler: Any, **arguments: Any) -> Any:
        return kind(
            blocks,
            sampler=sampler,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else every epoch would draw a seed from the global random stream
            **({"batch_size": self.batch_size} | arguments),
        )
