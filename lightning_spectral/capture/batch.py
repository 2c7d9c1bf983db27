"""What a batch says about itself: its samples and tokens, which of them are real, and parts of it.

**The rule of samples.** A sample is an entry of axis ``batch_dim`` (0 unless said) of every tensor of the batch that
has it. How many there are, and which tensors have the axis, is told from lengths and names:

1. ``input_ids``, wherever it lies in the batch, has its samples on that axis, and says how many.
2. Without it, all tensors of two or more axes must agree on that length; where there are none, those of one axis. Two
   kinds are for all samples and have no say: named tensors of length 1 there, and those whose axes all are as long as
   further axes of another tensor (a causal mask, a table of positions).
3. Every tensor as long on that axis as there are samples has it (one of one axis on its only one); all others are for
   all samples. So are, whatever their length, tensors of one axis under a name with ``class_weight`` in it, and under
   one with ``position`` if they are as long as a further axis (not ``start_positions`` and ``end_positions``, which are
   labels). A tensor that once was seen to be for all samples stays so.
4. NumPy arrays are read like tensors, but have no say in how many samples there are. A list or tuple (named ones are
   none) of as many entries as samples has one for each, unless a tensor or array in it has the axis; of another length
   it is for all samples, and stays so, as it is under the names of the third line. Unless its entries all are strings
   or mappings, it may be as long by chance if it has fewer than 8, or tensors, arrays or further lists of that length
   in them. Until batches of two sizes were as long as it, a step that reads it for some samples alone is refused.

What is left is not guessed: lists of tensors of unequal lengths, loaders of unequal batch sizes, and batches that axis
1 would fit better, as a pair of ``(time, batch)`` and ``(batch,)`` tensors. Such a batch has no known number of
samples: rows of activations then form groups by whole forward passes, and who must cut it refuses it, in the first
batch. ``batch_dim`` or ``samples`` say how it is.
"""

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_spectral.capture.masks import Mask
from lightning_spectral.capture.one_line import shown
from lightning_spectral.capture.unread import Unread

SampleCutter = Callable[[Any], Sequence[Any]]
"""``samples(batch) -> batches of one``, each as ``training_step`` takes it."""

NO_SAMPLES = "the batch holds no tensor with an axis of samples"

FEW = 8
"""Entries of a list, fewer of which may be as many as there are samples by chance: two betas, three colours."""

PARTS = (Tensor, np.ndarray, list, tuple)
"""What can hold samples, or parts that do."""


def tensors(batch: Any) -> Iterator[Tensor]:
    """All tensors of a batch in its own order, through mappings, sequences and attributes of dataclass-like objects."""
    return (tensor for _, tensor in named_tensors(batch))


def named_tensors(batch: Any) -> Iterator[tuple[str, Tensor]]:
    """The same with the way to each: keys, indices and attributes, with dots between."""
    return ((path, part) for path, part, _ in _parts(batch) if isinstance(part, Tensor))


def _parts(batch: Any) -> Iterator[tuple[str, Any, int]]:
    """Tensors, arrays, lists and tuples likewise, with their depth, each before all that it holds."""
    left: list[Iterator[tuple[str, Any]]] = [iter((("", batch),))]
    # Each container once: an object may refer back to one that it is a part of, or be part of many.
    seen: dict[int, Any] = {}
    while left:
        found = next(left[-1], None)
        if found is None:
            left.pop()
            continue
        path, part = found
        if isinstance(part, (Tensor, np.ndarray)):
            yield path, part, len(left)
        elif id(part) not in seen:
            seen[id(part)] = part
            if _is_list(part):
                yield path, part, len(left)
            left.append(iter([(f"{path}.{key}" if path else str(key), inner) for key, inner in _pieces(part)]))


