"""Study 4: which runs it makes, how it tunes them, and the tokens that they learn."""

import json
import math
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from benchmarks.compact_json import write_compact
from benchmarks.findings import byte_pairs
from benchmarks.findings.early_tail import Seen, completed, gate, judge, means, outcome, read
from benchmarks.findings.early_tail_report import write_report
from benchmarks.findings.early_tail_runs import (
    BATCH_SIZES,
    CONFIG,
    EVERY_NUM_TOKENS,
    MAX_TOKENS,
    TARGET_TOKENS,
    TUNING_TOKENS,
    VARIANTS,
    EarlyTail,
    Setting,
    all_of,
    lacking,
)
from benchmarks.findings.runs import RESULTS
from lightning_spectral.cli import main
from lightning_spectral.nanogpt import ShardData
from tests.benchmarks.planted_runs import broken, plant


class Planted(EarlyTail):
    """Runs whose loss is known: a parabola in the log of the rate, about the best of each batch size."""

    def losses(self, setting: Setting) -> tuple[list[float], list[float]]:
        best = {1: 0.1, 2: 0.5, 4: 1.0, 8: 2.0, 16: math.inf}[setting.batch_size]
        distance = abs(math.log(setting.factor / best)) if math.isfinite(best) else 9 - setting.factor
        tokens = [TUNING_TOKENS, TARGET_TOKENS]
        return [float(count) for count in tokens], [3 + distance, 2.001 + distance]

    def train_all(self, settings: Iterable[Setting], tokens: int, target: float | None = None) -> None:
        trained.extend((setting, tokens, target) for setting in settings)


trained: list[tuple[Setting, int, float | None]] = []


def test_rates_are_tuned_and_one_is_tried_beyond_an_edge() -> None:
    trained.clear()
    study = Planted()
    tuned = study.tuned("rope")
    assert [setting.factor for setting in tuned] == [0.25, 0.5, 1.0, 2.0, 4.0]
    assert len(trained) == 15 + 4
    assert study.target(tuned) == 2.01, "of the best run, rounded up"


