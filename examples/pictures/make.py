"""Draws the index's pictures from what examples left: `python examples/pictures/make.py own_module FOLDER`.

Those of two processes take the folder of a run in one, and that of one in two; that of the notebook takes the notebook.
"""

import base64
import io
import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image

from lightning_spectral import Run

FOLDER = Path(__file__).parent
BLUE, ORANGE = "#4c6a92", "#d1622b"
COLORS = 64
"""Of a picture's palette."""


def own_module(folder: Path) -> Figure:
    """Eigenvalues of the last block, from the first report to the last."""
    return _evolution(folder, "blocks.3", "eigenvalues of the last block: of 8 directions 7 stand out")


def hf_gpt2(folder: Path) -> Figure:
    """Eigenvalues of the last block, from the first report to the last."""
    return _evolution(folder, "gpt2.transformer.h.3", "eigenvalues of the last block of a GPT-2")


def vision(folder: Path) -> Figure:
    """Eigenvalues of the ConvNeXt's second block, likewise."""
    title = "ConvNeXt: 32 channels, made of patches of four pixels"
    return _evolution(folder / "convnext", "net.convnext.encoder.stages.0.layers.1", title)


def lora(folder: Path) -> Figure:
    """Eigenvalues of the last block, likewise."""
    return _evolution(folder, "gpt2.base_model.model.transformer.h.3", "eigenvalues of the last block, under adapters")


def gan(folder: Path) -> Figure:
    """Eigenvalues of the discriminator's second block, likewise."""
    title = "discriminator: pairs of waves around a circle, of eight clusters"
    return _evolution(folder, "discriminator.blocks.1", title)


def tensor_parallel(one: Path, two: Path) -> Figure:
    """Eigenvalues of a layer whose features are cut in two."""
    return _processes(one, two, "activation", "blocks.3.up", "eigenvalues of blocks.3.up, half of it in each process")


def fsdp2(one: Path, two: Path) -> Figure:
    """Singular values of the gradients of 64 samples, half of them in each process."""
    return _processes(one, two, "gradient", "blocks.3.down.weight", "per-sample gradients of blocks.3.down, 64 samples")


def _processes(one: Path, two: Path, kind: str, name: str, title: str) -> Figure:
    figure, axes = _panel(title, "rank", "")
    runs = Run(one), Run(two)
    step = runs[0].steps(kind)[-1]
    _spectrum(axes, runs[0], kind, name, step, color=BLUE, label="one process")
    _spectrum(axes, runs[1], kind, name, step, color=ORANGE, marker=".", ls="", ms=4, label="two processes")
    axes.legend(frameon=False, loc="lower left")
    return figure


def wandb_offline(folder: Path) -> Figure:
    """Losses against tokens, from the exported histories."""
    figure, axes = _panel("exported from W&B: three seeds at each learning rate", "tokens", "validation loss")
    for side, color in (("base", BLUE), ("doubled", ORANGE)):
        for path in sorted(folder.glob(f"{side}/*/history.jsonl")):
            history = Run(path).history
            seen = np.isfinite(history.val_loss)
            (line,) = axes.plot(history.tokens[seen], history.val_loss[seen], color=color)
        line.set_label(side)
    axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:,.0f}")
    axes.legend(frameon=False)
    return figure


def hf_trainer(folder: Path) -> Figure:
    """Loss and effective rank of the last block."""
    figure, axes = _panel("validation loss (orange), RankMe of the last block of 64 channels", "step", "RankMe")
    run = Run(folder)
    steps = run.steps("activation-validate")
    spectra = [run.spectrum("activation-validate", "transformer.h.3", step=step) for step in steps]
    axes.plot(steps, [spectrum.rankme().value for spectrum in spectra], color=BLUE, marker=".")
    losses = axes.twinx()
    seen = np.isfinite(run.history.val_loss)
    losses.plot(run.history.step[seen], run.history.val_loss[seen], color=ORANGE)
    losses.tick_params(axis="y", colors=ORANGE)
    losses.spines["top"].set_visible(False)
    return figure


