"""What a loss can reach, noted as it is and put back: tensors, containers, attributes, generators, in place."""

import collections
import functools
import pickle
import random
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from lightning_spectral.capture.large import ROOM, Large
from lightning_spectral.capture.reachable import (
    BARE,
    MANY,
    MISSING,
    PLAIN,
    children_of,
    content_of,
    is_iterator,
    is_opaque,
    is_others,
    is_trainer,
    is_users,
    named_globals,
    slots_of,
    value_in,
)

GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)

NEAREST = 1_000
"""How many objects are noted of what a loss asks of training by one name: a datamodule may lead to all the data."""

PutBack = Callable[[], bool]
"""Puts one thing back as it was; tells whether it had been changed."""


class Kept:
    """All that can be reached from some roots, as it is now, to be put back after a loss was asked for.

    Followed are containers, attributes, slots, closures, defaults, partials, bound objects, and, through functions and
    classes of the user's own, the globals that their code names. What a library keeps to itself is not.

    Args:
        roots: Where to begin: a shadow, a loss function, a batch.
        originals: What each object of a copy was copied from, by the copy's id: the memory of the original does for a
            tensor's, and a copy need not be put back in the end.
        stops: Objects, by class, that are not followed.
        left_out: Objects that are not.

    Raises:
        ValueError: If a Python iterator is among it that cannot be put back: any that is no copy, and a copy that does
            not keep in attributes how far it is.
    """

    def __init__(
        self,
        roots: Iterable[Any],
        originals: Mapping[int, Any] | None = None,
        stops: tuple[type, ...] = (),
        left_out: Iterable[Any] = (),
    ) -> None:
        self._originals = originals or {}
        self._stops: tuple[type, ...] = (*PLAIN, *stops, Kept)
        self._generators: list[tuple[Any, Any]] = []
        """Generators of random numbers, of copies too, and the states that they were met in."""
        self._outside: list[PutBack] = []
        self._inside: list[PutBack] = []
        self._changed: list[PutBack] | None = None
        self._random: list[tuple[PutBack, bool]] = []
        self._room = ROOM
        self.large = Large()
        """What does not fit into the room for copies, to be watched while losses are asked for."""
        # It also keeps what was seen alive, so that no id means two things.
        self._seen: dict[int, Any] = {id(part): part for part in left_out}
        self._asked: set[tuple[int, str]] = set()
        self._refusal: ValueError | None = None
        self.follow(roots)

    def follow(self, roots: Iterable[Any]) -> None:
        """Note what can be reached from some more roots; ValueError as for the first."""
        left = list(roots)
        while left:
            part = left.pop()
            if self._note(part):
                left.extend(children_of(part))

    def follow_training(self, stand_in: Any, name: str, value: Any) -> None:
        """Note what can be reached from what a loss has asked of training by a name, before it gets it.

        It is not the step's own, so less is noted: :data:`NEAREST` objects at most, the nearest, without iterators that
        a library's objects hold, a loader's say, and without objects that hold a lock or a thread.

        Raises:
            ValueError: As for the roots, and from then on whenever something is asked of training.
        """
        if isinstance(value, (*PLAIN, types.MethodType)) or (id(stand_in), name) in self._asked:
            return
        if self._refusal is not None:
            raise self._refusal
        left, most = collections.deque([value]), len(self._seen) + NEAREST
        try:
            with _plain_tensors():
                while left and len(self._seen) < most:
                    part = left.popleft()
                    if is_others(part) or not self._note(part):
                        continue
                    home = type(part).__module__
                    is_librarys = home not in ("builtins", "collections", "functools", "types") and not is_users(home)
                    left.extend(child for child in children_of(part) if not (is_librarys and is_iterator(child)))
        except ValueError as error:
            self._refusal = error
            raise
        self._asked.add((id(stand_in), name))
        # The next loss may be one that changes some of it.
        self._changed = None

    def _note(self, part: Any) -> bool:
        """Note one part as it is; whether what it leads to is to be followed."""
        if id(part) in self._seen or isinstance(part, self._stops) or is_trainer(part):
            return False
        is_copy = id(part) in self._originals
        self._seen[id(part)] = part
        if isinstance(part, GENERATORS):
            self._generators.append((part, _state(part)))
            self._random.append((_generator(part), is_copy))
            return False
        if is_iterator(part) and (is_opaque(part) or not is_copy):
            where = "that a copy holds" if is_copy else "that a copy shares with training"
            raise ValueError(
                f"training_step must not draw from an iterator {where}, got a {type(part).__name__}: give loss_fn, "
                "which takes all it needs from the batch"
            )
        if not is_copy and not self._has_room(part):
            return False
        (self._inside if is_copy else self._outside).extend(_notes(part, self._originals))
        return True

    def _has_room(self, part: Any) -> bool:
        """Whether a copy of a tensor or an array fits; if not, it is watched."""
        if isinstance(part, np.ndarray):
            if not part.flags.writeable:
                return False  # nobody writes to it
            if part.nbytes > self._room:
                self.large.add_array(part)
                return False
            self._room -= part.nbytes
        elif _is_copyable(part):
            if part.nbytes > self._room:
                self.large.add_tensor(part)
                return False
            self._room -= part.nbytes
        return True

    def random_state(self) -> list[Any]:
        """Of generators that are not as they were met, to see whether a loss has drawn from one; met it may have it."""
        states = [(index, _state(generator), first) for index, (generator, first) in enumerate(self._generators)]
        return [(index, state) for index, state, first in states if state != first]

    def reset(self, anew: bool = False) -> None:
        """Put all but generators back between two losses; from the second time on only what the first had changed.

        ``anew`` puts all back and forgets what that was: the next loss may write something else.
        """
        if self._changed is None or anew:
            changed = [put_back for put_back in (*self._inside, *self._outside) if put_back()]
            self._changed = None if anew else changed
        else:
            for put_back in self._changed:
                put_back()
        self.large.put_back()

    def put_back(self) -> None:
        """Put everything outside of copies back, generators included."""
        for put_back in self._outside:
            put_back()
        self.large.put_back()
        for put_back, is_copy in self._random:
            if not is_copy:
                put_back()

    def rewind(self) -> None:
        """Let all generators begin again."""
        for put_back, _ in self._random:
            put_back()


