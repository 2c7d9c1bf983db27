"""Sequences of modular arithmetic: a task whose features are known, the harmonics of a cycle."""

import math
from functools import cache, lru_cache

import numpy as np
from typing_extensions import override

from lightning_spectral.nanogpt.blocks import BlockData, Blocks

SMALLEST_CYCLE = 5
CYCLE_EXPONENT = 1.3
OFFSET_EXPONENT = 1.2
SMALLEST_STEP = 0.125


class Sequences(Blocks):
    """Sequences of `block_size + 1` tokens each, one after the other, that share none."""

    @override
    def __len__(self) -> int:
        return len(self.tokens) // (self.block_size + 1)

    @override
    def start(self, index: int) -> int:
        return index * (self.block_size + 1)


class ModularArithmetic(BlockData):
    r"""Sequences :math:`t_k = o + ((a + d k) \bmod c)`: whoever has read a cycle of one knows the rest of it.

    For each sequence the cycle c is drawn from 5 ... vocab_size with weights :math:`c^{-1.3}`, the offset o from
    0 ... vocab_size - c with weights :math:`(o + 1)^{-1.2}`, the start a from 0 ... c - 1, and the step d from
    :math:`\lceil c / 8 \rceil` ... c - 1; the distributions of the task by which *Spectral Lens* (arXiv 2605.05683)
    illustrates its mechanistic model. A batch is what `TextData` gives.

    Args:
        num_sequences: Sequences to train on; drawn once, and each seen once an epoch.
        block_size: Tokens that the model reads of each; one more is drawn, which is the last label.
        batch_size: Sequences in a batch of one rank.
        vocab_size: Number of token values, at least 8.
        not_coprime: Share of sequences whose c and d have a common divisor, so that they visit a part of the cycle
            only. Prime cycles have no such step, the others get more of them.
        num_val_sequences: Sequences held out: drawn from the same distribution by numbers of their own.
        seed: Of the sequences and of their order.
        num_workers: Processes that prepare batches.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> data = ModularArithmetic(num_sequences=64, block_size=8, vocab_size=32)
        >>> batch = next(iter(data.val_dataloader()))
        >>> batch["input_ids"].shape, bool((batch["input_ids"][:, 1:] == batch["labels"][:, :-1]).all())
        (torch.Size([16, 8]), True)
    """

    def __init__(
        self,
        num_sequences: int = 32_768,
        block_size: int = 64,
        batch_size: int = 16,
        vocab_size: int = 1024,
        not_coprime: float = 0.3,
        num_val_sequences: int = 1024,
        seed: int = 42,
        num_workers: int = 0,
    ) -> None:
        super().__init__(block_size, batch_size, num_workers, seed)
        for name, value, least in (
            ("num_sequences", num_sequences, 1),
            ("num_val_sequences", num_val_sequences, 1),
            ("vocab_size", vocab_size, 8),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        most = _share_with_divisor(vocab_size)
        if not 0 <= not_coprime <= most:
            raise ValueError(
                f"not_coprime must be between 0 and {most:.2f}, the share of cycles that have such a step, "
                f"got {not_coprime}"
            )
        # not logged: the model has a block_size of its own, and Lightning refuses equal names with different values
        self.save_hyperparameters(logger=False)
        self.num_sequences = num_sequences
        self.num_val_sequences = num_val_sequences
        self.not_coprime = not_coprime
        self._vocab_size = vocab_size

    @property
    def vocab_size(self) -> int:
        """Number of token values."""
        return self._vocab_size

    @override
    def setup(self, stage: str | None = None) -> None:
        """Draw the sequences, once."""
        if self._train is None:
            self._train, self._val = (
                Sequences(self._draw(num, np.random.default_rng((self.seed, stream))), self.block_size)
                for stream, num in enumerate((self.num_sequences, self.num_val_sequences))
            )

    def _draw(self, num: int, rng: np.random.Generator) -> np.ndarray:
        """``(num * (block_size + 1),)`` tokens."""
        cycles, weights = _cycles(self._vocab_size)
        cycle = rng.choice(cycles, num, p=weights)
        share = self.not_coprime / _share_with_divisor(self._vocab_size) if self.not_coprime else 0.0
        wants_divisor = rng.random(num) < share
        step = np.empty(num, dtype=np.int64)
        offset = np.empty(num, dtype=np.int64)
        for index, (size, shares) in enumerate(zip(cycle.tolist(), wants_divisor.tolist(), strict=True)):
            coprime, others = _steps(size)
            step[index] = rng.choice(others if shares and len(others) else coprime)
            offset[index] = rng.choice(self._vocab_size - size + 1, p=_offset_weights(self._vocab_size - size + 1))
        start = rng.integers(cycle)
        position = start[:, None] + step[:, None] * np.arange(self.block_size + 1)
        return (offset[:, None] + position % cycle[:, None]).astype(np.uint32).reshape(-1)


@lru_cache(maxsize=8)
def _cycles(vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Cycles, and their probabilities."""
    cycles = np.arange(SMALLEST_CYCLE, vocab_size + 1)
    weights = cycles**-CYCLE_EXPONENT
    return cycles, weights / weights.sum()


@lru_cache(maxsize=8)
def _share_with_divisor(vocab_size: int) -> float:
    """How often a cycle is drawn that has a step with a common divisor."""
    cycles, weights = _cycles(vocab_size)
    return float(sum(weight for size, weight in zip(cycles.tolist(), weights, strict=True) if len(_steps(size)[1])))


@cache
def _steps(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps of a cycle that share no divisor with it, and those that do."""
    steps = np.arange(math.ceil(SMALLEST_STEP * size), size)
    is_coprime = np.gcd(steps, size) == 1
    return steps[is_coprime], steps[~is_coprime]


@cache
def _offset_weights(num: int) -> np.ndarray:
    weights = np.arange(1, num + 1) ** -OFFSET_EXPONENT
    return weights / weights.sum()
