"""Studies of what the spectra say, with their plans written down before the first run."""