def _pieces(part: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(part, Mapping):
        return part.items()
    if isinstance(part, Sequence) and not isinstance(part, (str, bytes)):
        return zip(getattr(part, "_fields", range(len(part))), part, strict=False)
    if isinstance(part, type):
        return ()
    if is_dataclass(part):
        return ((field.name, getattr(part, field.name)) for field in fields(part))
    return vars(part).items() if hasattr(part, "__dict__") else ()


def _is_list(part: Any) -> bool:
    """Whether a part may have an entry for each sample: named fields and lengths of axes are none."""
    return isinstance(part, (list, tuple)) and not isinstance(part, torch.Size) and not hasattr(part, "_fields")


def _within(parts: list[tuple[str, Any, int]], index: int) -> list[Any]:
    """What one of the parts holds, at whatever depth."""
    end = index + 1
    while end < len(parts) and parts[end][2] > parts[index][2]:
        end += 1
    return [part for _, part, _ in parts[index + 1 : end]]


def _inside(part: Any, make: Callable[[Any], Any]) -> Any:
    """A list or tuple with what is made of the parts in it."""
    parts = [apply_to_collection(one, PARTS, make) for one in part]
    return type(part)(*parts) if hasattr(part, "_fields") else type(part)(parts)


class Place(NamedTuple):
    """Where the samples are in a tensor, an array, a list or a tuple."""

    path: str = ""
    axis: int | None = None
    """None where it is for all samples."""
    doubt: str | None = None
    """Why it may be for all samples though it has an axis."""


@dataclass(frozen=True)
class Cut:
    """A batch of which it is known where its samples are."""

    data: Any
    """The batch, as it came."""
    size: int
    """Samples in it."""
    places: tuple[Place, ...] = ()
    """Of each tensor, array, list and tuple, in the order of :meth:`mapped`."""
    ones: tuple[Any, ...] | None = None
    """Batches of one, where ``samples`` cut it."""
    is_part: bool = False
    """Whether it has fewer samples than came together."""

    def part(self, start: int, stop: int) -> "Cut":
        """The samples from ``start`` to before ``stop``: the same containers around views."""
        if self.ones is not None:
            ones = self.ones[start:stop]
            whole = self.data if len(ones) == self.size else None
            return Cut(ones[0] if len(ones) == 1 else whole, len(ones), ones=ones)

        def take(part: Any, place: Place) -> Any:
            if place.axis is None:
                return part
            if isinstance(part, (Tensor, np.ndarray)):
                return part[(slice(None),) * place.axis + (slice(start, stop),)]
            return type(part)(part[start:stop])

        size = len(range(self.size)[start:stop])
        return Cut(self.mapped(take), size, self.places, is_part=self.is_part or size < self.size)

    def pick(self, indices: Tensor) -> "Cut":
        """The samples of these indices, of a batch that no function cut: the same containers around copies."""

        def take(part: Any, place: Place) -> Any:
            if place.axis is None:
                return part
            if isinstance(part, Tensor):
                return part.index_select(place.axis, indices.to(part.device))
            if isinstance(part, np.ndarray):
                return part.take(indices.numpy(force=True), place.axis)
            return type(part)([part[index] for index in indices.tolist()])

        return Cut(self.mapped(take), len(indices), self.places, is_part=self.is_part or len(indices) < self.size)

    def mapped(self, make: Callable[[Any, Place], Any]) -> Any:
        """The batch with something else for each tensor, and for each array and list that has an axis of samples."""
        places = iter(self.places)

        def enter(part: Any) -> Any:
            place = next(places)
            if isinstance(part, Tensor) or place.axis is not None:
                return make(part, place)
            return part if isinstance(part, np.ndarray) else _inside(part, enter)

        return apply_to_collection(self.data, PARTS, enter)


class Samples:
    """Where the samples of batches are: by the rule of this file, or as a user says.

    Args:
        batch_dim: Axis of samples, from 0; None for 0, unless another would fit better.
        cutter: Cuts a batch into batches of one; then the rule is not asked.
    """

    def __init__(self, batch_dim: int | None = None, cutter: SampleCutter | None = None) -> None:
        self.batch_dim = batch_dim
        self.cutter = cutter
        self.is_said = batch_dim is not None or cutter is not None
        """Whether a user said so."""
        self._shared: set[str] = set()
        """Ways to what is for all samples, as an earlier batch has shown."""
        self._lengths: dict[str, set[int]] = {}
        """Numbers of samples of batches that a list has been as long as, by the way to it."""

    def count(self, batch: Any) -> int | None:
        """Number of samples; None if it cannot be told."""
        if isinstance(batch, Cut):
            return batch.size
        try:
            return self._places(batch)[0] if self.cutter is None else len(self.cutter(batch))
        except Exception:  # whatever a user's function makes of an odd batch
            return None

    def cut(self, batch: Any) -> Cut:
        """A batch ready to be cut into samples; ValueError, naming what settles it, if the rule cannot tell."""
        if isinstance(batch, Cut):
            return batch
        if self.cutter is not None:
            with torch.inference_mode(False):
                ones = self.cutter(batch)
            if not isinstance(ones, Sequence) or isinstance(ones, (str, bytes)):
                raise ValueError(f"samples must return a list of batches of one, got a {type(ones).__name__}")
            return Cut(batch, len(ones), ones=tuple(ones))
        size, by_id = self._places(batch)
        if size is None:
            raise ValueError(f"{NO_SAMPLES}: give samples, a function that cuts it into batches of one")
        reached: list[Any] = []
        places: list[Place] = []

        def enter(part: Any) -> Any:
            reached.append(part)
            places.append(by_id.get(id(part), Place()))
            is_inner = isinstance(part, (list, tuple)) and places[-1].axis is None
            return _inside(part, enter) if is_inner else part

        apply_to_collection(batch, PARTS, enter)
        held = {id(tensor) for tensor in tensors(batch) if by_id[id(tensor)].axis is not None}
        missed = held - {id(part) for part in reached}
        if missed:
            # Whole, it would pass for a part of each sample.
            raise ValueError(
                "batch must hold tensors in mappings, sequences or dataclasses, to be cut without samples=, got a "
                f"{type(batch).__name__}"
            )
        return Cut(batch, size, tuple(places))

    def axes(self, batch: Any) -> dict[str, int | None]:
        """The axis that holds samples in each tensor of a batch, by the way to it, None where it is for all samples.

        Nothing where a function cuts; ValueError if the rule cannot tell.
        """
        if self.cutter is not None:
            return {}
        _, by_id = self._places(batch)
        return {path: by_id[id(tensor)].axis if by_id else None for path, tensor in named_tensors(batch)}

    def others(self, batch: Any) -> dict[str, str]:
        """What becomes of the arrays and lists of a batch, in words, by the way to them; see :meth:`axes`."""
        if self.cutter is not None:
            return {}
        _, by_id = self._places(batch)
        parts = [found for found in _parts(batch) if id(found[1]) in by_id]
        words: dict[str, str] = {}
        end = 0
        for index, (path, part, _) in enumerate(parts):
            if index < end or isinstance(part, Tensor):
                continue
            place, within = by_id[id(part)], _within(parts, index)
            if isinstance(part, np.ndarray):
                where = "for all samples" if place.axis is None else f"on axis {place.axis}"
                words[path] = f"array {part.shape} {where}"
            elif place.axis is not None or not any(by_id[id(one)].axis is not None for one in within):
                end = index + 1 + len(within)
                where = "for all samples" if place.axis is None else "cut with the samples"
                words[path] = f"{type(part).__name__} of {len(part)} {where}"
                if place.doubt is not None:
                    words[path] = f"{type(part).__name__} of {len(part)} refused where it is read: {place.doubt}"
        return words

    def rule(self, batch: Any) -> str:
        """What tells how many samples a batch has, in words."""
        if self.cutter is not None:
            return f"samples={path_of(self.cutter)} cuts"
        axis = "axis 0" if self.batch_dim is None else f"batch_dim={self.batch_dim}"
        return f"{axis}, {_voters(list(named_tensors(batch)), self.batch_dim or 0)[0]}"

    def _places(self, batch: Any) -> tuple[int | None, dict[int, Place]]:
        """Number of samples, and by ``id`` of each tensor, array and list where it holds them."""
        parts = list(_parts(batch))
        found = [(path, part) for path, part, _ in parts if isinstance(part, Tensor)]
        wanted = self.batch_dim or 0
        size = _size(found, wanted)
        if size is None:
            return None, {}
        further = {length for _, t in found if t.ndim > 1 for axis, length in enumerate(t.shape) if axis != wanted}
        axes: dict[int, int | None] = {}
        for path, part, _ in parts:
            if not isinstance(part, (Tensor, np.ndarray)):
                continue
            axis = min(wanted, part.ndim - 1)
            is_shared = axis < 0 or part.shape[axis] != size or (part.ndim > 1 and axis < wanted)
            if is_shared and part.ndim > 0:
                self._shared.add(path)
            is_shared = is_shared or path in self._shared or _is_shared_by_name(path, part, further)
            axes[id(part)] = None if is_shared else axis
        if self.batch_dim is None and (better := _fits_better(found, axes)):
            raise ValueError(better)
        places = {id(part): Place(path, axes.get(id(part))) for path, part, _ in parts}
        return size, places | self._lists(parts, size, axes, further)

    def _lists(
        self, parts: list[tuple[str, Any, int]], size: int, axes: dict[int, int | None], further: set[int]
    ) -> dict[int, Place]:
        """The lists and tuples that hold an entry for each sample, by ``id``; of nested ones the outermost."""
        places: dict[int, Place] = {}
        end = 0
        for index, (path, part, _) in enumerate(parts):
            if index < end or isinstance(part, (Tensor, np.ndarray)):
                continue
            within = _within(parts, index)
            if any(axes.get(id(one)) is not None for one in within):
                continue  # a container of what holds samples itself
            if len(part) != size:
                self._shared.add(path)
            if path in self._shared or _is_shared_by_name(path, part, further):
                continue
            lengths = self._lengths.setdefault(path, set())
            lengths.add(size)
            is_sure = size == 1 or len(lengths) > 1
            places[id(part)] = Place(path, 0, None if is_sure else _doubt(path, part, within))
            end = index + 1 + len(within)
        return places


def _doubt(path: str, part: Sequence[Any], within: list[Any]) -> str | None:
    """Why a list of as many entries as there are samples may be so by chance; None if it is not."""
    if all(isinstance(one, (str, bytes, Mapping)) for one in part):
        return None
    if len(part) >= FEW and not any(isinstance(one, (Tensor, np.ndarray)) or len(one) == len(part) for one in within):
        return None
    return (
        f"samples must say whether the {type(part).__name__} {path or 'batch'} of {len(part)} entries, for as many "
        "samples, is of the samples or for all: give samples, a function that cuts a batch into batches of one, or, if "
        "it is of the samples, make it a tensor or an array"
    )


def _voters(found: list[tuple[str, Tensor]], axis: int) -> tuple[str, list[tuple[str, Tensor]]]:
    """What tells the number of samples, in words, and the tensors that do."""
    if ids := [(path, t) for path, t in found if _name(path) == "input_ids" and t.ndim > axis]:
        return "the length of input_ids", ids
    if many := [(path, t) for path, t in found if t.ndim > max(axis, 1)]:
        return "the length on which tensors of two or more axes agree", many
    return "the length on which tensors of one axis agree", [(path, t) for path, t in found if t.ndim > 0]


def _size(found: list[tuple[str, Tensor]], axis: int) -> int | None:
    """Number of samples by the first two lines of the rule; ValueError where they do not settle it."""
    _, voters = _voters(found, axis)
    # Of a batch of labels alone, say.
    axis = axis if any(t.ndim > axis for _, t in voters) else 0
    lengths = {path: t.shape[axis] for path, t in voters}
    if len(set(lengths.values())) > 1:
        # In a list it may be the shortest of ragged samples.
        lengths = {path: length for path, length in lengths.items() if length != 1 or _name(path).isdigit()}
    further = {path: {n for other, n in enumerate(t.shape) if other != axis} for path, t in voters}
    sizes = {
        lengths[path]
        for path, t in voters
        if path in lengths
        and not any(set(t.shape) <= further[other] for other in lengths if lengths[other] != lengths[path])
    }
    if not lengths:
        return None
    if len(sizes) == 1:
        return sizes.pop()
    shapes = ", ".join(f"{path or 'batch'} {tuple(t.shape)}" for path, t in voters[:4])
    raise ValueError(
        f"batch_dim={axis} must be the axis of samples in all tensors of a batch, got {shapes}: give batch_dim, or "
        "samples, a function that cuts a batch into batches of one"
    )


def _fits_better(found: list[tuple[str, Tensor]], axes: dict[int, int | None]) -> str | None:
    """Why axis 1 is likelier that of samples than axis 0: with it more tensors of one axis are cut."""
    has_ids = any(_name(path) == "input_ids" for path, _ in found)
    many = [(path, t) for path, t in found if t.ndim > 1]
    ones = [(path, t) for path, t in found if t.ndim == 1 and not _is_shared_by_name(path, t, None)]
    if has_ids and not any(word in _name(path) for path, _ in ones for word in ("label", "target")):
        return None
    seconds = {t.shape[1] for _, t in many}
    if len(seconds) != 1 or any(axes[id(t)] is not None for _, t in ones):
        return None
    size = seconds.pop()
    fitting = [(path, t) for path, t in ones if len(t) == size]
    if not fitting or len(fitting) < len(ones):
        return None
    (path, many_axes), (other, one) = many[0], fitting[0]
    return (
        f"batch_dim must say which axis of {path or 'batch'} {tuple(many_axes.shape)} is of samples, for "
        f"{other} {tuple(one.shape)} fits its second: give batch_dim=0 or batch_dim=1"
    )


def _name(path: str) -> str:
    return path.rpartition(".")[2].lower()


def _is_shared_by_name(path: str, part: Any, further: set[int] | None) -> bool:
    name = _name(path)
    if getattr(part, "ndim", 1) != 1:
        return False
    if "class_weight" in name:
        return True
    is_positions = "position" in name and not name.startswith(("start_", "end_"))
    return is_positions and (further is None or len(part) in further)


def load_cutter(samples: SampleCutter | str | None) -> SampleCutter | None:
    """A function that cuts batches, or the one that an import path means; ValueError if nothing can be called."""
    if samples is None or callable(samples):
        return samples
    if isinstance(samples, str):
        module, _, name = samples.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"samples must be a function or its import path, got {shown(samples)}: {' '.join(str(error).split())}"
            ) from None
        if callable(found):
            return found
    raise ValueError(f"samples must be a function that cuts a batch, its import path or None, got {shown(samples)}")


