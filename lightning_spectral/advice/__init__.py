"""What a finished run's numbers usually mean, said only of what lies beyond its floors."""

from lightning_spectral.advice.facts import (
    Alarmed,
    Awaited,
    BatchNoise,
    Drift,
    Drifted,
    Fact,
    Moved,
    Number,
    are_as_many,
    floor_of_fall,
)
from lightning_spectral.advice.rules import MOST, RULES, Sentence, sentences

__all__ = [
    "MOST",
    "RULES",
    "Alarmed",
    "Awaited",
    "BatchNoise",
    "Drift",
    "Drifted",
    "Fact",
    "Moved",
    "Number",
    "Sentence",
    "are_as_many",
    "floor_of_fall",
    "sentences",
]
