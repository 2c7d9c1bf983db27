"""Comparisons of real tiny runs whose difference was planted, and of made-up ones whose difference is known exactly."""

import json
import math
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_spectral import Run, cli, compare
from lightning_spectral.functional import js_divergence, normalize
from lightning_spectral.measurement import stopwatch
from lightning_spectral.runs.gains import BETTER, gain_in
from lightning_spectral.runs.kinds import Key
from lightning_spectral.runs.measured import Measured
from lightning_spectral.runs.sides import Sides
from lightning_spectral.runs.statistics import scatter
from lightning_spectral.runs.to_json import to_json
from tests.runs import planted
from tests.runs.made_up import LAYER, made_up, when


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seeds of each setting, in turn; a batch takes 10 ms give or take five percent, a slow loader 30 ms more."""
    folder = tmp_path_factory.mktemp("planted")
    generator = random.Random(0)
    now = 0.0

    def wait(is_slow: bool) -> None:
        nonlocal now
        now += 0.01 * (1 + 0.05 * generator.gauss(0, 1)) + 0.03 * is_slow

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(stopwatch, "perf_counter", lambda: now)
        for number in range(3):
            for name, seeds in planted.SEEDS.items():
                planted.train(folder, name, seeds[number], wait)
    return folder


@pytest.mark.parametrize(
    ("variant", "kind", "faster", "learns"),
    [
        ("same", "none", False, False),
        ("slow", "execution-side", True, False),
        ("better", "learning-side", False, True),
        ("both", "both", True, True),
    ],
)
def test_planted_difference_is_found(runs: Path, variant: str, kind: str, faster: bool, learns: bool) -> None:
    comparison = compare(f"{runs}/base/*", f"{runs}/{variant}/*")
    assert comparison.verdict.kind == kind
    gains = comparison.gains
    assert gains["throughput"].is_detected == faster
    assert gains["tokens"].is_detected == learns
    if faster:
        assert gains["throughput"].gain == pytest.approx(-0.75, abs=0.03)
        assert gains["throughput"].high < 0
    if learns:
        assert gains["tokens"].low > 0
    for gain in gains.values():
        assert (gain.low <= 0 <= gain.high) != gain.is_detected or abs(gain.gain) < 0.02


def test_one_run_a_side_gives_no_verdict(runs: Path) -> None:
    comparison = compare(f"{runs}/base/0", f"{runs}/both/12")
    assert comparison.verdict.kind == "unknown"
    assert comparison.verdict.text == "no verdict: one run a side, and no recorded run floor of the family"
    assert comparison.gains["tokens"].gain > 1
    assert not any(gain.is_detected or math.isfinite(gain.low) for gain in comparison.gains.values())
    assert all(math.isfinite(shift.sampling_floor) for shift in comparison.shifts)


def test_a_recorded_run_floor_gives_one(runs: Path, tmp_path: Path) -> None:
    seeds = compare(f"{runs}/base/1", f"{runs}/both/13", floor=f"{runs}/same/*")  # of which one ran before, one after
    assert seeds.verdict.kind == "both"
    assert seeds.run_floor.variances[Key("tokens")].degrees == 2
    earlier = tmp_path / "earlier.json"
    earlier.write_text(to_json(compare(f"{runs}/same/*", f"{runs}/slow/*").as_dict()))
    recorded = compare(f"{runs}/base/1", f"{runs}/both/13", floor=earlier)
    assert recorded.verdict.kind == "learning-side"
    assert recorded.verdict.text.endswith(f"; tokens a second left out: {recorded.timing.reason}")
    assert recorded.run_floor.variances[Key("tokens")].degrees == 4


def test_matched_loss_is_the_lowest_that_all_reached(runs: Path) -> None:
    comparison = compare(f"{runs}/base/*", f"{runs}/better/*")
    every = [Run(f"{runs}/base/{seed}") for seed in planted.SEEDS["base"]]
    assert comparison.loss == max(run.history.val_loss.min() for run in every)
    at = compare(f"{runs}/base/*", f"{runs}/better/*", at_loss=4.0)
    assert at.loss == 4.0
    tokens = [run.tokens_to(4.0) for run in every]
    assert at.gains["tokens"].base == pytest.approx(stats.gmean(tokens))


def test_compare_prints_tables_json_and_a_figure(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", f"{runs}/base/*", f"{runs}/both/*"]
    cli.main([*words, "--plot", str(tmp_path / "both.png")])
    printed = capsys.readouterr().out
    assert re.search(r"tokens a second +[\d,]+ +[\d,]+ +\* -7\d\.\d%", printed)
    assert "gpt.blocks.1.attention.out" in printed
    assert "verdict  both: learning-side gain (" in printed
    assert "rule     a gain counts if it lies beyond the run floor" in printed
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    cli.main([*words, "--json"])
    found = json.loads(capsys.readouterr().out)
    expected = compare(*words[1:])
    assert found["verdict"]["kind"] == "both"
    assert found["loss"] == expected.loss
    assert found["gains"]["tokens"]["gain"] == expected.gains["tokens"].gain
    assert len(found["shifts"]) == 2 * (1 + 2 * 4)
    assert found["shifts"][0]["base"] is None  # a divergence has no sides


def test_show_prints_tables_json_and_a_figure(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["show", f"{runs}/base/0"]
    cli.main([*words, "--plot", str(tmp_path / "base.png"), "--kind", "gradient"])
    printed = capsys.readouterr().out
    assert "setting=base" in printed
    assert re.search(r"gpt.blocks.1.attention.out +20 +10,240 +\d\.\d+ \+/- \d", printed)
    assert (tmp_path / "base.png").read_bytes().startswith(b"\x89PNG")
    cli.main([*words, f"{runs}/base/1", "--json"])
    first, second = json.loads(capsys.readouterr().out)["runs"]
    assert first["about"]["tags"] == second["about"]["tags"] == {"setting": "base"}
    assert first["history"]["step"] == list(range(20, planted.NUM_STEPS + 1, 20))
    exponent = Run(f"{runs}/base/0").spectrum("activation", "gpt.blocks.0", 20).exponent((0.125, 0.5))
    assert [first["spectra"][0][key] for key in ("alpha_tail", "alpha_tail_stderr")] == [
        exponent.value,
        exponent.stderr,
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "nowhere", "base"], "run must be a folder with a record, got 'nowhere': it has no run.json"),
        (["compare", "x*", "base"], "base must name runs with a record, got 'x*': no folder with one matches"),
        (["compare", "base"], "the following arguments are required: VARIANT: see lightning-spectral compare --help"),
        (["show", "base/0", "--kind", "drift"], "kind must be one that Run('base/0') has a report of, activation, "),
        (["compare", "base/0", "same/3", "--at-loss", "1"], "at_loss must be a loss that all runs came down to, got 1"),
        (["compare", "base/0", "same/3", "--at-loss", "x"], "argument --at-loss: invalid float value: 'x'"),
        (["show", "base/0", "--plot", "none/a.png"], "plot must be a file that can be written, such as a.png, got "),
        (["compare", "base/0", "same/3", "--floor", "base/0/spectra/run.json"], "floor must be runs, or a file that "),
    ],
)
def test_bad_input_is_one_line(
    runs: Path, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(runs)
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"lightning-spectral: error: {message}")


def test_numbers_are_those_of_scipy(tmp_path: Path) -> None:
    base, variant = [1000, 1100, 1300], [500, 620]
    exponents = [1.0, 1.05, 0.9], [1.5, 1.6]
    for name, tokens, exponent in zip("bv", (base, variant), exponents, strict=True):
        for number, (count, alpha) in enumerate(zip(tokens, exponent, strict=True)):
            made_up(tmp_path / f"{name}{number}", count, count / 100, alpha, about=when(number))
    comparison = compare(f"{tmp_path}/b*", f"{tmp_path}/v*", at_loss=1.0)
    gain = comparison.gains["tokens"]
    interval = stats.ttest_ind(np.log(base), np.log(variant)).confidence_interval(0.975)
    assert gain.gain == pytest.approx(stats.gmean(base) / stats.gmean(variant) - 1)
    assert (gain.low, gain.high) == pytest.approx((math.exp(interval.low) - 1, math.exp(interval.high) - 1))
    assert gain.is_detected == (gain.low > 0)
    assert comparison.gains["throughput"].gain == pytest.approx(0)
    assert comparison.verdict.kind == "learning-side"
    shifts = {(shift.name, shift.quantity): shift for shift in comparison.shifts}
    tail = shifts[LAYER, "alpha_tail"]
    interval = stats.ttest_ind(exponents[1], exponents[0]).confidence_interval(0.975)
    expected = np.mean(exponents[1]) - np.mean(exponents[0])
    assert (tail.shift, tail.low, tail.high) == pytest.approx((expected, *interval))
    assert tail.is_detected
    spectra = [[normalize(torch.arange(1, 33.0) ** -alpha) for alpha in side] for side in exponents]
    centres = [torch.stack(side).mean(0) for side in spectra]
    assert shifts[LAYER, "js"].shift == pytest.approx(float(js_divergence(*centres)))
    variance = sum(float(js_divergence(p, c)) for side, c in zip(spectra, centres, strict=True) for p in side) / 3
    floor = stats.f.ppf(0.975, 1, 3) * variance * (1 / 3 + 1 / 2)
    assert shifts[LAYER, "js"].run_floor == pytest.approx(floor)
    assert shifts["", "js"].run_floor == pytest.approx(floor)


def test_seeds_alone_raise_few_alarms() -> None:
    """Of 2000 comparisons of three seeds a side that differ by chance alone, five percent may find a difference."""
    generator = np.random.default_rng(0)
    alarms = 0
    for _ in range(2000):
        logs = 0.1 * generator.standard_normal((2, 3, 3))
        sides = [
            [
                Measured(SimpleNamespace(id="", family="F"), dict(zip(map(Key, BETTER), run, strict=True)), {}, {}, {})
                for run in side
            ]
            for side in logs
        ]
        both = Sides(*sides, scatter(sides))
        alarms += any(gain_in(quantity, both).is_detected for quantity in ("tokens", "throughput"))
    assert 0.03 < alarms / 2000 < 0.06


@pytest.mark.parametrize(
    ("difference", "message"),
    [
        ({"stage": "train"}, "activation spectra of stage 'validate' in Run(.*a'.) and 'train' in Run"),
        ({"layers": ["b"]}, r"activation spectra of layers \['gpt.blocks.3'\] in .* and \['b'\] in"),
        ({"num_tokens": 128}, "activation spectra of num_tokens 64 in .* and 128 in"),
        ({"loss": "val_bpb"}, "the validation loss 'val_loss' in .* and 'val_bpb' in"),
        ({"data": "ff"}, "validation data {'0': 'a1'} in .* and {'0': 'ff'} in"),
    ],
)
def test_runs_that_were_not_measured_alike_are_refused(tmp_path: Path, difference: dict, message: str) -> None:
    first, second = made_up(tmp_path / "a", 100, 1), made_up(tmp_path / "b", 100, 1, **difference)
    with pytest.raises(ValueError, match=f"runs must have been measured alike, got {message}") as raised:
        compare(first, second)
    assert "\n" not in str(raised.value)


def test_usual_names_of_the_loss_are_of_one_thing(tmp_path: Path) -> None:
    first, second = (made_up(tmp_path / loss, 100, 1, loss=loss) for loss in ("val_loss", "eval_loss"))
    assert compare(first, second).verdict is not None


def test_mixed_families_are_refused(tmp_path: Path) -> None:
    paths = [made_up(tmp_path / "a", 100, 1), made_up(tmp_path / "b", 100, 1, family="G")]
    with pytest.raises(ValueError, match=r"base must be runs of one family, got F in Run\(.*\) and G in Run"):
        compare(paths, paths[0])
    other = made_up(tmp_path / "c", 100, 1, family="G")
    with pytest.raises(ValueError, match=r"floor must be of the base's family, F, got G in Run\("):
        compare(paths[0], paths[1], floor=other)
    assert compare(*paths).verdict.kind == "unknown"  # another family may well be the variant


def test_runs_without_spectra_are_compared_by_their_losses(tmp_path: Path) -> None:
    for number, tokens in enumerate((100, 101, 50, 51)):
        folder = made_up(tmp_path / str(number), tokens, 1.0, about=when(number % 2))
        for path in folder.rglob("*.npz"):
            path.unlink()
    comparison = compare([tmp_path / "0", tmp_path / "1"], [tmp_path / "2", tmp_path / "3"])
    assert comparison.verdict.kind == "both"
    assert "no spectra to compare" in comparison.verdict.text
    assert comparison.shifts == []


def test_a_run_that_was_resumed_elsewhere_is_no_second_seed(tmp_path: Path) -> None:
    first = made_up(tmp_path / "version_0", 100, 1)
    shutil.copytree(first, tmp_path / "version_1")
    with pytest.raises(ValueError, match=r"base must be independent runs, got .*version_0.* and .*version_1"):
        compare(f"{tmp_path}/version_*", made_up(tmp_path / "b", 50, 1))


def test_one_run_trained_twice_is_no_second_seed(tmp_path: Path) -> None:
    def side(name: str, tokens: tuple[float, ...], seeds: tuple[int, ...]) -> list[Path]:
        runs = zip(tokens, seeds, strict=True)
        return [
            made_up(tmp_path / f"{name}{at}", *of, about={"seed": seed})
            for at, (of, seed) in enumerate(((one, 30), seed) for one, seed in runs)
        ]

    other = side("v", (97, 98), (1, 2))
    with pytest.raises(ValueError, match=r"base must be independent runs, got .*b0.* and .*b1.* to the last digit"):
        compare(side("b", (100, 100), (42, 42)), other)
    with pytest.warns(UserWarning, match="base has several runs of seed 42: if they began alike, they scatter less"):
        compare(side("c", (100, 101), (42, 42)), other)


def test_a_side_of_several_settings_is_told_of(tmp_path: Path) -> None:
    def side(name: str, *batches: float) -> list[Path]:
        return [made_up(tmp_path / f"{name}{at}", 100 + at, 30, batch_tokens=size) for at, size in enumerate(batches)]

    with pytest.warns(UserWarning, match="variant has runs of 2 settings, by their records: they scatter more"):
        compare(side("a", 64, 64), side("b", 64, 1024))


def test_other_validation_loaders_are_other_data(tmp_path: Path) -> None:
    first, second = (made_up(tmp_path / f"of_{index}", 100, 30, dataloader_idx=index) for index in (0, 1))
    unsaid = made_up(tmp_path / "unsaid", 100, 30)
    with pytest.raises(ValueError, match=r"activation spectra of dataloader_idx 0 in .* and 1 in"):
        compare(first, second)
    assert compare(unsaid, first).gains["tokens"].gain == 0
    loss = "val_loss/dataloader_idx_"
    first, second = (made_up(tmp_path / f"loss_{index}", 100, 30, loss=f"{loss}{index}") for index in (0, 1))
    with pytest.raises(ValueError, match=r"got the validation loss '\S+_0' in .* and '\S+_1' in"):
        compare(first, second)
    assert compare(unsaid, first).gains["tokens"].gain == 0


def test_a_recorded_floor_is_of_about_the_loss_that_is_matched(tmp_path: Path) -> None:
    runs = [made_up(tmp_path / str(number), 100 + number, 30) for number in range(4)]
    earlier = tmp_path / "earlier.json"
    earlier.write_text(to_json(compare(runs[:2], runs[2], at_loss=1.5).as_dict()))
    assert compare(runs[3], made_up(tmp_path / "new", 90, 30), floor=earlier).loss == 1.5
    with pytest.raises(
        ValueError, match=r"floor must be of about the loss that is matched, 0.7, got one of 1.5: compare"
    ):
        compare(runs[3], tmp_path / "new", at_loss=0.7, floor=earlier)
    facts = json.loads(earlier.read_text()) | {"loss_name": "train_loss"}
    earlier.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="floor must be of the loss that is compared, val_loss, got one of train_loss"):
        compare(runs[3], tmp_path / "new", floor=earlier)


def test_runs_that_are_compared_are_no_floor_of_their_own(tmp_path: Path) -> None:
    base = [made_up(tmp_path / f"b{number}", 100 + number, 1) for number in range(3)]
    variant = made_up(tmp_path / "v", 50, 1)
    alone, with_themselves = compare(base, variant), compare(base, variant, floor=base)
    assert alone.gains == with_themselves.gains
    earlier = tmp_path / "earlier.json"
    earlier.write_text(to_json(alone.as_dict()))
    with pytest.raises(ValueError, match="floor must be of other runs than those that are compared"):
        compare(base, variant, floor=earlier)


def test_a_floor_without_tokens_gives_no_verdict(tmp_path: Path) -> None:
    base, variant = made_up(tmp_path / "b", 100, 1), made_up(tmp_path / "v", 50, 1)
    facts = compare(base, variant).as_dict() | {"run_floor": {"variances": {}, "families": ["F"], "runs": ["x"]}}
    (tmp_path / "floor.json").write_text(to_json(facts))
    assert compare(base, variant, floor=tmp_path / "floor.json").verdict.kind == "unknown"


def test_unequal_numbers_of_rows_are_refused(tmp_path: Path) -> None:
    """The setting is an upper limit: how many rows there were is what counts."""
    first, second = made_up(tmp_path / "a", 100, 1), made_up(tmp_path / "b", 100, 1)
    for path in (second / "spectra").glob("*.npz"):
        np.savez(path, **(dict(np.load(path)) | {f"activation/{LAYER}/num_tokens": np.asarray(48)}))
    with pytest.raises(ValueError, match=f"got activation/{LAYER} on rows 64 in .* and 48 in"):
        compare(first, second)


@pytest.mark.parametrize("values", [np.full(32, np.nan), np.zeros(32), np.empty(0)], ids=["NaN", "zero", "empty"])
def test_a_spectrum_that_a_run_has_not_is_left_out(tmp_path: Path, values: np.ndarray) -> None:
    runs = [made_up(tmp_path / f"{name}{n}", 100 + n, 1) for name in "bv" for n in range(2)]
    failure = "" if values.any() is np.False_ and len(values) else "it failed"
    for path in (runs[1] / "spectra").glob("*.npz"):
        changes = {f"activation/{LAYER}/eigenvalues": values, f"activation/{LAYER}/failure": np.asarray(failure)}
        np.savez(path, **(dict(np.load(path)) | changes))
    comparison = compare(runs[:2], runs[2:])
    assert comparison.verdict.kind == "none"
    assert comparison.shifts == []
    (reason,) = comparison.left_out.values()
    assert "b1" in reason
    json.loads(to_json(comparison.as_dict()))


def test_a_stall_is_an_execution_side_difference(tmp_path: Path) -> None:
    runs = [made_up(tmp_path / f"{name}{n}", 100 + n, 1 + n / 100, about=when(n)) for name in "bv" for n in range(3)]
    for run in runs[3:]:
        history = run / "spectra" / "history.csv"
        lines = [line.split(",") for line in history.read_text().splitlines()]
        for fields in lines[3:]:
            fields[2] = repr(float(fields[2]) + 5)  # once, in the middle
        history.write_text("\n".join(map(",".join, lines)) + "\n")
    assert compare(runs[:3], runs[3:]).verdict.kind == "execution-side"


def test_runs_without_a_loss_in_common_are_refused(tmp_path: Path) -> None:
    first, second = made_up(tmp_path / "a", 100, 1), made_up(tmp_path / "b", 100, 1)
    history = second / "spectra" / "history.csv"
    lines = [line.split(",") for line in history.read_text().splitlines()]
    for fields in lines[1:]:
        fields[4] = repr(float(fields[4]) / 10)
    history.write_text("\n".join(map(",".join, lines)) + "\n")
    with pytest.raises(ValueError, match=r"must have a loss in common, got 0.5 at the lowest in .*a'\) and 0.2 at"):
        compare(first, second)
