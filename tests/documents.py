"""The README and the pages of docs/: where they lie, and the code and commands that stand in them."""

import re
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).parents[1]
README = REPOSITORY / "README.md"
PAGES = [README, *sorted((REPOSITORY / "docs").rglob("*.md"))]


class Block(NamedTuple):
    """One fenced block of a page."""

    language: str
    """What stands after the fence: python, bash, or nothing for what is printed."""
    text: str


def blocks(page: Path) -> list[Block]:
    return [
        Block(*found) for found in re.findall(r"^```([^\n]*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    ]


def commands(page: Path) -> list[str]:
    return [line for block in blocks(page) if block.language == "bash" for line in block.text.splitlines() if line]


def documented_command(part: str) -> list[str]:
    """The words of the one command in the README and the pages that contains a text."""
    (command,) = {line for page in PAGES for line in commands(page) if part in line}
    return command.split()


def name_of(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))
