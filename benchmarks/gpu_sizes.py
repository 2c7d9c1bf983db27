"""The models, data and Trainers of the GPU benchmark, at full size and tiny."""

import argparse
import inspect
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_spectral import ActivationSpectrum, GradientSpectrum, HeadDrift, TailForecaster
from lightning_spectral.nanogpt import NanoGPT


@dataclass(frozen=True)
class Sizes:
    """What is trained, and how much of it is measured."""

    device: str
    model: dict[str, Any]
    """Arguments of NanoGPT."""
    batch_size: int
    num_tokens: int
    """Rows of an activation report."""
    num_samples: int
    """Rows of a gradient report."""
    cycles: int
    """Reports that are measured in a run, the first of which is to warm up."""
    widths: tuple[int, ...]
    layers_of_widest: int
    tokens_per_step: int
    """Of the optimizer steps that shares are of, many of whose batches would be accumulated."""
    chunk_size: int | None = None
    """Samples at a time by vmap."""

    @property
    def block_size(self) -> int:
        return int(self.model["block_size"])

    @property
    def precision(self) -> Any:
        return "bf16-mixed"

    @property
    def accelerator(self) -> str:
        return "gpu" if self.device == "cuda" else "cpu"

    def arguments(self) -> argparse.Namespace:
        """As :mod:`benchmarks.training` takes them."""
        return argparse.Namespace(
            batch_size=self.batch_size,
            tokens=self.block_size,
            num_tokens=self.num_tokens,
            accelerator=self.accelerator,
            precision=self.precision,
        )


D12 = {"tier": "d12", "recipe": "rope", "vocab_size": 50304, "block_size": 1024}
"""As in ``examples/d12.yaml``."""

SMALL = {"num_layers": 2, "num_heads": 2, "width": 32, "vocab_size": 64, "block_size": 32, "recipe": "rope"}


def sizes_of(device: str, is_tiny: bool, is_quick: bool) -> Sizes:
    """Those that the command's options mean."""
    if is_tiny:
        return Sizes(device, SMALL, 4, 512, 8, 2, (16, 24), 1, 512)
    return Sizes(device, D12, 32, 65536, 512, 2 if is_quick else 4, (768, 1600, 4096), 1 if is_quick else 5, 524288, 8)


class RandomTokens(Dataset[dict[str, Tensor]]):
    """Sequences that depend on their index alone."""

    def __init__(self, vocab_size: int, block_size: int) -> None:
        self.vocab_size, self.block_size = vocab_size, block_size

    def __len__(self) -> int:
        return 2**20

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.randint(self.vocab_size, (self.block_size + 1,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens[:-1], "labels": tokens[1:]}


class RandomData(LightningDataModule):
    """Random tokens: no shards are needed, and what is learnt does not matter here."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        data = RandomTokens(self.sizes.model["vocab_size"], self.sizes.block_size)
        return DataLoader(data, self.sizes.batch_size, pin_memory=self.sizes.device == "cuda")

    val_dataloader = train_dataloader


def module_of(sizes: Sizes, **changes: Any) -> NanoGPT:
    """The model, of one seed."""
    torch.manual_seed(0)
    return NanoGPT(**(sizes.model | changes))


def known(callback: Callable[..., Callback], **settings: Any) -> Callback:
    """A callback with those of the settings that it has."""
    names = inspect.signature(callback).parameters
    return callback(**{name: value for name, value in settings.items() if name in names})


def activations(sizes: Sizes, every: int, **more: Any) -> Callback:
    return known(ActivationSpectrum, every_n_steps=every, num_tokens=sizes.num_tokens, **more)


def gradients(sizes: Sizes, every: int, method: str, **more: Any) -> Callback:
    chunk = {"chunk_size": sizes.chunk_size} if method == "vmap" else {}
    settings = {"every_n_steps": every, "num_samples": sizes.num_samples, "method": method}
    return known(GradientSpectrum, **settings, **chunk, **more)


def all_four(sizes: Sizes, every: int) -> list[Callback]:
    rows = {"every_n_steps": every, "num_tokens": sizes.num_tokens}
    return [
        activations(sizes, every),
        gradients(sizes, every, "hooks"),
        HeadDrift(rank=4, **rows),
        TailForecaster(0.01, **rows),
    ]


@dataclass
class Trained:
    """A run that is over."""

    module: LightningModule
    metrics: dict[str, float]
    steps: list[float] = field(default_factory=list)
    """Seconds of each."""
    peak_bytes: int = 0
    """Of a GPU's memory; 0 on a CPU."""

    @property
    def failed(self) -> int:
        return sum(int(value) for key, value in self.metrics.items() if key.endswith("/failed"))

    @property
    def spectra(self) -> int:
        """How many layers and parameters have an exponent."""
        return sum(value == value for key, value in self.metrics.items() if key.endswith("/alpha_tail"))


class Clock(Callback):
    """Cuts a run into steps, with what callbacks before it do at their end."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._settle()
        self._since = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        self._settle()
        now = time.perf_counter()
        self.steps.append(now - self._since)
        self._since = now

    @staticmethod
    def _settle() -> None:
        # For the stream of training alone: what is solved beside it, nobody waits for.
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()


def train(sizes: Sizes, module: LightningModule, callbacks: list[Callback], steps: int, **settings: Any) -> Trained:
    """Train for so many steps, without validation unless callbacks need it."""
    if sizes.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    clock = Clock()
    defaults = {"accelerator": sizes.accelerator, "devices": 1, "precision": sizes.precision, "limit_val_batches": 0}
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        trainer = Trainer(
            max_steps=steps,
            callbacks=[*callbacks, clock],
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **(defaults | settings),
        )
        trainer.fit(module, RandomData(sizes))
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    peak = torch.cuda.max_memory_allocated() if sizes.device == "cuda" else 0
    return Trained(module, metrics, clock.steps, peak)


@contextmanager
def deterministic() -> Iterator[None]:
    """Kernels that give the same bits each time. If others were only warned of, FlashAttention would stay as it is."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
