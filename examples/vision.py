"""Spectra of two CNNs and of a vision transformer, whose channels are on different axes.

`python examples/vision.py` trains a ResNet, a ConvNeXt and a ViT (classes of transformers, small, of random weights)
one after the other to tell the direction of stripes under noise; `--model vit` trains one. All spectra are of
validation images, with the model in evaluation mode: in training mode the loss of an image depends, by batch norm, on
the others of its batch, so that it has no gradient of its own, and `GradientSpectrum` would say so instead of numbers.
"""

import argparse
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from lightning_spectral import ActivationSpectrum, GradientSpectrum, RunRecord

SIZE, CLASSES = 32, 8


def resnet(**common: int) -> nn.Module:
    """Two blocks of 32 channels and two of 64: convolutions and batch norms."""
    sizes = {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [2, 2], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**sizes, **common))


def convnext(**common: int) -> nn.Module:
    """Likewise; a block turns its maps for linear layers, and turns them back."""
    sizes = {"patch_size": 2, "num_stages": 2, "hidden_sizes": [32, 64], "depths": [2, 2]}
    sizes["layer_scale_init_value"] = 1.0  # else blocks do nothing for hundreds of steps, and spectra stay of the stem
    return ConvNextForImageClassification(ConvNextConfig(**sizes, **common))


def vit(**common: int) -> nn.Module:
    """Four blocks of width 64 on 64 patches, and on one position more, from which the class is read."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}
    return ViTForImageClassification(ViTConfig(image_size=SIZE, patch_size=4, **sizes, **common))


class Example(NamedTuple):
    """What is said of a model beside the defaults."""

    make: Callable[..., nn.Module]
    activations: dict[str, Any]
    parameters: list[str] | None


# By itself the stack of a CNN of transformers is its stages; this pattern means the blocks in them. Channels would be
# found on axis 1, too, unless a map of a ConvNeXt were as wide as it has channels: then `channel_dim` is asked for.
BLOCKS = {"layers": "net.*.encoder.stages.*.layers.*", "channel_dim": 1}
EXAMPLES = {
    "resnet": Example(resnet, BLOCKS, ["net.*.encoder.stages.*.layers.1.layer.1.convolution.weight"]),
    "convnext": Example(convnext, BLOCKS, ["net.*.encoder.stages.*.layers.1.*.weight"]),
    "vit": Example(vit, {}, None),  # five blocks at most, and their attention's output projections
}


class Classifier(LightningModule):
    """Any of them."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def loss(self, batch: list[Tensor]) -> Tensor:
        """Mean cross-entropy of the direction."""
        x, y = batch
        return nn.functional.cross_entropy(self.net(x).logits, y)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The loss; that of one image of a validation batch is what `GradientSpectrum` takes the gradient of."""
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """The loss by which runs are compared."""
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW for all."""
        return torch.optim.AdamW(self.parameters(), 1e-3)


def stripes(count: int) -> TensorDataset:
    """Waves in one of eight directions, of any length and phase, under noise."""
    y = torch.randint(CLASSES, (count,))
    at, angle = torch.arange(SIZE), y[:, None, None] * math.pi / CLASSES
    along = angle.cos() * at + angle.sin() * at[:, None]
    length, phase = 4 + 8 * torch.rand(count, 1, 1), torch.rand(count, 1, 1)
    x = torch.sin(2 * math.pi * (along / length + phase)) + torch.randn(count, SIZE, SIZE)
    return TensorDataset(x.unsqueeze(1), y)


def train(name: str, max_steps: int, folder: str) -> None:
    seed_everything(0, verbose=False)
    example = EXAMPLES[name]
    every = max(1, max_steps // 4)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        val_check_interval=every,
        check_val_every_n_epoch=None,
        logger=TensorBoardLogger(folder, "", ""),
        callbacks=[
            ActivationSpectrum(stage="validate", every_n_steps=every, num_tokens=32768, **example.activations),
            GradientSpectrum(example.parameters, stage="validate", every_n_steps=every, num_samples=64),
            RunRecord(family=name),
        ],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=every,
    )
    data = DataLoader(stripes(4096), 64, shuffle=True), DataLoader(stripes(128), 64)
    trainer.fit(Classifier(example.make(num_channels=1, num_labels=CLASSES)), *data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=EXAMPLES, action="append", help="one of them; default: each")
    parser.add_argument("--max-steps", type=int, default=60, help="optimizer steps, reported four times")
    parser.add_argument("--folder", default="lightning_logs/vision", help="where runs are written")
    arguments = parser.parse_args()
    for name in arguments.model or EXAMPLES:
        train(name, arguments.max_steps, f"{arguments.folder}/{name}")
    # Read off the figures: eigenvalues of the ConvNeXt's first blocks drop after the fourth, for its stem makes their
    # 32 channels of patches of four pixels. Off the tables: RankMe of the ResNet's blocks falls, in the last from 16 to
    # 10, as they drop what does not tell directions apart; noise scales are of a few images at first, and grow.
    print(f"See what blocks keep of the images: lightning-spectral show '{arguments.folder}/*' --plot vision.png")


if __name__ == "__main__":
    main()
