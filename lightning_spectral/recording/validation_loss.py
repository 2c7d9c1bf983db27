"""Which of the metrics of a validation run is its loss, and what it is over all ranks."""

import re
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import torch

from lightning_spectral.metrics.collectives import Together, world_size
from lightning_spectral.metrics.exchange import sum_over_ranks
from lightning_spectral.runs.loss_names import LOSS_OF_VALIDATION, OF_VALIDATION, is_of_training, rank

SAME_LOSS = 1e-10
"""Variance over ranks, relative to the square of the mean, that is rounding."""

_LOADER = re.compile(r"/dataloader_idx_(\d+)$")


def validation_loss(metrics: Mapping[str, Any], loader: int, monitored: Sequence[str] = ()) -> str | None:
    """Key of the loss of a validation run, of the loader that is measured; None if none is known to be it.

    ``val_loss``, ``val/loss``, ``valid_loss``, ``eval_loss``, ``loss/val`` and the like, in this order; else the one
    metric of validation that is ``monitored``, or of several the one that is called a loss. Never a guess among others.
    """
    plain = {key: _LOADER.sub("", key) for key in metrics if _loader_of(key) in (None, loader)}
    usual = [key for key, name in plain.items() if LOSS_OF_VALIDATION.fullmatch(name)]
    if usual:
        # Of two loaders' losses and their mean the loader's own.
        return min(usual, key=lambda key: (_loader_of(key) is None, rank(plain[key]), key))
    watched = [key for key in dict.fromkeys(monitored) if key in plain and not is_of_training(key)]
    losses = [key for key in watched if "loss" in key.lower()]
    return next((found[0] for found in (losses, watched) if len(found) == 1), None)


def loss_candidates(metrics: Mapping[str, Any]) -> list[str]:
    """Metrics that may be the validation loss: called losses, if any are, and of validation."""
    of_validation = [key for key in metrics if OF_VALIDATION.search(_LOADER.sub("", key))]
    return [key for key in of_validation if "loss" in key.lower()] or of_validation


def _loader_of(key: str) -> int | None:
    found = _LOADER.search(key)
    return None if found is None else int(found[1])


def mean_over_ranks(
    loss: float | None, weight: float, together: Together, device: torch.device
) -> tuple[float | None, bool]:
    """The loss of all ranks' samples, of which each rank may have logged that of its own alone; a collective.

    Args:
        loss: What this rank has logged; None for nothing.
        weight: Samples that it is of; NaN where they are not known, which makes all ranks weigh the same.
        together: Attempts of all ranks.
        device: Where the process group can reduce.

    Returns:
        The loss, None where no rank has one and no finite number where a rank has none, and whether it is a mean over
        ranks that had logged different ones.
    """
    if world_size() == 1:
        return loss, False
    own, weight = (0.0, 0.0) if loss is None else (loss, weight)
    sent = torch.tensor([loss is not None, own, own**2, weight, weight * own], dtype=torch.float64)
    number, total, squares, weights, weighted = together.attempt(lambda: sum_over_ranks(sent.to(device)).tolist())
    if not number:
        return None, False
    mean = total / number
    if not isfinite(mean):  # whichever rank's it is
        return mean, False
    if squares / number - mean**2 <= SAME_LOSS * mean**2:
        return mean if loss is None else loss, False
    return weighted / weights if weights > 0 else mean, True
