"""What a comparison takes from runs: closed forms of made-up ones, and why some cannot be compared."""

from math import isnan, log, nan
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_spectral import Run
from lightning_spectral.functional.estimate import Estimate, Spectrum
from lightning_spectral.runs.kinds import Key
from lightning_spectral.runs.measured import (
    BANDS,
    Measured,
    bands_of,
    check_comparable,
    keep_known,
    lowest_common_loss,
    measure,
)
from tests.runs.made_up import LAYER, made_up

LOSSES = [2.0, 1.5, 1.2, 1.0, 0.7, 0.5]
"""Of made-up runs, at reports."""


def shift_losses(folder: Path, by: float) -> Path:
    history = folder / "spectra" / "history.csv"
    head, *lines = [line.split(",") for line in history.read_text().splitlines()]
    moved = [[*fields[:-1], repr(float(fields[-1]) + by)] for fields in lines]
    history.write_text("".join(",".join(fields) + "\n" for fields in [head, *moved]))
    return folder


def without_reports(folder: Path, steps) -> Path:
    for step in steps:
        (folder / "spectra" / f"activation-validate-{step:09d}.npz").unlink()
    return folder


def test_numbers_at_a_loss_are_those_the_run_was_made_of(tmp_path: Path) -> None:
    run = Run(made_up(tmp_path / "a", 1000.0, 10.0, exponent=1.25))
    found = measure(run, 1.0, ["activation"], {"activation": {"head": (1, 10), "tail": (4, 16)}})
    assert found.run is run
    assert found.logs[Key("tokens")] == pytest.approx(log(1000))
    assert found.logs[Key("seconds")] == pytest.approx(log(10))
    assert found.logs[Key("throughput")] == pytest.approx(log(100))
    for part in ("head", "tail"):
        assert found.estimates[Key(f"alpha_{part}", "activation", LAYER)].value == pytest.approx(1.25)
    shares = np.arange(1, 33.0) ** -1.25
    shares /= shares.sum()
    entropy = -(shares * np.log(shares)).sum()
    assert found.estimates[Key("rankme", "activation", LAYER)].value == pytest.approx(np.exp(entropy))
    (key,) = found.spectra
    assert key == Key("js", "activation", LAYER)


def test_errors_are_those_of_the_jackknife(tmp_path: Path) -> None:
    run = Run(made_up(tmp_path / "a", 1000.0, 10.0))
    found = measure(run, 1.0, ["activation"], {"activation": {"head": (1, 10), "tail": (4, 16)}})
    without = np.load(run.folder / "activation-validate-000000400.npz")[f"activation/{LAYER}/leave_one_out"]
    ranks = np.log(np.arange(4, 17))
    exponents = [-np.polyfit(ranks, np.log(values[3:16]), 1)[0] for values in without]
    # Delete-a-group: (G - 1) times the mean square about the mean.
    expected = np.sqrt(3 * np.var(exponents))
    assert found.estimates[Key("alpha_tail", "activation", LAYER)].stderr == pytest.approx(expected)


@pytest.mark.parametrize(("loss", "shown"), [(0.4, "0.4"), (2.5, "2.5")], ids=["never", "below from the first"])
def test_a_loss_that_was_not_reached_is_refused_with_what_there_is(tmp_path: Path, loss: float, shown: str) -> None:
    run = Run(made_up(tmp_path / "a", 1000.0, 10.0))
    with pytest.raises(ValueError, match=rf"all runs came down to, got {shown}: Run\(.*\) has 2 to 0\.5$"):
        measure(run, loss, [], {})


def test_a_run_without_losses_is_refused(tmp_path: Path) -> None:
    run = Run(made_up(tmp_path / "a", 1000.0, 10.0))
    (run.folder / "history.csv").write_text("step,tokens,seconds,train_loss,val_loss\n1,10.0,1.0,nan,nan\n")
    with pytest.raises(ValueError, match=r"has none$"):
        measure(Run(run.path), 1.0, [], {})
    with pytest.raises(ValueError, match="losses between their first report and their last, got none in "):
        lowest_common_loss([Run(run.path)], ["activation"])


