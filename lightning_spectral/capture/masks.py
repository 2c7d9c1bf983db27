"""Which tokens of a batch are real: what a tensor that a user names means, decided once."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

MASKED_OUT = -1e3
"""Of a mask that is added to attention scores, values up to this one take a token out."""

Meaning = Literal["mask", "labels", "additive", "all"]


class Mask:
    """Reads the tensor under a key of each batch as booleans, True where a token is real.

    What its values mean is decided in the first batch that has any, by the first line that holds:

    - booleans: a mask, True where a token is real;
    - integers, some negative: labels, a token with a negative one is not real;
    - 0 and 1 alone under a name with "mask" in it, integers or floats: a mask (floats that are all 0 are additive);
    - floats that are 0 or at most -1000: additive, as attention takes them, a token with 0 is real;
    - integers under a name with "label" or "target" in it: labels, of which later batches may have negative ones.

    Anything else (numbers of documents, soft weights, 0 and 255) is refused, and so are booleans and 0 and 1 under a
    name with "pad" in it, which mark padding in torch and tokens elsewhere. Later batches whose values cannot mean what
    the first ones' did are refused, too.

    Args:
        key: Of a mapping, attribute of an object, index of a sequence; with dots where they are nested, as in
            ``"inputs.attention_mask"``. Its last part is the name.
        argument: Which gave the key, for error messages.
        counts_ids: Take integers under a name with "token" or "input_ids" in it for tokens, all of them real.
    """

    def __init__(self, key: str, argument: str = "mask", counts_ids: bool = False) -> None:
        self.key = key
        self.argument = argument
        self._counts_ids = counts_ids
        self.meaning: Meaning | None = None
        """Decided by the first values; None for booleans, too."""

    def __call__(self, batch: Any) -> Tensor:
        """Booleans of the shape of the tensor, in memory of their own; ValueError if there are none to be read."""
        value = self._find(batch)
        if not bool(self._fits(value)):
            raise ValueError(
                f"{self.argument} must name what means the same in every batch, got {self.key!r} of {_values(value)}, "
                f"which was read as {self.meaning} before: add to the batch a tensor of booleans, and name that"
            )
        return self._real(value)

    def count(self, batch: Any) -> Tensor:
        """How many tokens are real, 0-dim; NaN where later values cannot be read, so that no GPU has to be waited for.

        ValueError if there is no such tensor, or if the first cannot be read.
        """
        value = self._find(batch)
        exact = torch.float32 if value.device.type == "mps" else torch.float64
        return torch.where(self._fits(value), self._real(value).sum().to(exact), torch.nan)

    def _find(self, batch: Any) -> Tensor:
        value = find(batch, self.key)
        if not isinstance(value, Tensor) or value.ndim == 0:
            held = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(
                f"{self.argument} must name a tensor with axes in the batch, got {self.key!r}: the batch holds {held}"
            )
        if value.dtype == torch.bool:
            self._refuse_padding("booleans")
        elif self.meaning is None and value.numel() > 0:
            # The one look at values that decides.
            self.meaning = self._decide(value)
        return value

    def _fits(self, value: Tensor) -> Tensor:
        """Whether all values can mean what was decided, 0-dim."""
        if value.dtype != torch.bool and self.meaning == "mask":
            return ((value == 0) | (value == 1)).all()
        if value.dtype != torch.bool and self.meaning == "additive":
            return ((value == 0) | (value <= MASKED_OUT)).all()
        return torch.ones((), dtype=torch.bool, device=value.device)

    def _real(self, value: Tensor) -> Tensor:
        if value.dtype == torch.bool:
            return value.clone()  # a step may write to its own
        if self.meaning == "all":
            return torch.ones_like(value, dtype=torch.bool)
        if self.meaning == "labels":
            return value >= 0
        return value > MASKED_OUT if self.meaning == "additive" else value == 1

    def _refuse_padding(self, values: str) -> None:
        if "pad" in self._name:
            raise ValueError(
                f"{self.argument} must say which tokens are real, got {self.key!r} of {values}, which mark padding in "
                f"torch and tokens elsewhere: add to the batch batch['real'] = batch[{self.key!r}] == 0, or == 1, and "
                "name that"
            )

    @property
    def _name(self) -> str:
        return self.key.rpartition(".")[2].lower()

    def _decide(self, value: Tensor) -> Meaning:
        name, is_float = self._name, value.is_floating_point()
        # NaN is neither in any range nor out of it, and refused.
        smallest, largest = float(value.min()), float(value.max())
        is_binary = bool(((value == 0) | (value == 1)).all())
        if not is_float and smallest < 0:
            return "labels"
        if is_binary and "mask" in name and not (is_float and largest == 0):
            self._refuse_padding("0 and 1")
            return "mask"
        if is_float and bool(((value == 0) | (value <= MASKED_OUT)).all()):
            return "additive"
        if not is_float and ("label" in name or "target" in name):
            return "labels"
        if not is_float and self._counts_ids and ("token" in name or "input_ids" in name):
            return "all"
        if is_binary:
            remedy = "call it a mask in the batch, or make it one of booleans"
        else:
            remedy = f"add to the batch a tensor of booleans, batch[{self.key!r}] > 0 for example, and name that"
        raise ValueError(
            f"{self.argument} must name booleans, 0 and 1 under a name with 'mask', labels, or an additive mask, got "
            f"{self.key!r} of {_values(value)}: {remedy}"
        )


def _values(value: Tensor) -> str:
    kind = "floats" if value.is_floating_point() else "integers"
    return f"{kind} from {float(value.min()):g} to {float(value.max()):g}"


def find(batch: Any, key: str) -> Any:
    """What lies under a key in mappings, sequences and attributes, nested by dots; None if nothing does."""
    if (found := _step(batch, key)) is not None:
        return found
    first, *rest = key.split(".")
    # A key may hold dots itself: the longest way to the left comes last.
    for index in range(len(rest)):
        head, tail = ".".join([first, *rest[:index]]), ".".join(rest[index:])
        inner = _step(batch, head)
        if inner is not None and not isinstance(inner, Tensor) and (found := find(inner, tail)) is not None:
            return found
    return None


def _step(part: Any, key: str) -> Any:
    if isinstance(part, Mapping):
        if key in part:
            return part[key]
        return part[int(key)] if key.isdigit() and int(key) in part else None
    if isinstance(part, Sequence) and not isinstance(part, (str, bytes)) and key.isdigit():
        return part[int(key)] if int(key) < len(part) else None
    return getattr(part, key, None) if key.isidentifier() else None


def fit_rows(output: Tensor, mask: Tensor, is_time_first: bool) -> Tensor:
    """An output with its rows in the order of a mask.

    Args:
        output: ``(..., C)``, channels last.
        mask: Boolean, ``(B, ...)``.
        is_time_first: Whether the output is known to have its samples on the second axis.

    Returns:
        A view: as it is, turned where it has time first, or with axes of length one added or left out. If nothing fits,
        as it is.
    """
    rows, shape = tuple(output.shape[:-1]), tuple(mask.shape)
    if len(shape) >= 2 and (shape[1], shape[0], *shape[2:]) == rows and (is_time_first or shape != rows):
        return output.transpose(0, 1)
    if shape != rows and [size for size in shape if size != 1] == [size for size in rows if size != 1]:
        return output.reshape(*shape, output.shape[-1])
    return output
