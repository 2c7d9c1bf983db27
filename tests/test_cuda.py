"""On a GPU numbers are those of a CPU in float64, and training is training without; skipped where there is none."""

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from transformers import Trainer

from lightning_spectral import ActivationSpectrum, GradientSpectrum, HeadDrift, SpectralWatch, TailForecaster
from lightning_spectral.integrations.transformers import HFSpectralCallback
from lightning_spectral.metrics.covariance import CovarianceSpectrum
from tests.callbacks.test_do_no_harm import assert_identical
from tests.integrations.test_transformers import Padded, arguments, gpt2
from tests.models import WIDTH, LanguageModel, Network, tiny_trainer, token_loader
from tests.test_watch import loss_of

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:TailForecaster makes no forecast"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]

WEIGHTS = ["network.blocks.1.mlp.2.weight", "network.blocks.4.mlp.0.weight"]


@pytest.fixture(autouse=True)
def _same_bits_each_time():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")


class Drawing(LanguageModel):
    """Draws on the GPU at each step, from the shared generator and from one of its own."""

    def __init__(self, network: nn.Module | None = None) -> None:
        super().__init__(Network(dropout=0.1) if network is None else network)
        self.own: torch.Generator | None = None

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> STEP_OUTPUT:
        if self.own is None:
            self.own = torch.Generator(self.device).manual_seed(7)
        noise = torch.rand((), device=self.device) + torch.rand((), device=self.device, generator=self.own)
        return super().training_step(batch, batch_idx) * (1 + noise)


