"""Small models, their data and a quiet Trainer, for the tests that train."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric

WIDTH, NUM_BLOCKS, VOCABULARY, LENGTH = 32, 6, 40, 8
TESTED_ON = os.environ.get("TESTED_ON", "cpu")
"""Where Trainers of tests train: ``cpu``, or ``cuda`` by ``make test-cuda``."""
PROBES = ["blocks.0", "blocks.1", "blocks.2", "blocks.4", "blocks.5"]
"""Blocks round(5 i / 4), i = 0..4: the default choice of layers."""


class Block(nn.Module):
    """A residual block that mixes tokens (a running mean) and channels."""

    def __init__(self, width: int = WIDTH, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(1, x.shape[1] + 1, device=x.device).unsqueeze(-1)
        x = x + self.dropout(self.mix(self.norm(x).cumsum(1) / positions))
        return x + self.dropout(self.mlp(x))


class Network(nn.Module):
    """Embedding, a stack of blocks, and logits."""

    def __init__(self, width: int = WIDTH, num_blocks: int = NUM_BLOCKS, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(num_blocks))
        self.logits = nn.Linear(width, VOCABULARY)
        self.use_reentrant: bool | None = None
        """Kind of activation checkpointing of each block; None for none."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x) if self.use_reentrant is None else checkpoint(block, x, use_reentrant=self.use_reentrant)
        return self.logits(x)


class LanguageModel(LightningModule):
    """Predicts the next token; keeps a metric and a counter that an extra forward pass would move."""

    def __init__(self, network: nn.Module | None = None) -> None:
        super().__init__()
        self.network = Network() if network is None else network
        self.mean_loss = MeanMetric()
        self.register_buffer("num_forwards", torch.zeros(()))

    @property
    def blocks(self) -> nn.ModuleList:
        return self.network.blocks

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        self.num_forwards += 1
        return F.cross_entropy(self.network(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.mean_loss(loss.detach())
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.loss(batch), batch_size=len(batch["input_ids"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2)


class Alternating(LanguageModel):
    """Manual optimisation with two optimizers: ``global_step`` grows by two a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.SGD(self.network.blocks.parameters(), 1e-2),
            torch.optim.SGD(self.network.logits.parameters(), 1e-2),
        ]


class Perceptron(LightningModule):
    """A model without a stack of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.mse_loss(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-2)


class Tokens(Dataset):
    """Sequences that depend on their index alone."""

    def __init__(self, num_samples: int = 64, seed: int = 0) -> None:
        self.num_samples = num_samples
        self.seed = seed

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1000 * self.seed + index)
        tokens = torch.randint(VOCABULARY, (LENGTH + 1,), generator=generator)
        return {"input_ids": tokens[:-1], "labels": tokens[1:]}


def token_loader(num_samples: int = 64, batch_size: int = 4, seed: int = 0) -> DataLoader:
    return DataLoader(Tokens(num_samples, seed), batch_size=batch_size)


def tiny_trainer(folder: Path, **kwargs: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    defaults = {"accelerator": TESTED_ON, "devices": 1, "logger": False, "default_root_dir": folder, **quiet}
    return Trainer(**(defaults | kwargs))


class NoLogDir(Logger):
    """A logger of a service on the web."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    name, version = "project", "run7"

    @property
    def save_dir(self) -> str:
        return str(self.folder)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None: ...

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None: ...
