"""Where rows come from whose spectrum is known: random processes of a given covariance, and a model's held-out text."""

import io
from contextlib import redirect_stdout

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Generator, Tensor

from lightning_spectral.capture.activations import ActivationReader
from lightning_spectral.nanogpt import NanoGPT, TextData

LENGTH = 128
"""Tokens T of a sequence."""

PROCESSES = ("independent", "correlated", "documents", "heavy")
AUTOREGRESSION = 0.9
SHARED = 0.3
LOG_SPREAD = 0.5


def eigenvalues(spectrum: str, width: int) -> Tensor:
    """The true eigenvalues, descending.

    Args:
        spectrum: ``"power"`` or ``"broken"``.
        width: How many.

    Returns:
        ``(width,)`` float64.
    """
    ranks = torch.arange(1, width + 1, dtype=torch.float64)
    if spectrum == "power":
        return ranks**-1.2
    return torch.where(ranks <= 16, ranks**-1, (ranks / 16) ** -3 / 16)


def rows(process: str, values: Tensor, num_sequences: int, generator: Generator) -> Tensor:
    """Draw sequences of rows with covariance diag(values), whatever the process.

    Args:
        process: One of ``PROCESSES``.
        values: ``(d,)`` eigenvalues.
        num_sequences: S.
        generator: Source of randomness.

    Returns:
        ``(S, LENGTH, d)`` float64.
    """
    noise = torch.randn(num_sequences, LENGTH, len(values), dtype=torch.float64, generator=generator)
    if process == "correlated":
        for token in range(1, LENGTH):  # the first row has the stationary distribution already
            noise[:, token] *= (1 - AUTOREGRESSION**2) ** 0.5
            noise[:, token] += AUTOREGRESSION * noise[:, token - 1]
    elif process == "documents":
        common = torch.randn(num_sequences, 1, len(values), dtype=torch.float64, generator=generator)
        noise = (1 - SHARED) ** 0.5 * noise + SHARED**0.5 * common
    elif process == "heavy":
        logs = torch.randn(num_sequences, LENGTH, 1, dtype=torch.float64, generator=generator)
        noise *= torch.exp(LOG_SPREAD * logs - LOG_SPREAD**2)  # the mean square of exp(s z) is exp(2 s^2)
    return noise * values.sqrt()


def held_out_activations(seed: int = 1, num_steps: int = 600) -> dict[str, Tensor]:
    """Outputs of all blocks of a small trained GPT, on all of its held-out text.

    Args:
        seed: Of initialisation and order.
        num_steps: Of training.

    Returns:
        ``(sequences, LENGTH, d)`` float32 by block.
    """
    seed_everything(seed, verbose=False)
    module = NanoGPT(recipe="rope", num_layers=4, width=128, num_heads=4, block_size=LENGTH)
    return trained_outputs(module, TextData(block_size=LENGTH, batch_size=16, seed=seed), num_steps, 1.0)


def trained_outputs(
    module: NanoGPT, data: TextData, num_steps: int, gradient_clip_val: float | None = None
) -> dict[str, Tensor]:
    """Train a model and let its held-out text pass through it: outputs of all blocks, likewise, in the text's order."""
    trainer = Trainer(
        accelerator="cpu",
        max_steps=num_steps,
        limit_val_batches=0,
        gradient_clip_val=gradient_clip_val,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with redirect_stdout(io.StringIO()):
        trainer.fit(module, data)
    outputs: dict[str, list[Tensor]] = {}
    reader = ActivationReader(lambda name, output: outputs.setdefault(name, []).append(output))
    for index, block in enumerate(module.gpt.blocks):
        reader.add(f"gpt.blocks.{index}", block)
    reader.is_open = True
    module.eval()
    with torch.no_grad():
        for batch in data.val_dataloader():
            module(batch["input_ids"])
    reader.remove()
    return {name: torch.cat(parts) for name, parts in outputs.items()}
