"""Colours of a page can be read and told apart, in light and dark, by those who see fewer of them as well."""

import re
from itertools import combinations

import numpy as np
import pytest

from lightning_spectral.reporting.page import asset

LIGHT, DARK = (
    dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))
    for block in re.findall(r":root(?:\[data-theme=\"dark\"\])? \{(.*?)\}", asset("page.css"), re.DOTALL)
)
themes = pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])

# Machado, Oliveira, Fernandes, A physiologically-based model for simulation of color vision deficiency (2009).
VISION = {
    "all": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]]
    ),
}


def linear(colour: str) -> np.ndarray:
    """Red, green and blue in linear light."""
    parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """Of WCAG 2.1: 4.5 for text, 3 for what is drawn."""
    low, high = sorted(float(linear(colour) @ (0.2126, 0.7152, 0.0722)) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def lab(light: np.ndarray) -> np.ndarray:
    """CIELAB, D65."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    ratios = to_xyz @ np.clip(light, 0, 1) / (0.9505, 1.0, 1.089)
    x, y, z = np.where(ratios > 0.008856, np.cbrt(ratios), 7.787 * ratios + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@themes
def test_text_is_legible(theme: dict[str, str]) -> None:
    for text in ("ink", "soft", "accent", "moved", "bad"):
        for ground in ("paper", "card"):
            assert contrast(theme[text], theme[ground]) >= 4.5, (text, ground)


@themes
def test_lines_stand_out(theme: dict[str, str]) -> None:
    for name in [f"c{i}" for i in range(6)] + [f"d{i}" for i in range(12)]:
        # Layers have their names beside them, and differ from each other by more than from the ground.
        assert contrast(theme[name], theme["card"]) >= (2.4 if name.startswith("d") else 3), name


@themes
@pytest.mark.parametrize("vision", VISION)
def test_runs_are_told_apart_whatever_colours_one_sees(theme: dict[str, str], vision: str) -> None:
    seen = [lab(VISION[vision] @ linear(theme[f"c{i}"])) for i in range(6)]
    distances = {pair: float(np.linalg.norm(seen[pair[0]] - seen[pair[1]])) for pair in combinations(range(6), 2)}
    assert distances[0, 1] > 40  # base and variant
    assert min(distances.values()) > 12, distances


@themes
def test_lightness_says_how_deep_a_layer_lies(theme: dict[str, str]) -> None:
    lightness = [lab(linear(theme[f"d{i}"]))[0] for i in range(12)]
    assert len(lightness) == 12
    steps = np.diff(lightness)
    assert (steps < 0).all() if theme is LIGHT else (steps > 0).all()
