"""The study of spectra without each group as tables: cost by width, and error bars by method."""

from pathlib import Path
from typing import Any

from benchmarks.findings.tables import show_and_write

NUM_GROUPS = 4
QUANTITIES = {
    "tail": "Tail exponent",
    "head": "Head exponent",
    "RankMe": "RankMe",
    "head share": "Share of the ten largest",
}


def totals(seconds: dict[str, float]) -> dict[str, float]:
    """Seconds for one layer by method, of its steps; products and pairs in float32, as two digits need no more."""
    values, single = seconds["eigvalsh"], seconds["eigvalsh, float32"]
    vectors, product = seconds["eigh"], seconds["product, float32"]
    return {
        "float64": values * (1 + NUM_GROUPS),
        "float32": values + NUM_GROUPS * single,
        # The products of one group follow from the others' and from the eigenvalues of all.
        "first order": vectors + (NUM_GROUPS - 1) * product,
        "first order, a band": vectors + (NUM_GROUPS - 1) * seconds["product of a band"],
        "second order": vectors + NUM_GROUPS * (2 * product + seconds["repulsion, float32"]),
        "float64 with vectors": vectors * (1 + NUM_GROUPS),
        "float32 with vectors": vectors + NUM_GROUPS * (single + seconds["eigh, float32"]),
    }


def write_report(found: dict[str, Any], path: Path) -> None:
    """Print the tables, and write them as Markdown."""
    environment = found["environment"]
    where = found["costs"][0]["device"]
    steps = [
        {"width": str(cost["width"])} | {name: f"{value:.4f}" for name, value in cost["seconds"].items()}
        for cost in found["costs"]
    ]
    layers = []
    for cost in found["costs"]:
        of = totals(cost["seconds"])
        row = {"width": str(cost["width"]), "float64, s": f"{of['float64']:.3f}"}
        row |= {name: f"{of[name] / of['float64']:.2f}" for name in list(of)[1:5]}
        row["float32, with vectors"] = f"{of['float32 with vectors'] / of['float64 with vectors']:.2f}"
        layers.append(row)
    clock = "CPU seconds of one thread" if where == "cpu" else f"seconds on {where}"
    sections: list[tuple[str, Any]] = [
        (f"Spectra without each group for less, {environment['date']}", _told(found)),
        (f"Cost of the steps: {clock}, the least of several rounds", steps),
        ("Cost of a layer with four groups, beside five solves in float64", layers),
        (
            "Largest departure from float64: of the standard error, and of the corrected number in standard errors",
            _largest_departures(found["cells"]),
        ),
        *(
            (f"{title}: stderr, corrected, 80% bars that hold the mean / the truth", _of_quantity(found["cells"], name))
            for name, title in QUANTITIES.items()
        ),
        (
            "Floors of JS, of the overlap lost and of the angle: mean beside that in float64, (pairs of draws beyond)",
            _of_floors(found["cells"]),
        ),
    ]
    show_and_write(sections, "", path)


def _told(found: dict[str, Any]) -> str:
    num_draws = max(cell["num_draws"] for cell in found["cells"])
    return (
        f"{num_draws} draws a cell, {num_draws // 5 // 2 * 2} at d = 768, four groups, 80% intervals. 'float64' solves "
        "every matrix in float64; 'float32' those without a group in float32 where the rule of "
        "`functional/single_precision.py` allows it, at any width; the other two are the infinitesimal jackknife of "
        "`findings/perturbation.py`."
    )


def _largest_departures(cells: list[dict[str, Any]]) -> list[dict[str, str]]:
    """How far each method is from float64 in the worst cell, of few rows and of enough."""
    table = []
    for what, some in (
        ("n/d from 8 on", [cell for cell in cells if cell["ratio"] >= 8]),
        ("n/d of 2 and 4", [cell for cell in cells if cell["ratio"] < 8]),
    ):
        for method in list(cells[0]["methods"])[1:]:
            row = {"rows": what, "method": method}
            for name in QUANTITIES:
                pairs = [(cell["methods"][method][name], cell["methods"]["float64"][name]) for cell in some]
                bar = max((abs(one["stderr"] / right["stderr"] - 1) for one, right in pairs), default=0.0)
                shift = max((abs(one["corrected"] - right["corrected"]) / right["stderr"] for one, right in pairs))
                row[name] = f"{bar:.2%}, {shift:.3f}"
            floors = [
                cell["methods"][method]["js"]["floor"] / cell["methods"]["float64"]["js"]["floor"] for cell in some
            ]
            row["JS floor"] = f"{max(abs(ratio - 1) for ratio in floors):.2%}"
            table.append(row)
    return table


def _of_quantity(cells: list[dict[str, Any]], name: str) -> list[dict[str, str]]:
    table = []
    for cell in cells:
        right = cell["methods"]["float64"][name]
        row = {"rows of": cell["name"], "n/d": str(cell["ratio"]), "in float32": f"{cell['in_float32']:.0%}"}
        row |= {"truth": f"{right['truth']:.4g}", "plain": f"{right['plain']:.4g}", "spread": f"{right['spread']:.2g}"}
        for method, found in cell["methods"].items():
            one = found[name]
            covered = f"{one['coverage_of_mean']:.0%}/{one['coverage_of_truth']:.0%}"
            row[method] = f"{one['stderr']:.2g}, {one['corrected']:.4g}, {covered}"
        table.append(row)
    return table


def _of_floors(cells: list[dict[str, Any]]) -> list[dict[str, str]]:
    table = []
    for cell in cells:
        row = {"rows of": cell["name"], "n/d": str(cell["ratio"])}
        for method, found in cell["methods"].items():
            ratios = [
                f"{found[name]['floor'] / cell['methods']['float64'][name]['floor']:.2f} ({found[name]['beyond']:.0%})"
                for name in ("js", "overlap", "angle")
            ]
            row[method] = ", ".join(ratios)
        table.append(row)
    return table
