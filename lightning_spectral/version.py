"""The version of this package, which a tree of its source has too, though nothing was installed."""

from importlib.metadata import PackageNotFoundError, version

SOURCE_TREE = "0+source"
"""What it is where only the source lies: no release."""


def _version() -> str:
    try:
        return version("lightning-spectral")
    except PackageNotFoundError:
        return SOURCE_TREE


__version__ = _version()
