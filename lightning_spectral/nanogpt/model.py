"""GPT, one stack of equal blocks whose variants are independent switches of the configuration."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_spectral.nanogpt.attention import attend, block_mask, dense_mask, document_ids, takes_flex
from lightning_spectral.nanogpt.config import RECIPES, TIERS, GPTConfig, recipe_switches
from lightning_spectral.nanogpt.float8 import Float8Linear, float8_linear

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = ["GPT", "RECIPES", "TIERS", "GPTConfig", "next_token_loss", "norm", "recipe_switches"]


def norm(x: Tensor) -> Tensor:
    """Divide by the root mean square over the last axis, `(..., width)`; no parameters."""
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Average the cross entropy, in nats and float32, over the tokens whose label is not -100.

    Args:
        logits: Scores, `(batch, tokens, vocab_size)`.
        labels: The token that follows each input token, `(batch, tokens)`.

    Returns:
        The mean, 0-dim; 0 where every label is -100.
    """
    total = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")
    return total / (labels != -100).sum().clamp(min=1)


def _rotary_table(config: GPTConfig) -> Tensor:
    # angles of many radians, so in float32 or better even where parameters are made in less
    exact = torch.promote_types(torch.get_default_dtype(), torch.float32)
    if config.rotary_frequencies == "full":
        steps = torch.arange(0, config.head_size, 2, dtype=exact)
        frequencies = config.rotary_base ** -(steps / config.head_size)  # (head / 2,)
    else:
        turning = (1 / 1024) ** torch.linspace(0, 1, config.head_size // 4, dtype=exact)  # (head / 4,)
        frequencies = F.pad(turning, (0, config.head_size // 2 - len(turning)))  # (head / 2,)
    angles = torch.outer(torch.arange(config.block_size, dtype=exact), frequencies)  # (block_size, head / 2)
    return torch.stack((angles.cos(), angles.sin())).to(torch.get_default_dtype())  # (2, block_size, head / 2)


def _rotate(x: Tensor, table: Tensor) -> Tensor:
    cos, sin = table  # each (T, head / 2)
    a, b = x.chunk(2, dim=-1)  # (B, heads, T, head / 2): feature i is paired with i + head / 2
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)  # (B, heads, T, head)


@dataclass
class Context:
    """What blocks read besides the residual stream; what a switch that is off would need is None."""

    x0: Tensor
    """The embedding, (B, T, width)."""
    rotary: Tensor | None
    """Cosines and sines, (2, T, head / 2)."""
    mask: "Tensor | BlockMask | None"
    """Of layers with a long window."""
    short_mask: "Tensor | BlockMask | None"
    """Of layers with a short window."""
    first_values: Tensor | None = None
    """The first layer's values, which it puts here, (B, heads, T, head)."""


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        width = config.width
        if config.fused_qkv:
            self.qkv = nn.Linear(width, 3 * width, bias=False)
        else:
            self.q = nn.Linear(width, width, bias=False)
            self.k = nn.Linear(width, width, bias=False)
            self.v = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.short = config.has_short_window(layer)
        self.mixes_values = config.mixes_values(layer)
        if self.mixes_values:
            self.value_weights = nn.Parameter(torch.full((1 if config.value_weights == "one" else 2,), 0.5))

    @override
    def forward(self, x: Tensor, context: Context, embedded_values: Tensor | None) -> Tensor:
        """Mix tokens with those before them, (B, T, width) -> (B, T, width)."""
        batch, tokens, width = x.shape
        parts = self.qkv(x).chunk(3, dim=-1) if self.config.fused_qkv else (self.q(x), self.k(x), self.v(x))
        shape = (batch, tokens, self.config.num_heads, self.config.head_size)
        q, k, v = (part.view(shape).transpose(1, 2) for part in parts)  # each (B, heads, T, head)
        if self.config.qk_norm:
            q, k = norm(q), norm(k)
        if context.rotary is not None:
            q, k = _rotate(q, context.rotary), _rotate(k, context.rotary)
        # norm and table are float32 under autocast
        q, k = q.to(v.dtype), k.to(v.dtype)
        if self.config.value_mix == "first" and self.layer == 0:
            context.first_values = v  # (B, heads, T, head)
        elif self.mixes_values:
            other = context.first_values if embedded_values is None else embedded_values.view(shape).transpose(1, 2)
            assert other is not None, "the first layer has not run"
            v = self._mix(v, other)  # (B, heads, T, head)
        mask = context.short_mask if self.short else context.mask
        y = attend(q, k, v, mask, self.config.attention_scale)  # (B, heads, T, head), T^2 head operations a head
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width))  # (B, T, width)

    def _mix(self, v: Tensor, other: Tensor) -> Tensor:
        weights = self.value_weights
        own = 1 - weights[0] if self.config.value_weights == "one" else weights[0]
        return (own * v + weights[-1] * other).to(v.dtype)  # the tables are float32 under autocast


