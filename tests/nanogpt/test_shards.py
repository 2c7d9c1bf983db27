"""Shards: what is read, how ranks share it, where a stopped run goes on, and what is refused."""

import os
import pickle
import time
import types
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from lightning_spectral.nanogpt import NanoGPT, ShardData, write_shard
from lightning_spectral.nanogpt.blocks import Blocks
from lightning_spectral.nanogpt.shard_files import HEADER_BYTES, Shard, ShardTokens
from lightning_spectral.nanogpt.shards import DocumentBlocks, StreamLoader, StreamSampler

TRAIN, VAL = np.arange(1000, 1450), np.arange(5000, 5100)


@pytest.fixture
def folder(tmp_path):
    """Three training shards, of 200, 90 and 160 tokens that count on, and one of 100 for validation."""
    for index, part in enumerate(np.split(TRAIN, [200, 290])):
        write_shard(tmp_path / f"my_train_{index}.bin", part)
    write_shard(tmp_path / "my_val_0.bin", VAL)
    return tmp_path


def small(folder, **arguments):
    return ShardData(
        str(folder), **({"block_size": 8, "batch_size": 4, "val_tokens": 80, "vocab_size": 6000} | arguments)
    )


def on_rank(data, rank, world_size):
    data.trainer = types.SimpleNamespace(world_size=world_size, global_rank=rank)
    return data


