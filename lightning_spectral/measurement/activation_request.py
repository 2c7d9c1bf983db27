"""What is asked for of activations: which rows of layers, and how their sums are kept."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from typing_extensions import override

from lightning_spectral.functional.arguments import check_flag, describe
from lightning_spectral.measurement.arguments import check_axis, check_choice, check_positive
from lightning_spectral.measurement.collector import Collector
from lightning_spectral.measurement.measurement import Request, Scene
from lightning_spectral.measurement.placement import KEEPS, Keep
from lightning_spectral.metrics.layout import Layout

if TYPE_CHECKING:
    from lightning_spectral.measurement.activations import ActivationMeasurement

Dtype = Literal["auto", "float32", "float64"]

DTYPES = {"auto": torch.float32, "float32": torch.float32, "float64": torch.float64}
"""Types that products begin in."""


@dataclass(frozen=True, kw_only=True)
class ActivationRequest(Request):
    """Rows of layers: equal requests share one measurement of the union of their layers."""

    kind: ClassVar[str] = "activation"

    num_tokens: int
    normalize: bool
    dtype: Dtype
    mask: str | None = None
    channel_dim: int | None = None
    sums_device: Keep = field(default="auto", compare=False)
    """Where sums are kept. Those of equal rows are shared wherever that is: who joins first says it."""
    overlap: bool | Literal["auto"] = "auto"

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.overlap, bool) and not (isinstance(self.overlap, str) and self.overlap == "auto"):
            raise ValueError(f"overlap must be True, False or 'auto', got {describe(self.overlap)}")
        if self.stage == "validate":
            if self.overlap is True:
                raise ValueError(
                    "overlap must be False or 'auto' with stage='validate', got True: what monitors a validation run "
                    "needs its report at once"
                )
            object.__setattr__(self, "overlap", False)  # with equal others it shares a measurement
        check_positive(num_tokens=self.num_tokens)
        check_flag(normalize=self.normalize)
        check_choice(dtype=(self.dtype, tuple(DTYPES)), sums_device=(self.sums_device, KEEPS))
        if not (self.mask is None or (isinstance(self.mask, str) and self.mask)):
            raise ValueError(f"mask must be a key of the batch, or None for all tokens, got {describe(self.mask)}")
        check_axis(channel_dim=self.channel_dim)

    @override
    def measure(self, scene: Scene) -> "ActivationMeasurement":
        # What measures knows this file.
        from lightning_spectral.measurement.activations import ActivationMeasurement

        return ActivationMeasurement(self, scene)

    @override
    def settings(self) -> dict[str, Any]:
        # When numbers come, and where sums are, does not change them: a record goes on whatever it was.
        return {name: value for name, value in super().settings().items() if name not in ("overlap", "sums_device")}

    def collector(self, names: list[str], device: torch.device, layout: Layout | None = None) -> Collector:
        """What keeps the rows of layers on a device, or on the CPU where that has no float64."""
        return Collector(
            names=names,
            num_tokens=self.num_tokens,
            num_groups=self.num_groups,
            normalize=self.normalize,
            dtype=DTYPES[self.dtype],
            device=torch.device("cpu") if device.type == "mps" else device,
            layout=layout,
            keep=self.sums_device,
        )
