"""Checks what `make package` built: sizes, contents, links, and that it works where nothing of the source tree is.

The fresh environment borrows what the package depends on from the one that this runs in, so that nothing is downloaded.
"""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

MOST_BYTES = 2_500_000
"""Of the wheel, and of the source distribution."""

IMPORT = """
from importlib.metadata import version
from pathlib import Path
import sys
import lightning_spectral
assert Path(lightning_spectral.__file__).is_relative_to(sys.prefix), lightning_spectral.__file__
assert lightning_spectral.__version__ == version("lightning-spectral") == sys.argv[1], lightning_spectral.__version__
from lightning_spectral.runs.bundled import bundled
assert len(bundled("bundled:tiny")) > 10
"""

FIT = """
fit --model NanoGPT --data TextData --trainer.max_steps 3 --trainer.limit_val_batches 1 --trainer.accelerator cpu
--trainer.callbacks+=ActivationSpectrum --trainer.callbacks.every_n_steps 3 --trainer.logger CSVLogger
--trainer.logger.save_dir logs
"""


def main(folder: Path) -> None:
    """Raise an error for anything that is not as it should be."""
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    for built in (wheel, source):
        size = built.stat().st_size
        assert size < MOST_BYTES, f"{built.name} must be below {MOST_BYTES:,} bytes, got {size:,}: see what is in it"
    check_contents(wheel, source)
    with tempfile.TemporaryDirectory() as place:
        check_installed(wheel, Path(place))
    sizes = ", ".join(f"{built.name} {built.stat().st_size / 1e6:.2f} MB" for built in (wheel, source))
    print(f"package: {sizes}; imported, fitted and probed in a fresh environment")


def check_contents(wheel: Path, source: Path) -> None:
    """Whatever lies in the package's folder is in both, data included."""
    folder = ROOT / "lightning_spectral"
    files = {
        path.relative_to(ROOT).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    } | {"_lightning_spectral_command.py"}
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(source) as archive:
        in_source = {name.partition("/")[2] for name in archive.getnames()}
    assert not files - in_wheel, f"missing in the wheel: {files - in_wheel}"
    missing = (files | {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff"}) - in_source
    assert not missing, f"missing in the source distribution: {missing}"
    metadata = zipfile.ZipFile(wheel).read(f"{'-'.join(wheel.name.split('-')[:2])}.dist-info/METADATA").decode()
    targets = re.findall(r"\]\(([^)\s]+)\)", metadata)
    relative = [target for target in targets if not target.startswith("https://")]
    assert targets, "no link in the description: is README.md in it?"
    assert not relative, f"links that lead nowhere on the package index: {relative}"
    foreign = {name for name in in_wheel if name.split("/")[0].split("-")[0] not in ("lightning_spectral",)}
    assert foreign == {"_lightning_spectral_command.py"}, f"not of the package, in the wheel: {foreign}"


def check_installed(wheel: Path, place: Path) -> None:
    """Import the installed package, ask it for help, train three steps with it and show them, outside of its tree."""
    environment = place / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python, scripts = environment / "bin" / "python", environment / "bin"
    site = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    Path(site.strip(), "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--ignore-installed"]
    subprocess.run([*pip, wheel], check=True)

    user_folder = place / "user"
    user_folder.mkdir()
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*words: str | Path) -> str:
        done = subprocess.run(words, cwd=user_folder, env=kept, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(map(str, words))}:\n{done.stdout}{done.stderr}"
        return done.stdout

    version = wheel.name.split("-")[1]
    run(python, "-c", IMPORT, version)
    command = scripts / "lightning-spectral"
    assert run(scripts / "lightning", "--version") == f"lightning-spectral {version}\n"
    assert "commands: " in run(command, "--help")
    assert "--model" in run(command, "probe", "--help")
    assert "alpha_tail" in run(command, *FIT.split())
    (record,) = user_folder.glob("logs/*/version_0/spectra/run.json")
    assert f'"lightning-spectral": "{version}"' in record.read_text()
    assert "open it in a browser" in run(command, "report", record.parents[1])
    assert "drawChart" in (user_folder / "report.html").read_text()


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
