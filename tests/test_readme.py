"""What the README tells people to type works as it stands; other tests run its long commands."""

import re
from pathlib import Path

import pytest

from tests.runs.made_up import made_up

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def readme_command(part: str) -> list[str]:
    """The words of the one command in the README that contains a text."""
    (command,) = (line for block in blocks("bash") for line in block.splitlines() if part in line)
    return command.split()


def test_code_stands_at_line_7() -> None:
    assert "ActivationSpectrum" in README.splitlines()[6]


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(2):
        made_up(Path("runs", "baseline", f"version_{number}"), 1000 + number, 10)
        made_up(Path("runs", "rope", f"version_{number}"), 500 + number, 10)
    namespace: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)


def test_every_command_is_run_somewhere() -> None:
    # tests/test_cli.py takes its commands from here by their parts, CI calls make.
    ci, cli = ((REPOSITORY / path).read_text() for path in (".ci/run", "tests/test_cli.py"))
    parts = re.findall(r'readme_command\("([^"]+)"\)', cli)
    for line in "".join(blocks("bash")).splitlines():
        assert line in ci if line.startswith("make") else any(part in line for part in parts), line


def test_every_link_and_picture_is_there() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://") or (REPOSITORY / target).exists(), target