def random_states(kept: Kept | None) -> list[Any]:
    """The states of the generators that everybody shares, and of those that can be reached."""
    # Of little cost, for they are asked for before each chunk of samples.
    with _plain_tensors():
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        shared = [state.numpy().tobytes() for state in (torch.get_rng_state(), *cuda)]
    numbers = pickle.dumps(np.random.get_state(legacy=False))  # noqa: NPY002
    reached = [] if kept is None else kept.random_state()
    return [shared, random.getstate(), numbers, reached]


def _plain_tensors() -> AbstractContextManager[None]:
    """In here a new tensor is one, where vmap would make a layer of its own of it, which gives no memory away."""
    return torch._C._DisableFuncTorch()


def _notes(part: Any, originals: Mapping[int, Any]) -> Iterator[PutBack]:
    if isinstance(part, Tensor):
        if _is_copyable(part):
            yield _tensor(part, originals.get(id(part)))
    elif isinstance(part, np.ndarray):
        if part.dtype != object:
            yield _array(part)
    elif isinstance(part, type):
        yield _class(part)
    elif isinstance(part, types.CellType):
        yield _cell(part)
    elif isinstance(part, types.FunctionType):
        if named := named_globals(part):
            yield _mapping(part.__globals__, named)
    elif isinstance(part, (dict, list, set, collections.deque)) and len(part) <= MANY:
        yield _mapping(part) if isinstance(part, dict) else _collection(part)
    if isinstance(part, (Tensor, np.ndarray)) or type(part) in BARE:
        return
    if isinstance(attributes := getattr(part, "__dict__", None), dict):
        yield _mapping(attributes)
    if slots := slots_of(part):
        yield _slots(part, slots)


def _is_copyable(part: Any) -> TypeGuard[Tensor]:
    return (
        isinstance(part, Tensor)
        and part.layout == torch.strided
        and not (part.is_meta or part.is_nested or isinstance(part, nn.UninitializedParameter))
    )


def _tensor(tensor: Tensor, original: Any) -> PutBack:
    is_twin = isinstance(original, Tensor) and original.shape == tensor.shape
    kept = original.detach() if is_twin else tensor.detach().clone()

    @torch.no_grad()
    def put_back() -> bool:
        now = tensor.detach()
        if now.shape != kept.shape or torch.equal(now, kept):
            return False
        now.copy_(kept)
        return True

    return put_back


def _array(array: np.ndarray) -> PutBack:
    kept = array.copy()

    def put_back() -> bool:
        if np.array_equal(array, kept):
            return False
        np.copyto(array, kept)
        return True

    return put_back


def _mapping(mapping: dict[Any, Any], named: Mapping[Any, Any] | None = None) -> PutBack:
    kept = dict(mapping) if named is None else dict(named)

    def put_back() -> bool:
        is_same = all(mapping.get(key, MISSING) is value for key, value in kept.items())
        if is_same and (named is not None or len(mapping) == len(kept)):
            return False
        if named is None:
            mapping.clear()
        mapping.update(kept)
        return True

    return put_back


def _slots(part: Any, slots: list[types.MemberDescriptorType]) -> PutBack:
    kept = [(slot, value_in(slot, part)) for slot in slots]

    def put_back() -> bool:
        changed = [(slot, value) for slot, value in kept if value_in(slot, part) is not value]
        for slot, value in changed:
            if value is MISSING:
                slot.__delete__(part)
            else:
                slot.__set__(part, value)
        return bool(changed)

    return put_back


def _collection(collection: Any) -> PutBack:
    kept = list(collection)

    def put_back() -> bool:
        now = list(collection)
        if len(now) == len(kept) and all(map(_is, now, kept)):
            return False
        collection.clear()
        (collection.update if isinstance(collection, set) else collection.extend)(kept)
        return True

    return put_back


def _is(one: Any, other: Any) -> bool:
    return one is other


def _class(cls: type) -> PutBack:
    kept = dict(vars(cls)) if is_users(cls.__module__) else {}

    def put_back() -> bool:
        changed = [name for name, value in kept.items() if vars(cls).get(name, MISSING) is not value]
        for name in changed:
            setattr(cls, name, kept[name])
        return bool(changed)

    return put_back


def _cell(cell: types.CellType) -> PutBack:
    kept = content_of(cell)

    def put_back() -> bool:
        if content_of(cell) is kept:
            return False
        cell.cell_contents = kept
        return True

    return put_back


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        with _plain_tensors():
            return generator.get_state().numpy().tobytes()
    if isinstance(generator, random.Random):
        return generator.getstate()
    # NumPy's own words for a state leave out what is in the middle of a long one, if it was told to.
    is_new = isinstance(generator, np.random.Generator)
    return pickle.dumps(generator.bit_generator.state if is_new else generator.get_state(legacy=False))


def _generator(generator: Any) -> PutBack:
    state: Any
    put: Callable[[Any], Any]
    if isinstance(generator, random.Random):
        state, put = generator.getstate(), generator.setstate
    elif isinstance(generator, np.random.Generator):
        state, put = generator.bit_generator.state, functools.partial(setattr, generator.bit_generator, "state")
    else:
        state, put = generator.get_state(), generator.set_state

    def put_back() -> bool:
        put(state)
        return True

    return put_back
