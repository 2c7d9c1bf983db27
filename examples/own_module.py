"""Spectra of a LightningModule of one's own: nothing in it knows of the callbacks.

`python examples/own_module.py` trains a stack of equal blocks to tell which of eight noisy directions a row of 32
numbers lies along. Without arguments the callbacks find the stack; `RunRecord` is what `Run` and `lightning-spectral
compare` read afterwards.
"""

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_spectral import ActivationSpectrum, GradientSpectrum, RunRecord


class Classifier(LightningModule):
    """Blocks of equal shape, as any stack of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(32, 64)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(4))
        self.head = nn.Linear(64, 8)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Mean cross-entropy of the direction."""
        x, y = batch
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        loss = nn.functional.cross_entropy(self.head(x), y)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW for all."""
        return torch.optim.AdamW(self.parameters(), 1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-steps", type=int, default=200, help="optimizer steps, reported ten times")
    parser.add_argument("--folder", default="lightning_logs/own_module", help="where the run is written")
    arguments = parser.parse_args()

    seed_everything(0, verbose=False)
    y = torch.randint(8, (4096,))
    data = TensorDataset(torch.randn(8, 32)[y] + torch.randn(4096, 32), y)
    every = max(1, arguments.max_steps // 10)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=arguments.max_steps,
        logger=TensorBoardLogger(arguments.folder, "", ""),
        callbacks=[
            ActivationSpectrum(every_n_steps=every),
            GradientSpectrum("blocks.*.weight", every_n_steps=every, num_samples=64),
            RunRecord(),
        ],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=every,
    )
    trainer.fit(Classifier(), DataLoader(data, batch_size=64, shuffle=True))
    print(f"See how the blocks' RankMe falls while the loss does: lightning-spectral show {arguments.folder}")


if __name__ == "__main__":
    main()
