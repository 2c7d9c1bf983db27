"""GPTConfig, the sizes and independent switches of a GPT, and the names that stand for sets of them."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lightning_spectral.nanogpt.arguments import MAX_INT, check_flag, check_int, check_number, shown
from lightning_spectral.nanogpt.attention import HAS_FLEX

# num_layers, num_heads, width. All but tiny are the sizes of GPT-2; d12 has heads of 128 features, the others of 64.
TIERS: dict[str, dict[str, int]] = {
    "tiny": {"num_layers": 4, "num_heads": 2, "width": 128},
    "d12": {"num_layers": 12, "num_heads": 6, "width": 768},
    "d24": {"num_layers": 24, "num_heads": 16, "width": 1024},
    "d36": {"num_layers": 36, "num_heads": 20, "width": 1280},
    "d48": {"num_layers": 48, "num_heads": 25, "width": 1600},
}

# What each recipe adds to the one before it, in historical order. Muon is a matter of the optimizer alone.
RECIPES: dict[str, dict[str, Any]] = {
    "baseline": {"positions": "learned", "fused_qkv": True, "qk_norm": False},
    "rope": {"positions": "rotary", "fused_qkv": False, "qk_norm": True},
    "muon": {},
    "untied": {"tied_head": False, "embedding_norm": True},
    "value_mix": {"value_mix": "first", "x0_mix": True, "softcap": 30.0},
    "unet": {"unet": True},
    "fixed_window": {"document_mask": True, "window": 1024},
    "flex_window": {"window_start": 64, "window": 1792},
    "vte": {"value_mix": "layer"},
    "better_window": {"value_mix": "mirrored", "mask_block": 128},
    "sparse_embed": {"value_mix": "sparse", "value_weights": "two", "skip_attention": True},
    "truncated_rope": {"rotary_frequencies": "truncated"},
    "softcap": {"softcap": 15.0},
    "fp8_head": {"fp8": "on"},
    "long_short": {"window_pattern": "long_short"},
    "attn_scale": {"attention_scale": 0.12},
    "sub_lr": {"softcap_kind": "sigmoid"},
}


def _choose(argument: str, name: str, table: dict[str, dict[str, Any]]) -> dict[str, Any]:
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"{argument} must be one of {', '.join(table)}, got {shown(name)}")
    return table[name]


def recipe_switches(recipe: str) -> dict[str, Any]:
    """Fields of `GPTConfig` that a recipe sets, its own and those of all recipes before it, with their values."""
    _choose("recipe", recipe, RECIPES)
    switches: dict[str, Any] = {}
    for name, added in RECIPES.items():
        switches |= added
        if name == recipe:
            break
    return switches


_MOST = {"vocab_size": 2**31, "block_size": 2**31, "num_layers": 10_000, "num_heads": 2**16, "width": 2**20}
"""Sizes beyond which no model is built; what fits into the memory is for the machine to say."""


def _are_scales(scales: Any) -> bool:
    if not isinstance(scales, (tuple, list)) or len(scales) != 3:
        return False
    try:
        check_number(fp8_scales_0=scales[0], fp8_scales_1=scales[1], fp8_scales_2=scales[2])
    except ValueError:
        return False
    return min(scales) > 0


@dataclass(frozen=True)
class GPTConfig:
    """Sizes and switches of a `GPT`; any combination that passes the checks is a model.

    Raises:
        ValueError: If a number is out of its range, a switch has an unknown value, or two of them do not fit.
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
    """The slowest pair of features turns by about 1 / rotary_base radians a token (rotary_frequencies="full")."""
    rotary_frequencies: Literal["full", "truncated"] = "full"
    """"truncated" spaces half of the frequencies from 1 to 1 / 1024 and does not turn the other pairs at all."""
    fused_qkv: bool = True
    """One matrix for queries, keys and values, instead of one each."""
    qk_norm: bool = False
    """RMS-normalise each head's queries and keys, without parameters."""
    attention_scale: float | None = None
    """Factor on the products of queries and keys; None is 1 / sqrt(width / num_heads)."""
    attention: Literal["auto", "flex", "sdpa"] = "auto"
    """How masks are applied: by FlexAttention, which skips what is masked, or by SDPA with tokens^2 booleans. "auto"
    is flex on CUDA where something is masked besides the future, else sdpa. On a CPU flex cannot be trained."""
    document_mask: bool = False
    """Keep each document of a packed sequence from seeing the ones before it."""
    eos_token: int = 50256
    """The token that begins a document (document_mask=True), GPT-2's end of text. A token that the data does not
    have, as bytes do not have this one, leaves one document a sequence."""
    window: int | None = None
    """Tokens that a token sees, itself included; None sees all before it."""
    window_start: int | None = None
    """The window before training, from which it grows to `window` (see `GPT.set_tokens`); None keeps it fixed."""
    window_warmup_tokens: int = 900_000_000
    """Training tokens over which the window grows; the default is about the length of a speed run of d12."""
    window_step: int = 64
    """The window grows by this many tokens at a time."""
    window_pattern: Literal["equal", "long_short"] = "equal"
    """"long_short" gives layers windows [long, short, short, short], repeated up to the middle of the stack and then
    mirrored, where long is `window` and short half of it."""
    mask_block: int | None = None
    """Round the window up to blocks of this many tokens, aligned to multiples of it, so that fewer of them are cut
    through; the speed runs' is 128. None lets every token see equally far."""
    tied_head: bool = True
    """Score next tokens with the embedding; if not, with a separate matrix, the head, that starts at zero."""
    embedding_norm: bool = False
    """RMS-normalise the embedding, without parameters."""
    value_mix: Literal["none", "first", "layer", "mirrored", "sparse"] = "none"
    """What the values of attention are mixed with: the first layer's values, or an embedding of the token from a
    table that each layer has for itself, shares with its mirror image in the stack, or, sparse, the three layers
    next to each end (fewer in stacks of less than seven) share in order."""
    value_weights: Literal["one", "two"] = "one"
    """Mix values v with u as (1 - a) v + a u, or as a v + b u; learned, from 0.5."""
    x0_mix: bool = False
    """Let each block read a x + b x0, where x0 is the embedding; learned, from 1 and 0."""
    unet: bool = False
    """Add the outputs of the first half of the blocks to the inputs of the second half, last to first, with learned
    weights from 1."""
    skip_attention: bool = False
    """Leave attention out of layer num_layers // 2 + 1, counted from 0, or of the last but one if that comes first."""
    softcap: float | None = None
    """Bound c of the logits (see softcap_kind); None leaves them unbounded."""
    softcap_kind: Literal["tanh", "sigmoid"] = "tanh"
    """Bound logits z as c tanh(z / c), or as 2 c sigmoid(z / (c sqrt(width) / 2))."""
    fp8: Literal["off", "on", "emulate"] = "off"
    """Multiply by the head in 8-bit floats: on a GPU that can, or by rounding the factors, which is slower than
    "off" and runs everywhere."""
    fp8_scales: tuple[float, float, float] = (2.0, 32.0, 2.0**29)
    """Factors on activations, weights and gradients before they are rounded to 8 bits. The last is for 65,536 tokens a
    pass and is lowered in proportion for fewer, as the gradients of a mean are larger then."""

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_names()
        self._check_positions()
        self._check_windows()
        self._check_stack()

    @property
    def head_size(self) -> int:
        """Features of one attention head."""
        return self.width // self.num_heads

    @property
    def layer_without_attention(self) -> int | None:
        """The layer that has an MLP only, counted from 0."""
        return min(self.num_layers // 2 + 1, self.num_layers - 2) if self.skip_attention else None

    @property
    def value_tables(self) -> list[int | None]:
        """For each layer the number of the table whose embeddings its values are mixed with."""
        last, depth = self.num_layers - 1, min(3, (self.num_layers - 1) // 2)
        slots: dict[int, int] = {}
        for layer in range(self.num_layers):
            if layer == self.layer_without_attention:
                continue
            if self.value_mix == "layer":
                slots[layer] = layer
            elif self.value_mix == "mirrored":
                slots[layer] = min(layer, last - layer)
            elif self.value_mix == "sparse" and not depth <= layer <= last - depth:
                slots[layer] = layer if layer < depth else layer - (last - depth + 1)
        used = sorted(set(slots.values()))  # a table that only the layer without attention would read is left out
        return [used.index(slots[layer]) if layer in slots else None for layer in range(self.num_layers)]

    def mixes_values(self, layer: int) -> bool:
        """Whether a layer's values are mixed with something; the first layer's are not with themselves."""
        if layer == self.layer_without_attention:
            return False
        return layer > 0 if self.value_mix == "first" else self.value_tables[layer] is not None

    def has_short_window(self, layer: int) -> bool:
        """Whether a layer sees half of the window; none does but with window_pattern="long_short"."""
        return self.window_pattern == "long_short" and min(layer, self.num_layers - 1 - layer) % 4 != 0

    def window_at(self, tokens: int) -> int:
        """Tokens that a token sees in a layer with a long window, after training on so many tokens."""
        assert self.window is not None, "there is no schedule without a window"
        if self.window_start is None or tokens >= self.window_warmup_tokens:
            return self.window
        grown = (self.window - self.window_start) * tokens // self.window_warmup_tokens
        return self.window_start + grown // self.window_step * self.window_step

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

    def _check_numbers(self) -> None:
        sizes = ("vocab_size", "block_size", "num_layers", "num_heads", "width")
        for name in (*sizes, "window", "window_start", "window_warmup_tokens", "window_step", "mask_block"):
            value = getattr(self, name)
            if value is None and name not in (*sizes, "window_warmup_tokens", "window_step"):
                continue
            check_int(1, _MOST.get(name, MAX_INT), **{name: value})
        for name, usual in (("attention_scale", 0.12), ("softcap", 15)):
            value = getattr(self, name)
            if value is not None:
                check_number(hint=f"take {usual} or None", **{name: value})
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, or None, got {value}: take {usual} or None")
        check_int(0, eos_token=self.eos_token)
        check_number(rotary_base=self.rotary_base)
        if not _are_scales(self.fp8_scales):
            raise ValueError(
                f"fp8_scales must be three positive factors, on activations, weights and gradients, got "
                f"{shown(self.fp8_scales)}: (2, 32, 2**29) is usual"
            )

    def _check_names(self) -> None:
        for field in dataclasses.fields(self):
            known = getattr(field.type, "__args__", ())  # of a Literal
            value = getattr(self, field.name)
            if getattr(field.type, "__origin__", None) is Literal and not (isinstance(value, str) and value in known):
                raise ValueError(f"{field.name} must be one of {', '.join(known)}, got {shown(value)}")
            if field.type is bool:
                check_flag(**{field.name: value})

    def _check_positions(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(
                f"width must be a multiple of num_heads={self.num_heads}, got {self.width}: "
                f"take {self.width - self.width % self.num_heads or self.num_heads}"
            )
        size = f"got {self.width} / {self.num_heads} = {self.head_size}"
        if self.positions == "rotary" and self.head_size % 2:
            raise ValueError(
                f"width / num_heads must be even for positions='rotary', which turns pairs of features, {size}"
            )
        if self.rotary_base <= 1:
            raise ValueError(f"rotary_base must be above 1, got {self.rotary_base}: 10000 is usual")
        if self.rotary_frequencies == "truncated":
            if self.positions != "rotary":
                raise ValueError(
                    f"rotary_frequencies='truncated' must have rotary positions, got positions={self.positions!r}: "
                    "take positions='rotary'"
                )
            if self.head_size % 4:
                raise ValueError(
                    f"width / num_heads must be a multiple of 4 for rotary_frequencies='truncated', which turns half "
                    f"of the pairs, {size}"
                )

    def _check_windows(self) -> None:
        for name, off in (("window_start", None), ("mask_block", None), ("window_pattern", "equal")):
            value = getattr(self, name)
            if value != off and self.window is None:
                raise ValueError(f"{name}={value!r} must have a window, got window=None: take window=1024, for example")
        if self.window_start is not None and self.window is not None and self.window_start > self.window:
            raise ValueError(
                f"window_start must be at most window={self.window}, as windows grow, got {self.window_start}: "
                f"take {self.window} or None"
            )
        if self.attention == "flex" and not HAS_FLEX:
            raise ValueError(
                f"attention must be 'auto' or 'sdpa' with torch {torch.__version__}, got 'flex', which needs torch>=2.5"
            )
        if self.attention == "flex" and self.head_size < 16:
            raise ValueError(
                f"width / num_heads must be at least 16 for attention='flex', got {self.width} / {self.num_heads} = "
                f"{self.head_size}: take attention='sdpa'"
            )

    def _check_stack(self) -> None:
        for name, value, off, least in (
            ("unet", self.unet, False, 2),
            ("skip_attention", self.skip_attention, False, 3),
            ("value_mix", self.value_mix, "sparse", 3),
            ("value_mix", self.value_mix, "first", 2),
        ):
            on = value == off if isinstance(off, str) else value
            if on and self.num_layers < least:
                raise ValueError(
                    f"num_layers must be at least {least} for {name}={value!r}, got {self.num_layers}: "
                    f"take {least} or another {name}"
                )
        if self.value_weights == "two" and self.value_mix == "none":
            raise ValueError(
                "value_weights='two' must have something to mix, got value_mix='none': take value_mix='first'"
            )
        if self.softcap_kind == "sigmoid" and self.softcap is None:
            raise ValueError("softcap_kind='sigmoid' must have a bound, got softcap=None: take softcap=15")
        if self.fp8 == "on" and (self.width % 16 or self.vocab_size % 16):
            raise ValueError(
                f"width and vocab_size must be multiples of 16 for fp8='on', got {self.width} and {self.vocab_size}: "
                "round them up, or take fp8='emulate'"
            )
