"""What is asked for of per-sample gradients, and which way to have their rows serves it."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from typing_extensions import override

from lightning_spectral.capture.batch import path_of
from lightning_spectral.capture.engines import Method
from lightning_spectral.capture.shadow import LossFunction
from lightning_spectral.functional.arguments import check_flag
from lightning_spectral.measurement.arguments import (
    MAX_SAMPLES,
    check_at_most,
    check_choice,
    check_patterns,
    check_positive,
)
from lightning_spectral.measurement.measurement import Request, Scene
from lightning_spectral.measurement.placement import KEEPS, Keep
from lightning_spectral.metrics.layout import are_sharded

if TYPE_CHECKING:
    from lightning_spectral.measurement.gradients import GradientMeasurement

Check = Literal["refuse", "warn", "off"]

ROW_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class GradientRequest(Request):
    """Per-sample gradients of chosen parameters; equal requests share one measurement."""

    kind: ClassVar[str] = "gradient"

    num_samples: int
    method: Method
    chunk_size: int | None
    loss_reduction: Literal["mean", "sum"]
    weights: bool
    row_dtype: Literal["float32", "bfloat16", "float64"]
    row_device: Keep = "auto"
    """Where rows are kept."""
    parameters: str | tuple[str, ...] | None
    """Patterns."""
    loss_fn: LossFunction | None
    check: Check = "refuse"
    """What a loss that is no mean of samples' losses comes to."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(num_samples=self.num_samples)
        if self.num_samples < 2:
            raise ValueError(f"num_samples must be at least 2, got {self.num_samples}: 512 are usual")
        check_at_most(num_samples=(self.num_samples, MAX_SAMPLES, "their Gram matrix is solved as a whole"))
        check_flag(weights=self.weights)
        if self.chunk_size is not None:
            check_positive(chunk_size=self.chunk_size)
        check_choice(
            method=(self.method, ("auto", "vmap", "hooks", "loop")),
            loss_reduction=(self.loss_reduction, ("mean", "sum")),
            row_dtype=(self.row_dtype, tuple(ROW_DTYPES)),
            row_device=(self.row_device, KEEPS),
            check=(self.check, ("refuse", "warn", "off")),
        )
        check_patterns(parameters=self.parameters)
        if self.samples is not None and self.method not in ("auto", "loop"):
            raise ValueError(f"samples cuts into batches of one, which method='loop' takes, got method={self.method!r}")

    @property
    def reads_backward(self) -> bool:
        """Whether rows are read off training's own backward passes."""
        return self.method == "hooks" and self.stage == "train"

    @override
    def measure(self, scene: Scene) -> "GradientMeasurement":
        # Each way to have rows knows this file.
        from lightning_spectral.measurement.backward_gradients import BackwardGradients
        from lightning_spectral.measurement.gradients import without_vmap
        from lightning_spectral.measurement.pass_gradients import PassGradients

        if are_sharded(scene.module):
            if self.method not in ("auto", "hooks") or self.stage != "train":
                raise ValueError(
                    f"method must be 'hooks', with stage='train', where parameters are sharded, got method="
                    f"{self.method!r} and stage={self.stage!r}: other ways run a copy of the module, of which there is "
                    "none"
                )
            try:
                return BackwardGradients(self, scene)
            except ValueError as error:
                raise ValueError(without_vmap(str(error))) from error
        return (BackwardGradients if self.reads_backward else PassGradients)(self, scene)

    @override
    def settings(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "loss_fn"}
        return {"kind": self.kind, **values, "samples": path_of(self.samples)}
