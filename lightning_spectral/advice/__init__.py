"""What a finished run's numbers usually mean, said only of what lies beyond its floors."""

from lightning_spectral.advice.facts import (
    UNEQUAL,
    Alarmed,
    Awaited,
    BatchNoise,
    Drift,
    Drifted,
    Fact,
    Moved,
    Number,
    floor_of_fall,
)
from lightning_spectral.advice.rules import MOST, NO_SKILL, RULES, Sentence, sentences

__all__ = [
    "MOST",
    "NO_SKILL",
    "RULES",
    "UNEQUAL",
    "Alarmed",
    "Awaited",
    "BatchNoise",
    "Drift",
    "Drifted",
    "Fact",
    "Moved",
    "Number",
    "Sentence",
    "floor_of_fall",
    "sentences",
]
