"""What all who watch a loop say at its end: what moved beyond its floors, and what that usually means."""

from collections.abc import Iterable
from typing import Protocol

from lightning_spectral.advice import Fact, Sentence, sentences
from lightning_spectral.recording import RunRecorder
from lightning_spectral.terminal import one_line, print_advice
from lightning_spectral.warner import Warner


class Knowing(Protocol):
    """Who may have something to say."""

    def facts(self) -> Iterable[Fact]:
        """What is known at the end of a run."""


def conclude(members: Iterable[Knowing], recorder: RunRecorder) -> None:
    """Keep in the record what can be said, and print it; nothing that goes wrong here fails a finished run."""
    warner = Warner("The conclusion of the run")
    facts: list[Fact] = []
    for member in members:
        try:
            facts += member.facts()
        except Exception as error:
            warner.warn(f"leaves out what {type(member).__name__} knows: {error!r}")
    try:
        found = [Sentence(one_line(text), url) for text, url in sentences(facts)]
        recorder.describe(advice=[sentence._asdict() for sentence in found])
        print_advice(found)
    except Exception as error:
        warner.warn(f"could not be told: {error!r}")
