"""Every recipe trains on a CPU with all callbacks on, the largest depth too; d12.yaml runs on two processes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, seed_everything

from lightning_spectral import ActivationSpectrum, GradientSpectrum, HeadDrift, Run, TailForecaster
from lightning_spectral.nanogpt import GPT, GPTConfig, NanoGPT, TextData, write_shard
from lightning_spectral.nanogpt.config import RECIPES, recipe_switches
from tests.limit import LIMIT
from tests.models import tiny_trainer
from tests.runs.planted import write_text

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    write_text(path)
    return str(path)


def fit(folder: Path, model: NanoGPT, text: str, num_steps: int, **kwargs) -> Run:
    """Train with all callbacks, on validation rows that they share."""
    rows = {"stage": "validate", "every_n_steps": num_steps // 2, "num_tokens": 512, "num_groups": 2}
    callbacks = [
        ActivationSpectrum(dtype="float64", tail=(8, 48), **rows),
        HeadDrift(rank=4, dtype="float64", **rows),
        TailForecaster(1.0, dtype="float64", tail=(8, 48), **rows),
        GradientSpectrum(stage="validate", every_n_steps=num_steps // 2, num_samples=24, num_groups=2),
    ]
    budget = {"max_steps": num_steps, "val_check_interval": num_steps // 2, "limit_val_batches": 8}
    trainer = tiny_trainer(
        folder, callbacks=callbacks, check_val_every_n_epoch=None, gradient_clip_val=1.0, **budget, **kwargs
    )
    trainer.fit(model, TextData(text, block_size=16, batch_size=8))
    failed = {key: float(value) for key, value in trainer.callback_metrics.items() if key.endswith("failed")}
    assert failed == dict.fromkeys(("activation/failed", "drift/failed", "forecast/failed", "gradient/failed"), 0.0)
    return Run(folder)


@pytest.mark.filterwarnings("ignore:TailForecaster makes no forecast")
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_learns_under_all_callbacks(recipe: str, tmp_path: Path, text: str) -> None:
    seed_everything(0, verbose=False)
    # The 8-bit head is for GPUs that have it; here it is emulated.
    switches = {"fp8": "emulate"} if recipe_switches(recipe).get("fp8") == "on" else {}
    model = NanoGPT("tiny", recipe, block_size=16, warmup_steps=3, switches=switches)
    run = fit(tmp_path, model, text, num_steps=30)
    assert run.history.val_loss[-1] < run.history.val_loss[0] < np.log(256)
    assert run.steps("activation") == run.steps("gradient") == [15, 30]


@pytest.mark.filterwarnings("ignore:TailForecaster makes no forecast")
@pytest.mark.filterwarnings("ignore:.*no error bar")
def test_48_layers_train_and_are_measured(tmp_path: Path, text: str) -> None:
    seed_everything(0, verbose=False)
    model = NanoGPT("d48", "unet", block_size=16, num_heads=2, width=64, warmup_steps=1)
    run = fit(tmp_path, model, text, num_steps=4)
    assert run.names("activation") == [f"gpt.blocks.{layer}" for layer in (0, 12, 24, 35, 47)]


def test_example_of_d12_runs_on_two_processes(tmp_path: Path) -> None:
    """The configuration as it stands, on shards made here, with a narrow model and few of everything."""
    generator = np.random.default_rng(0)
    (tmp_path / "shards").mkdir()
    for name, size in (("fineweb_train_000001.bin", 4000), ("fineweb_val_000000.bin", 1100)):
        write_shard(tmp_path / "shards" / name, generator.integers(0, 500, size))
    few = {
        "model.num_layers": 2,
        "model.width": 48,
        "model.num_heads": 2,
        "model.block_size": 32,
        "model.batch_tokens": 256,
        "model.warmup_steps": 1,
        "data.path": tmp_path / "shards",
        "data.block_size": 32,
        "data.batch_size": 2,
        "data.val_tokens": 1024,
        "trainer.max_steps": 4,
        "trainer.val_check_interval": 4,
        "trainer.callbacks.num_samples": 16,
        "trainer.callbacks.every_n_steps": 2,
        "trainer.precision": "32-true",
        "trainer.accelerator": "cpu",
        "trainer.devices": 2,
        "trainer.strategy": "ddp",
        "trainer.enable_progress_bar": "false",
        "trainer.default_root_dir": tmp_path,
    }
    words = [f"--{key}={value}" for key, value in few.items()]
    command = [sys.executable, "-m", "lightning_spectral", "fit", "--config", str(REPOSITORY / "examples" / "d12.yaml")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [*command, *words], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0, done.stderr[-4000:]
    run = Run(tmp_path / "lightning_logs" / "version_0")
    assert run.about["world_size"] == 2
    assert run.about["batch_tokens"] == 256
    assert run.history.tokens[-1] == 4 * 256
    assert np.isfinite(run.history.val_loss).any()
    assert run.names("activation") == ["gpt.blocks.0", "gpt.blocks.1"]


def test_window_grows_with_the_tokens_trained_on(tmp_path: Path, text: str) -> None:
    seed_everything(0, verbose=False)
    switches = {"window_start": 2, "window": 16, "window_step": 2, "window_warmup_tokens": 1024}
    model = NanoGPT("tiny", "flex_window", block_size=16, num_layers=2, width=32, warmup_steps=1, switches=switches)
    seen = {}

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_) -> None:
            seen[pl_module.tokens] = int(pl_module.gpt.window)

    trainer = tiny_trainer(tmp_path, callbacks=[Look()], max_steps=10, limit_val_batches=0)
    trainer.fit(model, TextData(text, block_size=16, batch_size=8))
    # A batch is trained with the window of the tokens before it.
    assert seen == {tokens: model.gpt.config.window_at(tokens - 128) for tokens in range(128, 1281, 128)}
    assert (seen[128], seen[1280]) == (2, 16)
    again = NanoGPT("tiny", "flex_window", block_size=16, num_layers=2, width=32, switches=switches)
    again.on_load_checkpoint({"tokens": 640})
    assert int(again.gpt.window) == model.gpt.config.window_at(640)


def test_all_batches_of_a_step_meet_one_window(tmp_path: Path, text: str) -> None:
    switches = {"window_start": 2, "window": 16, "window_step": 2, "window_warmup_tokens": 1024}
    model = NanoGPT("tiny", "flex_window", block_size=16, num_layers=2, width=32, warmup_steps=1, switches=switches)
    seen: dict[int, set[int]] = {}

    class Look(Callback):
        def on_before_backward(self, trainer, pl_module, loss) -> None:
            seen.setdefault(trainer.global_step, set()).add(int(pl_module.gpt.window))

    trainer = tiny_trainer(tmp_path, callbacks=[Look()], max_steps=3, limit_val_batches=0, accumulate_grad_batches=4)
    trainer.fit(model, TextData(text, block_size=16, batch_size=8))
    windows = [model.gpt.config.window_at(tokens) for tokens in (0, 512, 1024)]
    assert seen == {step: {window} for step, window in enumerate(windows)}
    assert len(set(windows)) == 3


def test_rotary_angles_do_not_suffer_from_a_model_made_in_bfloat16() -> None:
    config = GPTConfig.from_tier("tiny", "rope", block_size=1024)
    expected = GPT(config).rotary
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = GPT(config).rotary
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found.float(), expected, atol=4e-3, rtol=0)