def inputs(batches):
    return [batch["input_ids"].flatten().tolist() for batch in batches]


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    block_size=st.integers(1, 6),
    batch_size=st.integers(1, 3),
    ranks=st.integers(1, 4),
    start=st.integers(0, 50),
)
def test_ranks_together_see_the_sequential_stream(lengths, block_size, batch_size, ranks, start):
    tokens = ShardTokens([Shard(Path(), length, "<u2") for length in lengths])
    tokens._maps = dict(enumerate(np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1])))
    blocks = Blocks(tokens, block_size)
    step = batch_size * ranks
    if len(blocks) < step:
        return
    loaders = []
    for rank in range(ranks):
        sampler = StreamSampler(len(blocks), batch_size, ranks, rank)
        loaders.append(StreamLoader(blocks, batch_size=batch_size, sampler=sampler, drop_last=True))
        loaders[-1].load_state_dict({"num_tokens": start * block_size, "total": len(tokens)})
    seen, labels = [], []
    for _ in range(2):
        for batches in zip(*loaders, strict=True):
            seen += [n for batch in batches for n in batch["input_ids"].flatten().tolist()]
            labels += [n for batch in batches for n in batch["labels"].flatten().tolist()]
    one_pass = len(blocks) * block_size
    expected = (start * block_size + np.arange(2 * (len(blocks) // step) * step * block_size)) % one_pass
    assert seen == expected.tolist()
    assert labels == (expected + 1).tolist()
    assert loaders[0].state_dict()["num_tokens"] == start * block_size + len(seen)


def test_batches(folder):
    data = small(folder)
    assert (data.vocab_size, data.block_size, data.num_train_tokens, data.num_val_tokens) == (6000, 8, 56 * 8, 80)
    batches = list(data.train_dataloader())
    assert len(batches) == 14
    assert all(t.shape == (4, 8) and t.dtype == torch.int64 for batch in batches for t in batch.values())
    assert np.concatenate(inputs(batches)).tolist() == TRAIN[:448].tolist()
    assert all(torch.equal(batch["labels"], batch["input_ids"] + 1) for batch in batches)


def test_what_an_epoch_leaves_over_begins_the_next(folder):
    loader = small(folder, batch_size=5).train_dataloader()
    assert len(loader) == 11
    assert np.concatenate(inputs(loader)).tolist() == TRAIN[:440].tolist()
    assert inputs(loader)[0] == [*TRAIN[440:448], *TRAIN[:32]]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 10])
def test_validation_has_a_fixed_budget(folder, batch_size, ranks):
    batches = [
        list(on_rank(small(folder, batch_size=batch_size, val_tokens=83), rank, ranks).val_dataloader())
        for rank in range(ranks)
    ]
    assert len({len(part) for part in batches}) == 1, "as many batches on each rank"
    seen = sorted(n for part in batches for n in np.concatenate(inputs(part)).tolist())
    assert seen == VAL[:80].tolist()
    assert all(batch["input_ids"].shape[0] <= max(batch_size + 2, 2) for part in batches for batch in part)


def test_validation_needs_a_block_for_each_rank(folder):
    with pytest.raises(ValueError, match="val_tokens must be at least 88, a sequence of 8 tokens for each of 11 ranks"):
        on_rank(small(folder), 0, 11).val_dataloader()


def test_validation_takes_the_budget_exactly_or_all(folder):
    assert small(folder, val_tokens=99).num_val_tokens == 96
    assert small(folder, val_tokens=None).num_val_tokens == 96
    with pytest.raises(
        ValueError, match=r"val_tokens must be less than the 100 tokens in 1 validation shards.*got 100"
    ):
        small(folder, val_tokens=100).setup()


def test_pattern_and_val_path_and_order(folder):
    by_pattern = small(folder / "my_*_[0-9].bin")
    assert inputs(by_pattern.train_dataloader()) == inputs(small(folder).train_dataloader())
    other = folder / "other"
    other.mkdir()
    write_shard(other / "b.bin", range(50, 100))
    write_shard(other / "a.bin", range(50))
    data = small(other, val_path=str(folder))
    assert np.concatenate(inputs(data.train_dataloader())).tolist() == list(range(96))
    assert inputs(data.val_dataloader())[0] == VAL[:32].tolist()
    assert inputs(small(folder, val_path=str(other)).val_dataloader())[0] == list(range(32))


DOCUMENTS = [0, 1, 2, 0, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 0, 16, 17, 18, 19, 20, 21, 0, 23, 24]


def test_aligned_blocks_begin_with_a_document():
    blocks = DocumentBlocks(np.array(DOCUMENTS), block_size=4, eos_token=0)
    starts = [blocks.start(index) for index in range(len(blocks))]
    assert starts == [0, 4, 8, 15, 16, 20], "the last cannot move: the text would end before the block"
    assert blocks[3]["input_ids"].tolist() == [0, 16, 17, 18]
    assert blocks[3]["labels"].tolist() == [16, 17, 18, 19]


@given(
    tokens=st.lists(st.integers(0, 4), min_size=2, max_size=60),
    block_size=st.integers(1, 9),
)
def test_aligned_blocks_begin_with_a_document_where_one_begins_in_them(tokens, block_size):
    array = np.array(tokens)
    blocks = DocumentBlocks(array, block_size, eos_token=0)
    for index in range(len(blocks)):
        block, start, plain = blocks[index], blocks.start(index), index * block_size
        assert block["input_ids"].tolist() == tokens[start : start + block_size]
        assert block["labels"].tolist() == tokens[start + 1 : start + block_size + 1]
        assert plain <= start < plain + block_size
        assert 0 not in tokens[plain:start]
        begins = [i for i in range(plain, plain + block_size) if tokens[i] == 0 and i + block_size < len(tokens)]
        assert start == (begins[0] if begins else plain)


def test_alignment_moves_training_only(folder):
    data = small(folder, align_to_documents=True, eos_token=1003)
    assert inputs(data.train_dataloader())[0] == [*range(1003, 1011), *range(1008, 1032)]
    aligned = small(folder, align_to_documents=True, eos_token=5003)
    assert inputs(aligned.val_dataloader()) == inputs(small(folder).val_dataloader())
    assert (data.num_train_tokens, data.num_val_tokens) == (448, 80)


def break_header(path, word, value):
    with path.open("r+b") as stream:
        stream.seek(4 * word)
        stream.write(np.array(value, "<i4").tobytes())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: break_header(path, 0, 20240801), "must begin with the magic number 20240520 .*got 20240801"),
        (lambda path: break_header(path, 1, 2), "must be a shard of version 1, got version 2"),
        (lambda path: break_header(path, 2, 91), "must hold the 91 tokens .* 182 or 364 bytes, got 180 bytes"),
        (lambda path: break_header(path, 2, -5), "must hold at least one token, got -5"),
        (lambda path: os.truncate(path, HEADER_BYTES + 100), "must hold the 90 tokens .*got 100 bytes"),
        (lambda path: os.truncate(path, 1000), "must have a header of 1024 bytes, got 1000 bytes"),
    ],
)
def test_refuses_damaged_shards(folder, damage, message):
    path = folder / "my_train_1.bin"
    damage(path)
    with pytest.raises(ValueError, match=f"my_train_1.bin {message}.*: download it again, or write it with") as error:
        small(folder).setup()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"val_tokens": 7}, "val_tokens must be at least block_size = 8, a sequence, got 7: take more, or None"),
        ({"eos_token": -1}, "eos_token must be at least 0, got -1"),
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"shuffle": "no"}, "shuffle must be True or False, got 'no': give a bool"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_refuses_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        small(tmp_path, **arguments)


