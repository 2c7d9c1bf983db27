"""What a page holds of one run: what it is, its history, its spectra, and what was forecast and advised."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_spectral.reporting.cards import cards
from lightning_spectral.reporting.headline import headline, tokens_per_sample
from lightning_spectral.reporting.series import MOST_SHOWN, gather, key_of, series_of
from lightning_spectral.reporting.thinning import kept_points
from lightning_spectral.reporting.words import duration, number, short
from lightning_spectral.runs import Run

FORECAST = ("step", "tokens", "tokens_to_target", "low", "high", "actual")


def run_data(run: Run, label: str, side: int | None = None, most_shown: int = MOST_SHOWN) -> dict[str, Any]:
    """What a page holds of a run.

    Args:
        run: The run.
        label: What it is called on the page.
        side: Which side of a comparison it is of; None without one.
        most_shown: Of how many reports of each series spectra are held.

    Returns:
        JSON-like, with NaN where nothing is known.
    """
    series = {}
    for kind in run.kinds:
        first, *others = series_of(run, kind)
        try:
            for name in (first, *others):
                run.use(kind, name)
                series[key_of(kind, name)] = gather(run, kind, most_shown)
        finally:
            run.use(kind, first)
    found = headline(run)
    return {
        "label": label,
        "path": str(run.path),
        "side": side,
        "family": run.family,
        "facts": facts(run),
        "columns": run.columns,
        "cards": [card._asdict() for card in cards(found, failures(series))],
        "advice": advice(run),
        "loss_name": run.history.loss_name,
        "history": history(run),
        "series": series,
        "batch_tokens": number(run.about.get("batch_tokens")),
        "tokens_per_sample": tokens_per_sample(run),
        "forecasts": forecasts(run),
    }


def failures(series: dict[str, Any]) -> tuple[int, int, str]:
    """Spectra that could not be had, of how many, and why the latest; of the reports that a page looks at."""
    num_failed = num_all = 0
    latest = (-1, "")
    for one in series.values():
        for name in one["names"]:
            num_failed += name["num_failed"]
            num_all += name["num_reports"]
            for index, reasons in name["why"].items():
                if "all" in reasons:
                    latest = max(latest, (one["step"][int(index)], f"{name['name']}: {reasons['all']}"))
    return num_failed, num_all, latest[1]


def facts(run: Run) -> list[list[str]]:
    """What a run is, in words: pairs of a question and its answer, without those that are not known."""
    about, history = run.about, run.history
    given = about.get("model")
    model = given if isinstance(given, dict) else {}
    name, size = str(model.get("class") or "").rpartition(".")[2], number(model.get("num_parameters"))
    known = [
        ("model", f"{name}, {short(size)} parameters" if name and size > 0 else name),
        ("family", run.family),
        ("steps", short(float(history.step[-1])) if len(history.step) else ""),
        ("tokens", short(float(history.tokens[-1])) if len(history.tokens) else ""),
        ("training time", duration(float(history.seconds[-1])) if len(history.seconds) else ""),
        ("batch", f"{short(about['batch_tokens'])} tokens" if about.get("batch_tokens") else ""),
        ("seed", "" if about.get("seed") is None else str(about["seed"])),
        ("device", " x ".join(str(part) for part in (about.get("world_size"), about.get("device")) if part)),
        ("started", str(about.get("started") or "")[:16].replace("T", " ")),
        ("tags", ", ".join(f"{key}={value}" for key, value in run.tags.items())),
        ("read from", ", ".join(f"{key}: {value}" for key, value in run.columns.items())),
    ]
    return [[key, value] for key, value in known if value not in ("", "-")]


def advice(run: Run) -> list[dict[str, str]]:
    """What the run left of what moved; of addresses those that a page may point to."""
    is_safe = [one["url"].startswith("https://") for one in run.advice]
    return [one | {"url": one["url"] if safe else ""} for one, safe in zip(run.advice, is_safe, strict=True)]


def history(run: Run) -> dict[str, list[float]]:
    """Steps, tokens, seconds and losses; of many entries those that a chart needs."""
    found = run.history
    at = found.tokens if np.isfinite(found.tokens).all() else found.step
    losses = (found.train_loss, found.val_loss)
    kept = kept_points(at, losses) if len(at) else np.arange(0)
    return {name: column[kept].tolist() for name, column in found._asdict().items()} | {"num_entries": len(at)}


def forecasts(run: Run) -> list[dict[str, Any]]:
    """What each forecaster said as the run went on, with its target."""
    targets = run.about.get("forecast") or {}
    found: dict[str, dict[str, Any]] = {}
    for line in run.forecasts:
        prefix = str(line.get("prefix", ""))
        facts = targets.get(prefix) or {}
        said = {"target": number(facts.get("target_loss")), "monitor": str(facts.get("monitor") or "loss")}
        one = found.setdefault(prefix, {"prefix": prefix, **said, **{name: [] for name in FORECAST}})
        for name in FORECAST:
            one[name].append(number(line.get(name)))
    return list(found.values())


def labels(runs: Sequence[Run]) -> list[str]:
    """Short names that tell runs apart: paths without what all have in common; of one run the last two parts."""
    parts = [list(Path(run.path).absolute().parts) for run in runs]
    while len(parts) > 1 and all(len(one) > 1 for one in parts) and len({one[0] for one in parts}) == 1:
        parts = [one[1:] for one in parts]
    while len(parts) > 1 and all(len(one) > 1 for one in parts) and len({one[-1] for one in parts}) == 1:
        parts = [one[:-1] for one in parts]
    return [str(Path(*one[-2:] if len(parts) == 1 else one)) for one in parts]
