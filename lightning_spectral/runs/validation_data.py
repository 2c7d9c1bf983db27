"""Whether runs were validated on other data than each other, as far as fingerprints of their first samples tell."""

from collections.abc import Mapping
from typing import Any, NamedTuple

NUM_SAMPLES = 16
"""Samples of each loader, over all ranks, that a fingerprint is of."""


class ValidationData(NamedTuple):
    """What is known of the data that a run was validated on, by index of the loader."""

    fingerprints: Mapping[str, str] = {}
    """Hexadecimal digits; none where batches cannot be cut into samples, and of logs of other tools."""
    num_samples: Mapping[str, int] = {}
    """Of a validation run, over all ranks; none where nobody knows."""

    @classmethod
    def of(cls, about: Mapping[str, Any]) -> "ValidationData":
        """As the record of a run says it."""
        return cls(about.get("validation_data") or {}, about.get("validation_samples") or {})

    def as_facts(self) -> dict[str, Any]:
        """As :meth:`of` takes it."""
        return {"validation_data": dict(self.fingerprints), "validation_samples": dict(self.num_samples)}

    def of_loader(self, index: int) -> "ValidationData":
        """That of one loader, as if there were no other."""
        name = str(index)
        fingerprints = {"0": self.fingerprints[name]} if name in self.fingerprints else {}
        num_samples = {"0": self.num_samples[name]} if name in self.num_samples else {}
        return ValidationData(fingerprints, num_samples)

    def is_other(self, than: "ValidationData") -> bool:
        """Whether a loader that both had is known to have had other samples; what is not known is not other."""
        both = self.fingerprints.keys() & than.fingerprints.keys()
        return any(self.fingerprints[one] != than.fingerprints[one] and self._looks_alike(than, one) for one in both)

    def _looks_alike(self, than: "ValidationData", loader: str) -> bool:
        """Whether fingerprints are of as many samples: of fewer, where a limit leaves no more, they always differ."""
        if loader not in self.num_samples or loader not in than.num_samples:
            return True
        mine, theirs = (min(one.num_samples[loader], NUM_SAMPLES) for one in (self, than))
        return mine == theirs
