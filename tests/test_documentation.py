"""The address of the documentation stands in one place, and the package's own description has the same."""

import re
from pathlib import Path

import pytest

from lightning_spectral.advice import RULES
from lightning_spectral.documentation import DOCUMENTATION, page

ROOT = Path(__file__).parents[1]


def test_pages_and_headings_have_addresses() -> None:
    assert DOCUMENTATION == "https://lightning-spectral.github.io/lightning-spectral/"
    assert page("runs") == "https://lightning-spectral.github.io/lightning-spectral/runs/"
    assert page("runs", "compare") == "https://lightning-spectral.github.io/lightning-spectral/runs/#compare"


def test_the_description_of_the_package_has_the_same() -> None:
    found = re.search(r'^Documentation = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    if found is None:
        pytest.skip("the package has no address of its documentation yet")
    assert found[1] == DOCUMENTATION


def test_every_rule_leads_to_a_heading() -> None:
    source = ROOT / "docs" / "reading-spectra.md"
    if not source.exists():
        pytest.skip("there is no such page yet")
    text = source.read_text()
    for rule in RULES:
        words = rule.anchor.replace("-", " ")
        assert f"#{rule.anchor}" in text or f"## {words}" in text.lower(), rule.anchor