@pytest.mark.parametrize(
    ("shifts", "late", "expected"),
    [
        ([0.0, 0.0], [], 0.5),
        ([0.0, 0.3], [], 0.8),
        ([0.2, -0.1, 0.1], [], 0.7),
        ([0.0, 0.0], [600], 0.7),  # beyond the last report no spectrum is known
        ([0.0, 0.0], [500, 600], 1.0),
        ([0.0, 0.3], [600], 0.8),
    ],
)
def test_the_lowest_common_loss(tmp_path: Path, shifts: list[float], late: list[int], expected: float) -> None:
    """The first run lacks the late reports."""
    folders = [shift_losses(made_up(tmp_path / str(n), 100 + n, 1), shift) for n, shift in enumerate(shifts)]
    without_reports(folders[0], late)
    runs = [Run(folder) for folder in folders]
    assert lowest_common_loss(runs, ["activation"]) == pytest.approx(expected)
    assert lowest_common_loss(runs, []) == pytest.approx(0.5 + max(shifts))  # without spectra, all losses count


def test_runs_whose_losses_do_not_meet_are_refused_by_name(tmp_path: Path) -> None:
    runs = [Run(shift_losses(made_up(tmp_path / name, 100, 1), by)) for name, by in (("a", 0.0), ("b", 1.6))]
    with pytest.raises(ValueError, match=r"got 2\.1 at the lowest in .*b'\) and 2 at the highest in .*a'\)"):
        lowest_common_loss(runs, ["activation"])


def test_bands_are_the_recorded_ones_or_the_callbacks(tmp_path: Path) -> None:
    assert bands_of(Run(made_up(tmp_path / "a", 100, 1)), "activation") == BANDS
    recorded = Run(made_up(tmp_path / "b", 100, 1, head=[2, 9], tail=None))
    assert bands_of(recorded, "activation") == {"head": (2, 9), "tail": (0.125, 0.5)}
    assert bands_of(recorded, "gradient") == BANDS


@pytest.mark.parametrize(
    ("one", "other", "is_refused"),
    [
        ("hooks", "vmap", True),
        (None, "hooks", True),
        ("hooks", "hooks", False),
        ("vmap", "loop", False),
        (None, "vmap", False),
    ],
)
def test_rows_by_hooks_compare_only_with_their_like(tmp_path: Path, one, other, is_refused: bool) -> None:
    runs = [Run(made_up(tmp_path / name, 100, 1, method=method)) for name, method in (("a", one), ("b", other))]
    if is_refused:
        with pytest.raises(ValueError, match=r"got activation spectra of method='hooks' (True|False) in "):
            check_comparable(runs)
    else:
        assert check_comparable(runs) == ["activation"]


def test_kinds_that_a_run_lacks_are_not_compared_and_their_settings_do_not_matter(tmp_path: Path) -> None:
    first, second = made_up(tmp_path / "a", 100, 1), made_up(tmp_path / "b", 100, 1, stage="train")
    without_reports(second, range(100, 700, 100))
    assert check_comparable([Run(first), Run(second)]) == []
    assert check_comparable([Run(first), Run(first)]) == ["activation"]


def test_losses_of_unlike_kinds_are_refused(tmp_path: Path) -> None:
    first, second = made_up(tmp_path / "a", 100, 1), made_up(tmp_path / "b", 100, 1)
    history = second / "spectra" / "history.csv"
    head, *lines = history.read_text().splitlines()
    swapped = [[*fields[:3], *fields[:2:-1]] for fields in (line.split(",") for line in lines)]
    history.write_text("".join(f"{line}\n" for line in [head, *map(",".join, swapped)]))
    with pytest.raises(ValueError, match=r"one kind of loss, got val_loss in .*a'\) and train_loss in .*b'\): give"):
        check_comparable([Run(first), Run(second)])


