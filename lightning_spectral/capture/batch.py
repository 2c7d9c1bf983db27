"""What a batch says about itself: its samples and tokens, which of them are real, and parts of it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from zlib import crc32

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

IGNORE_INDEX = -100
"""The label that cross entropy skips, by PyTorch's convention."""


def tensors(batch: Any) -> Iterator[Tensor]:
    """All tensors of a batch in its own order, through mappings, sequences and attributes of dataclass-like objects."""
    left: list[Iterator[Any]] = [iter((batch,))]
    # Each container once: an object may refer back to one that it is a part of, or be part of many.
    seen: dict[int, Any] = {}
    while left:
        part = next(left[-1], left)
        if part is left:
            left.pop()
        elif isinstance(part, Tensor):
            yield part
        elif id(part) not in seen:
            seen[id(part)] = part
            left.append(iter(_pieces(part)))


def _pieces(part: Any) -> Iterable[Any]:
    if isinstance(part, Mapping):
        return part.values()
    if isinstance(part, Sequence) and not isinstance(part, (str, bytes)):
        return part
    return vars(part).values() if hasattr(part, "__dict__") and not isinstance(part, type) else ()


def num_samples(batch: Any) -> int | None:
    """Number of samples: first axis of ``input_ids`` if there, else of the first tensor with axes; None without."""
    if isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), Tensor):
        return len(batch["input_ids"])
    return next((len(tensor) for tensor in tensors(batch) if tensor.ndim > 0), None)


def token_mask(batch: Any, key: str, argument: str = "mask") -> Tensor:
    """Which tokens of a batch are real, in booleans of the shape of the tensor that ``key`` names.

    The batch is a mapping, or an object with attributes; the tensor a mask with 1 where a token is real, or labels with
    -100 where a token is not. ``argument``, which gave the key, is named in the ValueError if the batch has no such
    tensor, or it has no axes.
    """
    value = batch.get(key) if isinstance(batch, Mapping) else getattr(batch, key, None)
    if not isinstance(value, Tensor) or value.ndim == 0:
        held = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(f"{argument} must name a tensor with axes in the batch, got {key!r}: the batch holds {held}")
    if value.dtype == torch.bool:
        return value
    # A mask holds nothing but 0 and 1; anything else are labels. Decided where the tensor lies: no GPU has to wait.
    is_mask = ((value == 0) | (value == 1)).all()
    return torch.where(is_mask, value == 1, value != IGNORE_INDEX)


def hold(batch: Any) -> Any:
    """A batch that stays what it is while others take things out of the original, as some training steps do.

    It has containers of its own (mappings, sequences, dataclasses) around the same tensors; those made in inference
    mode, which no gradient can pass, are copied.
    """
    with torch.inference_mode(False):
        return apply_to_collection(batch, Tensor, lambda tensor: tensor.clone() if tensor.is_inference() else tensor)


def take(batch: Any, start: int, stop: int) -> Any:
    """The samples from ``start`` to before ``stop``, as a batch: the same containers around views.

    The batch is tensors in mappings, sequences and dataclasses. Those whose first axis is as long as there are samples
    are cut; others (positions for all, say) stay whole. Of some other object a part cannot be had: ValueError.
    """
    size = num_samples(batch)
    found: list[Tensor] = []

    def cut(tensor: Tensor) -> Tensor:
        if not has_samples(tensor, size):
            return tensor
        found.append(tensor)
        return tensor[start:stop]

    part = apply_to_collection(batch, Tensor, cut)
    if size is not None and not found and (start, stop) != (0, size):
        # Whole, it would pass for a sample.
        raise ValueError(
            f"batch must hold tensors in mappings, sequences or dataclasses, to be cut, got a {type(batch).__name__}"
        )
    return part


def has_samples(tensor: Tensor, size: int | None) -> bool:
    """Whether the first axis of a tensor counts the samples of its batch, of which there are ``size``."""
    return tensor.ndim > 0 and len(tensor) == size


def num_tokens(batch: Any, per_sample: int | str | None = None) -> int | Tensor:
    """Number of training tokens in a batch; for a key a tensor, so that no GPU has to be waited for.

    The elements of ``input_ids`` if the batch has it, else of its first integer tensor of two or more axes, else its
    number of samples. For batches that do not show them ``per_sample`` gives the tokens of each sample, or the key of a
    tensor to count instead: the ones of a mask, the labels that are not -100, or else all elements. ValueError if the
    batch has no tensor of that key, or no samples.
    """
    if isinstance(per_sample, str):
        return token_mask(batch, per_sample, "tokens_per_sample").sum()
    size = num_samples(batch)
    if size is None:
        raise ValueError(
            f"batch must hold a tensor with an axis of samples for its tokens to be counted, got a "
            f"{type(batch).__name__}: name a tensor with tokens_per_sample"
        )
    if per_sample is not None:
        return per_sample * size
    if isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), Tensor):
        return batch["input_ids"].numel()
    integers = (tensor for tensor in tensors(batch) if tensor.ndim >= 2 and not _has_fractions(tensor))
    return next((tensor.numel() for tensor in integers), size)


def _has_fractions(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool


def checksum(batch: Any, limit: int) -> int:
    """Checksum of the first ``limit`` samples of a batch, whatever batches they come in.

    It is the sum of a CRC-32 per sample: of two batches one after the other the sum of theirs. ValueError if the batch
    cannot be cut into samples.
    """
    total = 0
    for index in range(min(limit, num_samples(batch) or 0)):
        sample = take(batch, index, index + 1)
        code = 0
        for tensor in tensors(sample):
            # The data are the same in whatever precision a run takes them.
            exact = tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
            code = crc32(exact.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes(), code)
        total += code
    return total
