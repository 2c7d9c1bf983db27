"""What the record of a run says of it: what the user said, and what can be seen of model, Trainer and machine."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_spectral.functional.arguments import describe, is_one_line
from lightning_spectral.measurement.arguments import MAX_COUNT
from lightning_spectral.recording.family import describe_model, describe_setting, family_name
from lightning_spectral.runs.record import FOLDER
from lightning_spectral.version import __version__


@dataclass(frozen=True)
class Notes:
    """What a user says of a run beyond what can be seen of it.

    Args:
        family: Name that comparable runs share; None for one made of the model's class and configuration.
        tags: Anything JSON-like, by name.
        tokens_per_sample: See :func:`lightning_spectral.capture.batch.num_tokens`.
        loss: Key of the validation loss; None for the rule of thumb.
        vectors: Whether eigenvectors are kept.
        upload: Whether the record goes up to loggers that take artifacts.
        enabled: Whether there is to be a record.

    Raises:
        ValueError: Naming the argument that a record could not hold.
    """

    family: str | None = None
    tags: Mapping[str, Any] = field(default_factory=dict)
    tokens_per_sample: int | str | None = None
    loss: str | None = None
    vectors: bool = True
    upload: bool = False
    enabled: bool = True

    def __post_init__(self) -> None:
        for name, text in (("family", self.family), ("loss", self.loss)):
            if not (text is None or (is_one_line(text) and text)):
                raise ValueError(
                    f"{name} must be a name of one line, or None for that of the rule, got {describe(text)}"
                )
        if not (isinstance(self.tags, Mapping) and all(isinstance(key, str) for key in self.tags)):
            raise ValueError(f"tags must be a dictionary with names as keys, got {describe(self.tags)}")
        tokens = self.tokens_per_sample
        is_count = isinstance(tokens, int) and not isinstance(tokens, bool) and 0 < tokens <= MAX_COUNT
        if not (tokens is None or is_count or (isinstance(tokens, str) and tokens)):
            raise ValueError(
                f"tokens_per_sample must be a positive int, a key of the batch or None, got {describe(tokens)}"
            )
        for name in ("vectors", "upload", "enabled"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {describe(getattr(self, name))}")
        try:
            json.dumps(dict(self.tags))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"tags must hold what JSON can, got {describe(self.tags)}: {error}") from error


def describe_run(
    module: nn.Module,
    notes: Notes,
    *,
    optimizers: Sequence[Any],
    datamodule: Any,
    accumulate_grad_batches: int | None,
    world_size: int,
    precision: str,
    device: torch.device,
    seed: int | None,
) -> dict[str, Any]:
    """What there is to say of a run before its first step: JSON-like facts by name.

    When and where it started say what its seconds may be compared with (``runs/sessions.py``), its setting of which
    others it is a seed (``runs/settings.py``).
    """
    model = describe_model(module)
    is_cuda = device.type == "cuda"
    return {
        "family": notes.family or family_name(model),
        "tags": dict(notes.tags),
        "model": model,
        "setting": describe_setting(module, datamodule, optimizers),
        "started": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        "machines": [platform.node()],
        "accumulate_grad_batches": accumulate_grad_batches,
        "world_size": world_size,
        "precision": precision,
        "device": torch.cuda.get_device_name(device) if is_cuda else device.type,
        "seed": seed,
        "versions": {
            "python": platform.python_version(),
            "lightning-spectral": __version__,
            **{name: _version(name) for name in ("lightning", "torch")},
        },
    }


def global_seed() -> int | None:
    """The seed that Lightning's ``seed_everything`` has set last, in this process or in the one that began it."""
    seed = os.environ.get("PL_GLOBAL_SEED", "")
    return int(seed) if seed.isdigit() else None


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except ModuleNotFoundError:  # lightning.pytorch is also shipped as pytorch-lightning
        return None


def record_folder(loggers: Sequence[Any], root: str | Path) -> Path:
    """Where the record of a run belongs: in the log directory of the first logger, on the rank that knows it.

    ``root`` is where it belongs without loggers, and where loggers without a directory of their own save.
    """
    if not loggers:
        return Path(root) / FOLDER
    logger = loggers[0]
    if (log_dir := getattr(logger, "log_dir", None)) is not None:
        return Path(log_dir) / FOLDER
    # Without a directory for each run, as Lightning's ModelCheckpoint does.
    run = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir or root) / str(logger.name) / run / FOLDER
