"""The table of kinds: what is logged, recorded and compared under each; and the names that are made of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Kind:
    """One kind of quantity; what it has none of is None or empty."""

    noun: str
    """What a quantity of it belongs to: heading of tables."""
    series: str
    """The kind whose measurement records it."""
    values: str = ""
    """Field of a record that holds a spectrum's values."""
    count: str | None = None
    """Field of a record that holds the rows behind them."""
    corrects_bias: bool = False
    """See :class:`lightning_spectral.functional.Spectrum`."""
    must_agree: tuple[str, ...] = ()
    """Settings without which two runs' spectra do not compare."""
    edges: tuple[float, float] = (0.0, 0.0)
    """Outer edges of histograms of log10 values. Fixed, so that steps and runs compare bin by bin."""

    @property
    def value(self) -> str:
        """What a spectrum consists of, in words: ``"singular value"`` for example."""
        return self.values.removesuffix("s").replace("_", " ")

    @property
    def is_compared(self) -> bool:
        """Whether runs are compared by it."""
        return bool(self.must_agree)


KINDS = {
    "activation": Kind(
        "layer",
        series="activation",
        values="eigenvalues",
        count="num_tokens",
        corrects_bias=True,
        must_agree=("stage", "layers", "num_tokens", "normalize", "mask", "channel_dim", "dataloader_idx"),
        # Float32 products resolve 1e-7 beside an eigenvalue of 1; those of RMS-normalised rows sum to the width.
        edges=(-7.0, 4.0),
    ),
    "gradient": Kind(
        "parameter",
        series="gradient",
        values="singular_values",
        count="num_samples",
        must_agree=("stage", "parameters", "num_samples", "loss_reduction", "dataloader_idx"),
        # Norms are about 1 in small models and 1e-3 in large ones; values of one matrix span two or three decades.
        edges=(-6.0, 2.0),
    ),
    "weight": Kind("parameter", series="gradient", values="singular_values"),
    "drift": Kind("layer", series="activation"),
    "forecast": Kind("layer", series="activation"),
    "readout": Kind("head", series="readout"),
}


def setting_of(settings: Mapping[str, Any], name: str) -> Any:
    """A setting of a measurement as its record has it; a loader that is not said is the first."""
    return settings.get(name, 0 if name == "dataloader_idx" else None)


class Series(NamedTuple):
    """One measurement's reports in a record."""

    kind: str
    stage: str
    number: int = 1
    """Of several of one kind and stage."""

    @property
    def text(self) -> str:
        """As it stands in a record: ``activation-validate``, ``activation-validate-2``."""
        return f"{self.kind}-{self.stage}" + (f"-{self.number}" if self.number > 1 else "")

    @classmethod
    def parse(cls, text: str) -> "Series | None":
        """The inverse of ``text``; None for what is no series."""
        kind, _, rest = text.partition("-")
        stage, _, number = rest.partition("-")
        series = cls(kind, stage, int(number) if number.isdigit() else 1)
        return series if stage and series.text == text else None


class Key(NamedTuple):
    """One quantity of a run: of a spectrum, of a kind of spectra, or of the run itself."""

    quantity: str
    kind: str = ""
    name: str = ""
    """Layer or parameter."""

    @property
    def text(self) -> str:
        """As it stands in a comparison's JSON: ``activation/blocks.0/js``, ``activation/js``, ``tokens``."""
        return "/".join(part for part in (self.kind, self.name, self.quantity) if part)

    @classmethod
    def parse(cls, text: str) -> "Key":
        """The inverse of ``text``."""
        rest, _, quantity = text.rpartition("/")
        kind, _, name = rest.partition("/")
        return cls(quantity, kind, name)
