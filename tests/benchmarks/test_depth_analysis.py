"""Study 6: its tests on runs of known truth, its permutations against enumeration, and what is said of missing runs."""

import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.findings import depth
from benchmarks.findings.depth_report import write_report
from benchmarks.findings.depth_runs import BATCH_SIZES, DEPTHS, NUM_TOKENS, TUNING_TOKENS, Depth, seeds_of, tuning
from benchmarks.findings.permutation import arrangements, exact_separation, pooled_rank_correlation, separation
from benchmarks.findings.runs import RESULTS
from tests.benchmarks.planted_runs import broken, plant

PACE = {4: 1.0, 8: 1.5, 16: 1.75}
"""How many times as many tokens a batch size takes."""
COUNTS = (8_192, 49_152, TUNING_TOKENS, 212_992, NUM_TOKENS)


def names_of(layers: int) -> list[str]:
    return [f"gpt.blocks.{round(at * (layers - 1) / 4)}" for at in range(5)]


def loss_at(tokens: float, pace: float) -> float:
    return 10.0 - 0.5 * math.log(tokens / pace)


def make(folder: Path, layers: int, apart: float, tail: float = 0.2) -> None:
    """The fifteen runs of a depth.

    Args:
        folder: Where.
        layers: The depth.
        apart: How many times as far as seeds batch sizes are apart, in the exponent of the head.
        tail: By how much the tail steepens from one batch size to the next.
    """
    names = names_of(layers)
    for setting in dict.fromkeys([*tuning(layers), *seeds_of(one for one in tuning(layers) if one.factor == 1)]):
        pace = PACE[setting.batch_size] * (1 + 0.02 * setting.seed)
        tier = BATCH_SIZES.index(setting.batch_size)
        last = NUM_TOKENS if setting.factor == 1 else TUNING_TOKENS
        slow = 1.0 if setting.factor == 1 else 1.2

        def spectra(name: str, tokens: float, tier: int = tier, seed: int = setting.seed) -> np.ndarray:
            # of the deepest layer alone the head tells batch sizes apart more than twice as far
            more = 2.5 if name == names[-1] else 1.0
            steep = 3 + tail * tier + 0.02 * seed + (0.5 if tokens < 10_000 else 0.0)
            return broken(steep, 1 + 0.01 * (seed + apart * more * tier))

        points = [(tokens, loss_at(tokens, slow * pace)) for tokens in COUNTS if tokens <= last]
        plant(folder / setting.name, points, spectra, names, setting.batch_tokens)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("depth")
    for layers in DEPTHS:
        make(folder, layers, apart=6.0)
    return folder


def but(runs: Path, folder: Path, *names: str) -> None:
    """A folder with all runs but some."""
    folder.mkdir()
    for run in runs.iterdir():
        if run.name not in names:
            (folder / run.name).symlink_to(run)


