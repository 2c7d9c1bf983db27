"""Records of runs that never were, whose losses and spectra are known exactly."""

from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from math import nan
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from lightning_spectral.runs import Record, Row

LAYER = "gpt.blocks.3"
SETTINGS = {
    "kind": "activation",
    "stage": "validate",
    "layers": [LAYER],
    "num_tokens": 64,
    "normalize": True,
    "mask": None,
    "dataloader_idx": 0,
    "fingerprint": "a1",
}


def when(hours: float, machine: str | None = "a", device: str = "cpu") -> dict[str, Any]:
    """What a record says of when and where a run trained, hours after the first of them; no machine as of old ones."""
    start = datetime(2026, 11, 2, 9, tzinfo=timezone.utc) + timedelta(hours=hours)
    machines = {} if machine is None else {"machines": [machine]}
    return {"started": start.isoformat(), "device": device, **machines}


def made_up(
    folder: Path,
    tokens: float,
    seconds: float,
    exponent: float = 1.0,
    family: str = "F",
    layer: str = LAYER,
    batch_tokens: float = 64.0,
    data: str | None = "a1",
    loss: str = "val_loss",
    num_positive: int = 32,
    about: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """A run that comes down to loss 1 at a number of tokens and of seconds, its spectrum a power law.

    Args:
        folder: Its log directory.
        tokens: At loss 1; it ends at twice as many.
        seconds: At loss 1.
        exponent: Of its eigenvalues.
        family: Its own.
        layer: The one that was measured.
        batch_tokens: Tokens of a step.
        data: Fingerprint of the validation data; None as of old records, which say none.
        loss: Key that its validation loss was logged under.
        num_positive: Eigenvalues above the rounding of float32.
        about: What else its record says of it.
        settings: Of its measurement, where they differ.
    """
    settings = SETTINGS | {"layers": [layer]} | settings
    series = {"activation-validate": settings}
    facts = {"id": str(folder), "family": family, "series": series, "batch_tokens": batch_tokens}
    facts |= {"validation_data": {} if data is None else {"0": data}, "val_loss": loss, **(about or {})}
    record = Record.begin(folder / "spectra", facts)
    ranks = np.arange(1, 33.0)
    eigenvalues = np.where(num_positive >= ranks, ranks**-exponent, 0.0)
    generator = np.random.default_rng(crc32(folder.name.encode()))
    points = [(0.25, 2.0), (0.5, 1.5), (0.75, 1.2), (1.0, 1.0), (1.5, 0.7), (2.0, 0.5)]
    for step, (share, loss) in zip(range(100, 700, 100), points, strict=True):
        record.append(Row(step, share * tokens, share * seconds, nan, loss))
        noise = 1 + 0.001 * generator.standard_normal((4, 32))
        arrays = {
            "tokens": np.asarray(share * tokens),
            f"activation/{layer}/eigenvalues": eigenvalues,
            f"activation/{layer}/leave_one_out": eigenvalues * noise,
            f"activation/{layer}/dtype": np.asarray("float32"),
            f"activation/{layer}/num_tokens": np.asarray(settings["num_tokens"]),
            f"activation/{layer}/num_rows_without": np.asarray(settings["num_tokens"] * 3 // 4),
        }
        record.write_report("activation-validate", step, arrays)
    return folder
