"""GPT, one stack of equal blocks whose variants are independent switches of the configuration."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# num_layers, num_heads, width. All but tiny are the sizes of GPT-2; d12 has heads of 128 features, the others of 64.
TIERS: dict[str, dict[str, int]] = {
    "tiny": {"num_layers": 4, "num_heads": 2, "width": 128},
    "d12": {"num_layers": 12, "num_heads": 6, "width": 768},
    "d24": {"num_layers": 24, "num_heads": 16, "width": 1024},
    "d36": {"num_layers": 36, "num_heads": 20, "width": 1280},
    "d48": {"num_layers": 48, "num_heads": 25, "width": 1600},
}

# What each recipe adds to the one before it, in historical order.
RECIPES: dict[str, dict[str, Any]] = {
    "baseline": {"positions": "learned", "fused_qkv": True, "qk_norm": False},
    "rope": {"positions": "rotary", "fused_qkv": False, "qk_norm": True},
}


def _choose(argument: str, name: str, table: dict[str, dict[str, Any]]) -> dict[str, Any]:
    if name not in table:
        raise ValueError(f"{argument} must be one of {', '.join(table)}, got {name!r}")
    return table[name]


def recipe_switches(recipe: str) -> dict[str, Any]:
    """Collect the switches of a recipe: its own and those of all recipes before it.

    Args:
        recipe: A key of `RECIPES`.

    Returns:
        Fields of `GPTConfig` and their values.

    Raises:
        ValueError: If there is no such recipe.
    """
    _choose("recipe", recipe, RECIPES)
    switches: dict[str, Any] = {}
    for name, added in RECIPES.items():
        switches |= added
        if name == recipe:
            break
    return switches


@dataclass(frozen=True)
class GPTConfig:
    """Sizes and switches of a `GPT`; any combination that passes the checks is a model.

    Raises:
        ValueError: If a size is not positive, heads do not divide the width, or a switch has an unknown value.
    """

    vocab_size: int = 50304
    """Number of token values; the default is GPT-2's 50257 rounded up to a multiple of 128."""
    block_size: int = 1024
    """Longest sequence, in tokens."""
    num_layers: int = 12
    """Number of blocks."""
    num_heads: int = 6
    """Attention heads of a block; each sees width / num_heads features."""
    width: int = 768
    """Features of the residual stream."""
    positions: Literal["learned", "rotary"] = "learned"
    """A learned vector for each position, added to the embedding, or rotation of queries and keys."""
    rotary_base: float = 1e4
    """The slowest pair of features turns by about 1 / rotary_base radians a token (positions="rotary")."""
    fused_qkv: bool = True
    """One matrix for queries, keys and values, instead of one each."""
    qk_norm: bool = False
    """RMS-normalise each head's queries and keys, without parameters."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "num_layers", "num_heads", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.width % self.num_heads:
            raise ValueError(
                f"width must be a multiple of num_heads={self.num_heads}, got {self.width}: "
                f"take {self.width - self.width % self.num_heads or self.num_heads}"
            )
        if self.positions not in ("learned", "rotary"):
            raise ValueError(f"positions must be one of learned, rotary, got {self.positions!r}")
        if self.positions == "rotary" and self.head_size % 2:
            raise ValueError(
                f"width / num_heads must be even for positions='rotary', which turns pairs of features, "
                f"got {self.width} / {self.num_heads} = {self.head_size}"
            )
        if self.rotary_base <= 1:
            raise ValueError(f"rotary_base must be above 1, got {self.rotary_base}: 10000 is usual")

    @property
    def head_size(self) -> int:
        """Features of one attention head."""
        return self.width // self.num_heads

    @classmethod
    def from_tier(cls, tier: str, recipe: str = "baseline", **overrides: Any) -> "GPTConfig":
        """Configure a model by the names of its size and its recipe.

        Args:
            tier: A key of `TIERS`.
            recipe: A key of `RECIPES`.
            **overrides: Fields that take precedence over what the two names stand for.

        Returns:
            The configuration.

        Raises:
            ValueError: If a name or a field is unknown, or the fields do not fit each other.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in overrides:
            if name not in known:
                raise ValueError(f"overrides must be fields of GPTConfig ({', '.join(known)}), got {name!r}")
        return cls(**(_choose("tier", tier, TIERS) | recipe_switches(recipe) | overrides))


