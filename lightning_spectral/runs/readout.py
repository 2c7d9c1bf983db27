"""What a record keeps of a model's last layer, read back."""

from collections.abc import Mapping
from typing import Any

from lightning_spectral.functional.arguments import to_count, to_tensor
from lightning_spectral.theory import Readout

_PART = "readout/"


def read_readout(arrays: Mapping[str, Any]) -> Readout:
    """The readout of the one head in the arrays of a report.

    Raises:
        ValueError: If a field is missing, or of another type or shape, naming it.
    """
    names = {key.removeprefix(_PART).rpartition("/")[0] for key in arrays if key.startswith(_PART)}
    if len(names) != 1:
        raise ValueError(f"it must hold one head, got {len(names)}")
    start = f"{_PART}{names.pop()}/"
    values, power = (to_tensor(name, arrays[start + name]) for name in ("eigenvalues", "task_power"))
    if values.ndim != 1 or values.shape != power.shape:
        raise ValueError(f"eigenvalues and task_power must be vectors of one length, got {values.shape}, {power.shape}")
    failure = str(arrays[start + "failure"]) or None
    return Readout(
        values,
        power,
        float(arrays[start + "loss"]),
        to_count("num_tokens", arrays[start + "num_tokens"]),
        failure,
    )