def path_of(function: Callable[..., Any] | None) -> str | None:
    """The import path of a function, for a record; None for none."""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return None if function is None else f"{getattr(function, '__module__', '')}.{name}"


def num_samples(batch: Any) -> int | None:
    """Number of samples by the rule of :mod:`lightning_spectral.capture.batch`; None without, or if it cannot tell."""
    return Samples(0).count(batch)


def cut(batch: Any) -> Cut:
    """A batch ready to be cut by the rule, or as it is if it was before."""
    return Samples(0).cut(batch)


def batch_of(cut: Any) -> Any:
    """The batch of a :class:`Cut`, as a training step takes it; ValueError for several batches of one.

    Of a part of a batch, what may be for all samples must not be read.
    """
    if not isinstance(cut, Cut):
        return cut
    if cut.is_part and any(place.doubt is not None for place in cut.places):
        return cut.mapped(lambda part, place: part if place.doubt is None else Unread(place.doubt, type(part)))
    if cut.data is None and cut.ones is not None:
        raise ValueError("samples cuts batches into batches of one: use method='loop'")
    return cut.data


def token_mask(batch: Any, key: str, argument: str = "mask") -> Tensor:
    """Which tokens of a batch are real, in booleans of the shape of the tensor that ``key`` names.

    See :class:`lightning_spectral.capture.masks.Mask` for what its values mean. ``argument``, which gave the key, is
    named in the ValueError if the batch has no such tensor, or its values can mean anything.
    """
    return Mask(key, argument)(batch)


