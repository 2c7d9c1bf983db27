"""What drift may be measured from: the reports of a recorded run."""

from collections.abc import Sequence

from lightning_spectral.functional.estimate import Spectrum
from lightning_spectral.runs import Run
from lightning_spectral.runs.validation_data import ValidationData


class RecordedBases:
    """The reports of a recorded run, of which the nearest in tokens is a reference.

    Args:
        path: The run's log directory.
        stage: Where its rows came from.
        normalize: Whether they were normalised.

    Raises:
        ValueError: If it has no such reports.
    """

    def __init__(self, path: str, stage: str, normalize: bool) -> None:
        self._run = Run(path)
        # Of several series the one that keeps most eigenvectors.
        series = [
            name
            for name in self._run.all_series("activation")
            if (settings := self._run.settings(name)).get("stage") == stage and settings.get("normalize") == normalize
        ]
        if not series:
            raise ValueError(
                f"reference must have measured activations with stage={stage!r} and normalize={normalize}, "
                f"got {self._run}"
            )
        self._series = max(series, key=lambda name: self._run.settings(name).get("rank", 0))
        self._tokens = {step: self._run.tokens_at(self._series, step) for step in self._run.steps(self._series)}

    def check_width(self, name: str, width: int) -> None:
        """Refuse, by a ValueError, a run whose layer is of another width."""
        there = len(self._run.spectrum(self._series, name, min(self._tokens)).values)
        if there not in (0, width):
            raise ValueError(f"reference must have {name} of width {width}, got {self._run} with {there}")

    def check(self, layers: Sequence[str], rank: int) -> None:
        """Refuse, by a ValueError, a run that does not hold so many leading eigenvectors of each layer."""
        known = self._run.names(self._series)
        for name in layers:
            if name not in known:
                raise ValueError(f"reference must have measured {name}, got {self._run} with {', '.join(known)}")
        vectors = self._run.spectrum(self._series, layers[0], min(self._tokens)).vectors
        num_kept = 0 if vectors is None else vectors.shape[-1]
        if num_kept < rank:
            raise ValueError(
                f"reference must hold {rank} eigenvectors a layer, got {self._run} with {num_kept}: "
                f"record it with HeadDrift(rank={rank})"
            )

    def why_other(self, data: ValidationData, loader: int) -> str | None:
        """Why its rows do not compare with those of a run that was validated on some data, and read a loader of it."""
        there = ValidationData.of(self._run.about).of_loader(self._run.settings(self._series).get("dataloader_idx", 0))
        if not there.is_other(data.of_loader(loader)):
            return None
        return (
            f"reference must have been validated on the data of this run, got {self._run}: validate both on the same "
            "samples in the same order, or give reference='first'"
        )

    def nearest(self, tokens: float, layers: Sequence[str], rank: int) -> dict[str, Spectrum]:
        """Of the report nearest in tokens, spectra by layer with so many vectors; one that failed is missing."""
        step = min(self._tokens, key=lambda step: abs(self._tokens[step] - tokens))
        known = self._run.names(self._series)  # of layers that joined the model later it has none
        spectra = {name: self._run.spectrum(self._series, name, step) for name in layers if name in known}
        return {name: one.leading(rank) for name, one in spectra.items() if one.failure is None}
