"""Imports run one way through the house, so that a part can be read, tested and replaced without those above it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_spectral"

ALLOWED = {
    "functional": set(),
    "metrics": {"functional"},
    "theory": {"functional"},
    "capture": set(),
    "measurement": {"functional", "theory", "metrics", "capture"},
    "boards": set(),
    "documentation": set(),
    "advice": {"documentation", "functional"},
    "terminal": set(),
    "version": set(),
    "warner": set(),
    "runs": {"functional", "theory", "terminal"},
    "reporting": {"advice", "functional", "runs", "terminal", "version"},
    "recording": {"functional", "metrics", "capture", "measurement", "runs", "version", "warner"},
    "callbacks": {
        *("functional", "metrics", "capture", "measurement", "boards"),
        *("runs", "recording", "advice", "documentation", "terminal", "warner"),
    },
    "probing": {"functional", "metrics", "capture", "measurement", "callbacks", "runs", "terminal"},
    "watch": {"functional", "capture", "callbacks"},
    "integrations": {"capture", "callbacks", "warner"},
    "nanogpt": set(),
}
"""What each part may import of ours; `__init__` and the command line may import anything."""

FOREIGN = {
    "functional": {"torch", "scipy"},
    "theory": {"torch"},
    "nanogpt": {"torch", "lightning", "numpy", "rich", "typing_extensions"},
    "boards": {"torch", "numpy", "matplotlib", "wandb", "typing_extensions"},
}
"""Parts that may import only these besides the standard library."""


def imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names if node.module == "lightning_spectral")
    return names


def files_of(part: str) -> list[Path]:
    folder = PACKAGE / part
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_of_ours_run_one_way(part: str) -> None:
    for path in files_of(part):
        ours = {name.split(".")[1] for name in imported_modules(path) if name.startswith("lightning_spectral.")}
        assert ours <= ALLOWED[part] | {part}, f"{path} imports {ours - ALLOWED[part] - {part}}"


@pytest.mark.parametrize("part", FOREIGN)
def test_foreign_imports_are_few(part: str) -> None:
    for path in files_of(part):
        roots = {name.split(".")[0] for name in imported_modules(path)} - {"lightning_spectral"}
        assert roots <= FOREIGN[part] | sys.stdlib_module_names, path


def test_other_frameworks_are_imported_by_their_own_file_alone() -> None:
    importers = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if {name.split(".")[0] for name in imported_modules(path)} & {"transformers", "accelerate"}
    }
    assert importers == {"integrations/transformers.py"}  # which no other part may import, by the table


def test_every_part_is_in_the_table() -> None:
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert parts - {"__init__", "__main__", "cli", "py"} == set(ALLOWED)


IMPORT = """
import sys
import lightning.pytorch, scipy, torch, torchmetrics

# Torchmetrics has it already; is it asked for anew?
for name in [name for name in sys.modules if name.startswith("scipy.stats")]:
    del sys.modules[name]
vars(scipy).pop("stats", None)
import lightning_spectral

assert "scipy.stats" not in sys.modules
lightning_spectral.functional.spearman(torch.arange(4.0), torch.arange(4.0))
assert "scipy.stats" in sys.modules
"""


def test_scipys_statistics_are_imported_by_those_who_need_them() -> None:
    subprocess.run([sys.executable, "-c", IMPORT], cwd=PACKAGE.parent, check=True)
