"""How long a test waits for other processes."""

LIMIT = 1200.0
"""Seconds. A healthy run takes a few, on a crowded machine minutes, and one that fails ends by itself, at once: only
what hangs is still there after this long."""
