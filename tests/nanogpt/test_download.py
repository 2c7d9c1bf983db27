"""Downloads against a server of our own, which drops connections, refuses, and serves damaged files when told to."""

import contextlib
import http.server
import os
import threading

import numpy as np
import pytest

from lightning_spectral.nanogpt import ShardData, download, write_shard
from lightning_spectral.nanogpt.download import download_shards

VAL, FIRST, SECOND = "fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.files`, with ranges; `server.script` says what goes wrong with the next requests for a name."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        asked = self.headers.get("Range")
        self.server.requests.append((name, asked))
        fault = self.server.script.get(name, [])
        fault = fault.pop(0) if fault else None
        if fault == "loop":
            self.send_response(302)
            self.send_header("Location", self.path)
            self.end_headers()
            return
        if name not in self.server.files or isinstance(fault, int):
            self.send_error(fault or 404)
            return
        content = self.server.files[name]
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.server.ranges else 0
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if fault == "unasked" or (asked and self.server.ranges) else 200)
        if fault == "bad length":
            self.send_header("Content-Length", "x")
        elif fault not in ("no length", "endless"):
            self.send_header("Content-Length", str(len(content) - start))
        if asked and self.server.ranges:
            first = 0 if fault == "wrong range" else start
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        body = content[start:]
        with contextlib.suppress(OSError):
            while fault == "endless":
                self.wfile.write(body)
        if fault == "endless":
            return
        if fault == "a byte":
            body = body[:1]
        self.wfile.write(body[: len(body) // 2] if fault == "drop" else b"" if fault == "stall" else body)


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.script, server.requests, server.ranges = {}, {}, [], True
        for index, name in enumerate((VAL, FIRST, SECOND)):
            write_shard(tmp_path / name, np.arange(2000) + 2000 * index)
            server.files[name] = (tmp_path / name).read_bytes()
            (tmp_path / name).unlink()
        server.url = f"http://127.0.0.1:{server.server_port}/data/"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """Seconds that a download would have waited between its tries."""
    seconds = []
    monkeypatch.setattr(download, "sleep", seconds.append)
    return seconds


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "new" / "shards"


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_downloads_what_shard_data_reads(server, folder, capsys):
    paths = download_shards(folder, 2, server.url)
    assert paths == [folder / VAL, folder / FIRST, folder / SECOND]
    assert contents(folder) == server.files
    data = ShardData(str(folder), block_size=8, val_tokens=800)
    assert next(iter(data.train_dataloader()))["input_ids"][0].tolist() == list(range(2000, 2008))
    assert data.num_train_tokens == 3992
    out, err = capsys.readouterr()
    assert out == ""
    assert SECOND in err


def test_leaves_alone_what_is_there(server, folder):
    download_shards(folder, 1, server.url)
    (folder / FIRST).write_bytes(b"damaged")
    server.requests.clear()
    download_shards(folder, 2, server.url)
    assert server.requests == [(FIRST, None), (SECOND, None)]
    assert contents(folder) == server.files


def test_goes_on_after_a_dropped_connection(server, folder, waits):
    server.script[FIRST] = ["drop", "drop"]
    download_shards(folder, 1, server.url)
    half = len(server.files[FIRST]) // 2
    three_quarters = half + (len(server.files[FIRST]) - half) // 2
    assert server.requests[1:] == [(FIRST, None), (FIRST, f"bytes={half}-"), (FIRST, f"bytes={three_quarters}-")]
    assert contents(folder) == {name: server.files[name] for name in (VAL, FIRST)}
    assert waits == [1.0, 1.0], "progress was made"


def test_goes_on_in_another_call(server, folder):
    server.script[VAL] = ["drop", 503]
    with pytest.raises(ConnectionError, match=r"could not be downloaded, 1 tries .* HTTP 503 .*; 2512 bytes are kept"):
        download_shards(folder, 1, server.url, num_retries=0)
    assert [file.name for file in folder.iterdir()] == [f"{VAL}.part"]
    server.requests.clear()
    download_shards(folder, 1, server.url)
    assert server.requests[0] == (VAL, "bytes=2512-")
    assert contents(folder)[VAL] == server.files[VAL]


def test_a_complete_part_needs_no_request(server, folder):
    folder.mkdir(parents=True)
    (folder / f"{VAL}.part").write_bytes(server.files[VAL])
    download_shards(folder, 1, server.url)
    assert server.requests == [(FIRST, None)]
    assert set(contents(folder)) == {VAL, FIRST}


def test_starts_anew_where_a_part_is_too_long(server, folder, waits):
    folder.mkdir(parents=True)
    (folder / f"{VAL}.part").write_bytes(server.files[VAL] + b"more")
    download_shards(folder, 1, server.url)
    assert [request for name, request in server.requests if name == VAL] == ["bytes=5028-", None]
    assert contents(folder)[VAL] == server.files[VAL]


def test_starts_anew_where_the_server_knows_no_ranges(server, folder):
    server.ranges = False
    server.script[VAL] = ["drop"]
    download_shards(folder, 1, server.url)
    assert contents(folder) == {name: server.files[name] for name in (VAL, FIRST)}


def test_needs_no_length(server, folder):
    server.script[VAL] = ["no length"]
    download_shards(folder, 1, server.url)
    assert contents(folder)[VAL] == server.files[VAL]


def test_waits_longer_and_longer_then_gives_up(server, folder, waits):
    server.script[VAL] = [429, "stall", 503, 500, 502, 504, 503, 503, 503]
    message = (
        r"/fineweb_val_000000.bin could not be downloaded, 9 tries in a row failed, the last by: HTTP 503 .*; 0 bytes"
    )
    with pytest.raises(ConnectionError, match=message) as error:
        download_shards(folder, 1, server.url, num_retries=8)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
    assert "\n" not in str(error.value)


def test_nobody_at_home(folder, server):
    with pytest.raises(ConnectionError, match=r"could not be downloaded, 2 tries in a row failed, .* refused"):
        download_shards(folder, 1, "http://127.0.0.1:9/data", num_retries=1)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_refusals_are_final(server, folder, waits, status):
    server.script[FIRST] = [status]
    message = rf"base_url must serve shards, got HTTP {status} \(.*\) for http.*/data/{FIRST}: check the address, and"
    with pytest.raises(ValueError, match=message):
        download_shards(folder, 1, server.url)
    assert waits == []
    assert set(contents(folder)) == {VAL}, "what came before is kept"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: b"<html>" + content[6:], "must begin with the magic number 20240520"),
        (lambda content: content[:-2], "must hold the 2000 tokens of its header in 4000 or 8000 bytes, got 3998"),
        (lambda content: b"not found", "must have a header of 1024 bytes, got 9"),
    ],
)
def test_refuses_what_is_no_shard(server, folder, damage, message):
    server.files[FIRST] = damage(server.files[FIRST])
    with pytest.raises(ValueError, match=rf"base_url must serve shards, got a file from .*{FIRST} that .*{message}"):
        download_shards(folder, 1, server.url)
    assert set(contents(folder)) == {VAL}, "the next call starts anew"


