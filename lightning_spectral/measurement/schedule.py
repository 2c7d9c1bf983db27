"""When to collect and when to report: arithmetic on step counts that all ranks share."""

import math


class TrainSchedule:
    """Reports every so many optimizer steps, each from the last few steps before it.

    A report is due when ``global_step // every_n_steps`` grows. The steps that are collected for it are the last
    ``min(every_n_steps, ceil(num_tokens / rows per step))``, so that runs of different batch size are measured on
    equally many rows, of which ``num_tokens`` are wanted over all ranks.
    """

    def __init__(self, every_n_steps: int, num_tokens: int) -> None:
        self.every_n_steps = every_n_steps
        self.num_tokens = num_tokens
        self.rows_per_step: float | None = None
        """Rows of one optimizer step over all ranks; None until the first step has shown it."""
        self.stride = 1
        """How far ``global_step`` moves per batch: 2 with two optimizers under manual optimisation."""
        self._reported = 0
        self._step = 0

    def start(self, step: int) -> None:
        """Begin, or resume, at a ``global_step``; what was due before is not reported again."""
        self._reported = step // self.every_n_steps
        self._step = step

    def collects(self, step: int, rows_per_step: float | None = None) -> bool:
        """Whether a batch that begins now belongs to the next report.

        Args:
            step: The trainer's ``global_step`` before the batch.
            rows_per_step: Of a layer that has more of them than others, whose part of the window is its end; None for
                the whole window.

        Returns:
            True inside the window, and in the very first step, whose rows set the window.
        """
        if self.rows_per_step is None:
            return True
        next_report = (step // self.every_n_steps + 1) * self.every_n_steps
        window = self.window if rows_per_step is None else self.window_of(rows_per_step)
        return step >= next_report - window * self.stride

    @property
    def window(self) -> int:
        """How many optimizer steps a report is collected over."""
        return self.window_of(self.rows_per_step)

    def window_of(self, rows_per_step: float | None) -> int:
        """How many optimizer steps so many rows a step are collected over; all where their number is not known."""
        if not rows_per_step:
            return self.every_n_steps
        return min(self.every_n_steps, math.ceil(self.num_tokens / rows_per_step))

    def advance(self, step: int) -> int:
        """Note that a batch ended at a ``global_step``; returns how far it moved, zero within an accumulation."""
        moved = step - self._step
        self._step = step
        self.stride = max(self.stride, moved)
        return moved

    def due(self) -> bool:
        """Whether a report is due after the batch that has just ended; True once per crossing.

        One is due if a multiple of ``every_n_steps`` was reached since the last report.
        """
        reached = self._step // self.every_n_steps
        if reached <= self._reported:
            return False
        self._reported = reached
        return True