def hold(batch: Any) -> Any:
    """A batch that stays what it is while others take things out of the original, as some training steps do.

    It has containers of its own (mappings, sequences, dataclasses) around the same tensors; those made in inference
    mode, which no gradient can pass, are copied.
    """
    with torch.inference_mode(False):
        return apply_to_collection(batch, Tensor, lambda tensor: tensor.clone() if tensor.is_inference() else tensor)


def copied(batch: Any) -> Any:
    """A batch with containers and tensors of its own, for whoever writes into either."""
    if isinstance(batch, Cut):
        ones = None if batch.ones is None else tuple(map(copied, batch.ones))
        return replace(batch, data=copied(batch.data), ones=ones)
    return apply_to_collection(batch, (Unread, Tensor), lambda part: part if type(part) is Unread else part.clone())


def take(batch: Any, start: int, stop: int) -> Any:
    """The samples from ``start`` to before ``stop``, as a batch: the same containers around views.

    Of a :class:`Cut` a :class:`Cut`; of a batch, which the rule cuts, a batch. ValueError if it cannot be cut.
    """
    if isinstance(batch, Cut):
        return batch.part(start, stop)
    size = num_samples(batch)
    return batch if size is None or (start, stop) == (0, size) else batch_of(cut(batch).part(start, stop))


