"""Damage to a file, as a disk or a hand may do it."""

import random
from pathlib import Path


def change_bytes(rng: random.Random, file: Path) -> str:
    """Other bytes in some places; says what was done."""
    if not file.is_file():
        return "nothing"
    data = bytearray(file.read_bytes())
    for _ in range(rng.choice((1, 3, 30))):
        if data:
            data[rng.randrange(len(data))] = rng.randrange(256)
    file.write_bytes(data)
    return f"bytes of {file.name} changed"


def cut(rng: random.Random, file: Path) -> str:
    """One end alone, all of it twice, or a hole of zeros; says what was done."""
    if not file.is_file():
        return "nothing"
    data = file.read_bytes()
    at = rng.randrange(len(data) + 1)
    file.write_bytes(rng.choice((data[:at], data[at:], data + data, data[:at] + b"\0" * 50 + data[at:])))
    return f"{file.name} cut at {at}"
