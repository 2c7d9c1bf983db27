"""An example, run as its user would run it, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_example(name: str, *words: str | Path, **environment: str | Path) -> list[str]:
    """The lines that it printed; it has ended well, and nothing of ours warned.

    Args:
        name: Of the file in ``examples/``, without its ending.
        words: On its command line.
        environment: Beside this process's own; this tree's package is used, whichever is installed.
    """
    done = subprocess.run(
        [sys.executable, f"examples/{name}.py", *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | {key: str(value) for key, value in environment.items()},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "lightning_spectral/" not in done.stderr  # where a warning of ours would say that it comes from
    return done.stdout.splitlines()
