"""Spectra of a small model of bytes under tensor parallelism, in two processes on a CPU.

`python examples/tensor_parallel.py`: each process has half of every block's inner features. The numbers that it prints
are those of one process, `python examples/tensor_parallel.py --processes 1`.
"""

import argparse
import warnings

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_spectral import ActivationSpectrum, GradientSpectrum
from lightning_spectral.nanogpt import TextData

WIDTH, NUM_BLOCKS, BLOCK_SIZE = 64, 4, 64


class Block(nn.Module):
    """Mixes each byte with the mean of those before it, and then its features."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(2 * WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Rows of features, ``(batch, positions, width)``, to such."""
        y = self.norm(x)
        past = y.cumsum(1) / torch.arange(1, y.shape[1] + 1, device=y.device).unsqueeze(-1)
        return x + self.down(self.up(torch.cat([y, past], -1)).relu())


class ByteModel(LightningModule):
    """Predicts the next byte."""

    def __init__(self) -> None:
        super().__init__()
        seed_everything(0, verbose=False)  # processes that share a batch must begin with the same weights
        self.embed = nn.Embedding(256, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(NUM_BLOCKS))
        self.head = nn.Linear(WIDTH, 256)
        self.double()  # so that it does not show in which order sums are taken
        self.is_laid_out = False

    def configure_model(self) -> None:
        """Lie on the strategy's mesh, once."""
        if not self.is_laid_out and isinstance(self.trainer.strategy, ModelParallelStrategy):
            self.lay_out(self.device_mesh)
        self.is_laid_out = True

    def lay_out(self, mesh: DeviceMesh) -> None:
        """Put the model on a mesh of processes."""
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        for block in self.blocks:
            parallelize_module(block, mesh["tensor_parallel"], plan)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean cross-entropy of the next byte."""
        x = self.embed(batch["input_ids"])
        for block in self.blocks:
            x = block(x)
        loss = nn.functional.cross_entropy(self.head(x).flatten(0, 1), batch["labels"].flatten())
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW for all."""
        return torch.optim.AdamW(self.parameters(), 3e-3)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--processes", type=int, default=2, help="how many; 1 needs no strategy (default: 2)")
    parser.add_argument("--max-steps", type=int, default=40, help="optimizer steps, reported twice (default: 40)")
    parser.add_argument("--folder", default="lightning_logs/processes", help="where the run is written")


def train(model: LightningModule, arguments: argparse.Namespace, tensor_parallel: int) -> None:
    """Train, with spectra at half of the steps and at the end, and print what was logged last."""
    warnings.filterwarnings("ignore", ".*num_workers|.*returned a view tensor")
    processes, every = arguments.processes, max(1, arguments.max_steps // 2)
    data_parallel = processes // tensor_parallel
    trainer = Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="auto" if processes == 1 else ModelParallelStrategy(data_parallel, tensor_parallel),
        max_steps=arguments.max_steps,
        logger=TensorBoardLogger(arguments.folder, "", ""),
        callbacks=[
            ActivationSpectrum(["blocks.*", "blocks.3.up"], every_n_steps=every, dtype="float64"),
            GradientSpectrum("blocks.*.down.weight", every_n_steps=every, num_samples=64, method="hooks"),
        ],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, TextData(block_size=BLOCK_SIZE, batch_size=16 // data_parallel))  # 16 sequences in all
    if trainer.is_global_zero:
        for key, value in trainer.callback_metrics.items():
            if key.endswith(("/alpha_tail", "/rankme", "/noise_scale")):
                print(f"{key:40} {value:.8g}")
        print(f"See how they came about: lightning-spectral show {arguments.folder}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    arguments = parser.parse_args()
    train(ByteModel(), arguments, tensor_parallel=arguments.processes)
