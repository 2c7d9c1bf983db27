"""Shards of tokens, such as FineWeb's: a data module that reads them in order and resumes to the token."""

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from typing_extensions import override

from lightning_spectral.nanogpt.arguments import check_flag, check_int, check_path
from lightning_spectral.nanogpt.blocks import BlockData, Blocks, BlockSampler, ResumableLoader
from lightning_spectral.nanogpt.shard_files import ShardTokens, find_shards


class DocumentBlocks(Blocks):
    """Blocks that begin where a document does, which begins with `eos_token`.

    Each block moves forward to the first document that begins in it, and stays where it is if none does, or if the text
    would end before the block. So a block is a function of its index, found without reading others. As blocks move by
    different distances, each by less than its size, some tokens between them are left out and others come twice; on
    average each comes once.
    """

    def __init__(self, tokens: Any, block_size: int, eos_token: int) -> None:
        super().__init__(tokens, block_size)
        self.eos_token = eos_token

    @override
    def start(self, index: int) -> int:
        start = super().start(index)
        last = min(start + self.block_size, len(self.tokens) - self.block_size)
        documents = np.flatnonzero(self.tokens[start:last] == self.eos_token)
        return start + int(documents[0]) if len(documents) else start


class StreamSampler(DistributedSampler[int]):
    """Goes through blocks in order, over and over, each rank taking its own stretch of every global batch.

    With B blocks in a rank's batch and R ranks, a global batch is the next B R blocks, of which rank r takes those from
    r B on; so R ranks of batch size B see what one rank of batch size B R sees. After the last block comes the first
    one, in the same batch. An iteration is a pass through the blocks as far as it has whole global batches; the next
    one begins wherever `start` says.
    """

    def __init__(self, num_blocks: int, batch_size: int, num_replicas: int = 1, rank: int = 0) -> None:
        dataset: Any = range(num_blocks)  # only its length matters
        super().__init__(dataset, num_replicas, rank, shuffle=False, drop_last=True)
        self.num_blocks = num_blocks
        self.batch_size = batch_size
        self.start = 0  # blocks that all ranks together have had before the next iteration
        self.num_batches = num_blocks // (batch_size * num_replicas)
        self.num_samples = self.num_batches * batch_size

    def __iter__(self) -> Iterator[int]:
        step = self.batch_size * self.num_replicas
        first = self.start + self.rank * self.batch_size
        batches = range(first, first + self.num_batches * step, step)
        return (block % self.num_blocks for batch in batches for block in range(batch, batch + self.batch_size))


class StreamLoader(ResumableLoader):
    """A loader over a `StreamSampler` that goes on from where it was, to the token.

    What it gives next is a function of the tokens that were handed out on all ranks together since the first batch, and
    of nothing else: not of epochs, nor of what workers hold ready. So the position keeps its meaning if the batch size,
    the number of ranks or, down to a whole block, the block size changes.
    """

    sampler: StreamSampler  # type: ignore[assignment]
    dataset: Blocks
    _num_tokens = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator, as in ResumableLoader: the position may be restored between `iter` and the first `next`.
        if not isinstance(self.sampler, StreamSampler):  # Trainer(overfit_batches=...) puts in another one
            yield from DataLoader.__iter__(self)
            return
        block_size = self.dataset.block_size
        self.sampler.start = self._num_tokens // block_size
        self._num_tokens = self.sampler.start * block_size
        for batch in DataLoader.__iter__(self):
            self._num_tokens += self.batch_size * self.sampler.num_replicas * block_size
            yield batch

    @override
    def state_dict(self) -> dict[str, int]:
        """Give the position after the last batch handed out.

        Returns:
            The tokens handed out on all ranks since the first batch, and how many the shards hold; empty for a sampler
            that is not ours.
        """
        if not isinstance(self.sampler, StreamSampler):
            return {}
        return {"num_tokens": self._num_tokens, "total": len(self.dataset.tokens)}

    @override
    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        if not state_dict or not isinstance(self.sampler, StreamSampler):
            return
        if state_dict["total"] != len(self.dataset.tokens):
            warnings.warn(
                f"The training shards hold {len(self.dataset.tokens)} tokens, {state_dict['total']} when the "
                "checkpoint was written: the batches that follow may not be those of the interrupted run.",
                stacklevel=2,
            )
        self._num_tokens = state_dict["num_tokens"]


