"""FineWeb10B's shards from the web: `python -m lightning_spectral.nanogpt.download FOLDER --num-shards 10`."""

import argparse
import os
import re
from collections.abc import Callable, Sequence
from http.client import HTTPException, InvalidURL
from pathlib import Path
from time import monotonic, sleep
from typing import Any, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from lightning_spectral.nanogpt.arguments import check_int, check_number, check_path, shown
from lightning_spectral.nanogpt.shard_files import HEADER_BYTES, read_header, read_shard

BASE_URL = "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main"
"""Holds `fineweb_val_000000.bin` and `fineweb_train_000001.bin` to `..._000103.bin`, of 100 million tokens each."""

CHUNK = 1 << 20
LONGEST_WAIT = 60.0
MIN_GAIN = CHUNK
"""Bytes, or a hundredth of what was left, that a try must bring to count as progress: a server that gains a byte a try
would never be given up."""
MAX_SECONDS = 6 * 3600.0
"""For a file, in all: at 200 MB it is less than 10 kB/s."""
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses that may be gone at the next try."""

_RANGE = re.compile(r"bytes (\d{1,15})-(\d{1,15})/(\d{1,15})")


class _InterruptedError(Exception):
    """A transfer ended early; another try may go on from there.

    Args:
        reason: Why.
        is_progress: Whether it brought the file on.
    """

    def __init__(self, reason: str, is_progress: bool = False) -> None:
        super().__init__(reason)
        self.is_progress = is_progress


class _Limits(NamedTuple):
    """When a file is given up."""

    num_retries: int
    timeout: float
    deadline: float
    """By the monotonic clock."""

    def check(self, url: str, part: Path) -> None:
        if monotonic() > self.deadline:
            raise ConnectionError(
                f"{url} could not be downloaded within max_seconds; {_size(part)} bytes are kept, and the same command "
                "goes on from there"
            )


def download_shards(
    folder: str | Path,
    num_shards: int = 10,
    base_url: str = BASE_URL,
    num_retries: int = 6,
    timeout: float = 60.0,
    max_seconds: float = MAX_SECONDS,
) -> list[Path]:
    """Download the validation shard and the first training shards, for `ShardData(folder)`.

    A file appears under its name when it is complete and its header agrees with its size; until then it ends in
    `.part`, and an interrupted download goes on from there, in this call or the next. Shards that are there already are
    left alone. Needs nothing beyond Python's standard library for the transfer; progress is shown on stderr.

    Args:
        folder: Where to put the files; made if need be.
        num_shards: Training shards, 1 to 999,999; each has 100 million tokens, and FineWeb10B has 103.
        base_url: Where `fineweb_val_000000.bin` and `fineweb_train_000001.bin`, ... are. The default is the copy on
            Hugging Face that the speed runs use.
        num_retries: Tries without progress, less than a MiB and a hundredth of what is missing, before giving up on a
            file; the waits between them double from a second to a minute.
        timeout: Seconds without an answer after which a try counts as failed.
        max_seconds: Seconds for a file in all, tries and waits together, after which it is given up; what has come is
            kept.

    Returns:
        The shards, the validation shard first.

    Raises:
        ValueError: If an argument is out of its range, or the server refuses a file or gives one that is no shard, or
            longer than its header says.
        ConnectionError: If the transfer failed too often, or took too long.
    """
    check_path(hint="where to put the files", folder=folder)
    check_int(1, 999_999, hint="FineWeb10B has 103", num_shards=num_shards)
    check_int(0, 10_000, num_retries=num_retries)
    check_number(timeout=timeout, max_seconds=max_seconds)
    for name, value in (("timeout", timeout), ("max_seconds", max_seconds)):
        if not 0 < value <= 10**7:
            raise ValueError(f"{name} must be above 0 seconds and at most 10^7, got {value}")
    if not isinstance(base_url, str) or not base_url.startswith(("http://", "https://")):
        raise ValueError(
            f"base_url must begin with http:// or https://, got {shown(base_url)}: the default is {BASE_URL}"
        )
    folder = Path(folder).expanduser()
    if os.path.exists(folder) and not folder.is_dir():
        raise ValueError(f"folder must be a folder, got {str(folder)!r}, which is something else")
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

            limits = _Limits(num_retries, timeout, monotonic() + max_seconds)
            _download(f"{base_url.rstrip('/')}/{name}", target, limits, show)
    return [folder / name for name in names]


def _fault(path: Path) -> str | None:
    try:
        read_shard(path)
    except ValueError as error:
        return str(error)
    return None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _download(url: str, target: Path, limits: _Limits, show: Callable[[int, int | None], None]) -> None:
    part = target.with_name(f"{target.name}.part")
    for path in (part, target):
        if path.exists() and not path.is_file():
            raise ValueError(f"folder must have no folder, pipe or device in the place of a shard, got {str(path)!r}")
    failures = 0
    # A part may have been complete when the last call was interrupted: then there is nothing to ask the server for.
    while not _size(part) or _fault(part) is not None:
        limits.check(url, part)
        try:
            _transfer(url, part, limits, show)
        except _InterruptedError as error:
            failures = 0 if error.is_progress else failures + 1
            if failures > limits.num_retries:
                raise ConnectionError(
                    f"{url} could not be downloaded, {limits.num_retries + 1} tries in a row failed, the last by: "
                    f"{_one_line(error)}; {_size(part)} bytes are kept, and the same command goes on from there"
                ) from None
            sleep(max(0.0, min(2.0 ** max(failures - 1, 0), LONGEST_WAIT, limits.deadline - monotonic())))
            continue
        fault = _fault(part)
        if fault is not None:
            part.unlink()
            raise ValueError(f"base_url must serve shards, got a file from {url} that is none: {fault}")
    os.replace(part, target)


def _transfer(url: str, part: Path, limits: _Limits, show: Callable[[int, int | None], None]) -> None:
    """Append to a part what is missing, or start anew where the server cannot give that."""
    before = done = _size(part)
    with _connect(_request(url, done), part, limits.timeout) as response:
        total = _total(response, url, done)
        if response.status != 206:
            before = done = 0
        longest = _longest(url, part) if done >= HEADER_BYTES else None
        with part.open("ab" if done else "wb") as stream:
            while chunk := _read(response):
                stream.write(chunk)
                done += len(chunk)
                if longest is None and done >= HEADER_BYTES:
                    stream.flush()
                    longest = _longest(url, part)
                if done > (HEADER_BYTES + CHUNK if longest is None else longest) or (
                    total is not None and done > total
                ):
                    stream.close()
                    part.unlink()
                    raise ValueError(
                        f"base_url must serve shards, got a file from {url} that goes on after {longest} bytes"
                    )
                show(done, total)
                if monotonic() > limits.deadline:
                    stream.flush()
                    limits.check(url, part)
    if total is None and (longest is None or done < (longest + HEADER_BYTES) // 2):
        raise _InterruptedError(f"connection closed after {done} bytes", done - before >= MIN_GAIN)
    if total is not None and done != total:
        left = total - before
        raise _InterruptedError(
            f"connection closed after {done} of {total} bytes", done - before >= min(MIN_GAIN, max(left // 100, 1))
        )


def _longest(url: str, part: Path) -> int:
    """Bytes that a file of such a header may have, so that nothing which is no shard, or too long, fills a disk."""
    try:
        return HEADER_BYTES + 4 * read_header(part)
    except ValueError as error:
        part.unlink()
        raise ValueError(f"base_url must serve shards, got a file from {url} that is none: {error}") from None


def _request(url: str, done: int) -> Request:
    try:
        headers = {"User-Agent": "lightning-spectral"} | ({"Range": f"bytes={done}-"} if done else {})
        return Request(url, headers=headers)
    except ValueError as error:
        raise ValueError(f"base_url must be the address of a folder, got {url!r}: {_one_line(error)}") from None


def _connect(request: Request, part: Path, timeout: float) -> Any:
    try:
        return urlopen(request, timeout=timeout)
    except HTTPError as error:
        with error:
            if error.code == 416:  # the part is longer than the file or, having failed the check, not its beginning
                part.unlink(missing_ok=True)
            elif error.code not in PASSING:
                raise ValueError(
                    f"base_url must serve shards, got HTTP {error.code} ({_one_line(error.reason)}) for "
                    f"{request.full_url}: check the address, and that num_shards is not more than there are"
                ) from None
            raise _InterruptedError(f"HTTP {error.code} ({_one_line(error.reason)})") from None
    except URLError as error:
        raise _InterruptedError(_one_line(error.reason)) from None
    except (InvalidURL, ValueError) as error:  # a port, a host or a redirection that is none
        raise ValueError(
            f"base_url must be the address of a folder, got {request.full_url}: {_one_line(error)}"
        ) from None
    except (OSError, HTTPException) as error:
        raise _InterruptedError(_one_line(error)) from None


def _total(response: Any, url: str, done: int) -> int | None:
    """Size of the whole file, if the server says so; a continuation must be of what was asked for."""
    if response.status == 206:
        given = response.headers.get("Content-Range", "")
        if not done:
            raise ValueError(
                f"base_url must serve whole files, got the range {shown(given)} of {url}: take another address"
            )
        found = _RANGE.fullmatch(given)
        if found is None or int(found[1]) != done or int(found[2]) + 1 != int(found[3]):
            raise _InterruptedError(f"the server gave the range {shown(given)} for what begins at byte {done}")
        return int(found[3])
    if response.status != 200:
        raise ValueError(f"base_url must serve shards, got HTTP {response.status} for {url}: check the address")
    length = response.headers.get("Content-Length")
    if length is not None and not re.fullmatch(r"\d{1,15}", length):
        raise ValueError(f"base_url must serve shards, got a length of {shown(length)} for {url}: take another address")
    return None if length is None else int(length)


def _read(response: Any) -> bytes:
    try:
        # What there is, so that a server that drips does not hold the clock up until a MiB is full.
        data: bytes = response.read1(CHUNK)
    except (OSError, HTTPException) as error:
        raise _InterruptedError(_one_line(error)) from None
    return data


def _one_line(error: Any) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def main(args: Sequence[str] | None = None) -> None:
    """Download shards as the words after the program's name say; None takes them from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_spectral.nanogpt.download",
        description="Download shards of FineWeb10B (GPT-2 tokens, 200 MB each); run again to go on after a failure.",
    )
    parser.add_argument("folder", help="where to put the files")
    parser.add_argument("--num-shards", type=int, default=10, help="training shards, 1 to 103 (default: %(default)s)")
    parser.add_argument("--base-url", default=BASE_URL, help="where the files are (default: %(default)s)")
    parser.add_argument(
        "--max-seconds", type=float, default=MAX_SECONDS, help="for a file in all (default: %(default).0f)"
    )
    options = parser.parse_args(args)
    try:
        shards = download_shards(options.folder, options.num_shards, options.base_url, max_seconds=options.max_seconds)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {_one_line(error)}\n")
    tokens = sum(read_shard(shard).num_tokens for shard in shards)
    print(f"{len(shards)} shards with {tokens:,} tokens in {options.folder}")


if __name__ == "__main__":
    main()
