"""The examples in docstrings run and print what they say."""

import doctest
import importlib
import pkgutil

import pytest

from lightning_spectral import functional, metrics, nanogpt, theory

MODULES = sorted(
    module.name
    for package in (functional, metrics, nanogpt, theory)
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_say(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_examples_are_found():
    attempted = sum(doctest.testmod(importlib.import_module(name)).attempted for name in MODULES)
    assert attempted >= 10
