"""Text in blocks: what is read, how it is dealt, and how a stopped run goes on."""

import itertools
import sysconfig
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_spectral.nanogpt import NanoGPT, TextData
from lightning_spectral.nanogpt.blocks import Blocks, BlockSampler, ResumableLoader


@pytest.fixture
def text(tmp_path):
    """A file of 480 random bytes: with blocks of 8 and a fifth held out, 47 blocks to train on."""
    file = tmp_path / "text.txt"
    file.write_bytes(np.random.default_rng(0).integers(1, 250, 480, dtype=np.uint8).tobytes())
    return str(file)


def small(text, **arguments):
    return TextData(text, **({"block_size": 8, "batch_size": 8, "val_fraction": 0.2} | arguments))


def first_tokens(batches):
    return [tuple(batch["input_ids"][:, 0].tolist()) for batch in batches]


@given(length=st.integers(0, 200), block_size=st.integers(1, 40))
def test_blocks_cover_the_text(length, block_size):
    tokens = np.random.default_rng(length).integers(0, 256, length, dtype=np.uint8)
    blocks = Blocks(tokens, block_size)
    assert length - 1 - block_size < len(blocks) * block_size <= max(length - 1, 0)
    items = [blocks[i] for i in range(len(blocks))]
    inputs, labels = ([n for item in items for n in item[key].tolist()] for key in ("input_ids", "labels"))
    assert inputs == tokens[: len(inputs)].tolist()
    assert labels == tokens[1 : len(inputs) + 1].tolist()
    assert all(t.dtype == torch.int64 and t.shape == (block_size,) for item in items for t in item.values())
    with pytest.raises(IndexError):
        blocks[len(blocks)]


@given(num_blocks=st.integers(1, 60), batch_size=st.integers(1, 5), ranks=st.integers(1, 5), epoch=st.integers(0, 3))
def test_ranks_share_the_training_blocks(num_blocks, batch_size, ranks, epoch):
    samplers = [BlockSampler(num_blocks, batch_size, ranks, rank, seed=3) for rank in range(ranks)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    dealt = [list(sampler) for sampler in samplers]
    assert [len(part) for part in dealt] == [len(sampler) for sampler in samplers] == [num_blocks // ranks] * ranks
    everything = list(itertools.chain(*dealt))
    assert len(set(everything)) == len(everything)
    assert set(everything) <= set(range(num_blocks))
    one = BlockSampler(num_blocks, batch_size * ranks, seed=3)
    one.set_epoch(epoch)
    assert [block for blocks in zip(*dealt, strict=True) for block in blocks] == list(one)[: len(everything)]


@given(num_blocks=st.integers(1, 60), batch_size=st.integers(1, 5), ranks=st.integers(1, 5))
def test_ranks_share_the_validation_blocks(num_blocks, batch_size, ranks):
    dealt = [list(BlockSampler(num_blocks, batch_size, ranks, rank, shuffle=False)) for rank in range(ranks)]
    assert len({-(-len(part) // batch_size) for part in dealt}) == 1, "as many batches on each rank"
    assert all(part == sorted(part) for part in dealt)
    everything = sorted(itertools.chain(*dealt))
    kept = len(everything)
    assert everything == list(range(kept))
    assert num_blocks - kept < ranks
    assert ranks > 1 or kept == num_blocks


def test_order_depends_on_seed_and_epoch(text):
    def epochs(seed):
        loader = small(text, seed=seed).train_dataloader()
        return [first_tokens(loader) for _ in range(2)]

    first, second = epochs(1), epochs(2)
    assert first == epochs(1)
    assert first[0] != first[1]
    assert first != second
    assert first[1] != second[0], "seed + 1 in epoch 0 is not seed in epoch 1"


def test_training_leaves_the_random_stream_alone(text):
    torch.manual_seed(0)
    list(small(text).train_dataloader())
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1))


def test_split_and_sizes(text):
    data = small(text)
    content = Path(text).read_bytes()
    assert (data.vocab_size, data.num_train_tokens, data.num_val_tokens) == (256, 47 * 8, 11 * 8)
    batches = list(data.val_dataloader())
    assert [len(batch["labels"]) for batch in batches] == [8, 3]
    assert torch.cat([batch["input_ids"] for batch in batches]).flatten().tolist() == list(content[384 : 384 + 88])
    batch = next(iter(data.train_dataloader()))
    assert torch.equal(batch["input_ids"][:, 1:], batch["labels"][:, :-1])


def test_default_is_the_standard_library():
    data = TextData()
    text = np.concatenate([data.train_blocks.tokens, data.val_blocks.tokens])
    root = Path(sysconfig.get_path("stdlib"))
    source = (root / "__future__.py").read_bytes()
    assert text[: len(source)].tobytes() == source, "the first by path"
    assert (root / "zoneinfo" / "_zoneinfo.py").read_bytes() in text.tobytes()
    assert (root / "json" / "decoder.py").read_bytes() in text.tobytes()
    assert not any(file.read_bytes() in text.tobytes() for file in list((root / "test").glob("test_d*.py"))[:3])
    assert len(data.val_blocks.tokens) == round(len(text) / 10)
    assert len(text) > 4e6


def test_folder_reads_text_files_by_path(tmp_path):
    for name, content in {
        "b.txt": b"second " * 9,
        "a/z.py": b"first " * 9,
        "c": b"third " * 9,
        "image.png": b"\x89PNG\0" * 9,
        ".hidden": b"hidden " * 9,
        ".git/config": b"hidden " * 9,
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    data = TextData(str(tmp_path), block_size=4)
    text = np.concatenate([data.train_blocks.tokens, data.val_blocks.tokens]).tobytes()
    assert text == b"first " * 9 + b"second " * 9 + b"third " * 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"val_fraction": 0.0}, "val_fraction must be between 0 and 1, both excluded, got 0.0"),
        ({"val_fraction": 1.0}, "val_fraction must be between 0 and 1, both excluded, got 1.0"),
    ],
)
def test_refuses_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TextData(**arguments)


