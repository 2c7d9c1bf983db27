"""What an instrument asks of the loop that it watches, whoever runs that: a Trainer, or anybody."""

from collections.abc import MutableMapping, Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from lightning_spectral.measurement import Scene, Session
from lightning_spectral.recording import RunRecorder

T = TypeVar("T")


class Host(Protocol):
    """A loop, as an instrument sees it."""

    @property
    def module(self) -> nn.Module:
        """What is trained; names of layers and parameters begin here."""

    @property
    def session(self) -> Session[RunRecorder]:
        """What all instruments of the loop share, the same each time."""

    @property
    def step(self) -> int:
        """Optimizer steps so far."""

    @property
    def loggers(self) -> Sequence[Any]:
        """Lightning's loggers, or what has their ``log_metrics``."""

    @property
    def metrics(self) -> MutableMapping[str, Tensor]:
        """Latest values by full key, for others to monitor; losses among them."""

    @property
    def is_global_zero(self) -> bool:
        """Whether this rank writes."""

    @property
    def strategy(self) -> str:
        """The class that spreads the module over ranks, by name."""

    @property
    def lends_averages(self) -> bool:
        """Whether validation runs on averaged weights."""

    @property
    def is_fitting(self) -> bool:
        """Whether training is under way, rather than validation alone."""

    @property
    def is_checking(self) -> bool:
        """Whether this is a sanity check before training."""

    @property
    def has_validation(self) -> bool:
        """Whether validation runs belong to training, so that losses come with them."""

    def scene(self) -> Scene:
        """What a measurement is made for; ValueError for a strategy of which no rule is known."""

    def broadcast(self, value: T) -> T:
        """What rank zero has; a collective."""

    def stop(self) -> None:
        """End training after this step."""
