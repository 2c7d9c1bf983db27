"""Sequences of modular arithmetic: that they are, how they are distributed, and that a model can train on them."""

import math

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from lightning_spectral.nanogpt import ModularArithmetic, NanoGPT


def is_sequence(row, vocab_size):
    """Whether some cycle, step and offset give it."""
    places = np.arange(len(row))
    for cycle in range(5, vocab_size + 1):
        step = int(row[1] - row[0]) % cycle
        offsets = range(vocab_size + 1 - cycle) if math.ceil(0.125 * cycle) <= step < cycle else ()
        if any(((row[0] - offset + step * places) % cycle + offset == row).all() for offset in offsets):
            return True
    return False


def test_each_is_a_sequence_of_the_task():
    data = ModularArithmetic(num_sequences=60, block_size=40, vocab_size=64)
    for index in range(60):
        block = data.train_blocks[index]
        row = np.concatenate([block["input_ids"].numpy(), block["labels"].numpy()[-1:]])
        assert row.min() >= 0
        assert row.max() < 64
        assert is_sequence(row, 64)


def test_shares_are_those_asked_for():
    data = ModularArithmetic(num_sequences=4000, block_size=200, vocab_size=128)
    data.setup()
    rows = data.train_blocks.tokens.reshape(4000, -1).astype(int)
    span = rows.max(1) - rows.min(1) + 1
    visited = np.array([len(set(row.tolist())) for row in rows])
    # A sequence that goes round its whole cycle visits as many tokens as lie between its ends.
    assert np.mean(visited < span) == pytest.approx(0.3, abs=4 * (0.21 / 4000) ** 0.5 + 0.02)
    whole = visited[visited == span]
    counts = np.array([(whole == 5).sum(), (whole == 11).sum()])
    # Both are prime; their steps are coprime, their chances in the ratio of the weights.
    expected = (11 / 5) ** 1.3
    assert counts[0] / counts[1] == pytest.approx(expected, rel=4 * (1 / counts[0] + 1 / counts[1]) ** 0.5)


def test_they_depend_on_the_seed_alone_and_validation_is_apart():
    one, same = (ModularArithmetic(num_sequences=40, block_size=16, vocab_size=64, seed=3) for _ in range(2))
    other = ModularArithmetic(num_sequences=40, block_size=16, vocab_size=64, seed=4)
    for data in (one, same, other):
        data.setup()
    assert (one.train_blocks.tokens == same.train_blocks.tokens).all()
    assert (one.train_blocks.tokens != other.train_blocks.tokens).any()
    assert len(one.val_blocks) == 1024
    assert (one.val_blocks.tokens[:17] != one.train_blocks.tokens[:17]).any()


def test_a_model_learns_them():
    pl.seed_everything(0)
    data = ModularArithmetic(num_sequences=512, block_size=24, vocab_size=32, batch_size=32, num_val_sequences=64)
    model = NanoGPT(num_layers=1, num_heads=2, width=32, block_size=24, vocab_size=32, learning_rate=1e-2)
    trainer = pl.Trainer(
        max_steps=60,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    assert float(trainer.callback_metrics["val_loss"]) < math.log(32) - 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_sequences": 0}, "num_sequences must be at least 1, got 0"),
        ({"vocab_size": 4}, "vocab_size must be at least 8, got 4"),
        ({"not_coprime": 0.9}, r"not_coprime must be between 0 and 0\.\d\d, the share"),
        ({"not_coprime": math.nan}, "not_coprime must be between"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ModularArithmetic(**arguments)


def test_default_shapes():
    batch = next(iter(ModularArithmetic(num_sequences=32).train_dataloader()))
    assert batch["input_ids"].shape == batch["labels"].shape == torch.Size([16, 64])
