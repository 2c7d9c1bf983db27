"""Examples on models of others, run briefly: each leaves the spectra that it speaks of, and all of them are numbers."""

import math
import re
from pathlib import Path

from lightning_spectral import Run
from tests.examples.running import run_example


def assert_measured(run: Run, kind: str, names: list[str]) -> None:
    assert run.names(kind) == names
    for name in names:
        assert math.isfinite(run.spectrum(kind, name, run.steps(kind)[-1]).exponent((0.125, 0.5)).value), name


def test_padding_does_not_count(tmp_path: Path) -> None:
    printed = "\n".join(run_example("hf_gpt2", "--max-steps", "3", "--folder", tmp_path))
    (real, every), *_ = re.findall(r"attention_mask \(mask\): ([\d,]+) of ([\d,]+) positions count", printed)
    assert int(real.replace(",", "")) < int(every.replace(",", "")) == 32 * 64
    run = Run(tmp_path)
    assert_measured(run, "activation", [f"gpt2.transformer.h.{i}" for i in range(4)])
    assert_measured(run, "gradient", [f"gpt2.transformer.h.{i}.attn.c_proj.weight" for i in range(4)])
    first, second, *_ = (run.spectrum("activation", "gpt2.transformer.h.0", step) for step in run.steps("activation"))
    assert second.count == second.tokens - first.tokens  # rows are the real bytes of the steps since the last report


def test_channels_of_images(tmp_path: Path) -> None:
    *_, told = run_example("vision", "--max-steps", "3", "--folder", tmp_path)
    assert str(tmp_path) in told
    blocks = [f"encoder.stages.{i}.layers.{j}" for i in (0, 1) for j in (0, 1)]
    parts = ("dwconv", "layernorm", "pwconv1", "pwconv2")
    layers = {
        "resnet": [f"net.resnet.{block}" for block in blocks],
        "convnext": [f"net.convnext.{block}" for block in blocks],
        "vit": [f"net.vit.layers.{i}" for i in range(4)],
    }
    parameters = {
        "resnet": [f"net.resnet.{block}.layer.1.convolution.weight" for block in blocks[1::2]],
        "convnext": [f"net.convnext.{block}.{part}.weight" for block in blocks[1::2] for part in parts],
        "vit": [f"{layer}.attention.o_proj.weight" for layer in layers["vit"]],
    }
    for model, names in layers.items():
        run = Run(tmp_path / model)
        assert_measured(run, "activation", names)
        assert_measured(run, "gradient", parameters[model])
        widths = [len(run.spectrum("activation", name, 3).values) for name in names]
        assert widths == ([64] * 4 if model == "vit" else [32, 32, 64, 64])


def test_adapters_alone_have_gradients(tmp_path: Path) -> None:
    *_, told = run_example("lora", "--max-steps", "3", "--folder", tmp_path)
    assert str(tmp_path) in told
    run, start = Run(tmp_path), "gpt2.base_model.model.transformer.h"
    assert_measured(run, "activation", [f"{start}.{i}" for i in range(4)])
    matrices = [f"{start}.{i}.attn.c_attn.lora_{part}.default.weight" for i in range(4) for part in "AB"]
    assert_measured(run, "gradient", matrices)


def test_two_networks_by_manual_optimisation(tmp_path: Path) -> None:
    *_, drawn, told = run_example("gan", "--max-steps", "6", "--folder", tmp_path)
    assert str(tmp_path) in told
    assert sum(map(int, re.findall(r"\d+", drawn.partition("[")[2]))) <= 1024
    run = Run(tmp_path)
    assert run.steps("gradient") == [2, 4, 6]  # optimizer steps, two a batch
    assert_measured(run, "activation", [f"discriminator.blocks.{i}" for i in range(3)])
    assert_measured(run, "gradient", [f"discriminator.blocks.{i}.0.weight" for i in range(3)])
