"""Spectra of a GPT-2 while LoRA adapts it: activations of its frozen blocks, gradients of the adapters alone.

`python examples/lora.py` trains a small GPT-2 on those lines of Python's standard library that are code, then freezes
it, and trains adapters (peft) on those that are comments. `parameters="all"` means what is trained, here the matrices
of the adapters; a pattern that means frozen weights alone is refused in one line, for they have no gradient.
"""

import argparse

from hf_gpt2 import GPT2, lines_of_python, padded
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_spectral import ActivationSpectrum, GradientSpectrum, RunRecord


class Adapted(GPT2):
    """Two matrices of rank 4 beside each that makes queries, keys and values."""

    def __init__(self, base: GPT2) -> None:
        super().__init__()
        config = LoraConfig(r=4, lora_alpha=16, target_modules=["c_attn"], fan_in_fan_out=True)
        self.gpt2 = get_peft_model(base.gpt2, config)


def batches(lines: list[Tensor]) -> DataLoader:
    return DataLoader(lines, batch_size=32, shuffle=True, collate_fn=padded)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-steps", type=int, default=160, help="optimizer steps of either, reported four times")
    parser.add_argument("--folder", default="lightning_logs/lora", help="where the run of the adapters is written")
    arguments = parser.parse_args()

    seed_everything(0, verbose=False)
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    common = {"accelerator": "cpu", "max_steps": arguments.max_steps, **quiet}
    base = GPT2()
    Trainer(logger=False, **common).fit(base, batches(lines_of_python(8192, lambda line: not line.startswith(b"#"))))

    every = max(1, arguments.max_steps // 4)
    trainer = Trainer(
        logger=TensorBoardLogger(arguments.folder, "", ""),
        callbacks=[
            ActivationSpectrum(mask="attention_mask", every_n_steps=every, num_tokens=4096),
            GradientSpectrum("all", every_n_steps=every, num_samples=64),
            RunRecord(tokens_per_sample="attention_mask"),
        ],
        log_every_n_steps=every,
        **common,
    )
    trainer.fit(Adapted(base), batches(lines_of_python(4096, lambda line: line.startswith(b"#"))))
    # Read off the table of activations: tails of the last two blocks steepen, by six of their errors or more, and those
    # of the first two stay within two, though no weight of a block is trained: what adapters change adds up with depth.
    print(f"See what the adapters change: lightning-spectral show {arguments.folder} --plot lora.png")


if __name__ == "__main__":
    main()
