"""FineWeb10B's shards from the web: `python -m lightning_spectral.nanogpt.download FOLDER --num-shards 10`."""

import argparse
import os
import re
from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path
from time import sleep
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from lightning_spectral.nanogpt.shard_files import read_shard

BASE_URL = "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main"
"""Holds `fineweb_val_000000.bin` and `fineweb_train_000001.bin` to `..._000103.bin`, of 100 million tokens each."""

CHUNK = 1 << 20
LONGEST_WAIT = 60.0
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses that may be gone at the next try."""


class _InterruptedError(Exception):
    """A transfer ended early; another try may go on from there."""


def download_shards(
    folder: str | Path,
    num_shards: int = 10,
    base_url: str = BASE_URL,
    num_retries: int = 6,
    timeout: float = 60.0,
) -> list[Path]:
    """Download the validation shard and the first training shards, for `ShardData(folder)`.

    A file appears under its name when it is complete and its header agrees with its size; until then it ends in
    `.part`, and an interrupted download goes on from there, in this call or the next. Shards that are there already are
    left alone. Needs nothing beyond Python's standard library for the transfer; progress is shown on stderr.

    Args:
        folder: Where to put the files; made if need be.
        num_shards: Training shards, at least 1; each has 100 million tokens, and FineWeb10B has 103.
        base_url: Where `fineweb_val_000000.bin` and `fineweb_train_000001.bin`, ... are. The default is the copy on
            Hugging Face that the speed runs use.
        num_retries: Tries without any progress before giving up on a file; the waits between them double from a
            second to a minute.
        timeout: Seconds without an answer after which a try counts as failed.

    Returns:
        The shards, the validation shard first.

    Raises:
        ValueError: If an argument is out of its range, or the server refuses a file or gives one that is no shard.
        ConnectionError: If the transfer failed too often.
    """
    if num_shards < 1:
        raise ValueError(f"num_shards must be at least 1, got {num_shards}: FineWeb10B has 103")
    if not base_url.startswith(("http://", "https://")):
        raise ValueError(f"base_url must begin with http:// or https://, got {base_url!r}: the default is {BASE_URL}")
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    names = ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(1, num_shards + 1))]
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=Console(stderr=True)) as progress:
        for name in names:
            target = folder / name
            if target.exists() and _fault(target) is None:
                continue
            task = progress.add_task(name, total=None)

            def show(done: int, total: int | None, task: Any = task) -> None:
                progress.update(task, completed=done, total=total)

            _download(f"{base_url.rstrip('/')}/{name}", target, num_retries, timeout, show)
    return [folder / name for name in names]


def _fault(path: Path) -> str | None:
    try:
        read_shard(path)
    except ValueError as error:
        return str(error)
    return None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _download(
    url: str, target: Path, num_retries: int, timeout: float, show: Callable[[int, int | None], None]
) -> None:
    part = target.with_name(f"{target.name}.part")
    failures = 0
    # A part may have been complete when the last call was interrupted: then there is nothing to ask the server for.
    while not _size(part) or _fault(part) is not None:
        before = _size(part)
        try:
            _transfer(url, part, timeout, show)
        except _InterruptedError as error:
            failures = 0 if _size(part) > before else failures + 1
            if failures > num_retries:
                raise ConnectionError(
                    f"{url} could not be downloaded, {num_retries + 1} tries in a row failed, the last by: {error}; "
                    f"{_size(part)} bytes are kept, and the same command goes on from there"
                ) from None
            sleep(min(2.0 ** max(failures - 1, 0), LONGEST_WAIT))
            continue
        fault = _fault(part)
        if fault is not None:
            part.unlink()
            raise ValueError(f"base_url must serve shards, got a file from {url} that is none: {fault}")
    os.replace(part, target)


def _transfer(url: str, part: Path, timeout: float, show: Callable[[int, int | None], None]) -> None:
    """Append to a part what is missing, or start anew where the server cannot give that."""
    done = _size(part)
    request = Request(url, headers={"User-Agent": "lightning-spectral"} | ({"Range": f"bytes={done}-"} if done else {}))
    with _connect(request, part, timeout) as response:
        total = _total(response, part)
        if response.status != 206:
            done = 0
        with part.open("ab" if done else "wb") as stream:
            while chunk := _read(response):
                stream.write(chunk)
                done += len(chunk)
                show(done, total)
    if total is not None and done != total:
        if done > total:
            part.unlink()
        raise _InterruptedError(f"connection closed after {done} of {total} bytes")


def _connect(request: Request, part: Path, timeout: float) -> Any:
    try:
        return urlopen(request, timeout=timeout)
    except HTTPError as error:
        with error:
            if error.code == 416:  # the part is longer than the file or, having failed the check, not its beginning
                part.unlink(missing_ok=True)
            elif error.code not in PASSING:
                raise ValueError(
                    f"base_url must serve shards, got HTTP {error.code} ({error.reason}) for {request.full_url}: "
                    "check the address, and that num_shards is not more than there are"
                ) from None
            raise _InterruptedError(f"HTTP {error.code} ({error.reason})") from None
    except URLError as error:
        raise _InterruptedError(str(error.reason)) from None
    except (OSError, HTTPException) as error:
        raise _InterruptedError(str(error) or type(error).__name__) from None


def _total(response: Any, part: Path) -> int | None:
    """Size of the whole file, if the server says so; a continuation must begin where the part ends."""
    if response.status == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if found is None or int(found[1]) != _size(part):
            part.unlink()
            raise _InterruptedError(f"the server gave another range: {response.headers.get('Content-Range')}")
        return int(found[2])
    length = response.headers.get("Content-Length")
    return None if length is None else int(length)


def _read(response: Any) -> bytes:
    try:
        data: bytes = response.read(CHUNK)
    except (OSError, HTTPException) as error:
        raise _InterruptedError(str(error) or type(error).__name__) from None
    return data


def main(args: Sequence[str] | None = None) -> None:
    """Download shards as the words after the program's name say; None takes them from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_spectral.nanogpt.download",
        description="Download shards of FineWeb10B (GPT-2 tokens, 200 MB each); run again to go on after a failure.",
    )
    parser.add_argument("folder", help="where to put the files")
    parser.add_argument("--num-shards", type=int, default=10, help="training shards, 1 to 103 (default: %(default)s)")
    parser.add_argument("--base-url", default=BASE_URL, help="where the files are (default: %(default)s)")
    options = parser.parse_args(args)
    try:
        shards = download_shards(options.folder, options.num_shards, options.base_url)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    tokens = sum(read_shard(shard).num_tokens for shard in shards)
    print(f"{len(shards)} shards with {tokens:,} tokens in {options.folder}")


if __name__ == "__main__":
    main()
