"""What every callback on the shared measurement of activations has in common."""

from collections.abc import Sequence
from math import isnan
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from typing_extensions import override

from lightning_spectral.callbacks.spectral_callback import SpectralCallback
from lightning_spectral.capture.layers import check_one_mask, resolve_layers, resolve_layers_again
from lightning_spectral.functional.estimate import Spectrum
from lightning_spectral.functional.powerlaw import Band
from lightning_spectral.measurement import ActivationMeasurement, ActivationRequest, Report
from lightning_spectral.measurement.arguments import check_patterns


class LayersCallback(SpectralCallback[Report]):
    """Has the layers that its arguments name watched.

    A subclass says what it writes for each (``quantities``) and which ranks it looks at (:meth:`looks_at`); it may
    choose among the layers (:meth:`choose_layers`), and refuse their widths (:meth:`check_widths`).

    Args:
        layers: Patterns, see :func:`lightning_spectral.capture.resolve_layers`.
        request: What is measured, and when.
        prefix: Put before every key.
    """

    quantities: tuple[str, ...] = ()
    """Last parts of the keys, for each layer."""
    argument = "layers"
    """Of the subclass, which chooses them."""
    num_vectors = 0
    """How many leading eigenvectors are needed."""
    measurement: ActivationMeasurement | None

    def __init__(self, layers: str | Sequence[str] | None, request: ActivationRequest, prefix: str) -> None:
        check_patterns(layers=layers)
        super().__init__(request, prefix)
        self.layers = layers
        self.request = request
        self._has_checked_widths = False

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(layers=self.layers, stage=self.stage, prefix=self.prefix)

    @override
    def keys(self) -> list[str]:
        keys = [f"{self.kind}/{name}/{quantity}" for name in self.names for quantity in self.quantities]
        return [*keys, f"{self.kind}/failed"]

    @override
    def settings(self) -> dict[str, Any]:
        return super().settings() | {"layers": [] if self.measurement is None else self.measurement.layers}

    def looks_at(self) -> list[Band]:
        """The bands of ranks that are of use to it only as a whole."""
        return []

    def choose_layers(self, module: nn.Module) -> dict[str, nn.Module]:
        """Modules to measure, by name; raises ValueError for a pattern that matches nothing, or no stack of blocks."""
        return resolve_layers(module, self.layers, self.argument)

    def choose_again(self, module: nn.Module) -> dict[str, nn.Module]:
        """The same choice of a module that may have changed since: what is left of it, and what it means besides."""
        return resolve_layers_again(module, self.layers, self.names)

    def check_widths(self, widths: dict[str, int]) -> None:
        """Refuse, by a ValueError, settings that do not fit the layers, as soon as their widths are known."""

    @override
    def watch(self, module: nn.Module) -> list[str]:
        layers = self.choose_layers(module)
        check_one_mask(module, self.layers, self.request.mask)
        assert self.measurement is not None
        self.measurement.watch(layers, self.num_vectors, lambda: self._watch_again(module), self.looks_at())
        self._has_checked_widths = False
        return list(layers)

    def _watch_again(self, module: nn.Module) -> dict[str, nn.Module]:
        found = self.choose_again(module)
        joined = self.join_names([name for name in found if name not in self.names])
        return {name: layer for name, layer in found.items() if name in self.names or name in joined}

    @override
    def follow(self, module: nn.Module) -> None:
        assert self.measurement is not None
        # Of all callbacks on a measurement the first takes it.
        note, self.measurement.note = self.measurement.note, None
        if note is not None:
            rank_zero_warn(f"{type(self).__name__} {note}")

    def warn_of(self, spectrum: Spectrum, band: Band) -> None:
        """Warn where the exponent of a band, or its error bar, is not known."""
        exponent = spectrum.exponent(band)
        if spectrum.failure is not None or exponent.reason is None:
            return
        if self.is_widened(spectrum) and spectrum.is_cut_by_dtype(band):
            return
        # With one group nobody asked for error bars.
        if self.request.num_groups > 1 or isnan(exponent.value):
            self.warn(f"at step {spectrum.step}, {spectrum.name}: NaN, because {exponent.reason}")

    def is_widened(self, spectrum: Spectrum) -> bool:
        """Whether the next report will resolve what this one does not, of which one warning has spoken."""
        return self.measurement is not None and spectrum.name in self.measurement.widened

    def rows_in_words(self) -> str:
        """What rows were, for the heading of a table; empty before any."""
        rows = {} if self.measurement is None else self.measurement.rows
        words = list(dict.fromkeys(rows[name] for name in self.names if name in rows))
        reading = "" if self.measurement is None or self.stage != "validate" else self.measurement.reading
        which = f", {reading}" if reading else ""
        return f"; rows: {'; '.join(words[:3])}{', ...' if len(words) > 3 else ''}{which}" if words else ""

    @override
    def check_early(self) -> None:
        refusals = {} if self.measurement is None else self.measurement.refusals
        # Later, when reports have been made, a layer that changes costs its report only.
        if not self._has_checked_widths and (refused := [refusals[name] for name in self.names if name in refusals]):
            raise ValueError(refused[0])
        widths = {} if self.measurement is None else self.measurement.widths
        if widths and not self._has_checked_widths:
            self._has_checked_widths = True
            self.check_widths({name: widths[name] for name in self.names if name in widths})
