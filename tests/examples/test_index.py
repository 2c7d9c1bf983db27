"""The index of the examples has an entry for each, with a time and a picture, and the site shows it."""

import re
from typing import NamedTuple

from tests.examples.running import ROOT

FOLDER = ROOT / "examples"
INDEX = (FOLDER / "README.md").read_text()
WITHOUT_A_PICTURE = {"d12.yaml"}
"""What takes GPUs and a download."""


class Entry(NamedTuple):
    name: str
    target: str
    time: str
    text: str
    pictures: list[str]


def entry(part: str) -> Entry:
    found = re.match(r"\[([^]]+)\]\(([^)]+)\)\n\n\*([^*]+)\.\* ([^!]+)", part)
    assert found, part
    return Entry(*found.groups(), re.findall(r"!\[[^]]+\]\(([^)]+)\)", part))


ENTRIES = [entry(part) for part in INDEX.split("\n### ")[1:]]


def test_every_example_has_an_entry_and_every_entry_an_example() -> None:
    assert all(one.name == one.target for one in ENTRIES)
    files = sorted(path.name for path in FOLDER.iterdir() if path.is_file() and path.name != "README.md")
    assert sorted(one.name for one in ENTRIES) == files


def test_every_entry_has_a_time() -> None:
    for one in ENTRIES:
        assert re.fullmatch(r"\d+ (s|min)|hours", one.time), one.name


def test_every_entry_has_a_picture_and_every_picture_an_entry() -> None:
    shown = []
    for one in ENTRIES:
        assert len(one.pictures) == (one.name not in WITHOUT_A_PICTURE), one.name
        shown += [(FOLDER / path).resolve() for path in one.pictures]
    assert len(set(shown)) == len(shown)
    assert all(path.suffix == ".png" and path.exists() for path in shown)
    drawn = set((FOLDER / "pictures").glob("*.png"))
    assert drawn <= set(shown)
    assert not [path for path in drawn if path.stat().st_size >= 60_000]


def test_the_page_of_the_site_is_the_index() -> None:
    assert "<!-- include ../examples/README.md -->" in (ROOT / "docs" / "examples.md").read_text()
