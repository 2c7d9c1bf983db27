"""The notebook holds what it prints and draws, and runs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

from tests.examples.running import ROOT

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(notebook: NotebookNode) -> list[set[str]]:
    """What each cell gave: text, tables, pictures; how many is up to what moved."""
    return [
        {name for output in cell.outputs for name in output.get("data", [output.output_type])}
        for cell in code(notebook)
    ]


@pytest.fixture(scope="module")
def stored() -> NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_was_run_from_top_to_bottom(stored: NotebookNode) -> None:
    nbformat.validate(stored)
    assert [cell.execution_count for cell in code(stored)] == list(range(1, 1 + len(code(stored))))
    outputs = [output for cell in code(stored) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert sum("image/png" in kind for kind in kinds(stored)) >= 2


def test_it_is_light_and_of_no_machine(stored: NotebookNode) -> None:
    assert NOTEBOOK.stat().st_size < 400_000
    for cell in code(stored):
        for output in cell.outputs:
            text = output.get("text", "") + str(
                [x for name, x in output.get("data", {}).items() if "image" not in name]
            )
            assert not [part for part in ("/work", "/tmp", "/home", "/root", "site-packages") if part in text]


def test_it_runs(stored: NotebookNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # this tree's package, whichever is installed
    text = nbformat.writes(stored)
    assert text.count("num_steps = 200") == 1
    notebook = nbformat.reads(text.replace("num_steps = 200", "num_steps = 10"), as_version=4)
    for cell in code(notebook):
        cell.outputs, cell.execution_count = [], None
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert kinds(notebook) == kinds(stored)