@pytest.mark.parametrize("path", ["nowhere", "empty", "*.nothing"])
def test_refuses_a_path_without_shards(tmp_path, path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"path must be a folder, a glob .* got .*, where none are: python -m"):
        small(tmp_path / path).setup()


def test_refuses_shards_of_one_kind_only(folder):
    with pytest.raises(ValueError, match=r"path must have shards with 'val' in their names, got .* with 3 others"):
        small(folder / "*train*").setup()
    with pytest.raises(ValueError, match=r"path must have shards with 'train' in .* others, such as my_val_0.bin: ren"):
        small(folder / "*val*").setup()
    with pytest.raises(ValueError, match=r"val_path must have shards with 'val' in their names"):
        small(folder, val_path=str(folder / "*train*")).setup()


def test_refuses_the_same_shard_on_both_sides(tmp_path):
    write_shard(tmp_path / "tokens.bin", range(90))
    with pytest.raises(ValueError, match=r"val_path must hold other shards than path, got .*tokens.bin in both"):
        small(tmp_path, val_path=str(tmp_path)).setup()


def test_refuses_too_few_tokens(folder):
    with pytest.raises(ValueError, match=r"block_size must be less than .* training tokens, got 450 for 450 in 3"):
        small(folder, block_size=450, val_tokens=None).setup()
    with pytest.raises(
        ValueError, match=r"validation tokens, got 100 for 100 in 1 shards, .*my_val_0.bin: take longer"
    ):
        small(folder, block_size=100, val_tokens=None).setup()
    with pytest.raises(ValueError, match=r"batch_size must be at most 28, .* on each of 2 ranks, got 29"):
        on_rank(small(folder, batch_size=29), 0, 2).train_dataloader()


def test_large_shards_are_not_read(tmp_path):
    for name in ("train", "val"):
        path = tmp_path / f"{name}.bin"
        write_shard(path, [7])
        break_header(path, 2, 10**9)
        os.truncate(path, HEADER_BYTES + 2 * 10**9)  # sparse: two gigabytes that take no space
    start = time.process_time()  # a crowded machine does not count
    data = ShardData(str(tmp_path), block_size=64)
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].flatten().tolist() == [7] + [0] * 511
    assert data.num_train_tokens == (10**9 - 1) // 64 * 64
    assert len(pickle.dumps(data.train_blocks)) < 10_000, "a spawned worker gets names, not tokens"
    assert time.process_time() - start < 1


def test_maps_are_read_only(folder):
    tokens = small(folder).train_blocks.tokens
    with pytest.raises(ValueError, match="read-only"):
        tokens[0:4][0] = 1


class Watch(pl.Callback):
    """Remembers the tokens of batches; saves a checkpoint after each event of one kind."""

    def __init__(self, event=None, folder=None):
        self.batches, self.saved = [], {}
        if event:
            setattr(self, event, lambda trainer, *_: self.save(trainer, folder))

    def save(self, trainer, folder):
        self.saved[len(self.batches)] = str(folder / f"{len(self.batches)}.ckpt")
        trainer.save_checkpoint(self.saved[len(self.batches)])

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.batches += inputs([batch])


def fit(data, watch, ckpt_path=None, **limits):
    pl.seed_everything(0, verbose=False)
    module = NanoGPT(num_layers=1, num_heads=2, width=32, vocab_size=6000, block_size=8, warmup_steps=2)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[watch],
        **limits,
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize(("event", "num_workers"), [("on_train_batch_end", 0), ("on_validation_end", 1)])
def test_resumed_run_sees_the_tokens_of_the_uninterrupted_one(folder, tmp_path, event, num_workers):
    limits = {"max_steps": 7, "val_check_interval": 2, "check_val_every_n_epoch": None, "limit_val_batches": 1}
    whole = Watch(event, tmp_path)
    trainer = fit(small(folder, batch_size=17, num_workers=num_workers), whole, **limits)  # three batches an epoch
    assert torch.isfinite(trainer.callback_metrics["val_loss"])
    assert np.concatenate(whole.batches).tolist() == np.resize(TRAIN[:448], 7 * 17 * 8).tolist()
    for count in sorted(whole.saved)[1:5:2]:  # within the first epoch, and after its end
        rest = Watch()
        fit(small(folder, batch_size=17, num_workers=num_workers), rest, whole.saved[count], **limits)
        assert rest.batches == whole.batches[count:]