def num_tokens(batch: Any, per_sample: int | Mask | str | None = None, samples: Samples | None = None) -> int | Tensor:
    """Number of training tokens in a batch; for a key a tensor, so that no GPU has to be waited for, NaN if it misfits.

    The elements of ``input_ids`` if the batch has it, else of its first integer tensor of two or more axes, else of its
    integer tensors of one axis if they are sequences of unequal lengths, else its number of samples. For batches that
    do not show them ``per_sample`` gives the tokens of each sample, or the key of a tensor to count instead: the ones
    of a mask, the labels that are not negative, all of ``input_ids`` and the like. ValueError if the batch has no
    tensor of that key, or no known number of samples.
    """
    if isinstance(per_sample, str):
        per_sample = Mask(per_sample, "tokens_per_sample", counts_ids=True)
    if isinstance(per_sample, Mask):
        return per_sample.count(batch)
    samples = samples or Samples(0)
    if per_sample is None:
        found = list(tensors(batch))
        if isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), Tensor):
            return batch["input_ids"].numel()
        integers = [tensor for tensor in found if not _has_fractions(tensor)]
        if (many := next((tensor for tensor in integers if tensor.ndim >= 2), None)) is not None:
            return many.numel()
        if integers and len(integers) == len(found) and len({t.shape for t in integers}) > 1:
            return sum(tensor.numel() for tensor in integers)
    size = samples.count(batch)
    if size is None:
        raise ValueError(
            f"batch must hold a tensor with an axis of samples for its tokens to be counted, got a "
            f"{type(batch).__name__}: name a tensor with tokens_per_sample"
        )
    return size if per_sample is None else per_sample * size


def _has_fractions(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool


def checksum(batch: Any, limit: int) -> int:
    """Checksum of the first ``limit`` samples of a batch, whatever batches they come in.

    It is the sum of a CRC-32 per sample: of two batches one after the other the sum of theirs. ValueError if the batch
    cannot be cut into samples.
    """
    whole = cut(batch)
    total = 0
    for index in range(min(limit, whole.size)):
        sample = whole.part(index, index + 1).data
        code = 0
        for tensor in tensors(sample):
            # The data are the same in whatever precision a run takes them.
            exact = tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
            code = crc32(exact.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes(), code)
        total += code
    return total
