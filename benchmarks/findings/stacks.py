"""How far the stack's forecasts of the 40 landed runs err, each setting from the others, and what its intervals hold.

    python -m benchmarks.findings.stacks

Reads what ``efficiency.json`` keeps of the runs; writes ``stacks.md`` beside it. Six minutes on one core.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.findings.runs import RESULTS
from benchmarks.findings.tables import show_and_write
from lightning_spectral.functional import PREDICTORS, Early, StackedForecast, anchored_power_law, backtest, stack
from lightning_spectral.functional.line import setting_means

TARGET = 2.0
TAIL, HEAD = "alpha 0.125-0.5 gpt.blocks.3", "alpha 1-10 gpt.blocks.3"
SIZES = {4: 160, 8: 100, 12: 56, 30: 24}
"""References, and how many families of one more are drawn: each is forecast from the others."""


class Landed:
    """What the runs of rope showed at three numbers of tokens."""

    def __init__(self, path: Path) -> None:
        runs = [run for run in json.loads(path.read_text())["runs"] if run["name"].startswith("rope")]
        names = [run["name"].rpartition("-")[0] for run in runs]
        self._runs = runs
        self.settings = torch.tensor([sorted(set(names)).index(name) for name in names])
        self.tokens = torch.tensor([run["tokens"] for run in runs], dtype=torch.float64)
        self.points = [int(point) for point in runs[0]["early"]]

    def number(self, point: int, name: str) -> Tensor:
        values = [run["early"][str(point)][name] for run in self._runs]
        return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)

    def early(self, point: int, *spectral: str) -> Early:
        """Numbers at a point; of the loss curve the points up to there are known."""
        at = [one for one in self.points if one <= point]
        losses = torch.stack([self.number(one, "early loss") for one in at], 1)
        curves = [math.log(anchored_power_law(torch.tensor(at).double(), curve, TARGET)) for curve in losses]
        return Early(
            (losses[:, -1] - TARGET).log(),
            self.number(point, "log batch size"),
            torch.tensor(curves, dtype=torch.float64),
            torch.stack([self.number(point, name) for name in spectral], 1) if spectral else None,
        )


def errors(landed: Landed) -> list[dict[str, str]]:
    """Of the stack without spectra and of single predictors, all nested over settings."""
    rows = []
    for point in landed.points:
        early, common = landed.early(point), (landed.tokens, landed.settings)
        by_line = {"tail": landed.number(point, TAIL), "head": landed.number(point, HEAD)}
        by_line["early loss"] = landed.number(point, "early loss")
        found = {name: backtest(numbers, *common).predictions for name, numbers in by_line.items()}
        found["batch law"] = stack(early, landed.tokens, None, landed.settings, predictors=("batch law",)).predictions
        found["stack of loss and batch"] = stack(early, landed.tokens, None, landed.settings).predictions
        for name, spectral in (("tail", (TAIL,)), ("head", (HEAD,)), ("tail and head", (TAIL, HEAD))):
            whole = stack(landed.early(point, *spectral), landed.tokens, None, landed.settings)
            gain = f"{whole.spectral_gain:+.0%} ({whole.spectral_gain_low:+.0%} .. {whole.spectral_gain_high:+.0%})"
            found[f"... with {name}: takes off {gain}" + (", used" if whole.uses_spectra else "")] = whole.predictions
        rows += [_row(f"{point:,}", name, values, landed) for name, values in found.items()]
    return rows


def _row(point: str, name: str, predictions: Tensor, landed: Landed) -> dict[str, str]:
    logs = (predictions / landed.tokens).log()
    known = logs.isfinite()
    slow = known & (landed.settings == landed.settings[landed.tokens.argmax()])
    return {
        "tokens": point,
        "predictor": name,
        "median error": f"{float(logs[known].expm1().abs().quantile(0.5)):.1%}",
        "mean |ln|": f"{float(logs[known].abs().mean()):.3f}",
        "of settings": f"{float(setting_means(logs[known].abs(), landed.settings[known]).mean()):.3f}",
        "slowest setting": f"{float(logs[slow].abs().mean()):.2f}" if slow.any() else "-",
        "runs": str(int(known.sum())),
    }


def synthetic(rng: np.random.Generator, num: int, law: str) -> tuple[Early, Tensor]:
    """A family: batches, a gap of losses, and ln tokens that follow one, both, or neither."""
    size, rate = 128 * 2.0 ** rng.integers(2, 8, num), rng.standard_normal(num)
    far = np.log(size / 2048)
    gap = {"loss": 0.4 * rate, "batch": 0.3 * rate, "none": 0.4 * rate}.get(law, 0.2 * far - 0.2 * rate)
    noise = rng.standard_normal(num)
    y = {
        "batch": np.log1p(size / 4096) + 0.1 * noise,
        "loss": 1.5 * gap + 0.15 * noise,
        "batch and rate": np.log1p(size / 4096) - 0.3 * rate + 0.15 * rate**2 + 0.08 * noise,
        "bent": np.log1p(size / 4096) + gap + 0.4 * gap * far + 0.08 * noise,
        "none": 0.5 * noise,
    }[law]
    return Early(*map(torch.from_numpy, (gap, np.log(size)))), torch.from_numpy(np.exp(12.5 + y))


def coverage(
    draw: Callable[[np.random.Generator, int], StackedForecast | None], num: int, times: int
) -> dict[str, Any]:
    """Shares of 80% intervals of nested forecasts that hold the truth, inside the references and beyond."""
    rng = np.random.default_rng(num)
    held: dict[bool, list[bool]] = {False: [], True: []}
    refused = 0
    for _ in range(times):
        found, tokens, early, settings = draw(rng, num + 1)  # type: ignore[misc]
        for run in range(len(tokens)):
            if not math.isfinite(float(found.predictions[run])):
                refused += 1
                continue
            others = settings != settings[run]
            is_beyond = any(
                not float(column[others].min()) <= float(column[run]) <= float(column[others].max())
                for column in (early.log_gap, early.log_batch)
            )
            held[is_beyond].append(bool(found.lows[run] <= tokens[run] <= found.highs[run]))
    share = {where: f"{np.mean(each):.0%} of {len(each)}" if each else "-" for where, each in held.items()}
    return {"references": str(num), "inside": share[False], "beyond": share[True], "too far": str(refused)}


def coverages(landed: Landed) -> list[dict[str, str]]:
    rows = []
    for law in ("batch", "loss", "batch and rate", "bent", "none"):

        def draw(rng: np.random.Generator, num: int, law: str = law) -> Any:
            early, tokens = synthetic(rng, num, law)
            return stack(early, tokens), tokens, early, torch.arange(num)

        rows += [{"family": law} | coverage(draw, num, times) for num, times in SIZES.items()]
    for point in landed.points:
        early = landed.early(point)._replace(log_curve=None)

        def choose(rng: np.random.Generator, num: int, early: Early = early) -> Any:
            chosen = torch.isin(landed.settings, torch.from_numpy(rng.choice(18, num, replace=False)))
            part = Early(early.log_gap[chosen], early.log_batch[chosen])
            tokens, settings = landed.tokens[chosen], landed.settings[chosen]
            return stack(part, tokens, None, settings), tokens, part, settings

        sizes = {num: times for num, times in SIZES.items() if num < 18}
        rows += [{"family": f"landed, {point:,} tokens"} | coverage(choose, num, times) for num, times in sizes.items()]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where efficiency.json is and results go")
    folder = parser.parse_args().folder
    torch.set_num_threads(1)
    landed = Landed(folder / "efficiency.json")
    what = (
        f"{len(landed.tokens)} runs of {len(landed.settings.unique())} settings; predictors of a stack: "
        f"{', '.join(PREDICTORS)}. Each setting is forecast by a stack that was fitted, and weighed, on the others."
    )
    sections = [
        ("Forecasts of the landed runs by the stack", what),
        ("Errors of nested forecasts", errors(landed)),
        ("80% intervals that hold the truth", coverages(landed)),
    ]
    show_and_write(sections, "", folder / "stacks.md")


if __name__ == "__main__":
    main()