class Straight(nn.Module):
    """A block without a cumulative sum, which on a GPU is not deterministic."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


def straight() -> LanguageModel:
    network = Network()
    network.blocks = nn.ModuleList(Straight() for _ in network.blocks)
    return LanguageModel(network)


def train(folder: Path, callbacks: list[Any], module: LanguageModel | None = None, **kwargs: Any) -> dict[str, Any]:
    seed_everything(0, verbose=False)
    module = Drawing() if module is None else module
    settings = {"accelerator": "cuda", "max_steps": 12, "val_check_interval": 6, "limit_val_batches": 3}
    trainer = tiny_trainer(folder, callbacks=callbacks, **(settings | kwargs))
    trainer.fit(module, token_loader(48), token_loader(16, seed=1))
    own = getattr(module, "own", None)
    return {
        "state": {key: value.cpu().clone() for key, value in module.state_dict().items()},
        "cuda": torch.cuda.get_rng_state(),
        "cpu": torch.get_rng_state(),
        "own": None if own is None else own.get_state(),
        "metrics": {key: float(value) for key, value in trainer.callback_metrics.items()},
    }


def plain(**sizes: int) -> LanguageModel:
    """Without dropout, the same each time: numbers of a CPU and a GPU can be compared."""
    torch.manual_seed(0)
    return LanguageModel(Network(**sizes))


def all_of_them(method: str = "auto", **kwargs: Any) -> list[Any]:
    rows = {"every_n_steps": 3, "num_tokens": 96}
    return [
        ActivationSpectrum("all", **rows, **kwargs),
        GradientSpectrum(WEIGHTS, every_n_steps=3, num_samples=12, num_groups=1, method=method),
        GradientSpectrum(
            WEIGHTS, every_n_steps=6, num_samples=12, num_groups=1, stage="validate", prefix="val/", method=method
        ),
        HeadDrift(rank=4, **rows),
        TailForecaster(0.0, **rows),
    ]


@pytest.mark.parametrize("method", ["vmap", "loop", "hooks"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
def test_training_is_bit_identical(tmp_path: Path, precision: Any, method: str) -> None:
    expected = train(tmp_path, [], precision=precision)
    again = train(tmp_path, [], precision=precision)
    found = train(tmp_path, all_of_them(method), precision=precision)
    for one in (expected, again, found):
        one["losses"] = {key: value for key, value in one["metrics"].items() if key.endswith("_loss")}
        metrics = one.pop("metrics")
    assert_identical(again, expected)
    assert_identical(found, expected)
    assert {key: value for key, value in metrics.items() if key.endswith("/failed")} != {}
    failed = {key: value for key, value in metrics.items() if key.endswith("/failed") and value}
    assert not failed


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("place", ["device", "cpu"])
def test_numbers_do_not_depend_on_where_and_when(tmp_path: Path, place: Any, overlap: bool) -> None:
    def numbers(accelerator: str, **kwargs: Any) -> dict[str, float]:
        activations = ActivationSpectrum("all", every_n_steps=4, num_tokens=96, dtype="float64", **kwargs)
        gradients = GradientSpectrum(WEIGHTS, every_n_steps=4, num_samples=12, num_groups=1, method="hooks")
        found = train(tmp_path, [activations, gradients], plain(), accelerator=accelerator, max_steps=4)
        return {key: value for key, value in found["metrics"].items() if "alpha" in key or "rankme" in key}

    expected = numbers("cpu")
    found = numbers("cuda", overlap=overlap, sums_device=place)
    assert found.keys() == expected.keys()
    assert len(found) > 10
    for key, value in expected.items():
        # Weights themselves differ by the rounding of three steps.
        assert found[key] == pytest.approx(value, rel=1e-3, nan_ok=True), key


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_products_are_exact_whatever_the_user_asks_of_products(precision: str) -> None:
    """Reduced products (TF32, bfloat16) would leave 1e-3 of the largest eigenvalue in each."""
    torch.set_float32_matmul_precision(precision)
    generator = torch.Generator().manual_seed(0)
    width, scales = 64, torch.arange(1, 65, dtype=torch.float64) ** -1.0
    rows = (torch.randn(4096, width, generator=generator, dtype=torch.float64) * scales + 30).float()
    expected = np.linalg.eigvalsh(np.cov(rows.double().numpy().T, bias=False))[::-1]
    metric = CovarianceSpectrum(width).to("cuda")
    for part in rows.split(512):
        metric.update(part.cuda())
    found = metric.compute().cpu().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_blocks_are_read_as_eager_ones(tmp_path: Path, mode: str) -> None:
    """With ``reduce-overhead`` outputs lie in memory that the next replay of a graph writes over."""

    def run(callbacks: list[Any], is_compiled: bool) -> dict[str, Any]:
        torch._dynamo.reset()
        module = plain()
        if is_compiled:
            for block in module.network.blocks:
                block.compile(mode=mode)
        return train(tmp_path, callbacks, module, max_steps=8, limit_val_batches=0)

    spectrum = lambda: [ActivationSpectrum(every_n_steps=4, num_tokens=96, overlap=False)]  # noqa: E731
    plain, found, eager = run([], True), run(spectrum(), True), run(spectrum(), False)
    assert_identical(found["state"], plain["state"])
    for key, value in eager["metrics"].items():
        if key.endswith(("alpha_head", "rankme")):
            assert found["metrics"][key] == pytest.approx(value, rel=1e-3, nan_ok=True), key
    torch._dynamo.reset()


@pytest.mark.parametrize("rows", [{"row_device": "cpu"}, {"row_device": "device"}, {"row_dtype": "float64"}])
@pytest.mark.parametrize("method", ["vmap", "loop", "hooks"])
def test_gradient_rows_are_the_same_wherever_they_wait(tmp_path: Path, method: str, rows: dict[str, Any]) -> None:
    def run(accelerator: str, **kwargs: Any) -> dict[str, float]:
        spectrum = GradientSpectrum(WEIGHTS, every_n_steps=4, num_samples=16, **kwargs)
        found = train(tmp_path, [spectrum], plain(), accelerator=accelerator, max_steps=4, limit_val_batches=0)
        assert found["metrics"]["gradient/failed"] == 0
        return {key: value for key, value in found["metrics"].items() if "alpha" in key or "rankme" in key}

    # Rows by hooks are of weights that move, by a pass of its own of weights that stand.
    expected, found = run("cpu", method=method, row_dtype="float64"), run("cuda", method=method, **rows)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=2e-3, abs=1e-6, nan_ok=True), key


@pytest.mark.parametrize("num_steps", [1, 2])
def test_ddp_gives_what_no_strategy_gives(tmp_path: Path, num_steps: int) -> None:
    """Its hooks run in another stream than layers, and rows are let go of in hooks as soon as they are complete."""

    def run(**kwargs: Any) -> dict[str, float]:
        weights = [f"network.blocks.{index}.mlp.{part}.weight" for index in range(6) for part in (0, 2)]
        spectra = [
            ActivationSpectrum("all", every_n_steps=num_steps, num_tokens=512, num_groups=1),
            GradientSpectrum(weights, every_n_steps=num_steps, num_samples=64, method="hooks", row_device="device"),
        ]
        more = {"accumulate_grad_batches": 8, "max_steps": 2, "limit_val_batches": 0, "use_distributed_sampler": False}
        loader = token_loader(256, batch_size=8)
        seed_everything(0, verbose=False)
        trainer = tiny_trainer(tmp_path, callbacks=spectra, accelerator="cuda", **(more | kwargs))
        trainer.fit(plain(width=512), loader)
        assert trainer.callback_metrics["gradient/failed"] == 0
        return {key: float(value) for key, value in trainer.callback_metrics.items() if "seconds" not in key}

    expected = run()
    for _ in range(3):
        assert run(strategy=DDPStrategy(process_group_backend="nccl")) == pytest.approx(expected, rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("method", ["vmap", "loop", "hooks"])
def test_deterministic_trainers_are_watched(tmp_path: Path, method: str) -> None:
    """Where kernels that add up in any order are forbidden, measuring needs none."""
    torch.use_deterministic_algorithms(False)
    found = train(tmp_path, all_of_them(method), straight(), deterministic=True)
    assert {key: value for key, value in found["metrics"].items() if key.endswith("/failed") and value} == {}


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_a_loop_with_a_gradient_scaler_is_watched(dtype: torch.dtype | None) -> None:
    def run(is_watched: bool) -> tuple[dict[str, Any], dict[str, float]]:
        seed_everything(0, verbose=False)
        network = Network(dropout=0.1).cuda()
        optimizer = torch.optim.AdamW(network.parameters(), 1e-2)
        scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
        watch = None
        if is_watched:
            gradients = GradientSpectrum("blocks.*.mix.weight", every_n_steps=4, num_samples=16, method="hooks")
            activations = ActivationSpectrum("all", every_n_steps=4, num_tokens=96)
            watch = SpectralWatch(
                network, activations=activations, gradients=gradients, optimizer=optimizer, loss_fn=loss_of
            )
        for batch in itertools.islice(token_loader(48), 12):
            batch = {key: value.cuda() for key, value in batch.items()}
            with torch.autocast("cuda", dtype, enabled=dtype is not None):
                if watch is None:
                    scaler.scale(loss_of(network, batch)).backward()
                else:
                    with watch.step(batch):
                        scaler.scale(watch.loss(loss_of(network, batch))).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        if watch is not None:
            watch.close()
        state = {key: value.cpu().clone() for key, value in network.state_dict().items()}
        return {"state": state, "cuda": torch.cuda.get_rng_state()}, {} if watch is None else watch.metrics

    expected, _ = run(False)
    found, metrics = run(True)
    assert_identical(found, expected)
    assert metrics["gradient/failed"] == metrics["activation/failed"] == 0
    assert metrics["activation/blocks.0/num_tokens"] == 96


@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}], ids=["32", "bf16", "fp16"])
def test_a_trainer_of_transformers_is_watched(tmp_path: Path, precision: dict[str, Any]) -> None:
    def run(is_watched: bool) -> tuple[dict[str, Tensor], dict[str, float]]:
        seed_everything(0, verbose=False)
        data = {"train_dataset": Padded(64), "eval_dataset": Padded(16, 1)}
        trainer = Trainer(gpt2(dropout=0.1), arguments(tmp_path, use_cpu=False, **precision), **data)
        watching = HFSpectralCallback(
            activations=ActivationSpectrum(every_n_steps=4, num_tokens=1000, mask="attention_mask"),
            gradients=GradientSpectrum("transformer.h.*.attn.c_proj.weight", every_n_steps=4, num_samples=16),
        )
        if is_watched:
            trainer.add_callback(watching)
        trainer.train()
        state = {key: value.cpu().clone() for key, value in trainer.model.state_dict().items()}
        return state, watching.metrics if is_watched else {}

    expected, _ = run(False)
    found, metrics = run(True)
    assert_identical(found, expected)
    assert metrics["activation/failed"] == metrics["gradient/failed"] == 0


def test_running_out_of_memory_costs_a_report_and_not_the_run(tmp_path: Path) -> None:
    class Hog(ActivationSpectrum):
        """Has no memory left when the report is made."""

        def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1e-4)
            try:
                super().on_train_batch_end(*args, **kwargs)
            finally:
                torch.cuda.set_per_process_memory_fraction(1.0)

    hog = Hog("all", every_n_steps=4, num_tokens=96, overlap=False)
    with pytest.warns(UserWarning, match="out of memory"):
        found = train(tmp_path, [hog], plain(width=1024, num_blocks=2), max_steps=6, limit_val_batches=0)
    assert found["metrics"]["activation/failed"] > 0
