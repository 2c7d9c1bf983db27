"""A family of GPTs to watch, with text that every machine has, and shards of tokens, to train them on."""

from lightning_spectral.nanogpt.data import TextData
from lightning_spectral.nanogpt.model import GPT, RECIPES, TIERS, GPTConfig, next_token_loss
from lightning_spectral.nanogpt.modular import ModularArithmetic
from lightning_spectral.nanogpt.module import NanoGPT
from lightning_spectral.nanogpt.shard_files import write_shard
from lightning_spectral.nanogpt.shards import ShardData

__all__ = [
    "GPT",
    "RECIPES",
    "TIERS",
    "GPTConfig",
    "ModularArithmetic",
    "NanoGPT",
    "ShardData",
    "TextData",
    "next_token_loss",
    "write_shard",
]
