"""A family of small GPTs to watch, with text that every machine has to train them on."""

from lightning_spectral.nanogpt.data import TextData
from lightning_spectral.nanogpt.model import GPT, RECIPES, TIERS, GPTConfig, next_token_loss
from lightning_spectral.nanogpt.module import NanoGPT

__all__ = ["GPT", "RECIPES", "TIERS", "GPTConfig", "NanoGPT", "TextData", "next_token_loss"]
