"""The studies: their tests by permutation against enumeration, planted effects that they find, and runs made once."""

import itertools
import json
import os
import subprocess
import sys
from math import inf, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import rankdata, spearmanr

from benchmarks.findings import control, control_report, efficiency, file_order, geometry, runs
from benchmarks.findings.efficiency import DEFAULT_BAND, Observed, tail_name
from benchmarks.findings.permutation import holm, rank_correlation, separation
from benchmarks.findings.processes import LENGTH, PROCESSES, eigenvalues, rows
from benchmarks.findings.runs import POINTS, Family, Setting
from benchmarks.harness import environment
from lightning_spectral.functional import Spectrum, partial_spearman
from tests.limit import LIMIT

LAYERS = ("gpt.blocks.0", "gpt.blocks.1")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# permutation tests


def test_the_p_value_of_a_separation_is_that_of_all_relabellings(rng: np.random.Generator) -> None:
    points = rng.standard_normal((6, 2)) + np.repeat([[0.8, 0.0], [0.0, 0.0]], 3, axis=0)
    groups = np.repeat([0, 1], 3)
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)

    def difference(labels: np.ndarray) -> float:
        pairs = list(itertools.combinations(range(6), 2))
        between = [distances[i, j] for i, j in pairs if labels[i] != labels[j]]
        within = [distances[i, j] for i, j in pairs if labels[i] == labels[j]]
        return float(np.mean(between) - np.mean(within))

    every = [difference(groups[list(order)]) for order in itertools.permutations(range(6))]
    exact = np.mean(np.array(every) >= difference(groups) - 1e-12)
    found = separation(distances, groups.tolist())
    assert found.between - found.within == pytest.approx(difference(groups))
    assert found.p_value == pytest.approx(exact, abs=0.02)


@pytest.mark.parametrize("num_given", [0, 1, 2])
def test_rank_correlation_equals_scipys_and_that_of_the_inverse(rng: np.random.Generator, num_given: int) -> None:
    x, y, *given = rng.standard_normal((2 + num_given, 30)) + rng.standard_normal(30)
    rho, p_value = rank_correlation(x, y, given)
    inverse = np.linalg.inv(np.corrcoef([rankdata(values) for values in (x, y, *given)]))
    assert rho == pytest.approx(-inverse[0, 1] / np.sqrt(inverse[0, 0] * inverse[1, 1]))
    if num_given == 0:
        assert (rho, p_value) == pytest.approx(tuple(spearmanr(x, y)), abs=0.01)
    if num_given == 1:
        assert rho == pytest.approx(partial_spearman(*map(torch.from_numpy, (x, y, given[0]))))


def test_one_run_a_group_separates_nothing(rng: np.random.Generator) -> None:
    distances = rng.uniform(size=(5, 5))
    for groups in (range(5), [0] * 5):
        assert np.isnan(separation(distances + distances.T, list(groups))).all()


def test_p_values_given_others_are_uniform_where_nothing_is_left(rng: np.random.Generator) -> None:
    small = 0
    for seed in range(100):
        z = rng.standard_normal(25)
        x, y = z + 0.5 * rng.standard_normal((2, 25))
        small += rank_correlation(x, y, [z], seed=seed)[1] <= 0.1
    assert 3 <= small <= 20  # of a binomial with mean 10, beyond three standard deviations


def test_nothing_is_left_where_the_others_say_it_all(rng: np.random.Generator) -> None:
    x, y = rng.standard_normal((2, 12))
    assert np.isnan(rank_correlation(x, y, [x**3])).all()
    assert np.isnan(rank_correlation(x, y, [y, x])).all()
    assert np.isnan(rank_correlation(x[:4], y[:4], [x[:4] ** 2])).all()


