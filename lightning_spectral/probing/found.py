"""What a probe finds, as plain values: each part with its refusal where it cannot be read."""

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult

from lightning_spectral.runs.to_json import to_json


@dataclass(frozen=True)
class LayerFound:
    """A layer whose activations would be read."""

    name: str
    kind: str
    """Class of the module."""
    shape: tuple[int, ...] | None = None
    """Of its output, the last one in the batch; None if it did not run."""
    channel_dim: int | None = None
    """Axis of its channels, from 0."""
    width: int | None = None
    """How many they are: the covariance is width x width."""
    row: str | None = None
    """What a row is, in words."""
    rows: int = 0
    """Rows in the batch, after the mask."""
    problem: str | None = None
    """Why its numbers would be NaN, or the first batch be refused; None if neither."""


@dataclass(frozen=True)
class SamplesFound:
    """Where the samples of the batch are."""

    count: int | None = None
    rule: str = ""
    """What tells it, in words."""
    tensors: Mapping[str, tuple[tuple[int, ...], int | None]] | None = None
    """Shape of each tensor and its axis of samples, None where it is for all samples, by the way to it."""
    others: Mapping[str, str] | None = None
    """What becomes of arrays and lists, in words, by the way to them."""
    problem: str | None = None


@dataclass(frozen=True)
class MaskFound:
    """Which positions of the batch are real."""

    key: str | None = None
    """None: all are."""
    meaning: str | None = None
    num_real: int | None = None
    num_all: int | None = None
    others: Mapping[str, str] | None = None
    """Keys that could be named instead, with what they would leave."""
    problem: str | None = None


@dataclass(frozen=True)
class LossFound:
    """The loss that per-sample gradients would be taken of, and whether it is a mean of its samples' losses."""

    value: float | None = None
    """Of the whole batch, on a shadow of the module."""
    of_training: float | None = None
    """What ``training_step`` returned for it."""
    is_same: str = "not looked at"
    """``"passed"`` if these agree, ``"failed"``, or why they were not compared."""
    is_mean: str = "not looked at"
    """``"passed"`` if the batch's gradient lies in the spans of its samples' gradients and of two halves',
    ``"failed"``, or why it was not looked at."""
    residual: float | None = None
    """Share of the batch's gradient outside of its samples' span; up to 1e-3 passes."""
    weights_ratio: float | None = None
    """Largest over smallest weight of a sample in the batch's loss."""
    problem: str | None = None


@dataclass(frozen=True)
class ParameterFound:
    """A parameter whose per-sample gradients would be taken."""

    name: str
    shape: tuple[int, ...]
    kind: str
    """Classes of the modules that hold it."""
    problem: str | None = None
    """Why its numbers would be NaN; None if they would not."""


@dataclass(frozen=True)
class EngineFound:
    """A way to have per-sample gradients."""

    method: str
    works: bool
    is_auto: bool = False
    """Whether ``method="auto"`` takes it."""
    seconds: float | None = None
    """Estimated, for the samples of a report, without decomposing them."""
    num_bytes: int | None = None
    """Estimated peak beside the model and its training."""
    problem: str | None = None


@dataclass(frozen=True)
class CostFound:
    """What a report costs, estimated."""

    kind: str
    """``"activation"``, or ``"gradient"`` with the method that is taken."""
    reads: str
    """Of what, in words."""
    collecting: float
    """Seconds to have the rows."""
    solving: float
    """Seconds to make spectra of them."""
    kept_bytes: int
    """Held from the first rows to the report: sums (activations), or rows (gradients)."""
    peak_bytes: int
    """The most that is held at a time, that included."""
    how: str
    """How it was estimated."""
    kept_on: str
    """Where what is held is kept."""
    budget_bytes: int
    """What it may take on the model's device by ``"auto"``: a quarter of the memory that is free there now."""


@dataclass(frozen=True)
class Probe:
    """What the callbacks would do with a model, as :func:`lightning_spectral.probe` has found; prints as a table."""

    module: str
    """Class of the module."""
    device: str
    step: str | None
    """Why its training step failed; None if it did not."""
    samples: SamplesFound
    mask: MaskFound
    layers: tuple[LayerFound, ...]
    layers_problem: str | None
    """Why no layers were found; ``layers`` then are some that could be named."""
    loss: LossFound
    parameters: tuple[ParameterFound, ...]
    parameters_problem: str | None
    """Likewise of parameters; loss and engines were then tried on the first that could be named."""
    engines: tuple[EngineFound, ...]
    costs: tuple[CostFound, ...]

    @property
    def problems(self) -> list[str]:
        """All that is refused, or would be NaN, each reason once."""
        parts: list[Any] = [self.samples, self.mask, *self.layers, self.loss, *self.parameters]
        reasons = [self.step, self.layers_problem, self.parameters_problem, *(part.problem for part in parts)]
        return list(dict.fromkeys(reason for reason in reasons if reason is not None))

    def as_dict(self) -> dict[str, Any]:
        """For programs: plain values."""
        return asdict(self)

    def to_json(self) -> str:
        """The same as JSON; null stands for what is not a finite number."""
        return to_json(self.as_dict())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from lightning_spectral.probing.table import tables

        yield from tables(self)

    def __str__(self) -> str:
        from lightning_spectral.terminal import console

        settings: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
        # In a notebook rich would show it beside the file.
        out = Console(file=io.StringIO(), width=console().width, force_jupyter=False, **settings)
        out.print(self)
        return out.file.getvalue().rstrip()  # type: ignore[attr-defined]
