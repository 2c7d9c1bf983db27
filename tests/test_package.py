"""What is said around the code holds: versions agree, workflows call what is there, a source tree has a version."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.limit import LIMIT

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def pins(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def loaded(file: Path) -> dict:
    # YAML 1.1 takes the key `on` for true
    return {"on" if key is True else key: value for key, value in yaml.safe_load(file.read_text()).items()}


def commands(workflow: Path) -> list[str]:
    return [step["run"] for job in loaded(workflow)["jobs"].values() for step in job["steps"] if "run" in step]


def pythons(workflow: Path) -> set[str]:
    text = workflow.read_text()
    listed = [python for row in re.findall(r"python: \[(.*)\]", text) for python in re.findall(r"[\d.]+", row)]
    return {*listed, *re.findall(r'python-version: "([\d.]+)"', text)}


def test_workflows_call_what_is_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = [command for workflow in WORKFLOWS for command in commands(workflow)]
    assert [workflow.stem for workflow in WORKFLOWS] == ["docs", "release", "test"]
    for command in called:
        program, *words = command.split()
        if program == "make":
            # the target of the documentation's pages comes with them
            assert set(words) <= targets | ({"docs"} if not (ROOT / "mkdocs.yml").exists() else set()), command
        elif program != "test":
            assert (ROOT / program).stat().st_mode & 0o100, command
    assert {"make test-oldest", "make package", "make docs", ".ci/run"} <= set(called)
    runs = (ROOT / ".ci" / "run").read_text()
    assert set(re.findall(r"^make (\S+)", runs, re.MULTILINE)) <= targets


def test_a_release_needs_no_token_and_its_tag_is_the_version() -> None:
    release = loaded(ROOT / ".github" / "workflows" / "release.yml")
    assert release["on"] == {"push": {"tags": ["v*"]}}
    assert release["jobs"]["publish"]["permissions"] == {
        "id-token": "write",
        "attestations": "write",
        "contents": "read",
    }
    assert "secrets." not in (ROOT / ".github" / "workflows" / "release.yml").read_text()
    assert any("GITHUB_REF_NAME#v" in step.get("run", "") for step in release["jobs"]["build"]["steps"])


def test_versions_of_python_agree() -> None:
    tested = set().union(*map(pythons, WORKFLOWS))
    said = set(re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT))
    assert said == tested
    floor = re.search(r'requires-python = ">=([\d.]+)"', PROJECT)
    assert floor is not None
    assert floor[1] == min(said, key=lambda version: int(version.split(".")[1]))
    assert f'target-version = "py{floor[1].replace(".", "")}"' in PROJECT


def test_the_hooks_are_the_linters_that_are_pinned() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    ruff, local = config["repos"]
    assert ruff["rev"] == f"v{pins('constraints.txt')['ruff']}"
    assert [hook["id"] for hook in ruff["hooks"]] == ["ruff-check", "ruff-format"]
    assert [hook["entry"] for hook in local["hooks"]] == [".venv/bin/mypy"]


def test_the_oldest_versions_are_those_that_are_asked_for() -> None:
    found = re.search(r"^dependencies = \[\n(.*?)^\]", PROJECT, re.MULTILINE | re.DOTALL)
    assert found is not None
    oldest, newest = pins("constraints-oldest.txt"), pins("constraints.txt")
    floors = dict(re.findall(r'"([a-z-]+)(?:\[\w+\])?>=([\d.]+)', found[1]))
    assert set(floors) == set(oldest) - {"transformers"}
    for name, floor in floors.items():
        assert (oldest[name] + ".").startswith(floor + "."), f"{name}: {oldest[name]} is not the oldest of >={floor}"
    assert set(floors) - {"typing-extensions"} <= set(newest)


def test_the_citation_is_of_this_version_and_of_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)
    assert f'version = "{citation["version"]}"' in PROJECT
    assert f'license = "{citation["license"]}"' in PROJECT
    assert f'Repository = "{citation["repository-code"]}"' in PROJECT
    assert f'Documentation = "{citation["url"]}"' in PROJECT
    (paper,) = citation["references"]
    assert paper["url"].endswith("/2605.05683")
    assert [author["family-names"] for author in paper["authors"]] == ["Liu", "Paquette", "Sous"]


@pytest.mark.parametrize("name", ["bug", "question", "feature"])
def test_issue_forms_ask_for_something(name: str) -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    assert {"name", "description", "body"} <= set(form)
    ids = [part["id"] for part in form["body"]]
    assert len(set(ids)) == len(ids)
    assert all(part["attributes"]["label"] for part in form["body"])
    assert any(part.get("validations", {}).get("required") for part in form["body"])
    if name == "bug":
        assert "lightning-spectral probe" in str(form)


SOURCE_TREE = """
import importlib.metadata as metadata

there = metadata.distribution

def not_installed(name):
    if name == "lightning-spectral":
        raise metadata.PackageNotFoundError(name)
    return there(name)

metadata.distribution = not_installed
import lightning_spectral
from lightning_spectral.cli import main

assert lightning_spectral.__version__ == "0+source"
main(["--version"])
"""


def test_a_source_tree_is_imported_without_being_installed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SOURCE_TREE], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "lightning-spectral 0+source\n"
