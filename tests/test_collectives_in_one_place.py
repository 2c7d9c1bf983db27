"""Collectives are called in one module alone: there ranks meet before each, so that a failure leaves none waiting."""

import ast
from pathlib import Path

import lightning_spectral

PLACE = "metrics/collectives.py"
COLLECTIVES = {
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "all_gather_single", "all_to_all",
    "all_to_all_single", "barrier", "broadcast", "broadcast_object_list", "gather", "reduce", "reduce_scatter",
    "scatter",
}  # fmt: skip


def calls(path: Path) -> set[str]:
    """Collectives of torch.distributed that a file names."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute)
        and node.attr in COLLECTIVES
        and isinstance(node.value, ast.Name)
        and node.value.id in ("dist", "distributed")
    }


def test_collectives_are_called_in_one_module() -> None:
    package = Path(lightning_spectral.__file__).parent
    found = {path.relative_to(package).as_posix(): calls(path) for path in package.rglob("*.py")}
    assert {path for path, names in found.items() if names} - {PLACE} == set()
    assert found[PLACE] == {
        *("all_gather_into_tensor", "all_gather_single", "all_reduce", "all_to_all_single", "broadcast_object_list"),
    }
