"""``python -m lightning_spectral``, the same as the ``lightning-spectral`` command."""

from lightning_spectral.cli import main

if __name__ == "__main__":
    main()