def test_refuses_a_missing_path(tmp_path):
    with pytest.raises(ValueError, match=r"path must be a text file or a folder of them, got .* does not exist"):
        TextData(str(tmp_path / "nowhere")).setup()


def test_refuses_a_folder_without_text(tmp_path):
    (tmp_path / "data.bin").write_bytes(bytes(100))
    with pytest.raises(ValueError, match=r"path must hold at least one text file, got .*: hidden and binary"):
        TextData(str(tmp_path)).setup()


@pytest.mark.parametrize("length", [0, 60, 300])
def test_refuses_too_little_text(tmp_path, length):
    file = tmp_path / "short.txt"
    file.write_bytes(b"a" * length)
    message = f"block_size \\+ 1 = 65 bytes on both sides of the split, got .* with {length - length // 10} \\+"
    with pytest.raises(ValueError, match=message):
        TextData(str(file), block_size=64).setup()


def test_refuses_a_batch_larger_than_the_text(text):
    with pytest.raises(ValueError, match=r"batch_size must be at most 47, .* on each of 1 ranks, got 48"):
        small(text, batch_size=48).train_dataloader()


def test_missing_standard_library(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match="path must name a text file or folder, got None, but the standard library"):
        TextData().setup()


class Watch(pl.Callback):
    """Remembers batches; saves a checkpoint after each event of one kind."""

    def __init__(self, event=None, folder=None):
        self.batches, self.saved = [], {}
        if event:
            setattr(self, event, lambda trainer, *_: self.save(trainer, folder))

    def save(self, trainer, folder):
        count = len(self.batches)
        self.saved[count] = str(folder / f"{count}.ckpt")
        trainer.save_checkpoint(self.saved[count])

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.batches += first_tokens([batch])


class Impatient(NanoGPT):
    """Asks for the length of training early, as most schedules do, which makes Lightning forget the loader's state."""

    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches > 0
        return super().configure_optimizers()


def fit(text, watch, ckpt_path=None, kind=NanoGPT, num_workers=0, **limits):
    pl.seed_everything(0, verbose=False)
    module = kind(num_layers=1, num_heads=1, width=8, block_size=8, warmup_steps=2)
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
    trainer.fit(module, small(text, num_workers=num_workers), ckpt_path=ckpt_path)
    return module