class MLP(nn.Module):
    """Four times wider, squared ReLU, and back."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)
        self.down = nn.Linear(4 * config.width, config.width, bias=False)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Transform each token, (B, T, width) -> (B, T, width)."""
        return self.down(F.relu(self.up(x)).square())  # (B, T, 4 width) -> (B, T, width), 2/3 of a block's parameters


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream it reads."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attention = None if layer == config.layer_without_attention else Attention(config, layer)
        self.mlp = MLP(config)
        self.x0_weights = nn.Parameter(torch.tensor([1.0, 0.0])) if config.x0_mix else None

    @override
    def forward(self, x: Tensor, context: Context, embedded_values: Tensor | None = None) -> Tensor:
        """Update the residual stream, (B, T, width) -> (B, T, width)."""
        if self.x0_weights is not None:
            x = self.x0_weights[0] * x + self.x0_weights[1] * context.x0  # (B, T, width)
        if self.attention is not None:
            x = x + self.attention(norm(x), context, embedded_values)  # (B, T, width)
        return x + self.mlp(norm(x))  # (B, T, width)


class GPT(nn.Module):
    """A decoder-only transformer; the output of `blocks[i]` is the residual stream after block i.

    Matrices start normal with standard deviation 1 / sqrt(inputs), so that one rule serves widths from 128 to 1600;
    embeddings that are also the head with GPT-2's 0.02, so that the first loss is that of a nearly uniform guess,
    other embeddings with 1, the size of what they are added to or mixed with; the matrices that write into the
    residual stream and an untied head are zero, so that every block starts as the identity.

    Args:
        config: Sizes and switches.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        vocab_size, width = config.vocab_size, config.width
        self.embedding = nn.Embedding(vocab_size, width)  # also the head, if tied: (vocab, width)
        self.rotary: Tensor | None
        self.window: Tensor | None
        if config.positions == "learned":
            self.positions = nn.Embedding(config.block_size, width)
        rotary = _rotary_table(config) if config.positions == "rotary" else None  # (2, block_size, head / 2)
        self.register_buffer("rotary", rotary, persistent=False)
        # a tensor, so that a growing window changes no compiled code
        window = None if config.window is None else torch.tensor(config.window_at(0))
        self.register_buffer("window", window, persistent=False)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self._table_of = config.value_tables  # layer -> number of its table, or None
        num_tables = len({table for table in self._table_of if table is not None})
        # vocab width parameters each, of which a token reads width
        self.value_tables = nn.ModuleList(nn.Embedding(vocab_size, width) for _ in range(num_tables))
        if config.unet:
            self.skip_weights = nn.Parameter(torch.ones(config.num_layers // 2))  # first entry: the innermost pair
        if not config.tied_head:
            self.head = (
                nn.Linear(width, vocab_size, bias=False)
                if config.fp8 == "off"
                else Float8Linear(width, vocab_size, config.fp8, config.fp8_scales)
            )
        self.apply(self._init_weights)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            small = self.config.tied_head and module not in self.value_tables
            nn.init.normal_(module.weight, std=0.02 if small else 1.0)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, Attention):  # `apply` visits children first
            nn.init.zeros_(module.out.weight)
        elif isinstance(module, MLP):
            nn.init.zeros_(module.down.weight)
        elif module is self and not self.config.tied_head:
            nn.init.zeros_(self.head.weight)

    def set_tokens(self, tokens: int) -> None:
        """Let the window, if it is a growing one, have its size after so many training tokens on all ranks."""
        if self.window is not None and self.config.window_start is not None:
            self.window.fill_(self.config.window_at(tokens))

    @override
    def forward(self, input_ids: Tensor) -> Tensor:
        """Score every possible next token after each token.

        Args:
            input_ids: Tokens, `(batch, tokens)`, integers in [0, vocab_size), at most block_size of them in a row.

        Returns:
            Logits, `(batch, tokens, vocab_size)`.

        Raises:
            ValueError: If the sequences are longer than block_size.
        """
        config, tokens = self.config, input_ids.size(1)
        if tokens > config.block_size:
            raise ValueError(
                f"input_ids must have at most block_size={config.block_size} tokens a row, got {tokens}: "
                f"shorten the sequences or build the model with a larger block_size"
            )
        x = self.embedding(input_ids)  # (B, T, width)
        if config.positions == "learned":
            x = x + self.positions.weight[:tokens]  # (B, T, width) + (T, width)
        if config.embedding_norm:
            x = norm(x)  # (B, T, width)
        rotary = None if self.rotary is None else self.rotary[:, :tokens]  # (2, T, head / 2)
        context = Context(x, rotary, *self._masks(input_ids))
        tables = [table(input_ids) for table in self.value_tables]  # each (B, T, width)
        outputs: list[Tensor] = []  # of the first half of the blocks, (B, T, width)
        num_skips = config.num_layers // 2 if config.unet else 0
        for layer, block in enumerate(self.blocks):
            if layer >= config.num_layers - num_skips:
                weight = self.skip_weights[layer - config.num_layers + num_skips]
                x = x + weight * outputs.pop()  # (B, T, width)
            table = self._table_of[layer]
            x = block(x, context, None if table is None else tables[table])  # (B, T, width)
            if layer < num_skips:
                outputs.append(x)
        return self._bound(self._score(norm(x)))  # (B, T, vocab)

    def _masks(self, input_ids: Tensor) -> "tuple[Tensor | BlockMask | None, Tensor | BlockMask | None]":
        """Masks of layers with a long and with a short window."""
        config, device = self.config, input_ids.device
        masked = config.document_mask or self.window is not None
        build = block_mask if takes_flex(config.attention, device, masked, config.head_size) else dense_mask
        if not masked and build is dense_mask:
            return None, None  # SDPA knows causal attention by itself, and does half of the work then
        documents = document_ids(input_ids, config.eos_token) if config.document_mask else None  # (B, T)
        arguments = (config.mask_block, device)
        mask = build(input_ids.size(1), documents, self.window, *arguments)
        if config.window_pattern == "equal" or self.window is None:
            return mask, None
        return mask, build(input_ids.size(1), documents, (self.window // 2).clamp(min=1), *arguments)

    def _score(self, x: Tensor) -> Tensor:
        if not self.config.tied_head:
            return self.head(x)  # (B, T, width) -> (B, T, vocab)
        if self.config.fp8 == "off":
            return F.linear(x, self.embedding.weight)
        return float8_linear(x, self.embedding.weight, self.config.fp8, self.config.fp8_scales)

    def _bound(self, logits: Tensor) -> Tensor:
        c = self.config.softcap
        if c is None:
            return logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # bfloat16 near 15 has steps of 1 / 16
        if self.config.softcap_kind == "tanh":
            return c * torch.tanh(logits / c)
        return 2 * c * torch.sigmoid(logits / (0.5 * c * self.config.width**0.5))
