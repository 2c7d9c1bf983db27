"""Spectra of a generative adversarial network: manual optimisation of two networks by two optimizers.

`python examples/gan.py` trains a generator to draw from eight clusters on a circle, against a discriminator.
`every_n_steps` counts optimizer steps, of which there are two a batch. A `training_step` that moves optimizers cannot
be asked for the loss of one sample: `GradientSpectrum` is given `loss_fn`, and refuses in one line without. In training
the discriminator reads real points and generated ones; in `validation_step` real ones alone, the same each time, and
so its activations are read there.
"""

import argparse
import math

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, TensorDataset

from lightning_spectral import ActivationSpectrum, GradientSpectrum, RunRecord

CLUSTERS, LATENT, WIDTH = 8, 16, 64


class Network(nn.Module):
    """A stack of residual blocks."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.embed = nn.Linear(inputs, WIDTH)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(0.2)) for _ in range(3))
        self.head = nn.Linear(WIDTH, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """From ``(B, inputs)`` to ``(B, outputs)``."""
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class GAN(LightningModule):
    """Two networks, each trained against the other."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = Network(LATENT, 2)
        self.discriminator = Network(2, 1)

    def generate(self, like: Tensor) -> Tensor:
        """As many points as there are others."""
        return self.generator(torch.randn(len(like), LATENT))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """A step of each."""
        of_generator, of_discriminator = self.optimizers()
        (x,) = batch
        loss = discriminator_loss(self, batch)
        of_discriminator.zero_grad()
        self.manual_backward(loss)
        of_discriminator.step()

        fooled = softplus(-self.discriminator(self.generate(x))).mean()
        of_generator.zero_grad()
        self.manual_backward(fooled)
        of_generator.step()
        self.log_dict({"discriminator_loss": loss, "generator_loss": fooled})

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Real points through the discriminator, for its spectra."""
        (x,) = batch
        self.discriminator(x)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """One for each network."""
        networks = self.generator, self.discriminator
        return [torch.optim.Adam(network.parameters(), 1e-3, betas=(0.5, 0.99)) for network in networks]


def discriminator_loss(module: GAN, batch: list[Tensor]) -> Tensor:
    """Mean over samples, each a real point with a generated one: what `GradientSpectrum` takes gradients of."""
    (x,) = batch
    with torch.no_grad():
        generated = module.generate(x)
    return (softplus(-module.discriminator(x)) + softplus(module.discriminator(generated))).mean()


def clusters(count: int) -> TensorDataset:
    """Points of eight narrow clusters on a circle."""
    angle = 2 * math.pi * torch.randint(CLUSTERS, (count,)) / CLUSTERS
    return TensorDataset(torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(count, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-steps", type=int, default=1600, help="optimizer steps, two a batch, reported four times")
    parser.add_argument("--folder", default="lightning_logs/gan", help="where the run is written")
    arguments = parser.parse_args()

    seed_everything(0, verbose=False)
    every = max(2, arguments.max_steps // 4)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=arguments.max_steps,
        val_check_interval=every // 2,  # batches
        check_val_every_n_epoch=None,
        logger=TensorBoardLogger(arguments.folder, "", ""),
        callbacks=[
            # Of points in a plane 64 channels have a steep spectrum, beyond float32 after some ranks.
            ActivationSpectrum("discriminator.blocks.*", every_n_steps=every, stage="validate", dtype="float64"),
            GradientSpectrum(
                "discriminator.blocks.*.weight", every_n_steps=every, num_samples=256, loss_fn=discriminator_loss
            ),
            RunRecord(),
        ],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=every,
    )
    module = GAN()
    trainer.fit(module, DataLoader(clusters(8192), 64, shuffle=True), DataLoader(clusters(4096), 512))
    with torch.no_grad():
        drawn = module.generate(torch.empty(1024, 2))
    near = drawn.norm(dim=1).sub(1).abs() < 0.2
    angles = torch.atan2(drawn[near, 1], drawn[near, 0])
    counts = (angles / (2 * math.pi) * CLUSTERS).round().long().remainder(CLUSTERS).bincount(minlength=CLUSTERS)
    print(f"of 1,024 points that the generator draws, in each cluster: {counts.tolist()}")
    # Read off the figure: eigenvalues of the discriminator come in pairs, a sine and a cosine around the circle for
    # each number of waves, and drop after the eighth, for eight clusters need no more. Off the table: its noise scale
    # falls from several batches of 64 to less than one.
    print(f"See pairs, and the drop after eight: lightning-spectral show {arguments.folder} --plot gan.png")


if __name__ == "__main__":
    main()
