"""Shards on disk: a header that says how many tokens follow, checked before a token is read, and files as one array."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lightning_spectral.nanogpt.arguments import check_path, shown

MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 4 * 256  # 256 int32 words: magic, version, number of tokens; the others are zero
MAX_TOKENS = 2**31 - 1

_REWRITE = "download it again, or write it with lightning_spectral.nanogpt.write_shard"


class Shard(NamedTuple):
    """A file of tokens whose header agrees with its size."""

    path: Path
    """The file."""
    num_tokens: int
    """Tokens in it, at least one."""
    dtype: str
    """How they are stored: `<u2`, as GPT-2's fit, or `<u4`."""

    def open(self) -> np.ndarray:
        """Map the tokens into memory: a read-only array of `(num_tokens,)` whose pages are read when touched."""
        return np.memmap(self.path, self.dtype, mode="r", offset=HEADER_BYTES, shape=(self.num_tokens,))


def read_shard(path: Path) -> Shard:
    """Check a shard's header, reading no token; ValueError for a wrong size, magic, version or number of tokens."""
    if not path.is_file():
        raise ValueError(f"{path} must be a file of tokens, got a folder, a pipe or nothing there: {_REWRITE}")
    num_tokens = read_header(path)
    size = path.stat().st_size
    for dtype, width in (("<u2", 2), ("<u4", 4)):
        if size - HEADER_BYTES == width * num_tokens:
            return Shard(path, num_tokens, dtype)
    raise ValueError(
        f"{path} must hold the {num_tokens} tokens of its header in {2 * num_tokens} or {4 * num_tokens} bytes, "
        f"got {size - HEADER_BYTES} bytes: {_REWRITE}"
    )


def read_header(path: Path) -> int:
    """The number of tokens that a shard is to hold; ValueError for a wrong magic, version or number of tokens."""
    size = path.stat().st_size
    if size < HEADER_BYTES:
        raise ValueError(f"{path} must have a header of {HEADER_BYTES} bytes, got {size} bytes in all: {_REWRITE}")
    magic, version, num_tokens = (int(word) for word in np.fromfile(path, "<i4", count=3))
    if magic != MAGIC:
        raise ValueError(f"{path} must begin with the magic number {MAGIC} of a shard, got {magic}: {_REWRITE}")
    if version != VERSION:
        raise ValueError(f"{path} must be a shard of version {VERSION}, got version {version}: {_REWRITE}")
    if num_tokens < 1:
        raise ValueError(f"{path} must hold at least one token, got {num_tokens} in its header: {_REWRITE}")
    return num_tokens


def write_shard(path: str | Path, tokens: Sequence[int] | np.ndarray) -> None:
    """Write tokens as a shard, of uint16 where they fit and of uint32 otherwise; a file of that name is replaced.

    Nobody ever sees half a shard: it is written under another name and then renamed.

    Args:
        path: The file; `ShardData` expects `.bin` at the end of its name, and `train` or `val` in it.
        tokens: The tokens, `(num_tokens,)`, integers from 0 to 2^32 - 1. FineWeb's shards begin every document
            with the token 50256.

    Raises:
        ValueError: If the tokens are not a non-empty row of such integers.
    """
    check_path(hint="a file name that ends in .bin", path=path)
    try:
        array = np.asarray(tokens)
    except (ValueError, TypeError, OverflowError, RuntimeError):  # the last of tensors that require gradients
        raise ValueError(f"tokens must be a row of integers, got {shown(tokens)}") from None
    if array.ndim != 1 or not 0 < len(array) <= MAX_TOKENS or array.dtype.kind not in "iu":
        raise ValueError(
            f"tokens must be a row of 1 to {MAX_TOKENS} integers, got shape {array.shape} of {array.dtype}"
        )
    least, largest = int(array.min()), int(array.max())
    if least < 0 or largest >= 2**32:
        raise ValueError(f"tokens must be from 0 to 2^32 - 1, got {least if least < 0 else largest}")
    header = np.zeros(HEADER_BYTES // 4, "<i4")
    header[:3] = MAGIC, VERSION, len(array)
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"path must be a file, got {str(path)!r}, which is a folder, a pipe or a device")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as stream:
            header.tofile(stream)
            array.astype("<u2" if largest < 2**16 else "<u4").tofile(stream)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def find_shards(argument: str, path: str, word: str, other: str, unnamed: bool) -> list[Shard]:
    """Find the shards of one kind, which their names tell, sorted by name and checked.

    A path is a folder, of which the files `*.bin` count, a glob pattern or a file. `word` is in the names of the shards
    asked for and `other` in those of others; where both are, the one that comes last counts. With `unnamed` all files
    count if no name has either.

    Returns:
        What their headers say.

    Raises:
        ValueError: In the name of the argument, if there are none; or if one is damaged.
    """
    root = Path(path).expanduser()
    if os.path.isdir(root):
        found = [file for file in root.glob("*.bin") if not file.name.startswith(".")]
    else:
        found = [root] if os.path.isfile(root) else [Path(name) for name in glob.glob(str(root))]
    files = sorted(filter(os.path.isfile, found), key=lambda file: (file.name, file))
    if not files:
        raise ValueError(
            f"{argument} must be a folder, a glob pattern or the name of shards (*.bin), got {path!r}, where none are: "
            "python -m lightning_spectral.nanogpt.download FOLDER fetches FineWeb's"
        )

    def kind(file: Path) -> str:
        return max((w for w in (word, other) if w in file.name), key=file.name.rindex, default="")

    chosen = [file for file in files if kind(file) == word]
    if not chosen and unnamed and not any(map(kind, files)):
        chosen = files
    if not chosen:
        raise ValueError(
            f"{argument} must have shards with {word!r} in their names, got {path!r} with {len(files)} others, such as "
            f"{files[0].name}: rename them, or give the training shards as path and the others as val_path"
        )
    return [read_shard(file) for file in chosen]


class ShardTokens:
    """Shards as one array of the first `limit` tokens, or all: slices are read from their files, nothing else is."""

    def __init__(self, shards: Sequence[Shard], limit: int | None = None) -> None:
        self.shards = tuple(shards)
        self.starts = np.cumsum([0, *(shard.num_tokens for shard in self.shards)])
        self.num_tokens = int(self.starts[-1]) if limit is None else min(limit, int(self.starts[-1]))
        self._maps: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self.num_tokens

    def __getitem__(self, where: slice) -> np.ndarray:
        start, stop, _ = where.indices(self.num_tokens)
        parts = []
        shard = int(np.searchsorted(self.starts, start, side="right")) - 1
        while start < stop:
            end = min(stop, int(self.starts[shard + 1]))
            parts.append(self._map(shard)[start - self.starts[shard] : end - self.starts[shard]])
            start, shard = end, shard + 1
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, "<u2")

    def __getstate__(self) -> dict[str, Any]:
        # a map would go to a spawned worker as a copy of all its tokens
        return self.__dict__ | {"_maps": {}}

    def _map(self, shard: int) -> np.ndarray:
        if shard not in self._maps:
            self._maps[shard] = self.shards[shard].open()
        return self._maps[shard]
