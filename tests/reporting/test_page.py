"""A page holds what records hold: the numbers of Run, each gap with its reason, and nothing that would be fetched."""

import json
import re
from html.parser import HTMLParser
from math import isclose, isnan, log10
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_spectral import Run, compare, report
from lightning_spectral.functional.estimate import Spectrum
from lightning_spectral.functional.floor import js_floor, overlap_floor
from lightning_spectral.functional.powerlaw import power_law
from lightning_spectral.functional.spectrum import js_divergence
from lightning_spectral.functional.subspace import subspace_overlap
from lightning_spectral.reporting.commands import run_command
from tests.models import LENGTH
from tests.reporting.conftest import EVIL, REASON
from tests.runs.made_up import LAYER, made_up


class Page(HTMLParser):
    """What stands on a page: texts, elements with their attributes, and the data."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._inside = [""]
        self.source = path.read_text()
        self.feed(self.source)
        (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', self.source, re.DOTALL)
        self.data = json.loads(data, parse_constant=self.refuse)

    @staticmethod
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self._inside.append("")

    def handle_data(self, data: str) -> None:
        if self._inside[-1] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def page_of(runs: Any, folder: Path, **settings: Any) -> Page:
    return Page(report(runs, folder / "report.html", **settings))


def agrees(found: float | None, truth: float) -> bool:
    """Five digits are kept, and null stands for NaN."""
    return isnan(truth) if found is None else isclose(found, truth, rel_tol=6e-5, abs_tol=1e-12)


@pytest.mark.parametrize("kind", ["activation", "gradient", "weight"])
def test_numbers_are_those_of_the_run(kind: str, trained: Path, tmp_path: Path) -> None:
    run = Run(trained)
    series = page_of(trained, tmp_path).data["runs"][0]["series"][f"{kind}-validate"]
    assert series["step"] == run.steps(kind)
    assert series["tokens"] == [run.tokens_at(kind, step) for step in run.steps(kind)]
    assert [held["name"] for held in series["names"]] == run.names(kind)
    settings = run.settings(kind)
    for held in series["names"]:
        for index, step in enumerate(series["step"]):
            spectrum = run.spectrum(kind, held["name"], step)
            tail, head = (spectrum.exponent(tuple(settings[part])) for part in ("tail", "head"))
            truth = {"alpha_tail": tail.value, "alpha_tail_stderr": tail.stderr, "alpha_head": head.value}
            truth |= {"rankme": spectrum.rankme().value, "rankme_stderr": spectrum.rankme().stderr}
            for quantity, value in truth.items():
                column = held.get(quantity, [None] * len(series["step"]))
                assert agrees(column[index], value), (held["name"], step, quantity)
            assert_spectrum(held, index, spectrum)
            assert_line(held["lines"][index], spectrum, tuple(settings["tail"]))


def assert_spectrum(held: dict[str, Any], index: int, spectrum: Spectrum) -> None:
    assert held["ranks"] == list(range(1, len(spectrum.values) + 1))  # of few all are kept
    for rank, value in zip(held["ranks"], held["log_values"][index], strict=True):
        truth = float(spectrum.values[rank - 1])
        assert agrees(value, log10(truth) if truth > 0 else float("nan"))


def assert_line(lines: list[list[float]], spectrum: Spectrum, band: tuple[float, float]) -> None:
    """The drawn line is the least-squares one through the band."""
    law = power_law(spectrum.values, band)
    drawn = lines[1]
    if isnan(float(law.exponent)):
        assert drawn == []
        return
    low, high, first, last = drawn
    assert isclose((first - last) / log10(high / low), float(law.exponent), rel_tol=1e-3)
    ranks = np.arange(low, high + 1)
    fitted = np.polyfit(np.log10(ranks), np.log10(spectrum.values.numpy()[low - 1 : high]), 1)
    assert np.allclose([first, last], np.polyval(fitted, np.log10([low, high])), atol=1e-3)


def test_drift_is_what_head_drift_logs(trained: Path, tmp_path: Path) -> None:
    run = Run(trained)
    series = page_of(trained, tmp_path).data["runs"][0]["series"]["activation-validate"]
    for held in series["names"]:
        first, *others = (run.spectrum("activation", held["name"], step) for step in series["step"])
        assert held["overlap"][0] == 1
        assert held["js"][0] == 0
        for index, other in enumerate(others, start=1):
            assert agrees(held["overlap"][index], float(subspace_overlap(other.vectors, first.vectors)))
            assert agrees(held["overlap_floor"][index], float(overlap_floor(other, first)))
            assert agrees(held["js"][index], float(js_divergence(other.values, first.values)))
            assert agrees(held["js_floor"][index], float(js_floor(other, first)))


def test_history_noise_and_forecasts_are_there(trained: Path, tmp_path: Path) -> None:
    run = Run(trained)
    page = page_of(trained, tmp_path)
    (found,) = page.data["runs"]
    for name, column in run.history._asdict().items():
        kept = found["history"][name]
        assert len(kept) == len(column)
        assert all(agrees(one, float(truth)) for one, truth in zip(kept, column, strict=True))
    noise = found["series"]["gradient-validate"]["noise"]
    for index, step in enumerate(run.steps("gradient")):
        scale = run.noise_scale(step)
        for field, truth in {"value": scale.between, "low": scale.low, "high": scale.high}.items():
            shown = noise[field][index]
            assert shown == "inf" if truth == float("inf") else agrees(shown, truth)
    (forecast,) = found["forecasts"]
    assert (forecast["target"], forecast["monitor"]) == (2.0, "val_loss")
    assert forecast["tokens_to_target"] == [None, 500]
    assert (forecast["low"], forecast["high"]) == ([None, 300], [None, 900])


def test_the_noise_scale_is_in_tokens_where_a_sample_has_some(trained: Path, tmp_path: Path) -> None:
    run = Run(trained)
    found = page_of(trained, tmp_path)
    assert found.data["runs"][0]["tokens_per_sample"] == LENGTH
    assert "tokens 80%" in found.text or "not seen 80%" in found.text
    assert f"the batch is {4 * LENGTH}" in found.text
    del run.about["batch_samples"]
    found = page_of(run, tmp_path)
    assert found.data["runs"][0]["tokens_per_sample"] is None
    assert "the batch is" not in found.text


def test_the_first_screen_says_what_the_run_is_and_how_it_stands(trained: Path, tmp_path: Path) -> None:
    run, text = Run(trained), page_of(trained, tmp_path).text
    losses = run.history.with_loss()[1]
    assert f"val_loss {losses[-1]:.4g} from {losses[0]:.4g}; lowest {losses.min():.4g}" in text
    last = [run.spectrum("activation", name, run.steps("activation")[-1]) for name in run.names("activation")]
    tails = [one.exponent((0.125, 0.5)).value for one in last]
    assert f"tail exponent {np.mean(tails):.3g}" in text
    shares = [one.rankme().value / len(one.values) for one in last]
    assert f"RankMe of width {np.mean(shares):.0%}" in text
    num_spectra = sum(len(run.names(kind)) * len(run.steps(kind)) for kind in run.kinds)
    assert f"failed 0 of {num_spectra}" in text
    assert "to val_loss 2 500 tokens" in text


def test_advice_is_shown_with_its_link_if_that_is_one(trained: Path, tmp_path: Path) -> None:
    page = page_of(trained, tmp_path)
    assert f"The tail fell {EVIL}." in page.text
    links = [attributes.get("href") for tag, attributes in page.tags if tag == "a"]
    assert "https://example.org/tail" in links
    assert not [link for link in links if link and link.startswith("javascript")]


def test_a_gap_has_its_reason(failed: Path, tmp_path: Path) -> None:
    page = page_of(failed, tmp_path)
    (held,) = page.data["runs"][0]["series"]["activation-validate"]["names"]
    assert held["alpha_tail"][1] is None
    assert held["log_values"][1] == []
    assert held["why"]["1"] == {"all": REASON}
    assert f"no spectrum of {LAYER} at step 20: {REASON}" in page.text
    assert "failed 1 of 3" in page.text


def test_what_comes_from_runs_is_no_html(failed: Path, trained: Path, tmp_path: Path) -> None:
    for path in (failed, trained):
        page = page_of(path, tmp_path)
        assert "<script>alert" not in page.source
        scripts = [attributes for tag, attributes in page.tags if tag == "script"]
        assert scripts == [{"type": "application/json", "id": "data"}, {}]


def test_nothing_is_fetched(trained: Path, tmp_path: Path) -> None:
    page = page_of(trained, tmp_path)
    loaded = [(tag, a) for tag, a in page.tags if "src" in a or (tag == "link" and a.get("href") != "data:,")]
    assert loaded == []
    assert not re.search(r"@import|url\((?!#)|fetch\(|XMLHttpRequest|import\(", page.source)
    assert "default-src 'none'" in page.source


def test_two_arguments_are_the_sides_of_compare(sides: Path, tmp_path: Path) -> None:
    groups = [str(sides / "base" / "*"), str(sides / "variant" / "*")]
    page, truth = page_of(groups, tmp_path), compare(*groups)
    assert truth.verdict.kind == "both"
    assert truth.verdict.text in page.text
    assert page.data["comparison"]["verdict"] == truth.verdict.text
    assert agrees(page.data["comparison"]["gains"][0]["gain"], truth.gains["tokens"].gain)
    assert [run["side"] for run in page.data["runs"]] == [0, 0, 0, 1, 1, 1]
    at_loss = page_of(groups, tmp_path, at_loss=1.0)
    assert at_loss.data["comparison"]["loss"] == 1


def test_other_numbers_of_arguments_are_no_sides(sides: Path, tmp_path: Path) -> None:
    every = [sides / "base" / "0", sides / "variant" / "0", sides / "variant" / "1"]
    for runs in ([str(sides / "*" / "*")], every):
        page = page_of(runs, tmp_path)
        assert page.data["comparison"] is None
        assert {run["side"] for run in page.data["runs"]} == {None}
        assert "Runs side by side" in page.text
    with pytest.raises(ValueError, match=r"^at_loss must be left out but for two sides, got 1\.0 for 3 entries$"):
        page_of(every, tmp_path, at_loss=1.0)
    with pytest.raises(ValueError, match=r"^floor must be left out but for two sides, got array\(.*\) for 3 entries$"):
        page_of(every, tmp_path, floor=np.eye(3))


def test_sides_that_do_not_compare_are_shown_with_the_reason(sides: Path, trained: Path, tmp_path: Path) -> None:
    page = page_of([sides / "base" / "0", trained], tmp_path)
    assert "no comparison" in page.text
    assert page.data["comparison"]["refused"].startswith("runs must have been measured alike")
    assert len(page.data["runs"]) == 2


def test_runs_stand_where_the_slider_is_at_equal_tokens(sides: Path, tmp_path: Path) -> None:
    page = page_of([sides / "base" / "0", sides / "variant" / "0"], tmp_path)
    (choice,) = page.data["choices"]
    tokens = [position["tokens"] for position in choice["positions"]]
    assert tokens == sorted({share * size for size in (100, 50) for share in (0.25, 0.5, 0.75, 1, 1.5, 2)})
    picks = {position["tokens"]: position["picks"] for position in choice["positions"]}
    assert picks[12.5] == [-1, 0]
    assert picks[25] == [0, 1]
    assert picks[200] == [5, 5]


def test_logs_of_other_tools_have_their_losses(log: Path, tmp_path: Path) -> None:
    page = page_of(log, tmp_path)
    assert page.data["choices"] == []
    assert page.data["runs"][0]["history"]["val_loss"] == [3.0, 2.2, 1.9]
    assert "val_loss 1.9 from 3" in page.text
    assert "read from tool: CSVLogger" in page.text


def test_of_many_reports_some_have_spectra_and_all_have_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_spectral.reporting.page.MOST_SHOWN", 3)
    monkeypatch.setattr("lightning_spectral.reporting.page.LEAST_SHOWN", 3)
    page = page_of(made_up(tmp_path / "run", 100.0, 1.0), tmp_path)
    series = page.data["runs"][0]["series"]["activation-validate"]
    assert series["shown"] == [0, 2, 5]
    assert len(series["names"][0]["log_values"]) == 3
    assert None not in series["names"][0]["alpha_tail"]
    assert len(page.data["choices"][0]["positions"]) == 3
    assert "spectra and drift of 3 of 6 reports" in page.text


WRONG = {
    "nothing": (["report"], "the following arguments are required: RUN: see lightning-spectral report --help"),
    "missing": (["report", "gone"], "run must be a folder with a record, got 'gone'"),
    "a folder": (["report", "run", "-o", "run"], "path must be a file, such as report.html, got 'run': a folder"),
    "nowhere": (["report", "run", "-o", "gone/a.html"], "path must be a file that can be written, such as report.html"),
    "no sides": (["report", "run", "--at-loss", "1"], "at_loss must be left out but for two sides, got 1.0 for 1 "),
    "NaN": (["report", "run", "run", "--at-loss", "nan"], "at_loss must be a finite number, got nan"),
}


@pytest.mark.parametrize(("words", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made_up(Path("run"), 100.0, 1.0)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as raised:
        run_command(words)
    assert "\n" not in str(raised.value)
    assert not Path("report.html").exists()


@pytest.mark.parametrize("runs", [None, 5, True, {}, {"a": 1}, b"run", iter(["run"])], ids=lambda runs: str(type(runs)))
def test_what_names_no_runs_is_refused(runs: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^runs must be a path, a pattern or a list of them, got ") as raised:
        report(runs, tmp_path / "report.html")
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("runs", [[], (), [[]], ["run", []]], ids=repr)
def test_no_runs_are_refused(runs: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made_up(Path("run"), 100.0, 1.0)
    with pytest.raises(ValueError, match=r"^runs must name at least one run, got (\[\]|\(\)): give a log directory$"):
        report(runs)


def test_the_command_says_what_it_wrote(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run_command(["report", str(trained)])
    assert re.fullmatch(r"report\.html: 0\.\d\d MB, open it in a browser\n", capsys.readouterr().out)
    assert Page(Path("report.html")).data["runs"][0]["path"] == str(trained)
