"""The commands on runs: one line for wrong arguments, JSON that any reader takes, and a file for each figure."""

import json
import re
from math import isclose
from pathlib import Path
from typing import Any

import pytest

from lightning_spectral import Run, compare
from lightning_spectral.runs.commands import COMMANDS, run_command
from tests.runs.made_up import LAYER, made_up

Printed = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four runs of each of two families, and one without spectra."""
    folder = tmp_path_factory.mktemp("made")
    for number in range(4):
        made_up(folder / f"f{number}", 100.0 + 10 * number, 1.0, 1 + number / 10, batch_tokens=2.0**number)
        made_up(folder / f"g{number}", 200.0 - 10 * number, 1.0, 1 + number / 10, family="G")
    for path in made_up(folder / "bare", 100.0, 1.0).rglob("*.npz"):
        path.unlink()
    return folder


@pytest.fixture
def inside(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    return made


def json_of(capsys: Printed, words: list[str]) -> Any:
    """What a command prints, and nothing else; NaN, which is no JSON, is refused."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    run_command([*words, "--json"])
    return json.loads(capsys.readouterr().out, parse_constant=refuse)


REQUIRED = "the following arguments are required"
WRONG = {
    "show, nothing": (["show"], f"{REQUIRED}: RUN: see lightning-spectral show --help"),
    "show, option": (["show", "f0", "--colour"], "unrecognized arguments: --colour: see lightning-spectral show"),
    "show, no value": (["show", "f0", "--plot"], "argument --plot: expected one argument: see lightning-spectral show"),
    "show, second missing": (["show", "f0", "gone"], "run must be a folder with a record, got 'gone'"),
    "show, kind": (["show", "f0", "--kind", "activation-train"], "kind must be one that Run('f0') has a report of"),
    "show, kind as JSON": (["show", "f0", "--kind", "weight", "--json"], "kind must be one that Run('f0') has"),
    "show, nothing to draw": (["show", "bare", "--plot", "a.png"], "kind must be one that Run('bare') has a report"),
    "compare, nothing": (["compare"], f"{REQUIRED}: BASE, VARIANT: see lightning-spectral compare --help"),
    "compare, three": (["compare", "f0", "f1", "f2"], "unrecognized arguments: f2: see lightning-spectral compare"),
    "compare, floor": (["compare", "f0", "f1", "--floor", "gone"], "run must be a folder with a record, got 'gone'"),
    "compare, NaN": (["compare", "f0", "f1", "--at-loss", "nan"], "at_loss must be a finite number, got nan"),
    "compare, ending": (["compare", "f0", "f1", "--plot", "a.xyz"], "plot must be a file that can be written, such"),
    "forecast, nothing": (["forecast"], f"{REQUIRED}: RUN, --target: see lightning-spectral forecast --help"),
    "forecast, target": (["forecast", "f*", "--target", "low"], "argument --target: invalid float value: 'low'"),
    "forecast, one bound": (["forecast", "f*", "--target", "1", "--tail", "3"], "argument --tail: expected 2"),
    "forecast, mixed": (["forecast", "f*", "--target", "1", "--tail", "1", "0.5"], "tail must be two ints (ranks) or"),
    "forecast, beyond": (["forecast", "f*", "--target", "1", "--tail", "0.5", "1.5"], "tail must be two ascending"),
    "forecast, negative": (["forecast", "f*", "--target", "1", "--tail", "-2", "-1"], "tail must be two ascending"),
    "forecast, words": (
        ["forecast", "f*", "--target", "1", "--tail", "low", "high"],
        "argument --tail: must be ranks or fractions, got 'low': see lightning-spectral forecast --help",
    ),
    "forecast, no digit": (
        ["forecast", "f*", "--target", "1", "--tail", "²", "3"],
        "argument --tail: must be ranks or fractions, got '²'",
    ),
    "forecast, at": (["forecast", "f*", "--target", "1", "--at"], "argument --at: expected at least one argument"),
    "forecast, too few": (
        ["forecast", "f0", "f1", "--target", "1"],
        "runs must be references enough: F: it needs 4 runs",
    ),
    "forecast, no spectra": (
        ["forecast", "bare", "--target", "1"],
        "runs must be references enough: F: it needs 4 runs that came down to 1, and has ",
    ),
    "forecast, by": (["forecast", "f*", "--target", "1", "--by", "x"], "argument --by: invalid choice: 'x'"),
}


