"""Docstrings are written with Sphinx's roles; this makes Markdown of them where the site is built."""

import inspect
import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|attr|mod):`~?([\w.]+)`")
FORMULA = re.compile(r":math:`([^`]+)`")
PAGE = re.compile(r"``docs/([\w-]+)\.md``")
EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)
DISPLAY = re.compile(r"^( *)\.\. math::\n\n((?:\1 +[^\n]*\n?|\n)+)", re.MULTILINE)


class Roles(griffe.Extension):
    """Rewrites the docstring of every object that is documented."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)


def to_markdown(text: str) -> str:
    """A docstring with formulas between dollars, and names as code."""
    text = EXAMPLE.sub(r"\1Examples:", DISPLAY.sub(_display, text))
    text = FORMULA.sub(lambda found: f"${' '.join(found[1].split())}$", text)
    text = PAGE.sub(r"[\1](../\1.md)", text)
    return ROLE.sub(lambda found: f"`{_short(found[1])}`", text)


def _short(name: str) -> str:
    return name.rpartition(".")[2] if name.startswith("lightning_spectral") else name


def _display(found: re.Match[str]) -> str:
    formula = " ".join(inspect.cleandoc(found[2]).split())
    return f"{found[1]}$$\n{found[1]}{formula}\n{found[1]}$$\n\n"
