"""What the record of a run says of it: what the user said, and what can be seen of model, Trainer and machine."""

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_spectral.capture.family import describe_model, family_name


class RunNotes(NamedTuple):
    """What a user says of a run beyond what can be seen of it."""

    family: str | None = None
    tags: Mapping[str, Any] = {}
    tokens_per_sample: int | str | None = None


def check_notes(family: str | None, tags: Mapping[str, Any] | None, tokens_per_sample: int | str | None) -> RunNotes:
    """Refuse notes that a record could not hold.

    Args:
        family: Name that comparable runs share; None for the one made of the model's class and configuration.
        tags: Anything JSON-like, by name.
        tokens_per_sample: See :func:`lightning_spectral.capture.batch.num_tokens`.

    Returns:
        The notes.

    Raises:
        ValueError: Naming the argument.
    """
    if not (family is None or (isinstance(family, str) and family)):
        raise ValueError(f"family must be a name, or None for that of the model, got {family!r}")
    if not (tags is None or (isinstance(tags, Mapping) and all(isinstance(key, str) for key in tags))):
        raise ValueError(f"tags must be a dictionary with names as keys, got {tags!r}")
    is_count = isinstance(tokens_per_sample, int) and not isinstance(tokens_per_sample, bool) and tokens_per_sample > 0
    if not (tokens_per_sample is None or is_count or isinstance(tokens_per_sample, str)):
        raise ValueError(
            f"tokens_per_sample must be a positive int, a key of the batch or None, got {tokens_per_sample!r}"
        )
    try:
        json.dumps(tags)
    except (TypeError, ValueError) as error:
        raise ValueError(f"tags must hold what JSON can, got {tags!r}: {error}") from error
    return RunNotes(family, dict(tags or {}), tokens_per_sample)


def agreed_notes(all_notes: Sequence[RunNotes]) -> RunNotes:
    """What several callbacks say of one run, together.

    Args:
        all_notes: Of each.

    Returns:
        What any of them says.

    Raises:
        ValueError: If one says something else than another.
    """
    said: dict[str, Any] = {}
    for notes in all_notes:
        words = {"family": notes.family, "tokens_per_sample": notes.tokens_per_sample}
        words |= {f"tags[{key!r}]": value for key, value in notes.tags.items()}
        for name, value in words.items():
            before = said.get(name)
            if before is not None and value is not None and before != value:
                raise ValueError(
                    f"{name} must be the same in all callbacks of a Trainer, got {before!r} and {value!r}: give it once"
                )
            said[name] = value if before is None else before
    tags = {key: value for notes in all_notes for key, value in notes.tags.items()}
    return RunNotes(said.get("family"), tags, said.get("tokens_per_sample"))


def describe_run(trainer: Trainer, pl_module: LightningModule, notes: RunNotes) -> dict[str, Any]:
    """What there is to say of a run before its first step.

    Args:
        trainer: The Trainer.
        pl_module: The module that is trained.
        notes: What the user says.

    Returns:
        JSON-like facts by name.
    """
    model = describe_model(pl_module)
    is_cuda = pl_module.device.type == "cuda"
    seed = os.environ.get("PL_GLOBAL_SEED", "")
    names = ("lightning-spectral", "lightning", "torch")
    return {
        "family": notes.family or family_name(model),
        "tags": notes.tags,
        "model": model,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "world_size": trainer.world_size,
        "precision": str(trainer.precision),
        "device": torch.cuda.get_device_name(pl_module.device) if is_cuda else pl_module.device.type,
        "seed": int(seed) if seed.isdigit() else None,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in names}},
    }


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except ModuleNotFoundError:  # lightning.pytorch is also shipped as pytorch-lightning
        return None