def analyse(folder: Path, results: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    results.mkdir()
    monkeypatch.setattr(sys, "argv", ["depth", "--runs", str(folder), "--folder", str(results)])
    monkeypatch.setattr(depth, "NUM_PERMUTATIONS", 999)
    depth.main()
    found: dict[str, Any] = json.loads((results / "depth.json").read_text())
    return found


def test_what_was_planted_is_found(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = analyse(runs, tmp_path / "out", monkeypatch)
    for one in found["depths"]:
        slowest = PACE[16] * 1.06
        assert one["loss"] == math.ceil(100 * loss_at(NUM_TOKENS, slowest)) / 100, "the highest, rounded up"
        for run in one["runs"]:
            pace = PACE[run["batch_size"]] * (1 + 0.02 * run["seed"])
            assert run["tokens"] == pytest.approx(pace * math.exp((10 - one["loss"]) / 0.5))
            tier = BATCH_SIZES.index(run["batch_size"])
            assert run["alpha_tail"] == pytest.approx(3 + 0.2 * tier + 0.02 * run["seed"])
            assert run["peak"] == COUNTS[0]
        assert one["tokens"] == pytest.approx(min(run["tokens"] for run in one["runs"]) / 2)
        assert one["separation"]["p_value"] == pytest.approx(1 / 280)
        assert one["separation"]["p_holm"] == pytest.approx(3 / 280)
        assert one["rho"] == pytest.approx(1.0)
        assert one["strongest"] == names_of(one["depth"])[-1]
        assert one["late"], "147,456 tokens are 72 steps of a batch of sixteen"
        assert all(entry.endswith("steps") for entry in one["late"])
    outcome = found["outcome"]
    assert [outcome[name] for name in ("D1", "D2", "D3", "gate")] == [True, True, True, False]
    assert outcome["pooled"] == pytest.approx([1.0, 1 / 1000])
    assert "the stage gate is not met" in outcome["in words"]
    assert depth.judge([one | {"late": []} for one in found["depths"]])["in words"] == "held"
    assert (tmp_path / "out" / "depth.png").stat().st_size > 10_000


def test_a_missing_run_is_named_and_its_depth_not_tested(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    but(runs, tmp_path / "runs", "depth_12-batch_4-lr_x1-seed_3", "depth_48-batch_8-lr_x2-seed_1")
    found = analyse(tmp_path / "runs", tmp_path / "out", monkeypatch)
    twelve, middle, deepest = found["depths"]
    assert twelve["missing"] == ["depth_12-batch_4-lr_x1-seed_3"]
    assert deepest["missing"] == ["depth_48-batch_8-lr_x2-seed_1"], "the rates are not known before all are tuned"
    assert "separation" not in twelve
    assert "separation" not in deepest
    assert middle["separation"]["p_holm"] == pytest.approx(3 / 280), "as if the others' p were 1"
    outcome = found["outcome"]
    assert outcome["depths"] == [36]
    assert [outcome[name] for name in ("D1", "D2", "D3")] == [None] * 3
    report = (tmp_path / "out" / "depth.md").read_text()
    assert "1 of 3 depths are complete" in report
    assert "12 layers: not made, 1 runs are missing" in report
    assert "| 48 | depth_48-batch_8-lr_x2-seed_1 |" in report


def test_nothing_is_made_of_no_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = analyse(tmp_path / "none", tmp_path / "out", monkeypatch)
    assert found["outcome"]["in words"] == "not made: no depth is complete"
    assert len(found["depths"][0]["missing"]) == 9


def test_seeds_alone_hold_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depth, "DEPTHS", (12,))
    make(tmp_path / "runs", 12, apart=0.0, tail=0.0)
    found = analyse(tmp_path / "runs", tmp_path / "out", monkeypatch)
    assert found["depths"][0]["separation"]["p_value"] > 0.5
    assert [found["outcome"][name] for name in ("D1", "D2")] == [False, False]


def test_a_run_that_ends_without_a_loss_is_missing(runs: Path, tmp_path: Path) -> None:
    name = "depth_36-batch_8-lr_x1-seed_2"
    but(runs, tmp_path / "runs", name)
    points = [(COUNTS[0], 9.0), (NUM_TOKENS, math.nan)]
    plant(tmp_path / "runs" / name, points, lambda *given: broken(3.0), names_of(36), 1024)
    assert depth.settings_of(Depth(tmp_path / "runs", only_read=True), 36)[1] == [name]


def test_words_say_which_part_holds(runs: Path) -> None:
    def told(holds: tuple[bool, ...], rhos: tuple[float, ...]) -> str:
        depths = [
            {"depth": layers, "separation": {"holds": one}, "rho": rho}
            for layers, one, rho in zip(DEPTHS, holds, rhos, strict=True)
        ]
        return depth._words(depths, {"D1": all(holds), "D2": False}, True)

    assert told((True, True, True), (0.1, -0.2, 0.3)) == (
        "batch sizes are farther apart than seeds at 12, 36 and 48 layers; D2 is not shown (rho +0.10, -0.20, +0.30)"
    )
    assert told((True, False, False), (0, 0, 0)).startswith("batch sizes are farther apart than seeds at 12 layers;")
    assert told((False,) * 3, (0, 0, 0)).startswith("D1 is not shown at any depth; ")


# permutation tests


def test_arrangements_are_all_that_differ() -> None:
    every = list(arrangements([3, 3, 3]))
    assert len(every) == len(set(every)) == 1680 == 280 * math.factorial(3)
    assert set(arrangements([2, 1, 2])) == set(itertools.permutations([0, 0, 1, 2, 2]))


def test_the_exact_separation_is_that_of_all_partitions() -> None:
    generator = np.random.default_rng(1)
    points = generator.standard_normal((6, 2)) + np.repeat([[0.0], [1.5]], 3, 0)
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)

    def difference(groups: tuple[tuple[int, ...], ...]) -> float:
        within = [distances[a, b] for group in groups for a, b in itertools.combinations(group, 2)]
        between = [distances[a, b] for a in groups[0] for b in groups[1]]
        return float(np.mean(between) - np.mean(within))

    # the first run is in the first group of each of the ten ways to part six in three and three
    halves = [(0, *rest) for rest in itertools.combinations(range(1, 6), 2)]
    every = [difference((half, tuple(set(range(6)) - set(half)))) for half in halves]
    observed = difference(((0, 1, 2), (3, 4, 5)))
    found = exact_separation(distances, list("aaabbb"))
    assert found.p_value == pytest.approx(np.mean(np.array(every) >= observed - 1e-12))
    assert found.between - found.within == pytest.approx(observed)
    drawn = separation(distances, list("aaabbb"))
    assert drawn[:2] == pytest.approx(found[:2])
    assert drawn.p_value == pytest.approx(found.p_value, abs=0.02)
    assert np.isnan(exact_separation(distances, list("abcdef"))).all()


def test_the_pooled_correlation_is_that_of_all_permutations_within_strata() -> None:
    x = [np.array([1.0, 2.0, 3.0]), np.array([30.0, 10.0, 20.0, 40.0])]
    y = [np.array([5.0, 6.0, 4.0]), np.array([1.0, 2.0, 3.0, 4.0])]

    def statistic(orders: tuple[tuple[int, ...], ...]) -> float:
        ranks = [np.argsort(np.argsort(part)) - (len(part) - 1) / 2 for part in (*x, *y)]
        return sum(float(ranks[at] @ ranks[at + 2][list(order)]) for at, order in enumerate(orders))

    every = [
        statistic(orders)
        for orders in itertools.product(itertools.permutations(range(3)), itertools.permutations(range(4)))
    ]
    observed = statistic(((0, 1, 2), (0, 1, 2, 3)))
    rho, p_value = pooled_rank_correlation(x, y, num=40_000)
    assert rho == pytest.approx(observed / (2.0 + 5.0))
    assert p_value == pytest.approx(np.mean(np.abs(every) >= abs(observed) - 1e-9), abs=0.01)
    assert np.isnan(pooled_rank_correlation([np.ones(4)], [np.arange(4.0)])).all()
    assert np.isnan(pooled_rank_correlation([np.array([1.0, np.nan, 2.0, 3.0])], [np.arange(4.0)])).all()


def test_the_report_says_what_the_landed_results_hold(tmp_path: Path) -> None:
    results = json.loads((RESULTS / "depth.json").read_text())
    write_report(results, tmp_path)
    assert (tmp_path / "depth.md").read_text() == (RESULTS / "depth.md").read_text()
