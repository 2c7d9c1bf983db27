"""The conductor: takes each event of a loop once, and hands it to the recorder and to every measurement."""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from lightning_spectral.measurement.measurement import Measurement, Report, Request, Scene
from lightning_spectral.measurement.passes import Pass
from lightning_spectral.measurement.stopwatch import Stopwatch


class Recorder(Protocol):
    """Who follows the events to keep a record, before the measurements do."""

    def start_train_batch(self, batch: Any) -> None:
        """A training batch begins, and is as the loader gave it."""

    def end_train_batch(self, loss: Tensor | None, step: int) -> None:
        """A training batch has ended, with its loss if it has one, after so many steps of optimizers in all."""

    def start_validation(self, passes: Sequence[Pass | None] = ()) -> None:
        """A validation run, not the sanity check, begins, of these passes over its loaders."""

    def start_validation_batch(self, batch: Any, loader: int) -> None:
        """A batch of a validation run begins."""

    def begin_report(self, measurement: Measurement, step: int) -> None:
        """A measurement has begun a report, of this step, that it will make later."""

    def add_report(self, measurement: Measurement, report: Report) -> None:
        """A measurement has made a report."""

    def end_validation_rows(self) -> None:
        """The last batch of a validation run has ended."""

    def end_validation(self, step: int, metrics: Mapping[str, Tensor]) -> None:
        """A validation run has ended, and its loss is known."""

    def end_training(self, step: int) -> None:
        """Training has ended."""

    def end(self) -> None:
        """The last member has left."""


class Member(Protocol):
    """Who takes part."""

    measurement: Measurement | None
    """What it takes reports from, if from any."""

    def settings(self) -> dict[str, Any]:
        """How that is made, JSON-like, for the record."""


R = TypeVar("R", bound=Recorder)


