"""A page in a real browser, on a phone and on a desk: the slider moves, numbers follow, and nothing sticks out."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_spectral import Run, report
from tests.chromium import Chromium
from tests.runs.made_up import LAYER

WIDTHS = (390, 1400)

TAIL = "document.querySelector('#readout td[data-quantity=\"tail exponent\"]').textContent"


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    found = Chromium()
    yield found
    found.close()


@pytest.fixture(scope="module")
def page(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report(trained, tmp_path_factory.mktemp("page") / "report.html")


def move_slider(browser: Chromium, position: int) -> None:
    browser.run(f"(() => {{ const slider = document.getElementById('step'); slider.value = {position}; "
                "slider.dispatchEvent(new Event('input', { bubbles: true })); })()")  # fmt: skip


def assert_whole(browser: Chromium, path: Path, width: int) -> None:
    """Nothing sticks out of the screen, nothing went wrong, and nothing was fetched but the page."""
    assert browser.run("document.documentElement.scrollWidth") <= width
    sticking = browser.run(
        "[...document.querySelectorAll('body *')].filter((one) => one.getBoundingClientRect().right > innerWidth + 1 "
        "&& !one.closest('.scroll, svg, .skip')).map((one) => one.outerHTML.slice(0, 99))"
    )
    assert sticking == []
    assert browser.problems == []
    assert browser.urls == [path.resolve().as_uri()]


def shown_of(run: Run, name: str, step: int) -> str:
    """What stands under the slider, by the run itself."""
    exponent = run.spectrum("activation", name, step).exponent((0.125, 0.5))
    return f"{exponent.value:.3f} ± {exponent.stderr:.3f}"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_slider_moves_and_numbers_follow(
    width: int, dark: bool, browser: Chromium, page: Path, trained: Path
) -> None:
    run = Run(trained)
    browser.open(page, width, dark=dark)
    name = run.names("activation")[-1]
    steps = run.steps("activation")
    assert browser.run("document.getElementById('name').value") == name
    assert browser.run(TAIL) == shown_of(run, name, steps[-1])
    before = browser.run("document.querySelector('#spectrum path').getAttribute('d')")
    curve = "[...document.querySelectorAll('#spectrum path')].map((one) => one.getAttribute('d')).join()"
    drawn = browser.run(curve)
    move_slider(browser, 1)
    assert browser.run("document.getElementById('at').textContent").startswith(f"step {steps[1]}, ")
    assert browser.run("document.getElementById('step').getAttribute('aria-valuetext')").startswith(f"step {steps[1]}")
    assert browser.run(TAIL) == shown_of(run, name, steps[1])
    assert browser.run(curve) != drawn
    assert before == browser.run("document.querySelector('#spectrum path').getAttribute('d')")  # the first report stays
    assert_whole(browser, page, width)


def test_keys_move_the_slider(browser: Chromium, page: Path, trained: Path) -> None:
    run = Run(trained)
    steps = run.steps("activation")
    browser.open(page, 390)
    browser.run("document.getElementById('step').focus()")
    at = "document.getElementById('at').textContent"
    browser.press("Home")
    assert browser.run(at).startswith(f"step {steps[0]},")
    browser.press("ArrowRight")
    assert browser.run(at).startswith(f"step {steps[1]},")
    browser.press("End")
    assert browser.run(at).startswith(f"step {steps[-1]},")


def test_the_cursor_of_all_charts_goes_with_the_slider(browser: Chromium, page: Path) -> None:
    browser.open(page, 1400)
    where = (
        "[...document.querySelectorAll('#loss .cursor, #numbers .cursor')].map((one) => Number(one.getAttribute('x1')))"
    )
    ends = browser.run(where)
    move_slider(browser, 0)
    starts = browser.run(where)
    assert len(starts) == 4
    assert all(start < end for start, end in zip(starts, ends, strict=True))


def choose(browser: Chromium, select: str, value: str) -> None:
    browser.run(f"(() => {{ const one = document.getElementById({json.dumps(select)}); "
                f"one.value = {json.dumps(value)}; one.dispatchEvent(new Event('change')); }})()")  # fmt: skip


@pytest.mark.parametrize("width", WIDTHS)
def test_other_spectra_layers_and_axes_are_chosen(width: int, browser: Chromium, page: Path, trained: Path) -> None:
    run = Run(trained)
    browser.open(page, width)
    choose(browser, "series", "gradient-validate")
    names = browser.run("[...document.getElementById('name').options].map((one) => one.value)")
    assert names == run.names("gradient")
    assert not browser.run("document.getElementById('noise-section').hidden")
    assert browser.run("document.getElementById('drift-section').hidden")
    choose(browser, "name", names[0])
    exponent = run.spectrum("gradient", names[0], run.steps("gradient")[-1]).exponent((0.125, 0.5))
    assert browser.run(TAIL).startswith(f"{exponent.value:.3f}")
    choose(browser, "axis", "seconds")
    assert "seconds of training" in browser.run("document.getElementById('loss').textContent")
    browser.run("document.getElementById('log').click()")
    assert_whole(browser, page, width)


def test_the_theme_is_that_of_the_machine_until_it_is_changed(browser: Chromium, page: Path) -> None:
    theme = "document.documentElement.dataset.theme"
    browser.open(page, 1400, dark=True)
    assert browser.run(theme) == "dark"
    browser.run("document.getElementById('theme').click()")
    assert browser.run(theme) == "light"
    assert browser.run("document.getElementById('theme').getAttribute('aria-pressed')") == "false"


def test_a_report_that_failed_is_a_gap_with_its_reason(browser: Chromium, failed: Path, tmp_path: Path) -> None:
    path = report(failed, tmp_path / "report.html")
    browser.open(path, 390)
    move_slider(browser, 1)
    assert browser.run(TAIL) == "-"
    assert "Gram matrix is not finite" in browser.run("document.getElementById('why').textContent")
    gaps = browser.run("document.querySelector('#numbers-rankme path[fill=none]').getAttribute('d')")
    assert gaps.count("M") == 2  # two stretches, with nothing between
    assert browser.run("document.querySelector('#drift path[fill=none]').getAttribute('d')").count("M") == 2
    assert_whole(browser, path, 390)


@pytest.mark.parametrize("width", WIDTHS)
def test_two_sides_and_a_log_fit_the_screen(
    width: int, browser: Chromium, sides: Path, log: Path, tmp_path: Path
) -> None:
    path = report([str(sides / "base" / "*"), str(sides / "variant" / "*")], tmp_path / "sides.html")
    browser.open(path, width)
    move_slider(browser, 8)
    rows = browser.run("[...document.querySelectorAll('#readout tbody tr')].map((one) => one.cells.length)")
    assert len(rows) == 6
    assert "gain" in browser.run("document.getElementById('verdict').textContent")
    assert LAYER in browser.run("document.getElementById('name').value")
    assert_whole(browser, path, width)
    path = report(log, tmp_path / "log.html")
    browser.open(path, width)
    assert browser.run("document.getElementById('spectral').hidden")
    assert browser.run("document.querySelectorAll('#loss path').length") > 0
    assert_whole(browser, path, width)
