"""Records of runs that never were, of which losses and spectra are given, for the analyses of the studies."""

from collections.abc import Callable, Mapping, Sequence
from math import nan
from pathlib import Path
from typing import Any

import numpy as np

from lightning_spectral.runs import Record, Row

NUM_ROWS = 1024


def plant(
    folder: Path,
    points: Sequence[tuple[float, float]],
    spectra: Callable[[str, float], np.ndarray],
    layers: Sequence[str],
    batch_tokens: float,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Write the record of a run.

    Args:
        folder: Its log directory.
        points: Tokens and validation loss of each report.
        spectra: Eigenvalues ``(width,)`` of a layer at a number of tokens.
        layers: That were measured.
        batch_tokens: Of a step.
        about: What else its record says of it.

    Returns:
        The folder.
    """
    series = {"activation-validate": {"kind": "activation", "stage": "validate", "layers": list(layers)}}
    facts = {"id": str(folder), "family": "F", "series": series, "batch_tokens": batch_tokens}
    record = Record.begin(folder / "spectra", facts | dict(about or {}))
    scale = 1 + 1e-3 * np.array([-1, 1, -2, 2])[:, None]
    for tokens, loss in points:
        step = round(tokens / batch_tokens)
        record.append(Row(step, tokens, tokens / 1e3, nan, loss))
        arrays = {"tokens": np.asarray(tokens)}
        for layer in layers:
            values, start = spectra(layer, tokens), f"activation/{layer}"
            tilted = values * np.arange(1, len(values) + 1) ** (scale - 1)
            arrays |= {f"{start}/eigenvalues": values, f"{start}/leave_one_out": tilted}
            arrays |= {f"{start}/dtype": np.asarray("float64"), f"{start}/num_tokens": np.asarray(NUM_ROWS)}
        record.write_report("activation-validate", step, arrays)
    return folder


def broken(tail: float, head: float = 1.0, width: int = 64) -> np.ndarray:
    """Eigenvalues ``(width,)`` of two power laws that meet at an eighth of the ranks."""
    ranks = np.arange(1, width + 1.0)
    corner = width // 8
    return np.where(ranks < corner, ranks**-head, corner**-head * (ranks / corner) ** -tail)
