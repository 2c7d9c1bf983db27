"""Records of runs that never were, of which losses and spectra are given, for the analyses of the studies."""

from collections.abc import Callable, Mapping, Sequence
from math import nan
from pathlib import Path
from typing import Any

import numpy as np

from lightning_spectral.runs import Record, Row

NUM_ROWS = 1024


Spectra = Callable[[str, float], np.ndarray]
"""Values of a layer or parameter at a number of tokens."""


def plant(
    folder: Path,
    points: Sequence[tuple[float, float]],
    spectra: Spectra,
    layers: Sequence[str],
    batch_tokens: float,
    gradients: Spectra | None = None,
    pace: float = 1e3,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Write the record of a run.

    Args:
        folder: Its log directory.
        points: Tokens and validation loss of each report.
        spectra: Eigenvalues ``(width,)`` of layers.
        layers: That were measured.
        batch_tokens: Of a step.
        gradients: Singular values ``(n,)`` of a parameter of each layer; None for none.
        pace: Tokens a second.
        about: What else its record says of it.

    Returns:
        The folder.
    """
    of_kinds = {"activation": (spectra, list(layers), "eigenvalues", "num_tokens")}
    series: dict[str, Any] = {"activation-validate": {"stage": "validate", "layers": list(layers)}}
    if gradients is not None:
        parameters = [f"{layer}.out.weight" for layer in layers]
        of_kinds["gradient"] = gradients, parameters, "singular_values", "num_samples"
        series["gradient-validate"] = {"stage": "validate", "parameters": parameters, "num_samples": NUM_ROWS}
    facts = {"id": str(folder), "family": "F", "series": series, "batch_tokens": batch_tokens}
    record = Record.begin(folder / "spectra", facts | dict(about or {}))
    tilts = 1e-3 * np.array([-1, 1, -2, 2])[:, None]
    for tokens, loss in points:
        step = round(tokens / batch_tokens)
        record.append(Row(step, tokens, tokens / pace, nan, loss))
        for kind, (values_at, names, field, count) in of_kinds.items():
            arrays = {"tokens": np.asarray(tokens)}
            for name in names:
                values, start = values_at(name, tokens), f"{kind}/{name}"
                tilted = np.sort(values * np.arange(1, len(values) + 1) ** tilts)[:, ::-1]
                arrays |= {f"{start}/{field}": values, f"{start}/leave_one_out": tilted}
                arrays |= {f"{start}/dtype": np.asarray("float64"), f"{start}/{count}": np.asarray(NUM_ROWS)}
            record.write_report(f"{kind}-validate", step, arrays)
    return folder


def broken(tail: float, head: float = 1.0, width: int = 64) -> np.ndarray:
    """Eigenvalues ``(width,)`` of two power laws that meet at an eighth of the ranks."""
    ranks = np.arange(1, width + 1.0)
    corner = width // 8
    return np.where(ranks < corner, ranks**-head, corner**-head * (ranks / corner) ** -tail)
