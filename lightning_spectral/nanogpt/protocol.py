"""Training by tokens rather than batches: how many micro-batches make a step, and how many make a validation run."""

from typing import Any

import lightning.pytorch as pl


def num_batches(argument: str, num_tokens: int, block_size: int, batch_size: int, world_size: int = 1) -> int:
    """Count the batches of each rank that make up a number of tokens on all ranks together.

    For a step it is the `accumulate_grad_batches` that a Trainer needs. ValueError, in the name of the argument, if
    they do not make it up exactly.

    Example:
        >>> num_batches("batch_tokens", 524288, block_size=1024, batch_size=32, world_size=8)
        2
    """
    unit = block_size * batch_size * world_size
    if num_tokens < unit or num_tokens % unit:
        below = num_tokens // unit * unit
        near = f"{below} or {below + unit}" if below else f"{unit}"
        raise ValueError(
            f"{argument} must be a multiple of block_size x batch_size x ranks = {block_size} x {batch_size} x "
            f"{world_size} = {unit}, got {num_tokens}: take {near}"
        )
    return num_tokens // unit


def set_token_budgets(
    trainer: "pl.Trainer", stage: str, batch_tokens: int | None = None, val_tokens: int | None = None
) -> None:
    """Make a Trainer accumulate and validate over given numbers of tokens, whatever the batches and the ranks.

    They are tokens of an optimizer step and of a validation run, on all ranks; None leaves the Trainer's own setting.
    Only the stages fit and validate have such numbers. ValueError if there is no data module with `block_size` and
    `batch_size`, its batches do not make up a number, or the Trainer has a setting of its own.
    """
    attributes = {"batch_tokens": "accumulate_grad_batches", "val_tokens": "limit_val_batches"}
    stages = {"batch_tokens": ("fit",), "val_tokens": ("fit", "validate")}
    # Any: limit_val_batches is not declared on the Trainer
    settings: Any = trainer
    for argument, num_tokens in (("batch_tokens", batch_tokens), ("val_tokens", val_tokens)):
        if num_tokens is None or stage not in stages[argument] or settings.fast_dev_run:
            continue
        data: Any = getattr(trainer, "datamodule", None)
        if not (hasattr(data, "block_size") and hasattr(data, "batch_size")):
            raise ValueError(
                f"{argument} needs a data module that has block_size and batch_size, got "
                f"{type(data).__name__}: set the Trainer's {attributes[argument]} instead"
            )
        number = num_batches(argument, num_tokens, data.block_size, data.batch_size, trainer.world_size)
        given = getattr(trainer, attributes[argument])
        if given not in (1, number):
            raise ValueError(
                f"{argument} sets the Trainer's {attributes[argument]}, got {given} there too: leave it out"
            )
        setattr(settings, attributes[argument], number)


def check_val_tokens(trainer: "pl.Trainer", val_tokens: int | None) -> None:
    """Refuse, with a ValueError, a validation run on fewer tokens, on all ranks, than were asked for."""
    settings: Any = trainer
    if val_tokens is None or settings.fast_dev_run or trainer.sanity_checking:
        return
    found, asked = sum(trainer.num_val_batches), settings.limit_val_batches
    # The last of a loader's batches may be smaller.
    held_out = getattr(settings.datamodule, "num_val_tokens", val_tokens)
    if found < asked or held_out < val_tokens:
        of_batch = val_tokens // asked
        most = min(int(found), held_out // of_batch) * of_batch
        raise ValueError(f"val_tokens must be at most {most}, the whole batches of held-out tokens, got {val_tokens}")
