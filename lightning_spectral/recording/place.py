"""Where a process records: in the folder that is meant, or beside it while another process writes there."""

from pathlib import Path
from typing import NamedTuple

from lightning_spectral.runs.lock import Lock
from lightning_spectral.runs.record import ABOUT, Record, find_record, read_about


class Place(NamedTuple):
    """A folder that this process alone records in, until it leaves."""

    folder: Path
    lock: Lock
    known: Path | None
    """Where the record of the run is so far; None if there is none to go on with."""
    before: Path | None
    """Where it was when the checkpoint was written."""
    beside: str | None
    """Why the folder is not the one that was meant, in one line; None if it is."""

    @classmethod
    def take(cls, folder: Path, run_id: str, before: Path | None, step: int) -> "Place":
        """Take a folder, or, while another process writes there, the first of ``{folder}-1``, ``-2``, ... that is free.

        A run that recorded beside another goes on there. OSError if nothing can be written.

        Args:
            folder: The one that is meant.
            run_id: Of the run.
            before: Where it recorded when the checkpoint that it is resumed from was written; None if it is new.
            step: Its step.
        """
        was_beside = before is not None and before.parent == folder.parent
        meant = before if before is not None and was_beside and find_record(run_id, before) else folder
        lock = Lock.take(meant)
        beside, number, taken = None, 0, meant
        while not isinstance(lock, Lock):
            if beside is None:
                who = "a process that cannot be told" if lock is None else str(lock)
                beside = f"{meant} is written by {who} (if that is gone, remove {Lock.path_of(meant)})"
            number += 1
            taken = meant.with_name(f"{folder.name}-{number}")
            if not taken.exists():
                lock = Lock.take(taken)
        known = find_record(run_id, taken, meant, before) if step > 0 else None
        return cls(taken, lock, known, before, None if beside is None else f"records beside, in {taken}: {beside}")

    def why_anew(self, record: Record, step: int) -> str | None:
        """Why a resumed run could not go on with the record that it had, in one line; None if it could, or had none."""
        if step == 0 or self.known is not None:
            return None
        for there in (record.aside, self.before):
            if there is not None and (there / ABOUT).exists():
                try:
                    read_about(there)
                except ValueError as error:
                    return f"begins a new record in {self.folder}, and leaves what was recorded in {there}: {error}"
        return None

    def leave(self) -> None:
        """Let others record there."""
        self.lock.release()
