"""What drift is measured from: spectra and leading eigenvectors of a report, kept in a checkpoint or in a record."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lightning_spectral.functional.floor import Sample
from lightning_spectral.measurement import LayerSpectrum
from lightning_spectral.runs import Run


class Basis(NamedTuple):
    """What one report knows of one layer, as far as drift is concerned."""

    sample: Sample
    """Spectrum and leading eigenvectors, with all groups and without each."""
    num_tokens: int
    """Rows behind it."""

    @classmethod
    def of(cls, layer: LayerSpectrum, rank: int) -> "Basis":
        """The basis of a layer that was measured.

        Args:
            layer: With eigenvectors.
            rank: How many of them count; a shared report may hold more.

        Returns:
            Copies: the report's tensors are parts of larger ones, which should not be kept, nor saved.
        """
        assert layer.vectors is not None
        assert layer.leave_one_out_vectors is not None
        parts = (
            layer.eigenvalues,
            layer.leave_one_out,
            layer.vectors[..., :rank],
            layer.leave_one_out_vectors[..., :rank],
        )
        return cls(Sample(*(part.clone() for part in parts)), layer.num_tokens)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps.

        Returns:
            Tensors and a number.
        """
        return {**self.sample._asdict(), "num_tokens": self.num_tokens}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Basis":
        """The inverse of :meth:`state`.

        Args:
            state: Its result.

        Returns:
            The basis, on the CPU.
        """
        return cls(Sample(*(state[name].cpu() for name in Sample._fields)), state["num_tokens"])


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
        """Refuse a run whose layer is of another width.

        Args:
            name: The layer.
            width: Its width here.

        Raises:
            ValueError: Naming both.
        """
        there = len(self._run.spectrum(self._series, name, min(self._tokens)).values)
        if there not in (0, width):
            raise ValueError(f"reference must have {name} of width {width}, got {self._run} with {there}")

    def check(self, layers: Sequence[str], rank: int) -> None:
        """Refuse a run that does not hold what is needed of it.

        Args:
            layers: Names of layers.
            rank: Leading eigenvectors of each.

        Raises:
            ValueError: Naming what is missing.
        """
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

    def nearest(self, tokens: float, layers: Sequence[str], rank: int) -> dict[str, Basis]:
        """The report nearest in tokens.

        Args:
            tokens: Of this run.
            layers: Names of layers.
            rank: Leading eigenvectors of each.

        Returns:
            Bases by layer; one whose measurement had failed is missing.
        """
        step = min(self._tokens, key=lambda step: abs(self._tokens[step] - tokens))
        spectra = {name: self._run.spectrum(self._series, name, step) for name in layers}
        bases = {}
        for name, found in spectra.items():
            if found.failure is None and found.vectors is not None and found.leave_one_out_vectors is not None:
                vectors = (found.vectors[..., :rank], found.leave_one_out_vectors[..., :rank])
                bases[name] = Basis(Sample(found.values, found.leave_one_out, *vectors), found.count)
        return bases
