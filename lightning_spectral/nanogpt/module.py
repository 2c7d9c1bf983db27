"""NanoGPT, the LightningModule that trains a GPT on batches of tokens."""

import math
import time
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from rich.console import Console
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_spectral.nanogpt.arguments import check_int, check_number, shown
from lightning_spectral.nanogpt.model import GPT, GPTConfig, next_token_loss
from lightning_spectral.nanogpt.optimizers import Recipe, build_optimizer, group_table, settings_for, with_learning_rate
from lightning_spectral.nanogpt.protocol import check_val_tokens, set_token_budgets


class NanoGPT(pl.LightningModule):
    """A GPT for next-token prediction, trained as its recipe was: by AdamW, or by Muon and AdamW together.

    Batches are dicts of `input_ids` and `labels`, int64 of shape `(batch, tokens)`, where the label -100 is ignored.
    Logged: `train_loss` and `val_loss` (`test_loss`) in nats a token, the last two weighted by counted labels over
    the epoch and all ranks; `tokens`, the elements of `input_ids` trained on so far, and `tokens_per_second` since
    the last such entry, without the time that validation took. Tokens are counted without communication, as this
    rank's times the number of ranks, which is exact when batches have the same shape on all ranks; the count,
    attribute `tokens`, goes into checkpoints. Clipping gradients is up to the Trainer (`gradient_clip_val=1.0`).

    Args:
        tier: Size by name: tiny (4 layers, 2 heads, width 128: minutes on a CPU), d12, d24, d36 or d48 (the sizes of
            GPT-2).
        recipe: Architecture and optimizer by name: baseline (learned positions, fused query-key-value matrix), rope
            (rotary positions, normalised queries and keys, separate matrices), muon (the same, its matrices moved by
            Muon), or one of those after it, each of which adds to the one before.
        optimizer: Recipe whose optimizer is taken, such as baseline for AdamW on any architecture. None takes that of
            `recipe`.
        matrix_optimizer: What moves the blocks' matrices in a recipe with Muon: muon, or adamw at a learning rate of
            0.004. None takes the recipe's.
        learning_rate: Peak of the schedule where AdamW moves everything. None takes the recipe's, 3e-4 for baseline
            and 6e-4 for rope as in the speed runs, times 5 for tier tiny, whose width and batches are smaller. Recipes
            with Muon have one for each group of parameters, shown when training starts.
        lr_multiplier: Multiplies all learning rates, above 0: the one number to sweep. The default changes none.
        weight_decay: Decoupled decay of matrices and embeddings. None takes the recipe's, 0.1 for baseline and 0 for
            all others.
        betas: Decay rates of AdamW's two moments. None takes the recipe's, (0.9, 0.95) and from sparse_embed on
            (0.8, 0.95) for embeddings, vectors and single numbers.
        warmup_steps: Optimizer steps over which the learning rate rises linearly. The default is about a tenth of a
            short run on a CPU.
        cooldown: Fraction, in (0, 1], of the steps after the warm-up over which the learning rate falls to zero. None
            takes the recipe's: 1, along half a cosine, where AdamW moves everything; 0.1, linearly, with Muon. With
            no limit on steps or epochs nothing falls.
        stop_at_loss: Validation loss, in nats a token, at or below which training stops, so that runs can be compared
            at equal loss; the Trainer's `min_steps` is honoured. None trains for as long as the Trainer says.
        batch_tokens: Tokens of an optimizer step on all ranks, a multiple of what a batch of each rank has; sets the
            Trainer's `accumulate_grad_batches`, with which the last step of an epoch may have fewer. None leaves that
            alone. `val_check_interval` counts batches, not steps.
        val_tokens: Tokens of a validation run on all ranks, likewise; sets the Trainer's `limit_val_batches`.
        vocab_size: Number of token values. The default is that of bytes, as TextData gives.
        block_size: Longest sequence, in tokens. The default is TextData's.
        num_layers: Number of blocks. None takes the tier's.
        num_heads: Attention heads of a block. None takes the tier's.
        width: Features of the residual stream. None takes the tier's.
        switches: Fields of GPTConfig that differ from the recipe's, such as {"qk_norm": False}. The default changes
            none.

    Raises:
        ValueError: If a name is unknown, a number is out of its range or does not apply to the recipe, or the sizes do
            not fit each other.
    """

    def __init__(
        self,
        tier: Literal["tiny", "d12", "d24", "d36", "d48"] = "tiny",
        recipe: Recipe = "rope",
        optimizer: Recipe | None = None,
        matrix_optimizer: Literal["muon", "adamw"] | None = None,
        learning_rate: float | None = None,
        lr_multiplier: float = 1.0,
        weight_decay: float | None = None,
        betas: tuple[float, float] | None = None,
        warmup_steps: int = 50,
        cooldown: float | None = None,
        stop_at_loss: float | None = None,
        batch_tokens: int | None = None,
        val_tokens: int | None = None,
        vocab_size: int = 256,
        block_size: int = 256,
        num_layers: int | None = None,
        num_heads: int | None = None,
        width: int | None = None,
        switches: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_int(0, warmup_steps=warmup_steps)
        if stop_at_loss is not None:
            check_number(hint="None trains without a target", stop_at_loss=stop_at_loss)
        if stop_at_loss is not None and not stop_at_loss > 0:
            raise ValueError(f"stop_at_loss must be above 0, got {stop_at_loss}: None trains without a target")
        for name, value in (("batch_tokens", batch_tokens), ("val_tokens", val_tokens)):
            if value is not None:
                check_int(1, hint="None leaves it to the Trainer", **{name: value})
        if not (switches is None or (isinstance(switches, dict) and all(isinstance(name, str) for name in switches))):
            raise ValueError(
                f"switches must be fields of GPTConfig by name, got {shown(switches)}: write {{}} for none"
            )
        for name in ("tier", "recipe", "vocab_size", "block_size"):
            if name in (switches or {}):
                raise ValueError(f"switches must be other fields of GPTConfig, got {name!r}: it is an argument itself")
        self.save_hyperparameters()
        sizes = {"num_layers": num_layers, "num_heads": num_heads, "width": width}
        overrides = {name: size for name, size in sizes.items() if size is not None} | (switches or {})
        config = GPTConfig.from_tier(tier, recipe, vocab_size=vocab_size, block_size=block_size, **overrides)
        self.gpt = GPT(config)
        self.settings = settings_for(
            tier,
            recipe if optimizer is None else optimizer,
            matrix_optimizer=matrix_optimizer,
            learning_rate=learning_rate,
            lr_multiplier=lr_multiplier,
            weight_decay=weight_decay,
            betas=betas,
            cooldown=cooldown,
        )
        self.warmup_steps = warmup_steps
        self.stop_at_loss = stop_at_loss
        self.batch_tokens = batch_tokens
        self.val_tokens = val_tokens
        self.tokens = 0
        self._checked_tokens = False
        self._step_of_window = -1
        self._clock = _Clock()

    @property
    def learning_rate(self) -> float:
        """Peak learning rate of the blocks' matrices; one that is set, as Lightning's finder does, is everything's."""
        return self.settings.matrices

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        self.settings = with_learning_rate(self.settings, value)

    @override
    def forward(self, input_ids: Tensor) -> Tensor:
        """Score every possible next token after each token, `(batch, tokens)` -> `(batch, tokens, vocab_size)`."""
        return self.gpt(input_ids)

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = next_token_loss(self(batch["input_ids"]), batch["labels"])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._log_held_out("val_loss", batch)

    @override
    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._log_held_out("test_loss", batch)

    @override
    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Name the most likely next token after each token, `(batch, tokens)`."""
        return self(batch["input_ids"]).argmax(dim=-1)

    def _log_held_out(self, key: str, batch: dict[str, Tensor]) -> None:
        labels = batch["labels"]
        loss = next_token_loss(self(batch["input_ids"]), labels)
        # the weight of this batch in the mean: a float tensor, as ranks' sums of integer weights would be truncated
        weight: Any = (labels != -100).sum().float()
        self.log(key, loss, on_epoch=True, prog_bar=True, sync_dist=True, batch_size=weight)

    @override
    def setup(self, stage: str) -> None:
        """Refuse data that does not fit the model, with a ValueError; set what is given in tokens."""
        data = getattr(self.trainer, "datamodule", None)
        for name, what in (("vocab_size", "number of token values"), ("block_size", "length of the sequences")):
            least, size = getattr(data, name, None), getattr(self.gpt.config, name)
            if least is not None and least > size:
                raise ValueError(
                    f"{name} must be at least {least}, the {what} in {type(data).__name__}, got {size}: "
                    f"build the model with {name}={least}"
                )
        set_token_budgets(self.trainer, stage, self.batch_tokens, self.val_tokens)

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

    @override
    def on_fit_start(self) -> None:
        """Show beside Lightning's summary of the model, and like it on rank zero, what moves its parameters."""
        if self.trainer.is_global_zero and any(isinstance(c, ModelSummary) for c in self.trainer.callbacks):  # type: ignore[attr-defined]
            Console().print(group_table(self.trainer.optimizers[0]))

    @override
    def on_train_start(self) -> None:
        self._clock.start(self.tokens, self.global_step)
        self.gpt.set_tokens(self.tokens)

    @override
    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Count the tokens, here so that checkpoints written at the end of the batch have them."""
        self._check_tokens(batch)
        if self.global_step != self._step_of_window:  # all batches of a step meet one window
            self._step_of_window = self.global_step
            self.gpt.set_tokens(self.tokens)
        self.tokens += batch["input_ids"].numel() * self.trainer.world_size

    @override
    def on_train_batch_end(self, outputs: Any, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log tokens and, at the steps at which loggers write, their rate."""
        # float64: above 2^24 tokens float32 would round
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        self.log("tokens", torch.tensor(self.tokens, dtype=dtype, device=self.device))
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        step = self.global_step
        if every and step % every == 0 and step > self._clock.step:
            self.log("tokens_per_second", self._clock.rate(self.tokens, step))

    @override
    def on_validation_batch_start(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._check_tokens(batch)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    @override
    def on_validation_start(self) -> None:
        """Stop the clock; refuse to validate on fewer tokens than were asked for."""
        self._clock.pause()
        check_val_tokens(self.trainer, self.val_tokens)

    @override
    def on_validation_end(self) -> None:
        """Let the clock go on, unless the loss is as low as training was to bring it."""
        self._clock.go_on()
        fitting = self.trainer.state.fn == "fit" and not self.trainer.sanity_checking
        if self.stop_at_loss is None or not fitting:
            return
        # the mean over all ranks, so that all of them stop
        loss = self.trainer.callback_metrics.get("val_loss")
        if loss is not None and loss <= self.stop_at_loss:
            self.trainer.should_stop = True
            rank_zero_info(
                f"val_loss is {loss:.4f}, at or below stop_at_loss={self.stop_at_loss}: training stops at step "
                f"{self.global_step}, after {self.tokens:,} tokens"
            )

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["tokens"] = self.tokens

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.tokens = checkpoint["tokens"]
        self.gpt.set_tokens(self.tokens)

    def learning_rate_factor(self, step: int) -> float:
        """Give the schedule: the factor on the peak learning rate at an optimizer step, counted from 0.

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
        length = self.settings.cooldown * (total - self.warmup_steps)
        progress = (step - (total - length)) / length if length > 0 else 1.0
        progress = min(max(progress, 0.0), 1.0)
        return 1 - progress if self.settings.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = build_optimizer(self, self.settings)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.learning_rate_factor(step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Let Muon's momentum rise, as a function of the step alone, so that a resumed run goes on with it."""
        for group in optimizer.param_groups:
            if "momentum" in group:
                group["momentum"] = self.settings.momentum_at(self.global_step)


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
