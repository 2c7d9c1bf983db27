"""Spectra of a tiny GPT-2 under the Trainer of transformers, on lines of text that are padded.

`python examples/hf_trainer.py` trains on the bytes of Python's own modules, a line a sample. The mask that the model
gets keeps padding out of the spectra; `mask=` is its name among the model's arguments.
"""

import argparse
import ast
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from lightning_spectral import ActivationSpectrum, GradientSpectrum, HeadDrift
from lightning_spectral.integrations.transformers import HFSpectralCallback

LENGTH, PADDING = 64, 0


def lines() -> list[bytes]:
    """Of Python's own modules, by name, those that are neither short nor long."""
    texts = [path.read_bytes() for path in sorted(Path(ast.__file__).parent.glob("*.py"))]
    every = [line.strip() for text in texts for line in text.splitlines()]
    return [line for line in every if 16 <= len(line) <= LENGTH]


def collate(batch: list[bytes]) -> dict[str, Tensor]:
    """Pad lines at their end, where neither attention nor loss nor spectra shall look."""
    rows = [torch.tensor(list(line)) for line in batch]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PADDING)
    mask = (ids != PADDING).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def callback(every: int, trainer: Trainer) -> HFSpectralCallback:
    """Reports every so many steps, of activations, gradients and drift; the Trainer knows how long an evaluation is."""
    common: dict[str, Any] = {"every_n_steps": every, "mask": "attention_mask", "num_tokens": 8192}
    return HFSpectralCallback(
        activations=ActivationSpectrum(**common),
        gradients=GradientSpectrum(every_n_steps=every, num_samples=64),
        drift=HeadDrift(**common),
        trainer=trainer,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-steps", type=int, default=200, help="optimizer steps, reported ten times")
    parser.add_argument("--folder", default="hf_logs", help="where the run is written")
    arguments = parser.parse_args()

    every = max(1, arguments.max_steps // 10)
    text = lines()
    config = GPT2Config(
        vocab_size=256, n_positions=LENGTH, n_embd=64, n_layer=4, n_head=4, bos_token_id=PADDING, eos_token_id=PADDING
    )
    torch.manual_seed(0)
    trainer = Trainer(
        GPT2LMHeadModel(config),
        TrainingArguments(
            arguments.folder,
            max_steps=arguments.max_steps,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=64,
            learning_rate=3e-3,
            eval_strategy="steps",
            eval_steps=every,
            logging_steps=every,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=True,
        ),
        data_collator=collate,
        train_dataset=text[:-256],
        eval_dataset=text[-256:],
    )
    trainer.add_callback(callback(every, trainer))
    trainer.train()
    print(f"See how the last block's tail moves while the loss falls: lightning-spectral show {arguments.folder}")


if __name__ == "__main__":
    main()
