"""Figures hold what they are of: as many panels and lines as layers and runs, numbers of the spectra, none of NaN."""

import shutil
from collections.abc import Iterator
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import _pylab_helpers
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.spatial.distance import jensenshannon

from lightning_spectral import Run, compare, forecast
from lightning_spectral.runs.figures import COLORS, comparison_figure, evolution_figure, save
from lightning_spectral.runs.forecast_figures import forecast_figure
from tests.runs.made_up import LAYER, made_up


@pytest.fixture(autouse=True)
def no_pyplot_state() -> Iterator[None]:
    """No figure is left to pyplot, which would keep and, in a notebook, show it."""
    before = list(_pylab_helpers.Gcf.figs)
    yield
    assert list(_pylab_helpers.Gcf.figs) == before


def change(folder: Path, update: Any, steps=range(100, 700, 100)) -> Path:
    """Change arrays of a run's reports, given number and arrays of each."""
    for index, step in enumerate(steps):
        path = folder / "spectra" / f"activation-validate-{step:09d}.npz"
        arrays = dict(np.load(path))
        np.savez(path, **(arrays | update(index, arrays)))
    return folder


def layers(folder: Path, num: int, **kwargs: Any) -> Path:
    """A run that measured so many layers, each twice as large as the one before."""
    start = f"activation/{LAYER}/"

    def more(_: int, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        parts = {key.removeprefix(start): value for key, value in arrays.items() if key.startswith(start)}
        return {
            f"activation/b.{n}/{field}": value * 2.0**n if field.startswith(("eig", "leave")) else value
            for n in range(1, num)
            for field, value in parts.items()
        }

    return change(made_up(folder, 100.0, 1.0, **kwargs), more)


def visible(figure: Figure) -> list[Axes]:
    """Panels that are seen, without colour bars."""
    return [axes for axes in figure.axes if axes.get_visible() and axes.get_label() != "<colorbar>"]


def data_of(axes: Axes) -> list[np.ndarray]:
    return [np.asarray(line.get_xydata()) for line in axes.lines]


@pytest.mark.parametrize(
    ("num", "panels", "grid"),
    [(1, 1, (1, 1)), (2, 2, (1, 2)), (3, 3, (1, 3)), (4, 4, (2, 2)), (5, 5, (2, 3)), (6, 6, (2, 3)), (9, 6, (2, 3))],
)
def test_each_layer_has_a_panel_and_each_report_a_line(
    tmp_path: Path, num: int, panels: int, grid: tuple[int, int]
) -> None:
    run = Run(layers(tmp_path / "a", num))
    figure = evolution_figure(run, "activation")
    seen = visible(figure)
    assert len(seen) == panels
    assert seen[0].get_subplotspec().get_gridspec().get_geometry() == grid
    names = run.names("activation")
    assert {axes.get_title() for axes in seen} <= set(names)
    assert (seen[0].get_title(), seen[-1].get_title()) == (names[0], names[-1])
    for axes in seen:
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        for step, line in zip(run.steps("activation"), data_of(axes), strict=True):
            np.testing.assert_array_equal(line[:, 0], np.arange(1, 33))
            np.testing.assert_array_equal(line[:, 1], run.spectrum("activation", axes.get_title(), step))


def test_colours_and_words_tell_steps_and_kind(tmp_path: Path) -> None:
    figure = evolution_figure(Run(made_up(tmp_path / "a", 100, 1)), "activation-validate")
    (panel,) = visible(figure)
    assert len({line.get_color() for line in panel.lines}) == 6
    (bar,) = [axes for axes in figure.axes if axes.get_label() == "<colorbar>"]
    assert [text.get_text() for text in bar.get_yticklabels()] == ["100", "200", "300", "400", "500", "600"]
    assert figure.get_supylabel() == "eigenvalue"
    assert figure.get_suptitle().startswith("activation-validate spectra of ")


def test_zeros_and_failures_are_not_drawn(tmp_path: Path) -> None:
    """A logarithmic axis has no place for a zero; a failed report has none at all."""
    key = f"activation/{LAYER}/eigenvalues"

    def spoil(index: int, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if index == 1:
            return {key: np.full(32, nan), f"activation/{LAYER}/failure": np.asarray("no convergence")}
        return {key: np.where(np.arange(32) < 20, arrays[key], 0.0)} if index == 2 else {}

    run = Run(change(made_up(tmp_path / "a", 100, 1), spoil))
    (panel,) = visible(evolution_figure(run, "activation"))
    assert [len(line) for line in data_of(panel)] == [32, 20, 32, 32, 32]
    assert all((line > 0).all() for line in data_of(panel))


def test_a_single_report_and_one_that_failed_are_drawn_too(tmp_path: Path) -> None:
    folder = made_up(tmp_path / "a", 100, 1)
    for path in sorted((folder / "spectra").glob("*.npz"))[1:]:
        path.unlink()
    save(evolution_figure(Run(folder), "activation"), tmp_path / "one.png")
    change(folder, lambda *_: {f"activation/{LAYER}/failure": np.asarray("no convergence")}, [100])
    figure = evolution_figure(Run(folder), "activation")
    save(figure, tmp_path / "none.png")
    assert data_of(visible(figure)[0]) == []


@pytest.fixture
def sides(tmp_path: Path) -> tuple[list[Path], list[Path]]:
    base = [layers(tmp_path / f"b{n}", 2, exponent=1 + n / 10) for n in range(2)]
    return base, [layers(tmp_path / f"v{n}", 2, exponent=1.5 + n / 10) for n in range(3)]


def test_a_comparison_is_four_panels_of_all_runs(sides: tuple[list[Path], list[Path]]) -> None:
    comparison = compare(*sides, at_loss=1.1)
    figure = comparison_figure(comparison)
    by_tokens, by_seconds, spectra, drift = visible(figure)
    runs = [*comparison.base, *comparison.variant]
    colors = [COLORS["base"]] * 2 + [COLORS["variant"]] * 3
    for axes, quantity in ((by_tokens, "tokens"), (by_seconds, "seconds")):
        *lines, matched = axes.lines
        assert [line.get_color() for line in lines] == colors
        for run, line in zip(runs, lines, strict=True):
            np.testing.assert_array_equal(line.get_xdata(), getattr(run.history, quantity))
            np.testing.assert_array_equal(line.get_ydata(), run.history.val_loss)
        assert list(matched.get_ydata()) == [1.1, 1.1]
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert labels == ["base (2 runs)", "variant (3 runs)", "matched at 1.100"]
    for run, line in zip(runs, data_of(spectra), strict=True):
        values = np.asarray(run.at_loss(1.1).spectrum("activation", "b.1"))
        np.testing.assert_allclose(line[:, 1], values / values.sum())
    (head,) = spectra.patches
    assert (head.get_x(), head.get_width()) == (1, 9)
    assert [len(line) for line in data_of(drift)] == [5] * 5
    assert figure.get_suptitle().replace("\n", " ") == comparison.verdict.text
    assert spectra.get_title().startswith("b.1 at the matched loss: JS ")


def test_drift_is_the_divergence_from_the_first_report_that_has_values(tmp_path: Path) -> None:
    """SciPy's distance is the root of the divergence. Gradients behind a zero-initialised layer are zero at first."""
    exponents = [1.0, 1.0, 1.2, 1.5, 1.9, 2.4]
    key = f"activation/{LAYER}/eigenvalues"

    def turn(index: int, _: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {key: np.arange(1, 33.0) ** -exponents[index] * (index > 0)}

    folders = [change(made_up(tmp_path / name, 100, 1), turn) for name in "bv"]
    _, _, _, drift = visible(comparison_figure(compare(*folders)))
    spectra = [np.arange(1, 33.0) ** -alpha for alpha in exponents]
    expected = [jensenshannon(spectrum, spectra[1]) ** 2 for spectrum in spectra[2:]]
    for line in data_of(drift):
        np.testing.assert_allclose(line[:, 0], [75, 100, 150, 200])
        np.testing.assert_allclose(line[:, 1], expected, rtol=1e-6)


def test_of_layers_of_which_the_last_was_left_out_another_is_drawn(sides: tuple[list[Path], list[Path]]) -> None:
    change(sides[0][0], lambda *_: {"activation/b.1/eigenvalues": np.zeros(32)})
    comparison = compare(*sides)
    assert [key.name for key in comparison.left_out] == ["b.1"]
    _, _, spectra, drift = visible(comparison_figure(comparison))
    assert spectra.get_title().startswith(f"{LAYER} at the matched loss")
    assert drift.get_title() == f"drift of {LAYER}"
    assert len(spectra.lines) == len(drift.lines) == 5


def test_spectra_narrower_than_the_default_head_are_drawn_without_it(tmp_path: Path) -> None:
    def narrow(_: int, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {key: value[..., :6] for key, value in arrays.items() if value.ndim}

    folders = [change(made_up(tmp_path / name, 100, 1), narrow) for name in "bv"]
    _, _, spectra, _ = visible(comparison_figure(compare(*folders)))
    assert [line.shape for line in data_of(spectra)] == [(6, 2), (6, 2)]
    assert len(spectra.patches) == 0


def test_without_a_second_report_there_is_no_drift_to_draw(tmp_path: Path) -> None:
    folders = [made_up(tmp_path / name, 100, 1) for name in "bv"]
    for path in tmp_path.rglob("*.npz"):
        if "400" not in path.name:
            path.unlink()
    figure = comparison_figure(compare(*folders))
    _, _, spectra, drift = visible(figure)
    assert [len(line) for line in data_of(spectra)] == [32, 32]
    assert [len(line) for line in data_of(drift)] == [0, 0]
    save(figure, tmp_path / "a.png")


def test_without_spectra_losses_are_drawn_alone(tmp_path: Path) -> None:
    folders = [made_up(tmp_path / name, 100, 1) for name in "bv"]
    for path in tmp_path.rglob("*.npz"):
        path.unlink()
    comparison = compare(*folders)
    figure = comparison_figure(comparison)
    assert len(visible(figure)) == 2
    assert "unknown" in visible(figure)[0].get_title()  # the run floor of one run a side
    save(figure, tmp_path / "losses.png")


ALPHAS = [1.4, 0.8, 1.0, 1.15, 0.9, 1.7]


def law(alpha: float) -> float:
    return 1000 * float(np.exp(0.8 * alpha))


@pytest.fixture
def family(tmp_path: Path) -> str:
    for number, alpha in enumerate(ALPHAS):
        folder = made_up(tmp_path / "runs" / str(number), law(alpha), 1.0, alpha, batch_tokens=2.0**number)
        spectra = folder / "spectra"
        shutil.copy(spectra / "activation-validate-000000100.npz", spectra / "activation-validate-000000001.npz")
        change(folder, lambda *_: {"tokens": np.asarray(1.0)}, [1])
    return f"{tmp_path}/runs/*"


def test_loss_curves_are_drawn_with_the_forecasts_of_unfinished_runs(family: str, tmp_path: Path) -> None:
    new = made_up(tmp_path / "new", law(1.1), 1.0, 1.1, batch_tokens=3.0)
    history = new / "spectra/history.csv"
    history.write_text("\n".join(history.read_text().splitlines()[:4]) + "\n")
    (found,) = forecast([family, new], 1.0, by="tail")
    figure = forecast_figure(found)
    curves, truths = visible(figure)
    (one,) = found.forecasts
    assert one.value == pytest.approx(law(1.1), rel=1e-6)
    lines = data_of(curves)
    np.testing.assert_array_equal(lines[-3][:, 1], [2, 1.5, 1.2])  # its own losses
    np.testing.assert_allclose(lines[-2][:, 0], [one.low, one.high])
    np.testing.assert_allclose(lines[-1][:, 0], [one.value])
    assert [text.get_text() for text in curves.get_legend().get_texts()] == ["finished (6)", "new"]
    assert "tokens that it took" in truths.get_xlabel()
    save(figure, tmp_path / "new.png")


def test_forecasts_of_finished_runs_stand_on_what_they_took(family: str) -> None:
    (found,) = forecast(family, 1.0)
    _, truths = visible(forecast_figure(found))
    drawn = {container.get_label(): container.lines[0].get_xydata() for container in truths.containers}
    for point in found.backtest.points:
        stack = next(one for one in point.predictors if one.name == "stack")
        expected = [
            (truth, one.value)
            for truth, one in zip(found.backtest.tokens_to_target, stack.forecasts, strict=True)
            if np.isfinite([one.value, one.high]).all()
        ]
        np.testing.assert_allclose(drawn[f"at {point.tokens:,.0f} tokens"], np.reshape(expected, (-1, 2)))


def test_a_family_too_small_to_forecast_its_runs_is_drawn(family: str, tmp_path: Path) -> None:
    for number in (4, 5):
        shutil.rmtree(tmp_path / "runs" / str(number))
    save(forecast_figure(*forecast(family, 1.0)), tmp_path / "four.png")


def test_a_family_with_too_few_references_is_not_drawn(family: str, tmp_path: Path) -> None:
    made_up(tmp_path / "other", 100, 1, family="G")
    first, second = forecast([family, tmp_path / "other"], 1.0)
    forecast_figure(first)
    with pytest.raises(ValueError, match="plot must be of a family with references enough, got G: it needs 4 runs"):
        forecast_figure(second)


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("a.pdf", b"%PDF"), ("a.svg", b"<?xml")])
def test_the_ending_names_the_format(tmp_path: Path, name: str, start: bytes) -> None:
    save(Figure(), tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)


@pytest.mark.parametrize("name", ["a.nonsense", "gone/a.png"], ids=["ending", "folder"])
def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"^plot must be a file that can be written, such as a\.png, got ") as raised:
        save(Figure(), tmp_path / name)
    assert "\n" not in str(raised.value)