def test_asks_again_after_a_continuation_that_begins_elsewhere(server, folder):
    server.script[VAL] = ["drop", "wrong range"]
    download_shards(folder, 1, server.url)
    assert [request for name, request in server.requests if name == VAL] == [None, "bytes=2512-", "bytes=2512-"]
    assert contents(folder)[VAL] == server.files[VAL]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_shards": 0}, "num_shards must be at least 1, got 0"),
        ({"num_shards": "3"}, "num_shards must be an int, got '3'"),
        ({"num_shards": 10**9}, "num_shards must be at most 999999"),
        ({"num_retries": 2.5}, "num_retries must be an int, got 2.5"),
        ({"timeout": float("nan")}, "timeout must be a finite number, got nan"),
        ({"max_seconds": 0}, "max_seconds must be above 0 seconds"),
        ({"base_url": 5}, "base_url must begin with http:// or https://, got 5"),
        ({"base_url": "http://a b/"}, "base_url must be the address of a folder, got"),
        ({"base_url": "http://[a/"}, "base_url must be the address of a folder"),
        ({"base_url": "file:///etc"}, "base_url must begin with http:// or https://, got 'file:///etc'"),
    ],
)
def test_refuses_arguments(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        download_shards(folder, **{"num_retries": 0} | arguments)
    assert not folder.exists() or not list(folder.iterdir())


@pytest.mark.parametrize("status", [200, "endless"])
def test_what_never_ends_is_stopped_by_what_its_header_says(server, folder, status):
    server.script[VAL] = ["endless"]
    if status == 200:
        server.files[VAL] = bytes(5000)  # no shard at all
    with pytest.raises(ValueError, match=r"got a file from .* that (is none|goes on after 9024 bytes)"):
        download_shards(folder, 1, server.url)
    assert list(folder.iterdir()) == []


def test_a_part_is_refused_where_the_whole_was_asked_for(server, folder):
    server.script[VAL] = ["unasked"]
    with pytest.raises(ValueError, match="base_url must serve whole files, got the range ''"):
        download_shards(folder, 1, server.url)


def test_a_length_that_is_none_is_refused(server, folder):
    server.script[VAL] = ["bad length"]
    with pytest.raises(ValueError, match="got a length of 'x'"):
        download_shards(folder, 1, server.url)


def test_redirections_in_a_circle_are_refused_in_one_line(server, folder):
    server.script[VAL] = ["loop"] * 100
    with pytest.raises(ValueError, match=r"got HTTP 302 .*infinite loop") as caught:
        download_shards(folder, 1, server.url)
    assert "\n" not in str(caught.value)


def test_a_byte_a_try_is_no_progress(server, folder, waits):
    server.script[VAL] = ["a byte"] * 1000
    with pytest.raises(ConnectionError, match=r"3 tries in a row failed.*; 3 bytes are kept"):
        download_shards(folder, 1, server.url, num_retries=2)
    server.script[VAL] = []
    download_shards(folder, 1, server.url)
    assert contents(folder)[VAL] == server.files[VAL]


def test_a_file_has_a_time_in_all(server, folder, monkeypatch):
    clock = iter(range(0, 10**6, 40))
    monkeypatch.setattr(download, "monotonic", lambda: next(clock))
    server.script[VAL] = ["drop"] * 10
    with pytest.raises(ConnectionError, match=r"within max_seconds; \d+ bytes are kept"):
        download_shards(folder, 1, server.url, max_seconds=200)


def test_a_pipe_in_the_place_of_a_shard_is_refused(server, folder):
    folder.mkdir(parents=True)
    os.mkfifo(folder / f"{VAL}.part")
    with pytest.raises(ValueError, match="no folder, pipe or device in the place of a shard"):
        download_shards(folder, 1, server.url)


def test_command(server, folder, capsys):
    download.main([str(folder), "--num-shards", "1", "--base-url", server.url])
    assert capsys.readouterr().out == f"2 shards with 4,000 tokens in {folder}\n"
    with pytest.raises(SystemExit) as stop:
        download.main([str(folder), "--num-shards", "3", "--base-url", server.url])
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(
        "python -m lightning_spectral.nanogpt.download: error: base_url must serve shards, got HTTP 404"
    )
