"""The command line as users meet it: from YAML, with their own model in the current folder, and with mistakes."""

import json
import os
import shlex
import subprocess
import sys
from importlib.metadata import distribution, version
from pathlib import Path

import pytest

import _lightning_spectral_command as script
from lightning_spectral import cli
from tests.documents import documented_command
from tests.limit import LIMIT
from tests.runs.made_up import made_up, when

REPOSITORY = Path(__file__).parents[1]

USER_CODE = """
import torch
from lightning.pytorch import LightningModule, LightningDataModule
from torch import nn


class Mine(LightningModule):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3)))

    def training_step(self, batch, batch_idx):
        return self.blocks(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-2)


class MyData(LightningDataModule):
    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randn(64, 16), batch_size=16)
"""

QUIET = [
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.max_epochs=1",
]


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(USER_CODE)
    monkeypatch.chdir(tmp_path)
    # Lightning 2.6 calls names that jsonargparse has since renamed; not for us to mend.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setattr(sys, "argv", ["lightning-spectral"])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return tmp_path


def error_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main([*words])
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_unknown_command_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of(capsys, "train")
    assert message == (
        "lightning-spectral: error: command must be one of probe, fit, validate, test, predict, show, compare, "
        "forecast, report, watch, got 'train': see lightning-spectral --help"
    )


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_help_lists_the_commands(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(words)
    assert (
        "commands: probe, fit, validate, test, predict, show, compare, forecast, report, watch"
        in capsys.readouterr().out
    )


def test_callback_is_added_to_a_model_in_the_current_folder(user_folder: Path) -> None:
    program, *words = documented_command("fit --model mine.Mine")
    settings = [
        "--trainer.callbacks.every_n_steps=4",
        "--trainer.callbacks.num_groups=2",
        "--trainer.max_steps=4",
        *QUIET,
    ]
    run = subprocess.run(
        [str(Path(sys.executable).with_name(program)), *words, *settings],
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert run.returncode == 0, run.stderr
    assert "blocks.2" in run.stdout
    assert "alpha_tail" in run.stdout
    assert list(user_folder.glob("lightning_logs/version_0/events.out.tfevents.*"))


def test_a_model_in_the_current_folder_is_probed(user_folder: Path) -> None:
    program, *words = documented_command("probe --model mine.Mine")
    run = subprocess.run(
        [str(Path(sys.executable).with_name(program)), *words],
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert run.returncode == 0, run.stderr
    assert "Mine: one training batch on cpu, nothing trained" in run.stdout
    assert "16 (axis 0, the length on which tensors of two or more axes agree)" in run.stdout
    assert "self-check  passed" in run.stdout
    assert "blocks.2" in run.stdout
    assert not list(user_folder.glob("lightning_logs"))


def test_a_probe_is_json_for_programs(user_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loader = USER_CODE[USER_CODE.index("    def train_dataloader") :]
    (user_folder / "mine.py").write_text(
        USER_CODE.replace("class MyData", loader + "\n\nclass MyData").replace(
            "        return self.blocks", "        print('mine')\n        return self.blocks"
        )
    )
    words = ["--model=mine.Mine", "--trainer.accelerator=cpu", "--layers=[blocks.0.0]", "--num_samples=32", "--json"]
    cli.main(["probe", *words])
    found = json.loads(capsys.readouterr().out)
    assert [layer["name"] for layer in found["layers"]] == ["blocks.0.0"]
    assert found["layers"][0]["shape"] == [16, 16]
    assert found["samples"]["count"] == 16
    assert found["loss"]["is_mean"] == "passed"
    assert [engine["method"] for engine in found["engines"] if engine["works"]] == ["vmap", "hooks", "loop"]
    assert found["costs"][1]["reads"].startswith("32 samples x 768 numbers")


CONFIG = """
seed_everything: 1
model: {class_path: mine.Mine}
data: {class_path: mine.MyData}
trainer:
  accelerator: cpu
  max_steps: 3
  logger:
    class_path: lightning.pytorch.loggers.TensorBoardLogger
    init_args: {save_dir: never}
  callbacks:
    - class_path: ActivationSpectrum
      init_args: {layers: blocks.1, num_tokens: 48}
    - class_path: lightning_spectral.GradientSpectrum
      init_args: {parameters: blocks.2.0.weight, num_samples: 24, num_groups: 2}
ckpt_path: null
"""


def test_a_probe_goes_by_a_configuration_and_its_callbacks(
    user_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (user_folder / "config.yaml").write_text(CONFIG)
    cli.main(["probe", "--config=config.yaml", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [layer["name"] for layer in found["layers"]] == ["blocks.1"]
    assert [parameter["name"] for parameter in found["parameters"]] == ["blocks.2.0.weight"]
    assert [cost["reads"][:10] for cost in found["costs"]] == ["48 rows of", "24 samples"]
    cli.main(["probe", "--config=config.yaml", "--layers=blocks.0", "--json"])
    assert json.loads(capsys.readouterr().out)["layers"][0]["name"] == "blocks.0"
    assert not (user_folder / "never").exists()
    error = error_of(capsys, "probe", "--config=config.yaml", "--ckpt_path=some.ckpt")
    assert error == "lightning-spectral: error: ckpt_path must be None for a probe, got 'some.ckpt': leave it away"
    error = error_of(capsys, "probe", "--config=config.yaml", "--num_samples=1")
    assert error == "lightning-spectral: error: num_samples must be at least 2, got 1: 512 are usual"


def test_a_model_may_bring_its_own_loaders(user_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loader = USER_CODE[USER_CODE.index("    def train_dataloader") :]
    (user_folder / "mine.py").write_text(USER_CODE.replace("class MyData", loader + "\n\nclass MyData"))
    settings = ["--trainer.callbacks.every_n_steps=2", "--trainer.callbacks.num_groups=1", "--trainer.logger=false"]
    cli.main(["fit", "--model=mine.Mine", "--trainer.callbacks+=ActivationSpectrum", *settings, *QUIET])
    assert "blocks.2" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:TailForecaster makes no forecast")
@pytest.mark.filterwarnings("ignore:.*all its values are exactly zero")  # projections before any step
@pytest.mark.parametrize("command", cli.COMMANDS)
def test_example_runs_with_overrides(command: str, user_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, _, config, path, *overridden = documented_command("examples/nanogpt.yaml")
    overrides = {
        "model.num_layers": 2,
        "model.width": 32,
        "data.batch_size": 2,
        "data.path": str(REPOSITORY / "lightning_spectral"),
        "trainer.max_steps": 2,
        "trainer.val_check_interval": 2,
        "trainer.limit_val_batches": 2,
        "trainer.limit_test_batches": 2,
        "trainer.limit_predict_batches": 2,
    }
    words = [f"--{key}={value}" for key, value in overrides.items()]
    cli.main([command, config, str(REPOSITORY / path), *overridden, *words, *QUIET])
    printed = capsys.readouterr().out
    assert ("gpt.blocks.1" in printed) == (command == "fit")


@pytest.mark.parametrize(
    "command",
    [
        documented_command("lightning-spectral compare"),
        documented_command("lightning-spectral show"),
        documented_command("--plot forecast.png"),
    ],
)
def test_runs_are_read_as_the_readme_says(
    command: list[str], user_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        for name, tokens, exponent in (("baseline", 100, 1.0), ("rope", 50, 1.5)):
            path = Path("runs", name, f"version_{number}")
            made_up(path, tokens + number, 1.0, exponent + 0.01 * number, about=when(number))
        for batch_size in (8, 64):  # of a loss that was above 2 and came below
            path = Path("sweep", f"batch_{batch_size}-seed_{number}")
            made_up(path, 10 * batch_size + number, 1.0, exponent=1 + batch_size / 100)
            history = path / "spectra" / "history.csv"
            history.write_text(history.read_text().replace(",2.0\n", ",2.1\n"))
    _, *words = shlex.split(" ".join(command))
    cli.main(words)
    printed = capsys.readouterr().out
    assert "gpt.blocks.3" in printed
    assert ("verdict  both: learning-side gain (activation-led" in printed) == ("compare" in words)
    assert ("alpha_tail    " in printed) == ("forecast" in words)
    assert list(user_folder.glob("*.png"))


def test_logs_of_other_tools_are_read_as_the_readme_says(user_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    family = "NanoGPT-3f9a01c2"
    for batch in (4.0, 8.0, 16.0):
        made_up(Path("sweep", f"{batch:.0f}"), 3000 * batch, 1.0, family=family, batch_tokens=256 * batch)
        history = Path("sweep", f"{batch:.0f}", "spectra/history.csv")
        history.write_text(history.read_text().replace(",2.0\n", ",2.1\n"))
    for batch, num in ((32, 3), (64, 3), (24, 2)):
        folder = Path("csv_logs", f"version_{batch}")
        folder.mkdir(parents=True)
        losses = ((2, 3.0), (4, 2.2), (9, 1.9))[:num]
        (folder / "metrics.csv").write_text("step,val_loss\n" + "".join(f"{step},{loss}\n" for step, loss in losses))
        (folder / "hparams.yaml").write_text(f"batch_size: {batch}\n")
    _, *words = shlex.split(" ".join(documented_command("csv_logs")))
    cli.main(words)
    printed = capsys.readouterr().out
    assert f"{family}: 5 runs came down to 2 in" in printed
    assert "csv_logs/version_24 has no spectra: read from CSVLogger" in printed
    assert "tokens: batch_size*256 = 6,144 a step" in " ".join(printed.split())


def test_console_scripts_and_module_are_one_command() -> None:
    scripts = {entry.name: entry.load() for entry in distribution("lightning-spectral").entry_points}
    assert scripts == {"lightning": script.lightning, "lightning-spectral": cli.main}
    assert script.COMMANDS == cli.ALL_COMMANDS
    output = subprocess.check_output([sys.executable, "-m", "lightning_spectral", "--version"], text=True)
    assert output == f"lightning-spectral {version('lightning-spectral')}\n"


def test_who_reads_no_further_and_a_terminal_of_few_letters_are_no_tracebacks(tmp_path: Path) -> None:
    run = made_up(tmp_path / "läuf_β", 100, 30)
    command = shlex.join([sys.executable, "-m", "lightning_spectral", "show", str(run)])
    for line, coding in ((f"{command} --json | head -c 1", "utf-8"), (command, "ascii")):
        environment = os.environ | {"PYTHONIOENCODING": coding, "PYTHONUTF8": "0"}
        done = subprocess.run(["bash", "-c", line], capture_output=True, env=environment, timeout=LIMIT)
        assert done.stderr == b""
        assert done.returncode == 0
        assert done.stdout


OTHER_PROGRAM = """
import json, sys


def main_cli():
    print(json.dumps({"argv": sys.argv, "torch": "torch" in sys.modules}))
    return 7
"""


@pytest.fixture
def other_package(tmp_path: Path) -> Path:
    """A folder with a stand-in for lightning-sdk: its metadata, under the name it writes there, and its program."""
    metadata = tmp_path / "lightning_sdk-2026.10.13.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.4\nName: lightning_sdk\nVersion: 2026.10.13\n")
    (metadata / "entry_points.txt").write_text(
        "[console_scripts]\nlightning = lightning_sdk:main_cli\nlightning-sdk = lightning_sdk:main_cli\n"
    )
    (tmp_path / "lightning_sdk.py").write_text(OTHER_PROGRAM)
    return tmp_path


def run_script(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Call `lightning` as pip writes it, with what a folder holds installed beside this package."""
    path = folder / "lightning"
    path.write_text("import sys\nfrom _lightning_spectral_command import lightning\nsys.exit(lightning())\n")
    return subprocess.run(
        [sys.executable, str(path), *words],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(REPOSITORY)])} | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.parametrize(
    "words", [["login"], ["job", "run", "--name", "a b", "--", "fit"], ["--install"]], ids=" ".join
)
def test_a_foreign_command_is_handed_on_unchanged(words: list[str], other_package: Path) -> None:
    run = run_script(other_package, *words)
    assert json.loads(run.stdout) == {"argv": [str(other_package / "lightning"), *words], "torch": False}
    assert run.returncode == 7
    assert run.stderr == (
        f"lightning-spectral: {words[0]!r} is not one of probe, fit, validate, test, predict, show, compare, "
        "forecast, report, watch: "
        "handed on to lightning-sdk\n"
    )


def test_completion_is_handed_on_in_silence(other_package: Path) -> None:
    run = run_script(other_package, _LIGHTNING_COMPLETE="bash_complete")
    assert json.loads(run.stdout)["argv"] == [str(other_package / "lightning")]
    assert (run.returncode, run.stderr) == (7, "")


def test_a_foreign_package_that_does_not_load_is_one_line(other_package: Path) -> None:
    (other_package / "lightning_sdk.py").write_text("import not_there\n")
    run = run_script(other_package, "login")
    assert run.returncode == 2
    assert run.stderr == (
        "lightning-spectral: error: command 'login' is for lightning-sdk, but its lightning_sdk:main_cli cannot be "
        "imported, got ModuleNotFoundError: No module named 'not_there': reinstall lightning-sdk\n"
    )


def test_ours_wins_over_a_command_of_the_same_name(other_package: Path) -> None:
    run = run_script(other_package, "forecast", "--help")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("usage: lightning-spectral forecast")
    assert run.stderr == ""


@pytest.mark.parametrize(("words", "says_more"), [([], True), (["--help"], True), (["--version"], False)])
def test_help_names_the_other_package(
    words: list[str],
    says_more: bool,
    other_package: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cli.main(words)
    ours = capsys.readouterr().out
    monkeypatch.syspath_prepend(other_package)
    monkeypatch.setattr(sys, "argv", ["lightning", *words])
    script.lightning()
    more = "\nlightning-sdk is installed: `lightning` hands all other commands on to it, see lightning-sdk --help.\n"
    assert capsys.readouterr().out == ours + more * says_more


def test_nothing_is_handed_on_where_there_is_no_other_package(
    other_package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Lightning's own of 2.5.0 does not count.
    metadata = other_package / "lightning_sdk-2026.10.13.dist-info"
    (metadata / "METADATA").write_text("Metadata-Version: 2.4\nName: lightning\nVersion: 2.5.0\n")
    metadata.rename(other_package / "lightning-2.5.0.dist-info")
    monkeypatch.setattr(sys, "path", [str(other_package), str(REPOSITORY)])
    monkeypatch.setattr(sys, "argv", ["lightning", "login"])
    with pytest.raises(SystemExit) as stop:
        script.lightning()
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("lightning-spectral: error: command must be one of probe, fit, ")


def test_the_other_names_stay_ours(other_package: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "lightning_spectral", "login"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(other_package), str(REPOSITORY)])},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("lightning-spectral: error: command must be one of probe, fit, ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--trainer.callbacks.tail=[30,20]"],
            "tail must be two ascending ranks from 1, got (30, 20): write e.g. (1, 10)",
        ),
        (
            ["--trainer.callbacks.layers=blcks.0"],
            "layers='blcks.0' matches no layer: did you mean 'blocks.0', ",
        ),
        (
            ["--trainer.callbacks.tail=[3,99]"],
            "tail must end at or before rank 16, the last there is, got (3, 99): lower its end",
        ),
    ],
    ids=["band", "pattern", "width"],
)
def test_bad_input_is_one_line(
    words: list[str], message: str, user_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["fit", "--model=mine.Mine", "--data=mine.MyData", "--trainer.callbacks+=ActivationSpectrum"]
    error = error_of(capsys, *start, *words, "--trainer.logger=false", *QUIET)
    assert error.startswith(f"lightning-spectral: error: {message}")


def test_a_users_own_error_keeps_its_traceback(user_folder: Path) -> None:
    (user_folder / "mine.py").write_text(
        USER_CODE.replace("return self.blocks(batch).square().mean()", "raise ValueError('mine')")
    )
    with pytest.raises(ValueError, match=r"^mine$"):
        cli.main(["fit", "--model=mine.Mine", "--data=mine.MyData", "--trainer.logger=false", *QUIET])
