"""What all callbacks of one Trainer have in common: measurements, the keys they write, the time they took."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

from lightning_spectral.measurement.shared import Measurement, Request
from lightning_spectral.measurement.stopwatch import Stopwatch

T = TypeVar("T")


class Session:
    """Lets callbacks that know nothing of each other share a measurement, and keeps two from writing one key."""

    def __init__(self) -> None:
        self.stopwatch = Stopwatch()
        """Time spent in all measurements and reports so far, on this rank."""
        self._measurements: weakref.WeakValueDictionary[Request, Measurement] = weakref.WeakValueDictionary()
        self._owners: dict[str, weakref.ref[Any]] = {}
        self._done: set[str] = set()
        self._shared: dict[Any, Any] = {}

    def shared(self, kind: Callable[[Stopwatch], T]) -> T:
        """The one object of a class that all callbacks of this Trainer have in common.

        Args:
            kind: The class; made with the stopwatch, by the first who asks.

        Returns:
            The object.
        """
        if kind not in self._shared:
            self._shared[kind] = kind(self.stopwatch)
        return self._shared[kind]

    def measurement(self, request: Request, device: torch.device) -> Measurement:
        """The one measurement for a request; once its last member has left, the next to ask gets a new one.

        Args:
            request: What is to be measured, and when.
            device: Where a new measurement keeps its sums.

        Returns:
            The shared measurement.
        """
        measurement = self._measurements.get(request)
        # One that all have left may wait for the garbage collector, with what it knew of an earlier fit.
        if measurement is None or not measurement.has_members:
            self._measurements[request] = measurement = Measurement(request, device, self.stopwatch)
        return measurement

    def claim(self, keys: Iterable[str], owner: Any) -> None:
        """Reserve the keys that a callback will write.

        Args:
            keys: Full names, prefix included.
            owner: The callback.

        Raises:
            ValueError: If another callback writes one of them.
        """
        for key in keys:
            other = self._owner(key)
            if other is not None and other is not owner:
                writers = f"{type(other).__name__} and {type(owner).__name__}"
                raise ValueError(f"{writers} would both write {key!r}: give one of them a prefix")
            self._owners[key] = weakref.ref(owner)

    def claim_shared(self, key: str, owner: Any) -> bool:
        """Reserve a key that any callback may write and one should.

        Args:
            key: Full name, prefix included.
            owner: The callback.

        Returns:
            Whether this owner is the one.
        """
        if self._owner(key) is None:
            self._owners[key] = weakref.ref(owner)
        return self._owner(key) is owner

    def is_first(self, what: str) -> bool:
        """Whether something that should happen once for all callbacks of a Trainer has not happened yet.

        Args:
            what: Its name.

        Returns:
            True the first time.
        """
        is_first = what not in self._done
        self._done.add(what)
        return is_first

    def release(self, owner: Any) -> None:
        """Give back all keys of a callback.

        Args:
            owner: The callback.
        """
        self._owners = {key: ref for key, ref in self._owners.items() if ref() not in (None, owner)}

    def _owner(self, key: str) -> Any:
        ref = self._owners.get(key)
        return None if ref is None else ref()


_sessions: "weakref.WeakKeyDictionary[Any, Session]" = weakref.WeakKeyDictionary()


def session_of(trainer: Any) -> Session:
    """The session of a Trainer.

    Args:
        trainer: Any object that lives as long as the session should.

    Returns:
        The same session for the same trainer.
    """
    return _sessions.setdefault(trainer, Session())