class Session(Generic[R]):
    """What all who take part in the watching of one loop have in common; they need not know of each other.

    Members forward every event; who joined first leads, and only the leader's should be handed on (:meth:`is_led_by`).
    Then all reports that an event brings about are made, and recorded, before the first member looks at one.

    Args:
        make_recorder: Makes the recorder, given the stopwatch.
    """

    def __init__(self, make_recorder: Callable[[Stopwatch], R]) -> None:
        self.stopwatch = Stopwatch()
        """Time spent in all measurements and reports so far, on this rank."""
        self.recorder = make_recorder(self.stopwatch)
        self.members: list[Member] = []
        self._held: dict[int, tuple[Request, Measurement]] = {}
        self._owners: dict[str, weakref.ref[Member]] = {}
        self._done: set[str] = set()

    def join(self, member: Member) -> None:
        """Take part."""
        self.members.append(member)

    def is_led_by(self, member: Member) -> bool:
        """Whether a member's events are those that count."""
        return bool(self.members) and self.members[0] is member

    def leave(self, member: Member) -> None:
        """Take part no longer; a measurement ends with the last member that holds it."""
        self.members = [other for other in self.members if other is not member]
        self._owners = {key: ref for key, ref in self._owners.items() if ref() not in (None, member)}
        _, measurement = self._held.pop(id(member), (None, None))
        if measurement is not None and measurement not in self.measurements:
            measurement.abandon()
            measurement.remove()
        if not self.members:
            self.recorder.end()

    def share(self, member: Member, request: Request, scene: Scene) -> Measurement:
        """The one measurement for a request, which the member holds until it leaves.

        Raises:
            ValueError: If the module does not allow it.
        """
        held = next((measurement for known, measurement in self._held.values() if known == request), None)
        measurement = request.measure(scene) if held is None else held
        self._held[id(member)] = request, measurement
        return measurement

    @property
    def measurements(self) -> list[Measurement]:
        """Each once, in the order in which they were asked for first."""
        return list(dict.fromkeys(measurement for _, measurement in self._held.values()))

    def claim(self, keys: Iterable[str], owner: Member) -> None:
        """Reserve the full names of keys that a member will write.

        Raises:
            ValueError: If another member writes one of them.
        """
        for key in keys:
            other = self._owner(key)
            if other is not None and other is not owner:
                writers = f"{type(other).__name__} and {type(owner).__name__}"
                raise ValueError(f"{writers} would both write {key!r}: give one of them a prefix")
            self._owners[key] = weakref.ref(owner)

    def claim_shared(self, key: str, owner: Member) -> bool:
        """Reserve a key that any member may write and one should; True if this owner is the one."""
        if self._owner(key) is None:
            self._owners[key] = weakref.ref(owner)
        return self._owner(key) is owner

    def is_claimed(self, key: str) -> bool:
        """Whether a member writes a key."""
        return self._owner(key) is not None

    def _owner(self, key: str) -> Member | None:
        ref = self._owners.get(key)
        return None if ref is None else ref()

    def is_first(self, what: str) -> bool:
        """Whether something that should happen once for all members has not happened yet."""
        is_first = what not in self._done
        self._done.add(what)
        return is_first

    def start_training(self, step: int) -> None:
        """Training begins, or resumes, at a step; the recorder is started by who knows what it is to say."""
        for measurement in self.measurements:
            measurement.start_training(step)

    def start_train_batch(self, batch: Any, step: int, batch_idx: int = 0) -> None:
        """A training batch begins."""
        self.recorder.start_train_batch(batch)
        for measurement in self.measurements:
            measurement.start_train_batch(batch, step, batch_idx)

    def before_backward(self, scale: Callable[[], float], loss: Tensor | None = None) -> None:
        """A backward pass begins, see :meth:`Measurement.before_backward`."""
        for measurement in self.measurements:
            measurement.before_backward(scale, loss)

    def after_backward(self, is_last: bool) -> None:
        """A backward pass has ended."""
        for measurement in self.measurements:
            measurement.after_backward(is_last)

    def before_optimizer_step(self, optimizer: Any) -> None:
        """An optimizer is about to move its parameters."""
        for measurement in self.measurements:
            measurement.before_optimizer_step(optimizer)

    def end_train_batch(self, loss: Tensor | None, step: int) -> None:
        """A training batch has ended; all reports that are due are made."""
        self.recorder.end_train_batch(loss, step)
        for measurement in self.measurements:
            before, pending = measurement.report, measurement.pending
            measurement.end_train_batch(step)
            self._record(measurement, before)
            if measurement.pending is not None and measurement.pending is not pending:
                self.recorder.begin_report(measurement, step)

    def end_pending(self) -> None:
        """Have all reports that are being made beside training, now; a collective."""
        for measurement in self.measurements:
            before = measurement.report
            measurement.end_pending()
            self._record(measurement, before)

    def abandon(self) -> list[int]:
        """Drop all reports that are being made beside training; their steps."""
        return [step for measurement in self.measurements if (step := measurement.abandon()) is not None]

    def start_validation(self, step: int, always: bool, passes: Sequence[Pass | None] = ()) -> None:
        """A validation run begins, of these passes over its loaders; it is measured however early, if always."""
        self.recorder.start_validation(passes)
        for measurement in self.measurements:
            known = measurement.loader < len(passes)
            measurement.start_validation(step, always, passes[measurement.loader] if known else None)

    def start_validation_batch(self, batch: Any, loader: int, step: int, is_check: bool, batch_idx: int = 0) -> None:
        """A validation batch begins, maybe of the sanity check."""
        if not is_check:
            self.recorder.start_validation_batch(batch, loader)
        for measurement in self.measurements:
            if measurement.loader == loader:
                measurement.start_validation_batch(batch, step, batch_idx)

    def end_validation_batch(self, loader: int, step: int, is_last: bool) -> None:
        """A validation batch has ended, maybe the last of its loader."""
        for measurement in self.measurements:
            if measurement.loader == loader:
                measurement.end_validation_batch(step, is_last)

    def end_validation_rows(self, step: int) -> None:
        """The last batch of a validation run has ended; all its reports are made."""
        self.recorder.end_validation_rows()
        for measurement in self.measurements:
            before = measurement.report
            measurement.end_validation(step)
            self._record(measurement, before)

    def end_validation(self, step: int, metrics: Mapping[str, Tensor]) -> None:
        """A validation run has ended, and its loss is among the metrics."""
        self.recorder.end_validation(step, metrics)

    def end_training(self, step: int) -> None:
        """Training has ended."""
        self.recorder.end_training(step)

    def _record(self, measurement: Measurement, before: Report | None) -> None:
        if (report := measurement.report) is not None and report is not before:
            self.recorder.add_report(measurement, report)
