"""The README and the pages of docs/ stay true: what they tell people to type works, what they point to is there."""

import ast
import importlib
import importlib.util
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

import lightning_spectral
from lightning_spectral import ActivationSpectrum, Run, cli
from tests.documents import PAGES, README, REPOSITORY, blocks, commands, name_of
from tests.models import LanguageModel, tiny_trainer, token_loader
from tests.runs.made_up import made_up, when

SITE = "https://lightning-spectral.github.io/lightning-spectral/"
MINE = "def cut(batch):\n    return [[sample] for sample in batch]\n"

RUN_ELSEWHERE = re.compile(r"^<!-- run by (tests/\S+) -->$", re.MULTILINE)
"""A page says so where another test, which names the page, runs its Python."""

pages = pytest.mark.parametrize("page", PAGES, ids=name_of)


def test_code_stands_at_line_7() -> None:
    assert "ActivationSpectrum" in README.read_text().splitlines()[6]


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 120


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of someone who reads: runs and logs under the names that pages use, and a module of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    Path("mine.py").write_text(MINE)
    for number in range(3):
        for name, tokens, exponent in (("baseline", 100, 1.0), ("rope", 50, 1.5)):
            path = Path("runs", name, f"version_{number}")
            made_up(path, tokens + number, 1.0, exponent + 0.01 * number, about=when(number))
        for size in (4, 8, 16):
            path = Path("sweep", f"batch_{size}-seed_{number}")
            made_up(path, 3000 * size + number, 1.0, exponent=1 + size / 100, batch_tokens=256 * size)
            history = path / "spectra" / "history.csv"
            history.write_text(history.read_text().replace(",2.0\n", ",2.1\n"))  # comes down to 2 on the way
    for number in range(6):
        folder = Path("csv_logs", f"version_{number}")
        folder.mkdir(parents=True)
        losses = [(4, 3.0), (9, 2.2), (15 + number, 1.9)]
        (folder / "metrics.csv").write_text("step,val_loss\n" + "".join(f"{step},{loss}\n" for step, loss in losses))
        (folder / "hparams.yaml").write_text(f"batch_size: {8 * (1 + number // 2)}\n")
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("trained")
    spectrum = ActivationSpectrum(every_n_steps=2, num_tokens=64, readout="network.logits", num_groups=1)
    logger = TensorBoardLogger(folder, version=0)
    torch.manual_seed(0)
    tiny_trainer(folder, callbacks=[spectrum], logger=logger, max_steps=2, log_every_n_steps=1).fit(
        LanguageModel(), token_loader(), token_loader(8)
    )
    return Run(logger.log_dir)


@pages
def test_python_runs(page: Path, reader: Path, request: pytest.FixtureRequest) -> None:
    """In one namespace a page, that of a reader who has imported the package and has a model, a batch and a run."""
    code = [block.text for block in blocks(page) if block.language == "python"]
    if elsewhere := RUN_ELSEWHERE.search(page.read_text()):
        assert page.name in (REPOSITORY / elsewhere[1]).read_text()
        return
    if not code:
        return
    namespace: dict[str, Any] = {name: getattr(lightning_spectral, name) for name in lightning_spectral.__all__}
    namespace |= {"lightning_spectral": lightning_spectral, "torch": torch}
    if page != README:  # whose code stands for itself
        namespace |= {"module": LanguageModel(), "batch": next(iter(token_loader()))}
        namespace |= {"run": request.getfixturevalue("trained"), "step": 2}
        namespace["batch"]["attention_mask"] = torch.ones(4, 8, dtype=torch.int64)
    else:
        namespace = {}
    for text in code:
        exec(compile(text, name_of(page), "exec"), namespace)


@pages
def test_blocks_are_of_a_kind_that_a_test_runs(page: Path) -> None:
    assert {block.language for block in blocks(page)} <= {"python", "bash", ""}


