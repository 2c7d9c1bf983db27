"""The table of cost by width says of each row whether it was measured or computed, and adds up."""

import pytest

from benchmarks import cost_by_width
from benchmarks.one_report import report
from benchmarks.published_runs import RUNS
from tests.benchmarks.test_benchmarks import run


def test_rows_are_measured_of_five_layers_of_one_and_computed(tmp_path) -> None:
    sizes = "--widths 16 32 48 --five-layers-up-to 16 --one-layer-up-to 32 --num-tokens 1024"
    printed, found = run(tmp_path, "cost_by_width", sizes)
    assert "measured" in printed
    rows = {row["width"]: row for row in found["result"]["widths"]}
    hows = ["measured", "one layer measured, times 5", "computed from 32"]
    assert [row["how"].partition(":")[0] for row in rows.values()] == hows
    assert rows[48]["collecting"] == pytest.approx(2.25 * rows[32]["collecting"])
    assert rows[48]["solving"] == pytest.approx(3.375 * rows[32]["solving"])
    assert all(row["collecting"] > 0 < row["solving"] for row in rows.values())
    assert all(2 * 8 * 5 * w**2 < row["sums_bytes"] < 6 * 8 * 5 * (w + 1) ** 2 for w, row in rows.items())
    assert "computed from 32" in (tmp_path / "result.md").read_text()


def test_a_report_has_a_spectrum_of_each_layer() -> None:
    cost = report(16, layers=2, num_tokens=512)
    assert cost.failures == {}
    assert min(cost.collecting, cost.solving, cost.collecting_cpu, cost.solving_cpu) > 0


def test_shares_of_published_runs_follow_from_their_rates() -> None:
    tokens = {run.name: run.tokens_per_second / run.cards for run in RUNS}
    assert tokens["LLaMA 65B"] == pytest.approx(380)
    assert tokens["TinyLlama 1.1B"] == pytest.approx(24_000)
    assert tokens["torchtitan, Llama 3.1 8B"] == pytest.approx(6_667)
    (llama,) = (run for run in RUNS if run.name == "LLaMA 65B")
    # 5 x 65,536 x 2 x 8,192^2 operations at 19.5e12 on each of 2,048 cards, in 100 steps of 5.14 s.
    assert llama.products_share(5, 65536, 100) == pytest.approx(
        5 * 65536 * 2 * 8192**2 / 19.5e12 / 2048 / 514, rel=1e-3
    )
    widths = {"widths": [{"width": 8192, "solving": 514.0}], "num_tokens": 65536}
    (row,) = cost_by_width.of_runs(widths)
    assert row["solving"] == pytest.approx(1, rel=1e-3)
