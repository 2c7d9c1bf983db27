"""Changes of known truth, for study 5: of how runs are executed, of what they learn, and of nothing but coordinates."""

import time
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_spectral.nanogpt import GPT, GPTConfig, NanoGPT, ShardData
from lightning_spectral.nanogpt.blocks import Blocks, BlockSampler
from lightning_spectral.nanogpt.model import Block, Context, norm

OF_ROPE = ("positions", "fused_qkv", "tied_head", "embedding_norm", "value_mix", "x0_mix", "unet", "softcap", "window")
"""What must be as in recipe rope for the two changes of coordinates."""


class Sleep(pl.Callback):
    """Sleeps after each batch: slower, and nothing else."""

    def __init__(self, seconds: float = 0.01) -> None:
        super().__init__()
        self.seconds = seconds

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        time.sleep(self.seconds)


class FusedOptimizer(pl.Callback):
    """Lets AdamW take its fused kernel: the same formula in another order of rounding."""

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["fused"] = True


class GradientNoise(pl.Callback):
    """Adds Gaussian noise to each parameter's gradient, of so many times its norm, drawn apart from all else."""

    def __init__(self, ratio: float = 0.5) -> None:
        super().__init__()
        self.ratio = ratio

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # not the seed itself, from which the weights were drawn
        self.generator = torch.Generator().manual_seed(torch.initial_seed() + 10_000_019)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                noise = torch.randn(parameter.shape, generator=self.generator)
                parameter.grad += noise * (self.ratio * parameter.grad.norm() / noise.norm())


class Compiled(NanoGPT):
    """The model under ``torch.compile``."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.gpt.compile()


class Rotated(NanoGPT):
    """The model that starts in another orthogonal basis of its residual stream: the same function and spectra."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        rotate(self.gpt, rotation(self.gpt.config.width))


def rotation(width: int) -> Tensor:
    """A random orthogonal matrix ``(width, width)``, float64, always the same."""
    drawn = torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    basis, triangle = torch.linalg.qr(drawn)
    return basis * triangle.diagonal().sign()  # Haar's distribution (Mezzadri, Notices of the AMS 54, 2007)


@torch.no_grad()
def rotate(gpt: GPT, basis: Tensor) -> None:
    """Change the basis of the residual stream, x -> basis x, in all that writes it and reads it.

    Args:
        gpt: Of recipe rope, whose RMSNorm without parameters knows no basis.
        basis: Orthogonal, ``(width, width)``.
    """
    _check_rope(gpt.config)

    def set_to(weight: Tensor, value: Tensor) -> None:
        weight.copy_(value.to(weight.dtype))

    set_to(gpt.embedding.weight, gpt.embedding.weight.double() @ basis.T)  # the head too
    for block in gpt.blocks:
        for reader in (block.attention.q, block.attention.k, block.attention.v, block.mlp.up):
            set_to(reader.weight, reader.weight.double() @ basis.T)
        for writer in (block.attention.out, block.mlp.down):
            set_to(writer.weight, basis @ writer.weight.double())


class ScaledChannel(NanoGPT):
    """The model with one channel of the residual stream four times as large between blocks, divided where it is read.

    The factor is a power of two, so that loss and gradients are the same to the bit; what the blocks put out is not.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        with torch.random.fork_rng(devices=[]):
            scaled = ScaledGPT(self.gpt.config)
        scaled.load_state_dict(self.gpt.state_dict(), strict=False)
        self.gpt = scaled


class ScaledBlock(Block):
    """A block that reads and writes a stream of which a channel is scaled."""

    scale: Tensor

    @override
    def forward(self, x: Tensor, context: Context, embedded_values: Tensor | None = None) -> Tensor:
        return super().forward(x / self.scale, context, embedded_values) * self.scale


class ScaledGPT(GPT):
    """A GPT of recipe rope whose blocks put out a stream of which a channel is scaled."""

    def __init__(self, config: GPTConfig, channel: int = 0, factor: float = 4.0) -> None:
        super().__init__(config)
        _check_rope(config)
        scale = torch.ones(config.width)
        scale[channel] = factor
        self.register_buffer("scale", scale, persistent=False)
        self.blocks = nn.ModuleList(ScaledBlock(config, layer) for layer in range(config.num_layers))
        for block in self.blocks:
            block.register_buffer("scale", scale, persistent=False)

    @override
    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)  # (B, T, width)
        context = Context(x, self.rotary[:, : input_ids.size(1)], None, None)
        x = x * self.scale
        for block in self.blocks:
            x = block(x, context)
        return self._score(norm(x / self.scale))  # (B, T, vocab)


def _check_rope(config: GPTConfig) -> None:
    rope = GPTConfig.from_tier("tiny", "rope")
    other = [name for name in OF_ROPE if getattr(config, name) != getattr(rope, name)]
    if other:
        raise ValueError(f"recipe must be rope for a change of coordinates, got another {', '.join(other)}: take rope")


class TwiceSampler(BlockSampler):
    """Deals every block twice in a row, so that an epoch has half of the blocks."""

    @override
    def __iter__(self) -> Any:
        start, self.start = self.start, 0
        order = np.repeat(list(super().__iter__()), 2)[: self.num_samples]
        self.start = start
        return iter(order[start:].tolist())


class Twice(ShardData):
    """Shards of which every sequence is shown twice in a row: half as many different tokens."""

    def __init__(self, path: str, **arguments: Any) -> None:
        super().__init__(path, **arguments)

    @override
    def _sampler(self, blocks: Blocks, shuffle: bool) -> TwiceSampler:
        return TwiceSampler(len(blocks), self.batch_size, *self._replicas_and_rank(), shuffle, self.seed)


class Repacked(ShardData):
    """The first training tokens as a ring, cut into sequences from some place on: the same tokens, wherever cut.

    Args:
        path: As in ShardData.
        part_tokens: How many tokens.
        shift: Where the first sequence begins.
        **arguments: As in ShardData.
    """

    def __init__(self, path: str, part_tokens: int = 262_144, shift: int = 0, **arguments: Any) -> None:
        super().__init__(path, **arguments)
        self.part_tokens = part_tokens
        self.shift = shift

    @override
    def setup(self, stage: str | None = None) -> None:
        is_first = self._train is None
        super().setup(stage)
        if is_first:
            assert self._train is not None
            ring = np.roll(np.asarray(self._train.tokens[0 : self.part_tokens]), -self.shift)
            self._train = Blocks(np.append(ring, ring[:1]), self.block_size)