RUNS = ("show", "compare", "forecast", "report")
RUN_BY_TESTS_OF_THE_COMMAND_LINE = re.findall(
    r'documented_command\("([^"]+)"\)', (REPOSITORY / "tests/test_cli.py").read_text()
)


@pytest.mark.parametrize("command", sorted({line for page in PAGES for line in commands(page)}))
def test_commands_work(command: str, reader: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is run here, or by the test that names it; those that install, download and build are looked up."""
    if any(part in command for part in RUN_BY_TESTS_OF_THE_COMMAND_LINE):
        return
    match shlex.split(command):
        case ["lightning-spectral", name, *words] if name in RUNS:
            cli.main([name, *words])
            assert capsys.readouterr().out
        case ["lightning" | "lightning-spectral", name, "--config", path, *_]:
            assert name in cli.ALL_COMMANDS
            assert_a_test_names(Path(path).name)
            assert (REPOSITORY / path).exists()
        case ["lightning-spectral", name, *_] if name in cli.ALL_COMMANDS:
            assert_a_test_names(f'"{name}"')
        case ["tensorboard", "--logdir", _]:
            assert importlib.util.find_spec("tensorboard")
        case ["make", target]:
            assert f"\n{target}:" in (REPOSITORY / "Makefile").read_text()
        case ["pip", "install", package]:
            assert_is_known(package)
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module)
            assert_a_test_names(module)
        case ["python", path, *_]:
            assert path.startswith("examples/")
            ast.parse((REPOSITORY / path).read_text())
        case _:
            pytest.fail(f"no test knows how to run: {command}")


def assert_a_test_names(text: str) -> None:
    assert any(text in path.read_text() for path in (REPOSITORY / "tests").rglob("*.py") if path != Path(__file__)), (
        text
    )


def assert_is_known(package: str) -> None:
    """Ours, with an extra that there is, or one that the tests install."""
    project = (REPOSITORY / "pyproject.toml").read_text()
    name, _, extra = package.removesuffix("]").partition("[")
    assert f'\nname = "{name}"\n' in project or f'\n  "{name}>' in project
    assert not extra or f"\n{extra} = [" in project


def test_ci_runs_the_two_commands_of_the_readme() -> None:
    ci = (REPOSITORY / ".ci/run").read_text()
    made = [line for line in commands(README) if line.startswith("make")]
    assert made == ["make demo", "make test"]
    assert all(line in ci for line in made)


@pages
def test_commands_in_the_text_name_modules_that_are_there(page: Path) -> None:
    for module in re.findall(r"python -m ([\w.]+)", page.read_text()):
        assert importlib.util.find_spec(module), module


@pages
def test_every_link_and_picture_is_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if target.startswith(SITE):
            file = REPOSITORY / "docs" / (path.removeprefix(SITE).rstrip("/") + ".md" if path != SITE else "index.md")
        elif target.startswith("https://"):
            continue
        else:
            file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


def anchors(page: Path) -> set[str]:
    """Those of its headings, and those that stand there by name."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE):
        text, _, given = heading.partition(" {#")
        words = re.sub(r"[^\w\s-]", "", text).strip().lower()
        found.add(given.rstrip("}") if given else re.sub(r"[-\s]+", "-", words))
    return found


@pytest.mark.parametrize("name", ["functional", "metrics", "nanogpt", "runs", "theory"])
def test_the_reference_has_every_public_name(name: str) -> None:
    package = importlib.import_module(f"lightning_spectral.{name}")
    page = REPOSITORY / "docs/api" / f"{'functions' if name == 'functional' else name}.md"
    shown = re.findall(r"^::: [\w.]+\.(\w+)$", page.read_text(), re.MULTILINE)
    assert set(package.__all__) <= set(shown)


def test_every_picture_is_light_and_used() -> None:
    texts = "".join(page.read_text() for page in PAGES)
    for picture in (REPOSITORY / "docs/pictures").glob("*.png"):
        assert f"pictures/{picture.name}" in texts, picture
        assert picture.stat().st_size < 150_000, picture
