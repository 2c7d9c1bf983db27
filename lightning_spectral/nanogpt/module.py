"""NanoGPT, the LightningModule that trains a GPT on batches of tokens."""

import math
import time
from typing import Any, Literal, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from lightning_spectral.nanogpt.model import GPT, RECIPES, GPTConfig, next_token_loss


class RecipeOptimizer(NamedTuple):
    """How a recipe was trained in the speed runs it comes from."""

    learning_rate: float
    """Peak learning rate of AdamW."""
    weight_decay: float
    """Decoupled weight decay of the matrices."""


OPTIMIZERS: dict[str, RecipeOptimizer] = {
    "baseline": RecipeOptimizer(learning_rate=3e-4, weight_decay=0.1),
    "rope": RecipeOptimizer(learning_rate=6e-4, weight_decay=0.0),
    **{
        recipe: RecipeOptimizer(learning_rate=1e-3, weight_decay=0.0)
        for recipe in RECIPES
        if recipe not in ("baseline", "rope")
    },
}

# The recipes' learning rates were chosen at width 768 and half a million tokens a step.
TINY_LEARNING_RATE_FACTOR = 5.0


class NanoGPT(pl.LightningModule):
    """A GPT for next-token prediction, with AdamW and a warm-up followed by a cosine to zero.

    Batches are dicts of `input_ids` and `labels`, int64 of shape `(batch, tokens)`, where the label -100 is ignored.
    Logged: `train_loss` and `val_loss` (`test_loss`) in nats a token, the last two weighted by counted labels over
    the epoch and all ranks; `tokens`, the elements of `input_ids` trained on so far, and `tokens_per_second` since
    the last such entry, without the time that validation took. Tokens are counted without communication, as this
    rank's times the number of ranks, which is exact when batches have the same shape on all ranks; the count,
    attribute `tokens`, goes into checkpoints. Clipping gradients is up to the Trainer (`gradient_clip_val=1.0`).

    Args:
        tier: Size by name: tiny (4 layers, 2 heads, width 128: minutes on a CPU), d12, d24, d36 or d48 (the sizes of
            GPT-2).
        recipe: Architecture and optimizer by name: baseline (learned positions, fused query-key-value matrix) or rope
            (rotary positions, normalised queries and keys, separate matrices).
        learning_rate: Peak of the schedule. None takes the recipe's, 3e-4 for baseline and 6e-4 for rope as in the
            speed runs, times 5 for tier tiny, whose width and batches are smaller.
        weight_decay: Decoupled decay of matrices and embeddings. None takes the recipe's, 0.1 for baseline and 0 for
            rope.
        betas: Decay rates of AdamW's two moments, as in the speed runs.
        warmup_steps: Optimizer steps over which the learning rate rises linearly. The default is about a tenth of a
            short run on a CPU.
        cooldown: Fraction, in (0, 1], of the steps after the warm-up over which the learning rate falls to zero along
            half a cosine. The default, 1, is the recipes'. With no limit on steps or epochs nothing falls.
        vocab_size: Number of token values. The default is that of bytes, as TextData gives.
        block_size: Longest sequence, in tokens. The default is TextData's.
        num_layers: Number of blocks. None takes the tier's.
        num_heads: Attention heads of a block. None takes the tier's.
        width: Features of the residual stream. None takes the tier's.
        switches: Fields of GPTConfig that differ from the recipe's, such as {"qk_norm": False}. The default changes
            none.

    Raises:
        ValueError: If a name is unknown, a number is out of its range, or the sizes do not fit each other.
    """

    def __init__(
        self,
        tier: Literal["tiny", "d12", "d24", "d36", "d48"] = "tiny",
        recipe: Literal[
            "baseline",
            "rope",
            "muon",
            "untied",
            "value_mix",
            "unet",
            "fixed_window",
            "flex_window",
            "vte",
            "better_window",
            "sparse_embed",
            "truncated_rope",
            "softcap",
            "fp8_head",
            "long_short",
            "attn_scale",
            "sub_lr",
        ] = "rope",
        learning_rate: float | None = None,
        weight_decay: float | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        warmup_steps: int = 50,
        cooldown: float = 1.0,
        vocab_size: int = 256,
        block_size: int = 256,
        num_layers: int | None = None,
        num_heads: int | None = None,
        width: int | None = None,
        switches: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must be at least 0, got {warmup_steps}")
        if not 0 < cooldown <= 1:
            raise ValueError(f"cooldown must be a fraction in (0, 1], got {cooldown}: 1 is the recipes'")
        self.save_hyperparameters()
        sizes = {"num_layers": num_layers, "num_heads": num_heads, "width": width}
        overrides = {name: size for name, size in sizes.items() if size is not None} | (switches or {})
        config = GPTConfig.from_tier(tier, recipe, vocab_size=vocab_size, block_size=block_size, **overrides)
        self.gpt = GPT(config)
        default = OPTIMIZERS[recipe]
        factor = TINY_LEARNING_RATE_FACTOR if tier == "tiny" else 1.0
        self.learning_rate = factor * default.learning_rate if learning_rate is None else learning_rate
        self.weight_decay = default.weight_decay if weight_decay is None else weight_decay
        self.betas = (betas[0], betas[1])
        self.warmup_steps = warmup_steps
        self.cooldown = cooldown
        self.tokens = 0
        self._checked_tokens = False
        self._clock = _Clock()

    def forward(self, input_ids: Tensor) -> Tensor:
        """Score every possible next token after each token.

        Args:
            input_ids: Tokens, `(batch, tokens)`.

        Returns:
            Logits, `(batch, tokens, vocab_size)`.
        """
        return self.gpt(input_ids)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Compute and log the loss of a batch.

        Args:
            batch: `input_ids` and `labels`, `(batch, tokens)`.
            batch_idx: Not used.

        Returns:
            The mean loss over counted labels, 0-dim.
        """
        loss = next_token_loss(self(batch["input_ids"]), batch["labels"])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the loss of a held-out batch.

        Args:
            batch: `input_ids` and `labels`, `(batch, tokens)`.
            batch_idx: Not used.
        """
        self._log_held_out("val_loss", batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the loss of a test batch.

        Args:
            batch: `input_ids` and `labels`, `(batch, tokens)`.
            batch_idx: Not used.
        """
        self._log_held_out("test_loss", batch)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Name the most likely next token after each token.

        Args:
            batch: `input_ids`, `(batch, tokens)`.
            batch_idx: Not used.

        Returns:
            Tokens, `(batch, tokens)`.
        """
        return self(batch["input_ids"]).argmax(dim=-1)

    def _log_held_out(self, key: str, batch: dict[str, Tensor]) -> None:
        labels = batch["labels"]
        loss = next_token_loss(self(batch["input_ids"]), labels)
        # the weight of this batch in the mean: a float tensor, as ranks' sums of integer weights would be truncated
        weight: Any = (labels != -100).sum().float()
        self.log(key, loss, on_epoch=True, prog_bar=True, sync_dist=True, batch_size=weight)

    def setup(self, stage: str) -> None:
        """Refuse data that does not fit the model.

        Args:
            stage: Not used.

        Raises:
            ValueError: If the Trainer's data module has more token values or longer sequences than the model.
        """
        data = getattr(self.trainer, "datamodule", None)
        for name, what in (("vocab_size", "number of token values"), ("block_size", "length of the sequences")):
            least, size = getattr(data, name, None), getattr(self.gpt.config, name)
            if least is not None and least > size:
                raise ValueError(
                    f"{name} must be at least {least}, the {what} in {type(data).__name__}, got {size}: "
                    f"build the model with {name}={least}"
                )

    def _check_tokens(self, batch: dict[str, Tensor]) -> None:
        # in the first batch only, as it waits for the device; for loaders that come without a data module
        if self._checked_tokens:
            return
        largest = max(int(batch[key].max()) for key in ("input_ids", "labels") if key in batch)
        if largest >= self.gpt.config.vocab_size:
            raise ValueError(
                f"vocab_size must be at least {largest + 1}, as the data has the token {largest}, "
                f"got {self.gpt.config.vocab_size}: build the model with a larger vocab_size"
            )
        self._checked_tokens = True

    def on_train_start(self) -> None:
        """Start the clock."""
        self._clock.start(self.tokens, self.global_step)

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Count the tokens, here so that checkpoints written at the end of the batch have them.

        Args:
            batch: `input_ids` and `labels`, `(batch, tokens)`.
            batch_idx: Not used.
        """
        self._check_tokens(batch)
        self.tokens += batch["input_ids"].numel() * self.trainer.world_size

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log tokens and, at the steps at which loggers write, their rate.

        Args:
            outputs: Not used.
            batch: Not used.
            batch_idx: Not used.
        """
        # float64: above 2^24 tokens float32 would round
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        self.log("tokens", torch.tensor(self.tokens, dtype=dtype, device=self.device))
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        step = self.global_step
        if every and step % every == 0 and step > self._clock.step:
            self.log("tokens_per_second", self._clock.rate(self.tokens, step))

    def on_validation_batch_start(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Check the tokens of the first batch.

        Args:
            batch: `input_ids` and `labels`, `(batch, tokens)`.
            batch_idx: Not used.
            dataloader_idx: Not used.
        """
        self._check_tokens(batch)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def on_validation_start(self) -> None:
        """Stop the clock."""
        self._clock.pause()

    def on_validation_end(self) -> None:
        """Let the clock go on."""
        self._clock.go_on()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the number of tokens.

        Args:
            checkpoint: What will be written.
        """
        checkpoint["tokens"] = self.tokens

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the number of tokens.

        Args:
            checkpoint: What was written.
        """
        self.tokens = checkpoint["tokens"]

    def learning_rate_factor(self, step: int) -> float:
        """Give the schedule: the factor on the peak learning rate at an optimizer step.

        Args:
            step: Optimizer steps taken before this one.

        Returns:
            A number in [0, 1]: 1 / warmup_steps at step 0, 1 at the end of the warm-up, 0 when all steps are taken.
        """
        if step <= self.warmup_steps:
            return min(1.0, (step + 1) / max(self.warmup_steps, 1))
        # not asked before the second step: the answer may build the training loader, which Lightning restores from a
        # checkpoint only if it has not been built when training starts
        total = self.trainer.estimated_stepping_batches
        if total <= 0 or math.isinf(total):
            return 1.0
        length = self.cooldown * (total - self.warmup_steps)
        progress = (step - (total - length)) / length if length > 0 else 1.0
        return 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build AdamW, decaying matrices only, and its schedule.

        Returns:
            Optimizer and scheduler, stepped after each optimizer step.
        """
        matrices = [p for p in self.parameters() if p.requires_grad and p.ndim >= 2]
        others = [p for p in self.parameters() if p.requires_grad and p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": self.weight_decay}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=self.learning_rate, betas=self.betas
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.learning_rate_factor(step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class _Clock:
    """Tokens per second of running time."""

    def __init__(self) -> None:
        self.start(0, 0)

    def start(self, tokens: int, step: int) -> None:
        self._tokens, self.step = tokens, step
        self._since = self._paused = time.perf_counter()

    def pause(self) -> None:
        self._paused = time.perf_counter()

    def go_on(self) -> None:
        self._since += time.perf_counter() - self._paused

    def rate(self, tokens: int, step: int) -> float:
        rate = (tokens - self._tokens) / (time.perf_counter() - self._since)
        self.start(tokens, step)
        return rate