def norm(x: Tensor) -> Tensor:
    """Divide by the root mean square over the last axis; no parameters.

    Args:
        x: Features, `(..., width)`.

    Returns:
        Features of unit mean square, `(..., width)`.
    """
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
    # ints divided by an int: the angles come out in the default dtype, in float32 or better
    frequencies = config.rotary_base ** -(torch.arange(0, config.head_size, 2) / config.head_size)  # (head / 2,)
    angles = torch.outer(torch.arange(config.block_size), frequencies)  # (block_size, head / 2)
    return torch.stack((angles.cos(), angles.sin()))  # (2, block_size, head / 2)


def _rotate(x: Tensor, table: Tensor) -> Tensor:
    cos, sin = table  # each (T, head / 2)
    a, b = x.chunk(2, dim=-1)  # (B, heads, T, head / 2): feature i is paired with i + head / 2
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)  # (B, heads, T, head)


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        if config.fused_qkv:
            self.qkv = nn.Linear(width, 3 * width, bias=False)
        else:
            self.q = nn.Linear(width, width, bias=False)
            self.k = nn.Linear(width, width, bias=False)
            self.v = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, rotary: Tensor | None) -> Tensor:
        """Mix tokens with those before them, (B, T, width) -> (B, T, width)."""
        batch, tokens, width = x.shape
        parts = self.qkv(x).chunk(3, dim=-1) if self.config.fused_qkv else (self.q(x), self.k(x), self.v(x))
        shape = (batch, tokens, self.config.num_heads, self.config.head_size)
        q, k, v = (part.view(shape).transpose(1, 2) for part in parts)  # each (B, heads, T, head)
        if self.config.qk_norm:
            q, k = norm(q), norm(k)
        if rotary is not None:
            q, k = _rotate(q, rotary), _rotate(k, rotary)
        # norm and table are float32 under autocast
        q, k = q.to(v.dtype), k.to(v.dtype)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, T, head), T^2 head operations a head
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width))  # (B, T, width)


class MLP(nn.Module):
    """Four times wider, squared ReLU, and back."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)
        self.down = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token, (B, T, width) -> (B, T, width)."""
        return self.down(F.relu(self.up(x)).square())  # (B, T, 4 width) -> (B, T, width), 2/3 of a block's parameters


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream it reads."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary: Tensor | None) -> Tensor:
        """Update the residual stream, (B, T, width) -> (B, T, width)."""
        x = x + self.attention(norm(x), rotary)  # (B, T, width)
        return x + self.mlp(norm(x))  # (B, T, width)


class GPT(nn.Module):
    """A decoder-only transformer; the output of `blocks[i]` is the residual stream after block i.

    Matrices start normal with standard deviation 1 / sqrt(inputs), so that one rule serves widths from 128 to 1600;
    embeddings with GPT-2's 0.02, so that the first loss is that of a nearly uniform guess; the matrices that write
    into the residual stream are zero, so that every block starts as the identity.

    Args:
        config: Sizes and switches.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)  # also the head: (vocab, width)
        self.rotary: Tensor | None
        if config.positions == "learned":
            self.positions = nn.Embedding(config.block_size, config.width)
        rotary = _rotary_table(config) if config.positions == "rotary" else None  # (2, block_size, head / 2)
        self.register_buffer("rotary", rotary, persistent=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.apply(self._init_weights)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, Attention):  # `apply` visits children first
            nn.init.zeros_(module.out.weight)
        elif isinstance(module, MLP):
            nn.init.zeros_(module.down.weight)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Score every possible next token after each token.

        Args:
            input_ids: Tokens, `(batch, tokens)`, integers in [0, vocab_size), at most block_size of them in a row.

        Returns:
            Logits, `(batch, tokens, vocab_size)`.

        Raises:
            ValueError: If the sequences are longer than block_size.
        """
        tokens = input_ids.size(1)
        if tokens > self.config.block_size:
            raise ValueError(
                f"input_ids must have at most block_size={self.config.block_size} tokens a row, got {tokens}: "
                f"shorten the sequences or build the model with a larger block_size"
            )
        x = self.embedding(input_ids)  # (B, T, width)
        if self.config.positions == "learned":
            x = x + self.positions.weight[:tokens]  # (B, T, width) + (T, width)
        rotary = None if self.rotary is None else self.rotary[:, :tokens]  # (2, T, head / 2)
        for block in self.blocks:
            x = block(x, rotary)  # (B, T, width)
        return F.linear(norm(x), self.embedding.weight)  # (B, T, vocab)
