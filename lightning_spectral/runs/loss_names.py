"""The usual names of losses, by which records and logs know which of the metrics is the loss."""

import re
from collections.abc import Iterable

VALIDATION = "val|valid|validation|eval|evaluation|dev"
"""What validation is called, in the order in which names are preferred."""
_TRAINING = "train|training"

OF_VALIDATION = re.compile(rf"(^|[/_. -])({VALIDATION})([/_. -]|$)", re.IGNORECASE)

LOSS_OF_VALIDATION = re.compile(
    rf"(({VALIDATION})[/_. -]?loss|loss[/_. -]({VALIDATION}))([/_. -]epoch)?", re.IGNORECASE
)
"""``val_loss``, ``val/loss``, ``valid_loss``, ``eval_loss``, ``loss/val`` and the like."""

_LOSS_OF_TRAINING = re.compile(
    rf"(({_TRAINING})[/_. -]?loss|loss[/_. -]({_TRAINING})|loss)(?P<part>[/_. -](epoch|step))?", re.IGNORECASE
)


def rank(name: str) -> tuple[int, int]:
    """Where a name stands among the usual ones: by what validation is called, then the shape of the name."""
    words = re.findall(r"[a-z]+", name.lower())
    called = VALIDATION.split("|")
    return min((called.index(word) for word in words if word in called), default=len(called)), len(words)


def is_of_training(key: str) -> bool:
    """Whether a name says that it is of training."""
    return re.search(r"(^|[/_. -])train(ing)?([/_. -]|$)", key, re.IGNORECASE) is not None


def loss_of_validation(names: Iterable[str]) -> str | None:
    """The first of some names that are usual for the loss of validation; None without one."""
    usual = [name for name in names if LOSS_OF_VALIDATION.fullmatch(name)]
    return min(usual, key=lambda name: (rank(name), "_" not in name, name), default=None)


def loss_of_training(names: Iterable[str]) -> str | None:
    """That of training: ``train_loss``, ``train/loss``, ``loss`` and the like; means over an epoch before single steps.

    None without one.
    """
    usual = {name: match for name in names if (match := _LOSS_OF_TRAINING.fullmatch(name))}

    def preference(name: str) -> tuple[bool, bool, int, str]:
        part = (usual[name]["part"] or "").lower()
        return not is_of_training(name), part.endswith("step"), len(name), name

    return min(usual, key=preference, default=None)


def is_usual_of_training(name: str) -> bool:
    """Whether a name is usual for the loss of training, or says that it is of training."""
    return _LOSS_OF_TRAINING.fullmatch(name) is not None or is_of_training(name)
