"""What the files of a run's reports hold: names and tokens, looked up once each, and spectra."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_spectral.functional.estimate import Spectrum
from lightning_spectral.runs.kinds import KINDS
from lightning_spectral.runs.noise import NoiseScale, names_of_gradients, read_noise
from lightning_spectral.runs.readout import read_readout
from lightning_spectral.runs.record import Report
from lightning_spectral.runs.record_checks import check_step, tokens_of
from lightning_spectral.runs.safe_files import Arrays, open_arrays
from lightning_spectral.theory import Readout

Layout = dict[str, dict[str, tuple[str, ...]]]
"""Fields of a report's file by kind and name."""


class ReportFiles:
    """Reads the files of reports; ValueError for one that is broken.

    A file is opened once for all that is asked for together, and what it holds is remembered, but for the numbers.
    """

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[float, Layout]] = {}
        self._layouts: dict[tuple[str, ...], Layout] = {}

    def tokens(self, report: Report) -> float:
        """Training tokens at a report."""
        return self._look(report)[0]

    def names(self, report: Report, kind: str) -> Collection[str]:
        """Layers or parameters of a kind in a report, in order."""
        return self._look(report)[1].get(kind, {})

    def spectra(
        self, report: Report, kind: str, names: Collection[str] | None, without: Collection[str]
    ) -> dict[str, Spectrum]:
        """Spectra of a kind in a report, None for those of all names; fields in ``without`` are not read."""
        row, spectra = KINDS[kind], {}
        with _arrays(report) as arrays:
            for name, fields in self._see(report.path, arrays).get(kind, {}).items():
                if names is None or name in names:
                    found = {field: arrays[f"{kind}/{name}/{field}"] for field in fields if field not in without}
                    where: dict[str, Any] = {"name": name, "step": report.step, "tokens": self._seen[report.path][0]}
                    spectra[name] = Spectrum.from_arrays(
                        found, row.values, row.count, corrects_bias=row.corrects_bias, **where
                    )
        return spectra

    def noise(self, report: Report) -> dict[str, NoiseScale]:
        """The noise scale of each parameter in a report of gradients."""
        with _arrays(report) as arrays:
            return {name: read_noise(arrays, [name]) for name in names_of_gradients(arrays)}

    def noise_of_all(self, report: Report) -> NoiseScale:
        """That of all its parameters together."""
        with _arrays(report) as arrays:
            return read_noise(arrays, names_of_gradients(arrays))

    def readout(self, report: Report) -> Readout:
        """What the model's last layer could still take off the loss."""
        with _arrays(report) as arrays:
            return read_readout(arrays)

    def _look(self, report: Report) -> tuple[float, Layout]:
        if report.path not in self._seen:
            with _arrays(report) as arrays:
                self._see(report.path, arrays)
        return self._seen[report.path]

    def _see(self, path: Path, arrays: Arrays) -> Layout:
        if path not in self._seen:
            files = tuple(arrays)
            if files not in self._layouts:  # reports of one run mostly hold the same
                self._layouts[files] = _layout(files)
            self._seen[path] = tokens_of(arrays["tokens"]), self._layouts[files]
        return self._seen[path][1]


def _layout(files: Sequence[str]) -> Layout:
    found: dict[str, dict[str, list[str]]] = {}
    for key in files:
        part, _, rest = key.partition("/")
        name, _, field = rest.rpartition("/")
        if part in KINDS and name:
            found.setdefault(part, {}).setdefault(name, []).append(field)
    return {
        part: {name: tuple(fields) for name, fields in names.items() if KINDS[part].values in fields}
        for part, names in found.items()
    }


@contextmanager
def _arrays(report: Report) -> Iterator[Arrays]:
    """The arrays of a report; whatever is wrong with its file is told in one line."""
    try:
        with open_arrays(report.path) as arrays:
            if "step" in arrays:  # which old records lack
                check_step(arrays["step"], report.step)
            yield arrays
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"run has a broken record: {str(report.path)!r} cannot be read ({reason}): restore it or remove it"
        ) from error
