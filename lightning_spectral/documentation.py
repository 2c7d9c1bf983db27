"""Where the documentation stands, and its pages."""

DOCUMENTATION = "https://lightning-spectral.github.io/lightning-spectral/"


def page(name: str, anchor: str = "") -> str:
    """Address of a page, ``"reading-spectra"`` for example, or of a heading on it."""
    return f"{DOCUMENTATION}{name}/" + (f"#{anchor}" if anchor else "")