@pytest.mark.parametrize(("words", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_one_line(inside: Path, capsys: Printed, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as raised:
        run_command(words)
    assert "\n" not in str(raised.value)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_the_command_and_its_options(command: str, capsys: Printed) -> None:
    with pytest.raises(SystemExit) as stop:
        run_command([command, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: lightning-spectral {command} ")
    for option in ("--json", "--plot FILE.png", *{"show": ["--kind"], "compare": ["--floor"]}.get(command, ["--at"])):
        assert option in printed
    assert "%%" not in printed


def test_show_gives_all_of_each_run_as_json(inside: Path, capsys: Printed) -> None:
    found = json_of(capsys, ["show", "f[01]", "bare"])["runs"]
    assert [run["path"] for run in found] == ["f0", "f1", "bare"]
    for facts in found:
        run = Run(facts["path"])
        assert facts["about"] == run.about
        assert facts["history"]["tokens"] == run.history.tokens.tolist()
        assert facts["history"]["train_loss"] == [None] * 6
        assert [(row["name"], row["step"]) for row in facts["spectra"]] == [
            (LAYER, step) for step in run.steps("activation")
        ]
    exponents = [row["alpha_tail"] for row in found[1]["spectra"]]
    assert all(isclose(exponent, 1.1) for exponent in exponents)


def test_a_series_is_shown_by_its_own_name(inside: Path, capsys: Printed) -> None:
    run_command(["show", "f0", "--kind", "activation-validate"])
    assert "activation-validate spectra, validate" in capsys.readouterr().out
    (facts,) = json_of(capsys, ["show", "f0", "--kind", "activation-validate"])["runs"]
    assert {row["kind"] for row in facts["spectra"]} == {"activation-validate"}


def test_a_run_without_spectra_is_shown(inside: Path, capsys: Printed) -> None:
    run_command(["show", "bare"])
    assert "val_loss 2.0000 to 0.5000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["show", "f0", "f1"], ["a.b.svg", "a.b-2.svg"]),
        (["compare", "f0", "f1"], ["a.b.svg"]),
        (["forecast", "f?", "g?", "--target", "1"], ["a.b.svg", "a.b-2.svg"]),
    ],
    ids=["show", "compare", "forecast"],
)
def test_each_figure_has_a_file(inside: Path, tmp_path: Path, capsys: Printed, words: list[str], names) -> None:
    json_of(capsys, [*words, "--plot", str(tmp_path / "a.b.svg")])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert all("<svg" in path.read_text() for path in tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:.* has runs of 2 settings")
def test_compare_takes_loss_and_floor(inside: Path, tmp_path: Path, capsys: Printed) -> None:
    words = ["compare", "f0", "f3"]
    alone = json_of(capsys, words)
    assert (alone["loss"], alone["verdict"]["kind"]) == (0.5, "unknown")
    found = json_of(capsys, [*words, "--at-loss", "1.0", "--floor", "f[12]"])
    expected = compare("f0", "f3", at_loss=1.0, floor="f[12]").as_dict()
    assert found["loss"] == 1.0
    assert found["verdict"] == expected["verdict"]
    assert found["run_floor"] == expected["run_floor"]
    assert isclose(found["gains"]["tokens"]["gain"], 100 / 130 - 1)
    # What was printed serves as a floor in its turn.
    run_command(["compare", "f[12]", "g0", "--json"])
    earlier = tmp_path / "earlier.json"
    earlier.write_text(capsys.readouterr().out)
    found = json_of(capsys, [*words, "--at-loss", "0.5", "--floor", str(earlier)])
    assert found["verdict"]["kind"] != "unknown"
    assert found["run_floor"]["runs"] == [str(inside / f"f{n}") for n in (0, 3, 1, 2)] + [str(inside / "g0")]


def test_forecast_takes_layer_band_and_tokens(inside: Path, capsys: Printed) -> None:
    words = ["forecast", "f?", "--target", "1", "--layer", LAYER, "--tail", "0.25", "1", "--at", "30", "60"]
    with pytest.raises(ValueError, match="do not mix them"):
        run_command(words)
    (found,) = json_of(capsys, ["1.0" if word == "1" else word for word in words])["families"]
    assert (found["family"], found["forecasts"], found["reason"]) == ("F", [], None)
    found = found["backtest"]
    assert (found["family"], found["layer"], found["band"]) == ("F", LAYER, [0.25, 1.0])
    assert [point["tokens"] for point in found["points"]] == [30.0, 60.0]
    assert found["tokens_to_target"] == pytest.approx([100, 110, 120, 130])
    assert found["batch_tokens"] == [1.0, 2.0, 4.0, 8.0]


def test_tables_come_out_for_each_family(inside: Path, capsys: Printed) -> None:
    run_command(["forecast", "f?", "g?", "bare", "--target", "1.0"])
    printed = capsys.readouterr().out
    assert re.findall(r"^([FG]): (\d) runs came down to 1 in (\d+) to (\d+) tokens", printed, re.M) == [
        ("F", "5", "100", "130"),
        ("G", "4", "170", "200"),
    ]
    assert "bare has no activation spectra: it serves by loss and batch alone" in printed