class ShardData(BlockData):
    """Token shards of the FineWeb speed runs, read by memory map: in order, packed, split over ranks.

    A batch is a dict of `input_ids` and `labels`, both int64 of shape `(batch_size, block_size)`; the labels are the
    inputs shifted by one. The shards, sorted by name, are one long row of tokens that is cut into sequences wherever
    they end: a sequence may hold several documents, or parts of them, each beginning with `eos_token`.

    Training takes the sequences in order and, when they are used up, from the beginning again; nothing is shuffled, as
    FineWeb is, unless `shuffle` says so. A global batch is the next B R sequences for R ranks of batch size B, of which
    rank r takes the r-th stretch of B, so that R ranks see the tokens that one rank with an R times larger batch sees,
    in the same global batches. An epoch of Lightning's is as many global batches as fit into one pass; the sequences
    left over begin the next one, and only what does not fill the last sequence is never used. A run that is resumed
    from a checkpoint of Lightning's, even from the middle of an epoch, sees the tokens that the uninterrupted run would
    have seen; with another batch size or number of ranks it goes on at the same token.

    Validation, test and prediction take the first `val_tokens` tokens of the validation shards, whatever the batch size
    and the number of ranks, except those that do not fill a sequence. Where the sequences cannot be dealt evenly,
    batches are a little larger than `batch_size`, so that all ranks have the same number of them.

    Args:
        path: The shards: a folder (its files `*.bin`), a glob pattern, or one file. Those with `train` in their names
            are for training and, unless `val_path` is given, those with `val` are for validation. With `val_path`
            names without either word will do.
        block_size: Tokens of a sequence, at most the model's block_size.
        batch_size: Sequences in a batch of one rank.
        val_path: The validation shards, likewise; None looks for them in `path`.
        val_tokens: Tokens to validate on, at least block_size. The default is that of the speed runs; None takes all
            there are.
        eos_token: The token with which a document begins. The default is GPT-2's.
        align_to_documents: Whether a training sequence begins at the first document that begins in it, if one does.
            Then some tokens are left out and as many come twice: with documents of 700 tokens one in six each for
            sequences of 1024, one in a hundred for 65,536. Validation is never aligned.
        num_workers: Processes that prepare batches; 0, the default, does it in the training process, which is cheap.
        shuffle: Whether training goes through the sequences, each once an epoch, in an order that depends on (seed,
            epoch) alone and is dealt to ranks like cards, as `TextData` does; for shards whose documents are not.
        seed: Of that order, not negative.
        vocab_size: Number of token values. The default is GPT-2's; the model may have more, and refuses larger tokens.

    Raises:
        ValueError: If an argument is out of its range; shards that cannot be used are reported by `setup`.

    Example:
        >>> import tempfile
        >>> from lightning_spectral.nanogpt import ShardData, write_shard
        >>> folder = tempfile.TemporaryDirectory()
        >>> write_shard(f"{folder.name}/my_train_0.bin", range(100, 125))
        >>> write_shard(f"{folder.name}/my_val_0.bin", range(9))
        >>> data = ShardData(folder.name, block_size=4, batch_size=2, val_tokens=8)
        >>> next(iter(data.train_dataloader()))["labels"]
        tensor([[101, 102, 103, 104],
                [105, 106, 107, 108]])
        >>> data.num_train_tokens, data.num_val_tokens
        (24, 8)
        >>> folder.cleanup()
    """

    def __init__(
        self,
        path: str,
        block_size: int = 1024,
        batch_size: int = 8,
        val_path: str | None = None,
        val_tokens: int | None = 10_485_760,
        eos_token: int = 50256,
        align_to_documents: bool = False,
        num_workers: int = 0,
        shuffle: bool = False,
        seed: int = 0,
        vocab_size: int = 50257,
    ) -> None:
        super().__init__(block_size, batch_size, num_workers, seed)
        check_path(hint="a folder, a pattern or a file of shards", path=path)
        if val_path is not None:
            check_path(hint="a folder, a pattern or a file of shards, or None", val_path=val_path)
        if val_tokens is not None:
            check_int(1, val_tokens=val_tokens)
        if val_tokens is not None and val_tokens < block_size:
            raise ValueError(
                f"val_tokens must be at least block_size = {block_size}, a sequence, got {val_tokens}: "
                "take more, or None for all there are"
            )
        check_int(0, 2**32 - 1, hint="GPT-2's is 50256", eos_token=eos_token)
        check_int(1, 2**32, hint="GPT-2's is 50257", vocab_size=vocab_size)
        check_flag(align_to_documents=align_to_documents, shuffle=shuffle)
        # not logged: the model has a block_size of its own, and Lightning refuses equal names with different values
        self.save_hyperparameters(logger=False)
        self.path = path
        self.val_path = val_path
        self.val_tokens = val_tokens
        self.eos_token = eos_token
        self.align_to_documents = align_to_documents
        self.shuffle = shuffle
        self.vocab_size = vocab_size
        if not shuffle:
            self._resumable = StreamLoader

    @override
    def setup(self, stage: str | None = None) -> None:
        """Find and check the shards, once; no token is read. ValueError for damage, or too few tokens."""
        if self._train is not None:
            return
        separate = self.val_path is not None
        train_shards = find_shards("path", self.path, "train", "val", unnamed=separate)
        if self.val_path is None:
            val_shards = find_shards("path", self.path, "val", "train", unnamed=False)
        else:
            val_shards = find_shards("val_path", self.val_path, "val", "train", unnamed=True)
        both = {shard.path.resolve() for shard in train_shards} & {shard.path.resolve() for shard in val_shards}
        if both:
            raise ValueError(
                f"val_path must hold other shards than path, got {min(both)} in both: put 'val' into the names of "
                "those for validation"
            )
        limit = None if self.val_tokens is None else self.val_tokens + 1  # the last token's label is one more
        train, val = ShardTokens(train_shards), ShardTokens(val_shards, limit)
        for tokens, kind in ((train, "training"), (val, "validation")):
            if len(tokens) <= self.block_size:
                raise ValueError(
                    f"block_size must be less than the number of {kind} tokens, got {self.block_size} for "
                    f"{len(tokens)} in {len(tokens.shards)} shards, the first being {tokens.shards[0].path}: "
                    "take longer shards or a smaller block_size"
                )
        if limit is not None and len(val) < limit:
            raise ValueError(
                f"val_tokens must be less than the {len(val)} tokens in {len(val.shards)} validation shards, the first "
                f"being {val.shards[0].path}, got {self.val_tokens}: take more shards, or None for all there are"
            )
        aligned = self.align_to_documents
        self._train = (
            DocumentBlocks(train, self.block_size, self.eos_token) if aligned else Blocks(train, self.block_size)
        )
        self._val = Blocks(val, self.block_size)

    @override
    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Build the loader of this rank's validation batches.

        Returns:
            A loader with as many batches as on any other rank, which together have every block once.

        Raises:
            ValueError: If there are fewer blocks than ranks.
        """
        blocks = self.val_blocks
        num_replicas, rank = self._replicas_and_rank()
        even, rest = divmod(len(blocks), num_replicas)
        if not even:
            raise ValueError(
                f"val_tokens must be at least {num_replicas * self.block_size}, a sequence of {self.block_size} tokens "
                f"for each of {num_replicas} ranks, got {self.val_tokens}: take more, or a smaller block_size"
            )
        # Ranks with a block more than others need room for it in their last batch, not another batch.
        batch_size = next(size for size in itertools.count(self.batch_size) if not rest or even % size)
        sampler = BlockSampler(len(blocks), batch_size, num_replicas, rank, shuffle=False)
        return self._build_loader(DataLoader, blocks, sampler, batch_size=batch_size)

    @override
    def _sampler(self, blocks: Blocks, shuffle: bool) -> StreamSampler | BlockSampler:
        if self.shuffle:
            sampler: BlockSampler = super()._sampler(blocks, shuffle)
            return sampler
        return StreamSampler(len(blocks), self.batch_size, *self._replicas_and_rank())