@pytest.mark.parametrize(
    ("event", "limits"),
    [
        ("on_train_batch_end", {"max_epochs": 3}),
        ("on_train_batch_end", {"max_steps": 12, "val_check_interval": 3, "check_val_every_n_epoch": None}),
        ("on_validation_end", {"max_epochs": 3, "val_check_interval": 2}),
        ("on_train_epoch_end", {"max_steps": 12}),
        ("on_train_epoch_end", {"max_steps": 12, "val_check_interval": 3, "check_val_every_n_epoch": None}),
        ("on_train_batch_end", {"max_epochs": 3, "limit_train_batches": 3}),
    ],
)
def test_resumed_run_is_the_uninterrupted_one(text, tmp_path, event, limits):
    whole = Watch(event, tmp_path)
    module = fit(text, whole, **limits)
    counts = [count for count in whole.saved if count < len(whole.batches)]
    assert len(counts) > 1
    for count in {counts[0], counts[len(counts) // 2], counts[-1]}:
        rest = Watch()
        resumed = fit(text, rest, whole.saved[count], **limits)
        assert rest.batches == whole.batches[count:]
        assert resumed.tokens == module.tokens == len(whole.batches) * 64
        for expected, parameter in zip(module.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(expected, parameter)


@pytest.mark.parametrize(("kind", "num_workers"), [(Impatient, 0), (NanoGPT, 1), (Impatient, 1)])
def test_resumes_where_lightning_loses_the_position(text, tmp_path, kind, num_workers):
    whole, rest = Watch("on_train_batch_end", tmp_path), Watch()
    fit(text, whole, max_epochs=2)
    fit(text, rest, whole.saved[7], kind=kind, num_workers=num_workers, max_epochs=2)
    assert rest.batches == whole.batches[7:]


def test_all_batches_come_once_an_epoch_under_a_limit(text):
    watch = Watch()
    fit(text, watch, max_steps=10, limit_train_batches=3, limit_val_batches=0)
    loader = small(text).train_dataloader()
    assert watch.batches == first_tokens(loader) + first_tokens(loader)


def test_workers_prefetch_is_not_counted(text):
    loader = small(text, num_workers=1).train_dataloader()
    batches = iter(loader)
    next(batches), next(batches)
    assert loader.state_dict() == {"epoch": 0, "num_blocks": 16, "total": 47}
    batches.close()


def test_position_survives_another_number_of_ranks(text):
    data = small(text)
    data.setup()
    loader = data.train_dataloader()
    batches = iter(loader)
    seen = [next(batches) for _ in range(2)]
    assert len(first_tokens(seen)) == 2
    halves = []
    for rank in range(2):
        sampler = BlockSampler(47, 4, num_replicas=2, rank=rank, seed=42)
        half = ResumableLoader(data.train_blocks, batch_size=4, sampler=sampler, drop_last=True)
        half.load_state_dict(loader.state_dict())
        halves.append(next(iter(half))["input_ids"])
    expected = next(batches)["input_ids"]
    assert torch.equal(torch.stack(halves, dim=1).flatten(0, 1), expected)


def test_another_text_on_resumption_warns(text):
    with pytest.warns(UserWarning, match="The text has 47 blocks, 40 when the checkpoint was written"):
        small(text).train_dataloader().load_state_dict({"epoch": 0, "num_blocks": 8, "total": 40})


def test_validating_a_checkpoint_does_not_move_training(text, tmp_path):
    whole = Watch("on_train_batch_end", tmp_path)
    module = fit(text, whole, max_steps=3)
    data = small(text)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.validate(module, data, ckpt_path=whole.saved[2], verbose=False)
    assert first_tokens([next(iter(data.train_dataloader()))]) == whole.batches[:1]


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_overfitting_keeps_working(text):
    watch = Watch()
    fit(text, watch, max_epochs=2, overfit_batches=2)
    assert len(watch.batches) == 4
    assert watch.batches[:2] == watch.batches[2:]
