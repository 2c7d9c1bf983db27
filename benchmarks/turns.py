"""Several Trainers that train side by side, one step at a time in turn, so that each step has its twins next to it."""

import ctypes
import io
import logging
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from rich.progress import Progress, TaskID

from benchmarks.harness import console, settle

M_ARENA_MAX = -8
"""Of glibc's ``malloc.h``."""


@dataclass
class Segments:
    """Wall time of one run, cut where training batches and validation runs end; what callbacks do there is inside."""

    steps: list[float] = field(default_factory=list)
    """Seconds of each training step, with the loading of its batch."""
    validations: list[float] = field(default_factory=list)
    """Seconds of each validation run."""
    own: float = 0.0
    """Seconds that the callbacks say they took, ``spectral/seconds``."""
    failed: float = 0.0
    """Layers and parameters that the latest reports had no spectrum of."""


class Turns:
    """A baton that goes round the runs that are still under way.

    Args:
        size: Number of runs.
    """

    def __init__(self, size: int) -> None:
        self._alive = list(range(size))
        self._holder = 0
        self._changed = threading.Condition()
        self.failure: BaseException | None = None

    def wait(self, index: int) -> None:
        """Stand still until it is this run's turn."""
        with self._changed:
            self._changed.wait_for(lambda: self._holder == index or self.failure is not None)
            if self.failure is not None:
                raise RuntimeError("another run failed") from self.failure

    def hand_on(self, index: int) -> None:
        """Let the next run go."""
        with self._changed:
            place = self._alive.index(index)
            self._holder = self._alive[(place + 1) % len(self._alive)]
            self._changed.notify_all()

    def leave(self, index: int, failure: BaseException | None) -> None:
        """Take no more turns; a failure ends all runs."""
        with self._changed:
            self.failure = self.failure or failure
            if len(self._alive) > 1 and self._holder == index:
                self._holder = self._alive[(self._alive.index(index) + 1) % len(self._alive)]
            self._alive.remove(index)
            self._changed.notify_all()


class TakeTurns(Callback):
    """Stands last among the callbacks, so that what the others do at the end of a step is in the step."""

    def __init__(self, turns: Turns, index: int, segments: Segments, tick: Callable[[], None]) -> None:
        self._turns = turns
        self._index = index
        self._segments = segments
        self._tick = tick

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        self._cut(self._segments.steps)
        self._tick()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._cut(self._segments.validations)

    def _cut(self, segments: list[float]) -> None:
        settle()
        segments.append(time.perf_counter() - self._since)
        self._turns.hand_on(self._index)
        self._turns.wait(self._index)
        self._since = time.perf_counter()


@dataclass(frozen=True)
class Run:
    """What one of the runs trains, on what, watched by which callbacks."""

    module: LightningModule
    data: LightningDataModule
    callbacks: list[Callback]


def side_by_side(runs: dict[str, Callable[[], Run]], settings: dict[str, Any], title: str) -> dict[str, Segments]:
    """Train all runs, a step of each in turn.

    Args:
        runs: Make the runs, by name; all must have as many steps and validation runs.
        settings: Arguments of every Trainer; ``max_steps`` is needed.
        title: For the progress bar.

    Returns:
        Their segments by name. The runs have left no files.
    """
    share_freed_memory()
    turns = Turns(len(runs))
    found = {name: Segments() for name in runs}
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with (
        Progress(console=console, transient=True, redirect_stdout=False) as progress,
        tempfile.TemporaryDirectory() as folder,
        redirect_stdout(io.StringIO()),  # every run's closing tables
    ):
        bar = progress.add_task(title, total=settings["max_steps"] * len(runs))
        threads = []
        for index, (name, make) in enumerate(runs.items()):
            root = f"{folder}/{index}"
            arguments = (turns, index, make, found[name], settings | {"default_root_dir": root}, progress, bar)
            threads.append(threading.Thread(target=_train, args=arguments))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if turns.failure is not None:
        raise turns.failure
    return found


def share_freed_memory() -> None:
    """Let one run have what another has freed: glibc gives each thread an arena, which would each hold a step's."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_ARENA_MAX, 1)


def _train(
    turns: Turns,
    index: int,
    make: Callable[[], Run],
    segments: Segments,
    settings: dict[str, Any],
    progress: Progress,
    bar: TaskID,
) -> None:
    failure: BaseException | None = None
    try:
        turns.wait(index)
        run = make()
        last = TakeTurns(turns, index, segments, lambda: progress.advance(bar))
        trainer = Trainer(
            callbacks=[*run.callbacks, last],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **settings,
        )
        trainer.fit(run.module, run.data)
        metrics = trainer.callback_metrics
        segments.own = float(metrics.get("spectral/seconds", 0.0))
        segments.failed = sum(float(value) for key, value in metrics.items() if key.endswith("/failed"))
    except BaseException as error:  # whatever it is, the others must not wait for ever
        failure = error
    finally:
        turns.leave(index, failure)