def test_a_family_is_tuned_tiers_by_seeds_and_ten_settings_at_one_batch_size() -> None:
    trained.clear()
    runs, target = Planted().family("rope")
    assert len(runs) == len({run.name for run in runs}) == 5 * 3 + 9
    assert len({(run.factor, run.variant) for run in runs if run.batch_size == 4}) == 10
    assert {entry[1:] for entry in trained[-len(runs) :]} == {(MAX_TOKENS, target)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_run_is_accepted_by_the_command_line(
    tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-spectral"])
    study = EarlyTail(tmp_path)
    words = study.words(Setting(4, 0.5, 3, "rope", variant), MAX_TOKENS, 3.5)
    assert str(CONFIG) in words
    with pytest.raises(SystemExit) as ended:
        main([*words, "--print_config"])
    assert ended.value.code == 0


def test_every_validation_falls_on_a_whole_step() -> None:
    for count in (TUNING_TOKENS, TARGET_TOKENS, MAX_TOKENS):
        assert count % EVERY_NUM_TOKENS == 0
    assert all(EVERY_NUM_TOKENS % Setting(size, 1.0).batch_tokens == 0 for size in BATCH_SIZES)


def test_tokens_are_those_of_the_text_and_a_tenth_of_the_noisy_ones_are_shuffled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    paths = []
    for index in range(40):
        paths.append(tmp_path / f"{index}.py")
        paths[-1].write_text(" ".join(rng.choice(["alpha", "beta", "gamma = 1", "délta"], 200)))
    monkeypatch.setattr(byte_pairs, "text_files", lambda path: paths)
    facts = byte_pairs.make(tmp_path / "tokens", 300, 16)
    assert byte_pairs.make(tmp_path / "tokens", 300, 16) == facts, "what is there is kept"
    with pytest.raises(ValueError, match="vocab_size and block_size must be those of"):
        byte_pairs.make(tmp_path / "tokens", 301, 16)
    clean, noisy = (
        ShardData(str(tmp_path / "tokens" / name), block_size=16, val_tokens=None, vocab_size=300)
        for name in ("clean", "noisy")
    )
    ours, theirs = (np.asarray(data.train_blocks.tokens[0 : facts["train_tokens"]]) for data in (clean, noisy))
    assert (ours == 0).sum() == 40 - round(0.1 * 40), "each document begins with one"
    assert ours.max() < 300
    whole = len(ours) // 16 * 16
    differs = (ours != theirs)[:whole].reshape(-1, 16).any(1)
    assert 0.02 < differs.mean() < 0.2
    assert (np.sort(ours[:whole].reshape(-1, 16)) == np.sort(theirs[:whole].reshape(-1, 16))).all()


def _seen(name: str, batch_size: int, peak: float) -> Seen:
    return Seen(name, name, batch_size, True, 1e5, None, peak, ({}, {}))


def test_the_gate_names_runs_of_few_steps_and_those_before_their_maximum() -> None:
    runs = [_seen("late", 4, 5e4), _seen("few", 16, 5e4), _seen("rising", 1, 3e5)]
    late = gate(runs, (1e5, 2e5), batch_tokens=128, at=1)
    assert late == ["few: 98 steps", "rising: tail at its maximum at 300,000 tokens"]


@pytest.mark.parametrize(
    ("rho", "p_value", "low", "is_met", "second", "words"),
    [
        (0.9, 0.001, 0.02, True, None, "held in one family"),
        (0.9, 0.001, 0.02, True, 0.2, "held"),
        (0.9, 0.001, 0.02, True, -0.2, "refuted"),
        (0.9, 0.2, -0.1, True, 1.0, "batch size under another name"),
        (0.9, 0.001, -0.1, True, 1.0, "in part"),
        (-0.7, 0.001, 0.02, True, 1.0, "refuted"),
        (-0.7, 0.9, -0.1, False, None, "not shown; the stage gate is not met"),
    ],
)
def test_outcomes_are_those_of_the_plan(
    rho: float, p_value: float, low: float, is_met: bool, second: float | None, words: str
) -> None:
    tail = {"tiers": rho, "varied_given_loss": [0.5, p_value], "gain": 0.2, "gain_low": low}
    assert outcome([tail], is_met, second)["in words"] == words


def test_a_number_that_goes_with_tokens_passes_and_seeds_are_averaged() -> None:
    values = [(4, "a", 1.0, 10.0), (4, "a", 3.0, 1000.0), (4, "b", 5.0, 100.0), (8, "c", 0.0, 1.0)]
    runs = [Seen(tier, tier, size, True, took, None, 0.0, ({"x": value},)) for size, tier, value, took in values]
    assert means(runs, 0, "x").tolist() == [2.0, 5.0, 0.0]
    assert np.exp(means(runs, 0, "log tokens")) == pytest.approx([100.0, 100.0, 1.0])


LAYERS = ("gpt.blocks.0", "gpt.blocks.11")
TAKES = {1: 640_000.0, 2: 600_000.0, 4: 560_000.0, 8: 530_000.0, 16: 500_000.0}
"""Tokens to a loss of 4 at the best rate."""


def make(folder: Path, recipe: str, seeds: tuple[int, ...]) -> None:
    """Runs whose tail is the steeper the more tokens they need, and whose loss falls evenly in the log of tokens."""
    tuned = [Setting(size, 1.0, recipe=recipe) for size in BATCH_SIZES]
    tried = [Setting(size, factor, recipe=recipe) for size in BATCH_SIZES for factor in (0.5, 2.0)]
    for setting in [*tried, *(one for one in all_of(tuned) if one.seed in seeds)]:
        spread = 1 + 0.01 * setting.seed + 0.02 * len(setting.variant) + 0.2 * abs(math.log2(setting.factor))
        takes = TAKES[setting.batch_size] * spread
        is_tried = setting in tried and not (recipe == "rope" and setting.batch_size == 4)
        counts = [32_768, 98_304, TUNING_TOKENS, *(() if is_tried else (262_144, TARGET_TOKENS, 1_474_560))]
        points = [(count, 4 + math.log(takes / count)) for count in counts]

        def spectra(layer: str, tokens: float, steep: float = takes / 4e5) -> np.ndarray:
            return broken(steep + (0.2 if tokens < 50_000 else 0.0), width=64)

        plant(folder / setting.name, points, spectra, LAYERS, setting.batch_tokens)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("early")
    make(folder, "rope", (1, 2, 3))
    make(folder, "untied", (1,))
    return folder


def test_both_families_are_read_and_what_is_missing_is_named(planted: Path, tmp_path: Path) -> None:
    study = EarlyTail(planted, only_read=True)
    rope, untied = (read(study, recipe) for recipe in ("rope", "untied"))
    assert rope["target"] == untied["target"] == math.ceil(100 * (4 + math.log(505_000 / TARGET_TOKENS))) / 100
    assert rope["left_out"] == {}
    assert len(rope["runs"]) == 24
    assert sum(run["is_tuned"] for run in rope["runs"]) == 15
    assert sorted(untied["left_out"]) == sorted(f"untied-batch_{size}-lr_x1-seed_2" for size in BATCH_SIZES)
    primary = untied["at"][-1]
    assert primary["claims"][0]["tiers"] == pytest.approx(1.0)
    assert math.isnan(primary["claims"][0]["varied"][0]), "of one setting at a batch of four"
    for run in untied["runs"]:
        takes = TAKES[run["batch_size"]] * 1.01
        assert run["tokens"] == pytest.approx(takes * math.exp(4 - untied["target"]))
        assert run["early"][-1]["alpha_tail"] == pytest.approx(takes / 4e5)
        assert run["peak"] == 32_768
    assert judge([rope, untied])[-1]["P1"]
    assert [told["gate"] for told in judge([rope, untied])] == [False, True], "a quarter is too few steps of sixteen"
    results = {"families": [rope, untied], "outcomes": judge([rope, untied])}
    write_report(results, tmp_path)
    report = (tmp_path / "early_tail.md").read_text()
    assert "untied: 5 runs of 5 settings, 1 seed a batch size" in report
    assert "| untied-batch_16-lr_x1-seed_2 | 0 |" in report


@pytest.mark.parametrize(("size", "ranks"), [(1, True), (8, False)])
def test_a_run_that_was_cut_off_ranks_last_only_where_it_had_come_past_all_others(
    planted: Path, tmp_path: Path, size: int, ranks: bool
) -> None:
    name = f"untied-batch_{size}-lr_x1-seed_1"
    for run in planted.iterdir():
        if run.name != name:
            (tmp_path / run.name).symlink_to(run)
    counts = [TUNING_TOKENS, TARGET_TOKENS, *([900_000] if ranks else [])]
    points = [(32_768, 7.0), *((count, 4.3 - count / 1e7) for count in counts)]
    plant(tmp_path / name, points, lambda *given: broken(2.0), LAYERS, size * 128)
    found = read(EarlyTail(tmp_path, only_read=True), "untied")
    seen = {run["name"]: run for run in found["runs"]}
    assert (name in seen) == ranks
    if ranks:
        assert (seen[name]["tokens"], seen[name]["cut_off"]) == (math.inf, 900_000)
    else:
        assert found["left_out"][name] == TARGET_TOKENS


def test_the_report_says_what_the_landed_results_hold(tmp_path: Path) -> None:
    results = json.loads((RESULTS / "early_tail.json").read_text().replace("null", "NaN"))
    assert [len(family["runs"]) for family in results["families"]] == [24, 5]
    write_report(results, tmp_path)
    assert (tmp_path / "early_tail.md").read_text() == (RESULTS / "early_tail.md").read_text()
    assert (tmp_path / "early_tail.png").stat().st_size > 10_000


def test_an_earlier_result_whose_runs_are_gone_is_completed_by_the_runs_that_it_lacked(
    planted: Path, tmp_path: Path
) -> None:
    families = [read(EarlyTail(planted, only_read=True), recipe) for recipe in ("rope", "untied")]
    write_compact(tmp_path / "landed.json", {"families": families})
    rope, untied = json.loads((tmp_path / "landed.json").read_text().replace("null", "NaN"))["families"]
    assert lacking(rope) == []
    wanted = lacking(untied)
    assert [one.name for one in wanted] == [f"untied-batch_{size}-lr_x1-seed_2" for size in BATCH_SIZES]

    runs = tmp_path / "runs"
    nothing = completed(EarlyTail(runs, only_read=True), untied, "a date")
    assert nothing == {"kept": "a date", "added": [], **untied}

    make(runs, "untied", (2,))
    shutil.rmtree(runs / wanted[0].name)
    study = EarlyTail(runs, only_read=True)
    untied, before = completed(study, untied, "a date"), untied
    assert [run["name"] for run in untied["runs"][:5]] == [run["name"] for run in before["runs"]]
    assert untied["added"] == [run["name"] for run in untied["runs"][5:]] == [one.name for one in wanted[1:]]
    assert untied["left_out"] == {wanted[0].name: 0.0}
    make(tmp_path / "both", "untied", (1, 2))
    both = read(EarlyTail(tmp_path / "both", only_read=True), "untied")
    first = {run["name"]: run for run in both["runs"]}
    for run in untied["runs"][5:]:
        assert run == first[run["name"]] | {"early": run["early"]}, "but for the counts, which are those of before"
        assert run["early"][-1]["alpha_tail"] == pytest.approx(first[run["name"]]["early"][-1]["alpha_tail"])
    assert untied["at"][-1]["claims"][0]["tiers"] == pytest.approx(both["at"][-1]["claims"][0]["tiers"])
    results = {"families": [completed(study, rope, "a date"), untied]}
    write_report(results | {"outcomes": judge(results["families"])}, tmp_path)
    report = (tmp_path / "early_tail.md").read_text()
    assert "The runs of rope are gone: they stand as found on a date. The runs of untied are gone" in report
    assert "but for 4 that were made later and looked at after as many tokens" in report
