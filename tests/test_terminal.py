"""Tables as they stand on a terminal, and in a log file."""

import math

import pytest

from lightning_spectral.terminal import (
    console,
    new_table,
    number,
    one_line,
    print_advice,
    print_table,
    show_interval,
    show_number,
    with_error,
)


@pytest.mark.parametrize(
    ("value", "digits", "shown"),
    [(1234567.0, 0, "1,234,567"), (0.12345, 3, "0.123"), (-0.5, 1, "-0.5"), (math.nan, 2, "-"), (math.inf, 1, "inf")],
)
def test_numbers(value: float, digits: int, shown: str) -> None:
    assert show_number(value, digits) == shown


def test_first_and_last_report_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    columns = {"alpha": with_error("alpha", 2), "rows": number("rows", 0)}
    first = {"step": 100, "rows": {"b.0.weight": {"alpha": 1.5, "alpha_stderr": 0.25, "rows": 4096.0}}}
    last = {"step": 200, "rows": {"b.0.weight": {"alpha": math.nan, "alpha_stderr": math.nan, "rows": 0.0}}}
    print_table("a title", "layer", columns, first, last)
    printed = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert printed[0] == ["a", "title"]
    assert printed[1] == ["layer", "step", "alpha", "rows"]
    assert printed[3:5] == [["b.0", "100", "1.50", "+/-", "0.25", "4,096"], ["200", "-", "+/-", "-", "0"]]
    assert (
        " ".join(word for line in printed[5:] for word in line) == "each name ends in .weight, which is left out here"
    )
    print_table("a title", "layer", columns, first, first)
    assert capsys.readouterr().out.count("b.0") == 1


@pytest.mark.parametrize("names", [["b.0.weight", "b.0.bias"], ["b.0"], ["weight", "b.0.weight"]], ids=str)
def test_names_stand_whole_unless_all_are_weights(capsys: pytest.CaptureFixture[str], names: list[str]) -> None:
    report = {"step": 1, "rows": {name: {"rows": 1.0} for name in names}}
    print_table("", "parameter", {"rows": number("rows", 0)}, report, report)
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines() if line.split()[-1:] == ["1"]] == names
    assert "left out" not in printed


@pytest.mark.parametrize(
    ("interval", "shown"),
    [
        ((20.4, 9.1, 44.0), "20 (9.1..44)"),
        ((20.4, 9.1, math.inf), "20 (> 9.1)"),
        ((math.inf, 9.1, math.inf), "> 9.1"),
        ((math.inf, 0.0, math.inf), "not resolved"),
        ((20.4, 0.0, math.inf), "not resolved"),
        ((1.2, 0.0, 3.4), "1.2 (0.0..3.4)"),
        ((20.4, math.nan, math.nan), "20"),
        ((math.nan, math.nan, math.nan), "-"),
    ],
)
def test_an_interval_says_what_it_holds(interval: tuple[float, float, float], shown: str) -> None:
    assert show_interval(*interval) == shown


def test_advice_is_folded_and_its_addresses_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    url = f"https://example.org/{'x' * 200}/#here"
    print_advice([("word " * 50 + "[end]", url), ("short", "y")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "what moved beyond its floors, and what that usually means"
    assert f"  {url}" in lines
    folded = [line for line in lines if "word" in line]
    assert [line[:2] for line in folded] == ["- ", *["  "] * (len(folded) - 1)]
    assert all(len(line) <= 120 for line in folded)
    assert " ".join(" ".join(folded).split()) == "- " + "word " * 50 + "[end]"
    print_advice([])
    assert capsys.readouterr().out == ""


def test_a_log_file_is_wide_enough_for_whole_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert console().width == 120
    table = new_table("", ["name"], ["number"])
    table.add_row("x" * 200, "123,456,789")
    console().print(table)
    assert "123,456,789" in capsys.readouterr().out


def test_what_would_command_the_terminal_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    table = new_table("\x1b[2Jtitle", ["[red]name[/red]"], ["number"])
    table.add_row("[/] :smile: \x1b]0;x\x07", "1")
    console().print(table)
    console().print("two\nlines\r\x9b2J")
    printed = capsys.readouterr().out
    assert "\\x1b[2Jtitle" in printed
    assert "[red]name[/red]" in printed
    assert "[/] :smile: \\x1b]0;x\\x07" in printed
    assert "two\nlines\\r\\x9b2J" in printed
    assert one_line(" a\n b\x1b[0m\n") == "a b\\x1b[0m"