def test_a_long_setting_is_cut_short_in_the_message(tmp_path: Path) -> None:
    runs = [
        Run(made_up(tmp_path / "a", 100, 1, layers=[f"gpt.blocks.{n}" for n in range(40)])),
        Run(made_up(tmp_path / "b", 100, 1)),
    ]
    with pytest.raises(ValueError, match="measured alike") as raised:
        check_comparable(runs)
    assert "['gpt.blocks.0', 'gpt.blocks.1', " in str(raised.value)
    assert " ... in Run(" in str(raised.value)
    assert "gpt.blocks.9" not in str(raised.value)


ONE, TWO = Key("js", "activation", "b.0"), Key("js", "activation", "b.1")


def measured(name: str, **changes) -> Measured:
    """Two layers, of which the second may differ."""
    good = Spectrum(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64), count=8)
    second = changes.get("second", good)
    spectra = {ONE: good} | ({} if second is None else {TWO: second})
    estimates = {key._replace(quantity="rankme"): Estimate(2.0, 0.1) for key in spectra}
    return Measured(name, {Key("tokens"): 1.0}, estimates, spectra, {})


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (None, "it was not measured"),
        (Spectrum.missing("no convergence"), "no convergence"),
        (Spectrum(torch.zeros(3, dtype=torch.float64), count=8), "all its values are zero"),
        (Spectrum(torch.full((3,), nan, dtype=torch.float64), count=8), "all of its values are NaN"),
        (Spectrum(torch.tensor([2.0, 1.0, nan], dtype=torch.float64), count=8), "some of its values are NaN"),
    ],
    ids=["missing", "failed", "zero", "NaN", "one NaN"],
)
def test_a_spectrum_that_one_run_lacks_is_left_out_of_all(second: Spectrum | None, reason: str) -> None:
    kept, left_out = keep_known([measured("a"), measured("b", second=second), measured("c")])
    assert left_out == {TWO: f"b: {reason}"}
    for one in kept:
        assert list(one.spectra) == [ONE]
        assert list(one.estimates) == [ONE._replace(quantity="rankme")]
        assert one.logs == {Key("tokens"): 1.0}


def test_of_several_reasons_the_first_runs_is_told() -> None:
    every = [measured("a"), measured("b", second=None), measured("c", second=Spectrum.missing("no convergence"))]
    assert keep_known(every)[1] == {TWO: "b: it was not measured"}


def test_all_known_leaves_all() -> None:
    every = [measured("a"), measured("b")]
    kept, left_out = keep_known(every)
    assert left_out == {}
    assert [list(one.spectra) for one in kept] == [[ONE, TWO]] * 2
    assert [one.estimates for one in kept] == [one.estimates for one in every]


@pytest.mark.parametrize(
    ("values", "count", "message"),
    [([3.0, 2.0, 1.0], 9, "activation/b.1 on rows 8 in a and 9 in b"), ([2.0, 1.0], 8, "activation/b.1 of width 3")],
    ids=["rows", "width"],
)
def test_spectra_of_unlike_matrices_are_refused(values: list[float], count: int, message: str) -> None:
    other = Spectrum(torch.tensor(values, dtype=torch.float64), count=count)
    with pytest.raises(ValueError, match=f"measured alike, got {message}"):
        keep_known([measured("a"), measured("b", second=other)])


def test_a_band_beyond_the_spectrum_leaves_an_estimate_that_is_not_known(tmp_path: Path) -> None:
    run = Run(made_up(tmp_path / "a", 1000.0, 10.0))
    found = measure(run, 1.0, ["activation"], {"activation": {"head": (1, 40), "tail": (4, 16)}})
    assert isnan(found.estimates[Key("alpha_head", "activation", LAYER)].value)