def test_holm_multiplies_by_how_many_are_left() -> None:
    assert holm([0.01, 0.5, 0.03, 0.02]) == pytest.approx([0.04, 0.5, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


# the estimator's control


@pytest.mark.parametrize("spectrum", ["power", "broken"])
@pytest.mark.parametrize("process", PROCESSES)
def test_each_process_has_the_covariance_it_should(process: str, spectrum: str) -> None:
    values = eigenvalues(spectrum, 12)
    assert (values.diff() < 0).all()
    drawn = rows(process, values, 600, torch.Generator().manual_seed(0)).reshape(-1, 12)
    covariance = torch.cov(drawn.T, correction=0)
    scale = values.sqrt()[:, None] * values.sqrt()
    error = ((covariance - torch.diag(values)) / scale).abs().max()
    assert error < 0.25  # 600 documents, the process with the fewest independent rows: a spread of 0.06
    assert drawn.mean(0).div(values.sqrt()).abs().max() < 0.15


def test_a_report_of_a_process_is_that_of_all_its_rows() -> None:
    sequences = rows("independent", eigenvalues("power", 16), 8, torch.Generator().manual_seed(1)) + 5
    found = control.measured(sequences, normalize=False)
    expected = np.linalg.eigvalsh(np.cov(sequences.reshape(-1, 16).numpy(), rowvar=False, bias=True))[::-1]
    scaled = expected / expected.sum() * float(found.values.sum())
    np.testing.assert_allclose(found.values, scaled, rtol=1e-9)
    assert found.leave_one_out.shape == (4, 16)


def test_cells_of_the_control_are_judged_and_told(tmp_path: Path) -> None:
    cells = [control.Cell("independent", spectrum, 128, 16) for spectrum in ("power", "broken")]
    found = [control.run_cell(cell, 8, 0, tmp_path) for cell in cells]
    for cell in found:
        assert cell["tail"]["spread"] < 0.1
        assert abs(cell["tail"]["bias_corrected"]) < abs(cell["tail"]["bias"])
        assert 0 < cell["js_between_draws"] < cell["js_to_truth"] * 4
    blocks = [cell | {"source": "block", "spectrum": "trained", "ratio": ratio} for cell in found for ratio in (16, 64)]
    control_report.write_report(found + blocks, environment(), tmp_path)
    written = json.loads((tmp_path / "control.json").read_text())
    assert len(written["cells"]) == len(found + blocks)
    assert (tmp_path / "control.png").stat().st_size > 1000
    assert "| independent, power | 16 |" in (tmp_path / "control.md").read_text()


def test_a_cell_of_other_draws_or_another_model_is_made_again(tmp_path: Path) -> None:
    known, block = control.Cell("heavy", "power", 128, 4), control.Cell("block", "trained", 128, 4)
    for cell in (known, block):
        assert not control.is_done(cell, 8, 600, tmp_path)
        (tmp_path / f"{cell.name}.json").write_text(json.dumps({"num_draws": 8, "num_steps": 600}))
        assert control.is_done(cell, 8, 600, tmp_path)
        assert not control.is_done(cell, 10, 600, tmp_path)
    assert control.is_done(known, 8, 2, tmp_path)
    assert not control.is_done(block, 8, 2, tmp_path)


def test_the_recommendation_is_the_least_size_that_meets_everything() -> None:
    def cell(source: str, ratio: int, bias: float) -> dict[str, Any]:
        tail = {"bias_corrected": bias, "spread_corrected": 0.01, "coverage_of_mean": 0.8}
        return {"source": source, "spectrum": "trained", "ratio": ratio, "tail": tail, "js_between_draws": 1e-6}

    bias, _, _, js = control_report.CRITERIA
    cells = [cell("a", 16, 0.01), cell("b", 16, 0.03), cell("a", 64, 0.01), cell("b", 64, -0.01)]
    found = control_report.recommend(cells)
    assert (found["ratio"], found["num_tokens"], found["set_aside"]) == (64, 65536, [])
    assert found["failed"][bias] == {16: ["b"], 64: []}
    for one in cells:
        one["js_between_draws"] = 1e-3
    found = control_report.recommend(cells)
    assert (found["ratio"], found["num_tokens"], found["set_aside"]) == (64, 65536, [js])
    cells[2]["tail"]["coverage_of_mean"] = 0.5
    found = control_report.recommend(cells)
    assert (found["ratio"], found["num_tokens"], found["set_aside"]) == (None, None, [js])


def test_a_correction_that_corrects_nothing_is_told() -> None:
    def cell(ratio: int, plain: float, corrected: float) -> dict[str, Any]:
        return {"ratio": ratio, "tail": {"bias": plain, "bias_corrected": corrected}}

    better, worse, small = cell(16, 0.1, -0.01), cell(64, 0.01, -0.02), cell(4, 0.1, 0.2)
    assert control_report.worse_corrected([better, worse, small]) == [worse]


# runs


def test_the_plan_has_56_runs_and_each_its_name() -> None:
    settings = runs.all_settings()
    assert len(settings) == len({setting.name for setting in settings}) == 56
    assert [len(part()) for part in (runs.first_set, runs.second_set, runs.rates, runs.others)] == [24, 9, 12, 16]
    # Both rules give 1e-3 at a batch of 16.
    assert set(runs.first_set()) & set(runs.second_set()) == {Setting(16, seed, 1.0) for seed in (1, 2, 3)}


def test_a_run_is_made_by_the_command_line_and_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "MAX_TOKENS", 32_768)
    setting = Setting(64, 1, 2.0)
    small = ("--model.num_layers=2", "--model.width=16", "--trainer.callbacks.num_tokens=1024")
    family = Family(tmp_path)
    words = [sys.executable, "-m", "lightning_spectral", *family.words(setting), *small]
    subprocess.run(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True, timeout=LIMIT)
    run = family.open(setting)
    assert run.steps("activation") == [2, 4]
    assert [run.tokens_at("activation", step) for step in (2, 4)] == [16_384, 32_768]
    assert family.train(setting).startswith("rope-batch_64-lr_x2-seed_1: nan tokens")
    with pytest.raises(ValueError, match=r"got none of rope-batch_4-lr_x1-seed_1 .*: make it first"):
        family.open(Setting(4, 1, 1.0))
    monkeypatch.setattr(runs, "MAX_TOKENS", 65_536)  # of this one it was cut
    assert not family.is_complete(setting)
    assert (family.target, family.block_size) == (2.0, LENGTH)
    assert Family(scale=3).points == (98_304, 196_608, 393_216)


def test_runs_of_two_families_are_not_mixed(tmp_path: Path) -> None:
    Family(tmp_path / "runs").claim()
    Family(tmp_path / "runs").claim()
    with pytest.raises(ValueError, match=r"runs must be of one configuration and scale, .*: take a new folder"):
        Family(tmp_path / "runs", scale=2).claim()


def test_a_scale_that_cuts_steps_is_refused(tmp_path: Path) -> None:
    longer = tmp_path / "longer.yaml"
    longer.write_text(runs.CONFIG.read_text().replace("block_size: 128", "block_size: 1024"))
    with pytest.raises(ValueError, match=r"scale must make .* got 1: take a multiple of 8"):
        Family(tmp_path, longer)
    words = Family(tmp_path, longer, scale=8).words(Setting(128, 1, 1.0))
    assert words[words.index("--trainer.val_check_interval") + 1] == "1"
    longer.write_text(runs.CONFIG.read_text().replace("stop_at_loss", "lr_multiplier"))
    with pytest.raises(ValueError, match="config must set stop_at_loss"):
        _ = Family(tmp_path, longer).target
    with pytest.raises(ValueError, match="got 0"):
        Family(scale=0)


# batch size and geometry


def planted(effect: float, rng: np.random.Generator, sizes: tuple[int, ...] = (4, 16, 64)) -> list[dict[str, Any]]:
    """Runs whose tail steepens with batch size, beside what seeds do."""
    ranks = torch.arange(1, 129, dtype=torch.float64)
    found = []
    for size, seed in itertools.product(sizes, range(4)):
        layers = {}
        for layer in LAYERS:
            exponent = 1.5 + effect * np.log2(size) + 0.02 * rng.standard_normal()
            values = ranks**-exponent
            groups = values * torch.exp(0.001 * torch.from_numpy(rng.standard_normal((4, 128))))
            layers[layer] = Spectrum(values, groups, count=32768, count_without=24576)
        found.append(
            {
                "name": f"{size}-{seed}",
                "batch_size": size,
                "seed": seed,
                "multiplier": 1.0,
                "tokens": 1e5 * size,
                "layers": layers,
                "numbers": {layer: geometry.numbers(spectrum) for layer, spectrum in layers.items()},
            }
        )
    return found


def test_an_effect_of_batch_size_is_found_with_its_sign_and_size(rng: np.random.Generator) -> None:
    found = geometry.study(planted(0.05, rng))
    assert found["primary"]["holds"]
    tail = next(one for one in found["effects"] if one["quantity"] == "alpha_tail")
    assert tail["is_detected"]
    assert tail["rho"] > 0.8
    assert tail["shift"] == pytest.approx(0.2, abs=0.05)
    assert tail["spread_of_seeds"] == pytest.approx(0.02, rel=0.6)
    assert tail["effect_size"] == pytest.approx(tail["shift"] / tail["spread_of_seeds"])
    assert tail["sampling_error"] < tail["spread_of_seeds"]
    ratios = {pair["ratio"]: float(np.mean(pair["js"])) for pair in found["pairs"]}
    assert ratios[1] < ratios[4] < ratios[16]
    assert 0 < found["sampling_floor"] < ratios[1]


def test_seeds_alone_are_no_effect(rng: np.random.Generator) -> None:
    found = geometry.study(planted(0.0, rng))
    assert not found["primary"]["holds"]
    assert found["primary"]["p_value"] > 0.05
    assert not any(one["is_detected"] for one in found["effects"])


def test_batch_size_and_learning_rate_are_told_apart(rng: np.random.Generator) -> None:
    known = planted(0.05, rng)
    for run in known:
        run["multiplier"] = float(rng.uniform(0.5, 2))
    tail = next(one for one in geometry.explored(known) if one["quantity"] == "alpha_tail")
    assert tail["with_batch_size"][0] > 0.8
    assert abs(tail["with_learning_rate"][0]) < 0.7 < 1 - tail["with_batch_size"][1]
    swapped = [run | {"batch_size": run["multiplier"], "multiplier": run["batch_size"]} for run in known]
    other = next(one for one in geometry.explored(swapped) if one["quantity"] == "alpha_tail")
    assert other["with_learning_rate"] == tail["with_batch_size"]


def test_divergences_are_symmetric_and_zero_of_a_run_with_itself(rng: np.random.Generator) -> None:
    found, floors = geometry.divergences(planted(0.05, rng)[:5])
    assert found.shape == floors.shape == (2, 5, 5)
    np.testing.assert_allclose(found, found.swapaxes(1, 2), atol=1e-15)
    np.testing.assert_allclose(np.diagonal(found, axis1=1, axis2=2), 0, atol=1e-15)


def test_the_report_on_geometry_holds_what_was_found(tmp_path: Path, rng: np.random.Generator) -> None:
    sets = {"root rule": planted(0.05, rng, (4, 16, 128)), "one rate": planted(0.05, rng)}
    found: dict[str, Any] = {name: geometry.study(of_set) for name, of_set in sets.items()}
    for one in found["root rule"]["effects"]:
        one["is_robust"] = one["quantity"] == "alpha_tail"
    every = [*sets["root rule"], *sets["one rate"]]
    compared = {"batch_size": 128, "gain_of_tokens": -0.5, "js": 1e-3, "sampling_floor": 1e-5, "run_floor": 1e-4}
    compared |= {"is_detected": True, "verdict": "both"}
    found |= {"explored": geometry.explored(every), "never": ["rope-slow"], "compare": [compared]}
    geometry.write_report(every, sets, found, environment(), tmp_path)
    text = (tmp_path / "geometry.md").read_text()
    assert "gpt.blocks.0 alpha_tail rises with batch size" in text
    assert "never reached the target: rope-slow" in text
    assert "![" in text
    written = json.loads((tmp_path / "geometry.json").read_text())
    assert len(written["runs"]) == len(every)
    assert written["sets"]["one rate"] == [run["name"] for run in sets["one rate"]]
    assert len(written["runs"][0]["eigenvalues"]["gpt.blocks.0"]) == 128
    assert (tmp_path / "geometry.png").stat().st_size > 1000


# early tails and efficiency


def family(rng: np.random.Generator, recipe: str = "rope", says_more: bool = True) -> list[Observed]:
    """Runs whose tokens follow batch size and, beyond it, what one band of the last layer shows."""
    found = []
    for size, rate, seed in itertools.product((4, 8, 16, 32, 64, 128), (0.5, 1.0, 2.0), (1, 2)):
        own = rng.standard_normal()
        logs = 13 + 0.3 * np.log2(size) + 0.2 * own
        early = {}
        for point in POINTS:
            bands = {
                tail_name(layer, band): float(rng.standard_normal()) for layer in LAYERS for band in efficiency.BANDS
            }
            if says_more:
                bands[tail_name(LAYERS[-1], DEFAULT_BAND)] = float(logs + 0.01 * rng.standard_normal())
            loss = 3 + 0.1 * np.log2(size) + 0.1 * rng.standard_normal()
            early[point] = bands | {
                "early loss": float(loss),
                "log batch size": float(np.log(size)),
                "loss curve": nan if point == POINTS[0] else float(np.exp(logs) * 1.5),
            }
        found.append(Observed(Setting(size, seed, rate, recipe), float(np.exp(logs)), early))
    return found


def test_a_tail_that_says_more_than_batch_size_and_loss_is_found(rng: np.random.Generator, tmp_path: Path) -> None:
    rope, held_out = family(rng), {"muon": family(rng, "muon")[:8]}
    slowest = max(range(len(rope)), key=lambda index: rope[index].tokens)
    rope[slowest] = Observed(rope[slowest].setting, inf, rope[slowest].early)
    found = efficiency.study(rope, held_out)
    assert found["primary"]["outcome"] == "as the paper says"
    assert found["primary"]["of_settings"][1] <= 0.01
    assert efficiency.outcome(-0.5, 0.001) == "the other sign"
    assert efficiency.outcome(nan, nan) == "not testable"
    relations = {one["predictor"]: one for one in found["points"][POINTS[1]]}
    name = tail_name(LAYERS[-1], DEFAULT_BAND)
    assert relations[name]["num_runs"] == 36
    assert relations[name]["rho"] > 0.95
    assert max(relations[name]["errors"].values()) < 0.02
    assert relations["loss curve"]["errors"]["alone"] == pytest.approx(0.5)
    assert found["mean"][POINTS[1]]["alone"] > relations["log batch size"]["errors"]["alone"] > 0.1
    muon = {one["predictor"]: one for one in found["held_out"][POINTS[1]]["muon"]}
    assert muon[name]["median_error"] < 0.02
    assert muon["mean"]["median_error"] > 0.2
    assert found["band"] == []
    assert found["never"] == [rope[slowest].setting.name]
    efficiency.write_report(rope, held_out, found, None, environment(), tmp_path)
    text = (tmp_path / "efficiency.md").read_text()
    assert "as the paper says" in text
    assert "| never |" in text
    assert json.loads((tmp_path / "efficiency.json").read_text())["primary"]["predictor"] == name
    assert (tmp_path / "efficiency.png").stat().st_size > 1000


def test_a_tail_that_says_nothing_is_not_shown(rng: np.random.Generator) -> None:
    found = efficiency.study(family(rng, says_more=False), {"muon": family(rng, "muon", says_more=False)[:8]})
    assert found["primary"]["outcome"] == "not shown"


def test_a_setting_left_out_takes_its_seeds_along(rng: np.random.Generator) -> None:
    known = []
    for run in family(rng):
        # Settings scatter, seeds do not: the mean of the rest is nearer where it may look at the other seed.
        _, size, rate = run.group
        tokens = float(np.exp(13 + np.sin(7 * size * rate)))
        known.append(Observed(run.setting, tokens, run.early))
    found = efficiency.errors(known, POINTS[0], None)
    assert found.setting > found.alone > 0.1


def test_a_report_in_file_order_is_spread_over_the_pass_and_judged():
    generator = torch.Generator().manual_seed(0)
    sequences = torch.randn(4 * file_order.SIZE + 3, 4, 24, generator=generator)
    spectrum = file_order.report(sequences)
    assert spectrum.count == 4 * file_order.SIZE
    assert spectrum.leave_one_out.shape == (file_order.NUM_GROUPS, 24)
    assert spectrum.vectors.shape == (24, file_order.RANK)
    found = file_order.judge([file_order.report(part) for part in sequences.split(file_order.SIZE)[:4]])
    assert all(0 <= float(share.removesuffix("%")) <= 100 for name, share in found.items() if ":" in name)
