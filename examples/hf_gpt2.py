"""Spectra of a transformers GPT-2 in a LightningModule of one's own, on padded batches of which padding does not count.

`python examples/hf_gpt2.py` trains a GPT-2 of random weights to continue lines of Python, those of the standard
library, byte by byte. A batch is padded to its longest line: `mask="attention_mask"` keeps padding out of the
activations, and labels of -100 keep it out of the loss, so that it has no part in the gradient of a line either.
"""

import argparse
import os
import random
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_spectral import ActivationSpectrum, GradientSpectrum, RunRecord, probe

PAD = 256
"""The token after the bytes."""


class GPT2(LightningModule):
    """Four blocks of width 64."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 64, "vocab_size": PAD + 1}
        self.gpt2 = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=PAD, eos_token_id=PAD))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean cross-entropy of the next byte, over bytes that are real."""
        loss = self.gpt2(**batch).loss
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW for all that is trained."""
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), 3e-3)


def lines_of_python(count: int, chosen: Callable[[bytes], bool] = bool) -> list[Tensor]:
    """Lines of 16 to 64 bytes."""
    lines: set[bytes] = set()
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        found = (line.strip() for line in path.read_bytes().splitlines())
        lines |= {line for line in found if 16 <= len(line) <= 64 and chosen(line)}
    return [torch.tensor(list(line)) for line in random.Random(0).sample(sorted(lines), count)]


def padded(lines: list[Tensor]) -> dict[str, Tensor]:
    """A batch as long as its longest line."""
    ids = pad_sequence(lines, batch_first=True, padding_value=PAD)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": ids.where(ids != PAD, -100)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-steps", type=int, default=200, help="optimizer steps, reported five times")
    parser.add_argument("--folder", default="lightning_logs/hf_gpt2", help="where the run is written")
    arguments = parser.parse_args()

    seed_everything(0, verbose=False)
    module = GPT2()
    data = DataLoader(lines_of_python(8192), batch_size=32, shuffle=True, collate_fn=padded)
    # Before training, what will be read: how many positions count, that the loss is a mean of those of its lines, and
    # that lines weigh by their length in it ("ratio of sample weights").
    print(probe(module, next(iter(data)), mask="attention_mask"))

    every = max(1, arguments.max_steps // 5)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=arguments.max_steps,
        logger=TensorBoardLogger(arguments.folder, "", ""),
        callbacks=[
            ActivationSpectrum(mask="attention_mask", every_n_steps=every, num_tokens=4096),
            GradientSpectrum(every_n_steps=every, num_samples=64),
            RunRecord(tokens_per_sample="attention_mask"),  # of the history: without it input_ids count, padding too
        ],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=every,
    )
    trainer.fit(module, data)
    # Read off the figure: at first the blocks fill most of their 64 dimensions. When the loss leaves the plateau of
    # 3.5, on which it only knows how frequent bytes are, a few directions take over: RankMe falls to 5, heads steepen.
    print(f"See a few directions take over: lightning-spectral show {arguments.folder} --plot hf_gpt2.png")


if __name__ == "__main__":
    main()