def mlflow_local(folder: Path) -> Image.Image:
    """The last figure among the artifacts."""
    return Image.open(sorted(folder.glob("artifacts/*/artifacts/activation/spectra/*.png"))[-1])


def quickstart(notebook: Path) -> Image.Image:
    """The first picture in the notebook."""
    outputs = [output for cell in json.loads(notebook.read_text())["cells"] for output in cell.get("outputs", [])]
    first = next(output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {}))
    return Image.open(io.BytesIO(base64.b64decode(first)))


def constant_loss(folder: Path) -> Figure:
    """Losses against tokens, down to where training stopped."""
    figure, axes = _panel("until the validation loss is 2", "tokens", "nats a byte")
    for key, color, marker in (("train_loss", "#b3c6e0", ""), ("val_loss", BLUE, "o")):
        history = Run(folder, loss=key).history
        loss = history.train_loss if key == "train_loss" else history.val_loss
        seen = np.isfinite(loss)
        axes.plot(history.tokens[seen], loss[seen], color=color, marker=marker, label=key)
    axes.axhline(2, color=ORANGE, ls="--")
    axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:,.0f}")
    axes.legend(frameon=False)
    return figure


def lr_sweep(folder: Path) -> Figure:
    """Losses against multipliers, round by round."""
    figure, axes = _panel("three rounds, of 7, 4 and 2 runs", "times the recipe's learning rates", "validation loss")
    runs = json.loads((folder / "sweep.json").read_text())["runs"]
    for number, color in ((1, "#b3c6e0"), (2, "#7f9dc6"), (3, "#1f3354")):
        of_round = [run for run in runs if run["round"] == number and run["val_loss"] is not None]
        found = sorted((run["settings"]["multiplier"], run["val_loss"]) for run in of_round)
        tokens = of_round[0]["settings"]["tokens"]
        axes.plot(*zip(*found, strict=True), color=color, marker="o", ms=4, label=f"{tokens:,} tokens each")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda multiplier, _: f"{multiplier:g}")
    axes.legend(frameon=False)
    return figure


def reference_runs(folder: Path) -> Figure:
    """Losses against tokens, by batch size."""
    figure, axes = _panel("validation loss at three batch sizes, to 2.6", "tokens", "nats a byte")
    paths = sorted(folder.glob("batch_*"), key=lambda path: int(path.name.split("-")[0].split("_")[1]))
    for path, color in zip(paths, ["#b3c6e0", "#4c6a92", "#1f3354"], strict=True):
        history = Run(path).history
        axes.plot(history.tokens, history.val_loss, color=color, marker=".", label=path.name.split("-")[0])
    axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:,.0f}")
    axes.legend(frameon=False)
    return figure


def _evolution(folder: Path, name: str, title: str) -> Figure:
    """Eigenvalues of a layer, a line for each report."""
    figure, axes = _panel(title, "rank", "")
    run = Run(folder)
    steps = run.steps("activation")
    scale = ScalarMappable(Normalize(steps[0], steps[-1]), "viridis")
    for step in steps:
        _spectrum(axes, run, "activation", name, step, color=scale.to_rgba(step))
    figure.colorbar(scale, ax=axes, label="step", pad=0.02)
    return figure


def _panel(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.2, 3), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def _spectrum(axes: Axes, run: Run, kind: str, name: str, step: int, **how: object) -> None:
    values = run.spectrum(kind, name, step=step).values
    axes.loglog(range(1, 1 + len(values)), values, **how)


def main(name: str, *paths: str) -> None:
    drawn = globals()[name](*map(Path, paths))
    if isinstance(drawn, Figure):
        held = io.BytesIO()
        drawn.savefig(held)
        drawn = Image.open(held)
    drawn.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(FOLDER / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