def test_shuffled_each_sequence_comes_once_an_epoch_in_an_order_of_the_seed(folder):
    def first(seed, **arguments):
        return inputs(small(folder, shuffle=True, seed=seed, **arguments).train_dataloader())

    in_order = inputs(small(folder, batch_size=1).train_dataloader())
    assert in_order != first(0, batch_size=1) != first(1, batch_size=1)
    assert sorted(first(0, batch_size=1)) == in_order
    assert np.concatenate(first(0)).tolist() == np.concatenate(first(0, batch_size=1)).tolist()
    ranks = [inputs(on_rank(small(folder, shuffle=True, batch_size=2), r, 2).train_dataloader()) for r in range(2)]
    sequences = [[batch[:8], batch[8:]] for batch in ranks[0]], [[batch[:8], batch[8:]] for batch in ranks[1]]
    dealt = [one for pair in zip(*sequences, strict=True) for cards in zip(*pair, strict=True) for one in cards]
    assert dealt == first(0, batch_size=1)
    assert inputs(small(folder, shuffle=True).val_dataloader()) == inputs(small(folder).val_dataloader())


def test_a_shuffled_run_goes_on_in_mid_epoch_and_in_the_next(folder, tmp_path):
    whole = Watch("on_train_batch_end", tmp_path)
    fit(small(folder, batch_size=17, shuffle=True), whole, max_steps=5, limit_val_batches=0)
    assert whole.batches[:2] != whole.batches[3:5]
    for count in (2, 4):
        rest = Watch()
        fit(small(folder, batch_size=17, shuffle=True), rest, whole.saved[count], max_steps=5, limit_val_batches=0)
        assert rest.batches == whole.batches[count:]


def test_goes_on_at_the_same_token_with_another_batch_size(folder, tmp_path):
    whole, rest = Watch("on_train_batch_end", tmp_path), Watch()
    fit(small(folder, batch_size=5), whole, max_steps=3, limit_val_batches=0)
    fit(small(folder, batch_size=2), rest, whole.saved[3], max_steps=5, limit_val_batches=0)
    assert np.concatenate(rest.batches).tolist() == TRAIN[3 * 40 : 3 * 40 + 2 * 16].tolist()


def test_position_survives_another_number_of_ranks(folder):
    loader = small(folder, batch_size=6).train_dataloader()
    batches = iter(loader)
    next(batches)
    halves = [on_rank(small(folder, batch_size=3), rank, 2).train_dataloader() for rank in range(2)]
    for half in halves:
        half.load_state_dict(loader.state_dict())
    assert np.concatenate([inputs([next(iter(half))])[0] for half in halves]).tolist() == inputs([next(batches)])[0]


def test_position_is_in_tokens(folder):
    loader = small(folder, num_workers=1).train_dataloader()
    batches = iter(loader)
    next(batches), next(batches)
    assert loader.state_dict() == {"num_tokens": 64, "total": 450}, "what workers hold ready does not count"
    batches.close()
    other = small(folder, block_size=12).train_dataloader()
    other.load_state_dict(loader.state_dict())
    assert inputs([next(iter(other))])[0][0] == TRAIN[60], "down to a whole block"


def test_other_shards_on_resumption_warn(folder):
    with pytest.warns(UserWarning, match="The training shards hold 450 tokens, 400 when the checkpoint was written"):
        small(folder).train_dataloader().load_state_dict({"num_tokens": 8, "total": 400})


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_overfitting_keeps_working(folder):
    watch = Watch()
    fit(small(folder), watch, max_epochs=2, overfit_batches=2)
    assert len(watch.batches) == 4
    assert watch.batches[:2] == watch.batches[2:]


def test_arguments_are_those_of_the_command_line():
    parser = ArgumentParser()
    parser.add_class_arguments(ShardData, "data")
    config = parser.parse_args(["--data.path=shards", "--data.val_tokens=null", "--data.align_to_documents=true"])
    data = ShardData(**config.data.as_dict())
    assert (data.path, data.val_tokens, data.align_to_documents) == ("shards", None, True)
    assert (data.vocab_size, data.shuffle) == (50257, False), "FineWeb's"
    assert [action.dest for action in parser._actions if not action.help] == []
