"""Shards on disk: their format, which of them are found, and several as one array."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_spectral.nanogpt import write_shard
from lightning_spectral.nanogpt.blocks import Blocks
from lightning_spectral.nanogpt.shard_files import Shard, ShardTokens, find_shards, read_shard


def test_writes_the_format_of_the_speed_runs(tmp_path):
    path = tmp_path / "a.bin"
    write_shard(path, [3, 50256, 65535])
    words = np.frombuffer(path.read_bytes()[:1024], "<i4")
    assert words[:3].tolist() == [20240520, 1, 3]
    assert not words[3:].any()
    assert np.frombuffer(path.read_bytes()[1024:], "<u2").tolist() == [3, 50256, 65535]
    write_shard(path, np.array([3, 65536]))
    assert np.frombuffer(path.read_bytes()[1024:], "<u4").tolist() == [3, 65536]
    assert read_shard(path) == Shard(path, 2, "<u4")
    assert [file.name for file in tmp_path.iterdir()] == ["a.bin"]


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space")

    write_shard(tmp_path / "a.bin", [1, 2])
    before = (tmp_path / "a.bin").read_bytes()
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_shard(tmp_path / "a.bin", [3])
    assert [file.name for file in tmp_path.iterdir()] == ["a.bin"]
    assert (tmp_path / "a.bin").read_bytes() == before


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "tokens must be a row of 1 to .* integers, got shape \\(0,\\)"),
        ([[1, 2]], "got shape \\(1, 2\\) of int64"),
        ([0.5], "got shape \\(1,\\) of float64"),
        (torch.ones(3, requires_grad=True), "tokens must be a row of integers, got "),
        ([4, -1], "tokens must be from 0 to 2\\^32 - 1, got -1"),
        ([4, 2**32], "tokens must be from 0 to 2\\^32 - 1, got 4294967296"),
    ],
)
def test_refuses_to_write(tmp_path, tokens, message):
    with pytest.raises(ValueError, match=message):
        write_shard(tmp_path / "a.bin", tokens)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), data=st.data())
def test_shards_are_one_array(lengths, data):
    everything = np.arange(sum(lengths))
    parts = np.split(everything, np.cumsum(lengths)[:-1])
    tokens = ShardTokens([Shard(Path(), length, "<u2") for length in lengths])
    tokens._maps = dict(enumerate(parts))
    start, stop = (data.draw(st.integers(0, len(everything) + 2)) for _ in range(2))
    assert len(tokens) == len(everything)
    assert tokens[start:stop].tolist() == everything[start:stop].tolist()


def test_shards_of_both_widths_mix(tmp_path):
    write_shard(tmp_path / "train_0.bin", [1, 65535])
    write_shard(tmp_path / "train_1.bin", [65536, 2])
    tokens = ShardTokens(find_shards("path", str(tmp_path), "train", "val", unnamed=False))
    assert Blocks(tokens, 3)[0]["labels"].tolist() == [65535, 65536, 2]


@pytest.mark.parametrize(
    ("name", "kind"), [("interval_train", "train"), ("constrained_val", "val"), ("fineweb_val_000000", "val")]
)
def test_the_last_word_of_a_name_counts(tmp_path, name, kind):
    words = {"train", "val"}
    write_shard(tmp_path / f"{name}.bin", [1])
    assert len(find_shards("path", str(tmp_path), kind, *(words - {kind}), unnamed=False)) == 1


def test_hidden_files_and_folders_do_not_count(tmp_path):
    (tmp_path / "train_folder.bin").mkdir()
    (tmp_path / "._train_0.bin").write_bytes(b"left by another system")
    write_shard(tmp_path / "train_1.bin", [1])
    assert [shard.path.name for shard in find_shards("path", str(tmp_path), "train", "val", False)] == ["train_1.bin"]


def test_a_file_is_taken_by_its_name(tmp_path):
    write_shard(tmp_path / "train[1].bin", [1])
    assert len(find_shards("path", str(tmp_path / "train[1].bin"), "train", "val", unnamed=False)) == 1
