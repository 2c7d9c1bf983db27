"""Which token sees which, for SDPA as booleans and for FlexAttention as blocks, and attention under either."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    HAS_FLEX = True
except ModuleNotFoundError:  # torch 2.4
    HAS_FLEX = False

FLEX_BLOCK = 128
"""Tokens of a block that FlexAttention computes or skips; its kernels take no smaller ones."""


def document_ids(input_ids: Tensor, eos_token: int) -> Tensor:
    """Number the documents of packed sequences, each of which begins with `eos_token`.

    Each of the `(batch, tokens)` tokens gets the number of its document in the row, not decreasing.
    """
    return (input_ids == eos_token).cumsum(dim=1)


def _reach(window: Tensor, mask_block: int | None) -> Tensor:
    # in tokens, or in blocks of them, rounded up: what is at this distance or beyond is not seen
    return window if mask_block is None else (window + mask_block - 1) // mask_block


def _place(tokens: Any, mask_block: int | None) -> Any:
    return tokens if mask_block is None else tokens // mask_block


def takes_flex(attention: str, device: torch.device, masked: bool, head_size: int) -> bool:
    """Whether attention is FlexAttention rather than SDPA: by its name, or for "auto" where flex is worth it.

    That is on CUDA if more than the future is masked (for the future alone SDPA has kernels) and heads have at least
    16 features, of which flex takes no fewer; never in a torch that lacks it.
    """
    if attention == "auto":
        return HAS_FLEX and device.type == "cuda" and masked and head_size >= 16
    return attention == "flex"


def dense_mask(
    num_tokens: int, documents: Tensor | None, window: Tensor | None, mask_block: int | None, device: torch.device
) -> Tensor:
    """Say for each pair of tokens whether the first sees the second: not later, not too far, of one document.

    Args:
        num_tokens: Length of the sequences.
        documents: From `document_ids`, `(batch, tokens)`; None is one document.
        window: Tokens that a token sees, itself included, 0-dim; a tensor, so that compiled code serves all windows.
            None sees all before it.
        mask_block: Measure distances in aligned blocks of so many tokens.
        device: Of the result.

    Returns:
        Booleans, `(tokens, tokens)` or, with documents, `(batch, 1, tokens, tokens)`.
    """
    place = torch.arange(num_tokens, device=device)  # (T,)
    mask = place[:, None] >= place  # (T, T): row sees column
    if window is not None:
        distance = _place(place, mask_block)[:, None] - _place(place, mask_block)  # (T, T)
        mask = mask & (distance < _reach(window, mask_block))
    if documents is not None:
        mask = mask & (documents[:, None, :, None] == documents[:, None, None, :])  # (B, 1, T, T)
    return mask


def block_mask(
    num_tokens: int, documents: Tensor | None, window: Tensor | None, mask_block: int | None, device: torch.device
) -> "BlockMask":
    """Say the same as `dense_mask` for FlexAttention, without ever looking at all pairs of tokens.

    For each block of tokens: the blocks that it sees in whole and in part, and the rule inside the latter.
    """
    size = FLEX_BLOCK
    num_blocks = -(-num_tokens // size)
    first = torch.arange(num_blocks, device=device) * size  # (n,): each block's first token
    last = first + size - 1
    step = torch.arange(num_blocks, device=device)
    some, whole = step[:, None] >= step, step[:, None] > step  # (n, n): on the diagonal the future is cut off
    if window is not None:
        reach = _reach(window, mask_block)
        some = some & (_place(first, mask_block)[:, None] - _place(last, mask_block) < reach)  # the nearest pair
        whole = whole & (_place(last, mask_block)[:, None] - _place(first, mask_block) < reach)  # the farthest
    some, whole = some[None], whole[None]  # (1, n, n)
    if documents is not None:
        padding = documents[:, -1:].expand(-1, num_blocks * size - num_tokens)
        documents = torch.cat((documents, padding), dim=1)  # (B, n size)
        low, high = documents[:, first], documents[:, last]  # (B, n): numbers do not decrease along the row
        some = some & (low[:, :, None] <= high[:, None, :])
        whole = whole & (high[:, :, None] == low[:, None, :])
    partial = some & ~whole
    return BlockMask.from_kv_blocks(
        *_table(partial),
        *_table(some & whole),
        BLOCK_SIZE=size,
        mask_mod=_rule(documents, window, mask_block),
        seq_lengths=(num_tokens, num_tokens),
    )


def _table(blocks: Tensor) -> tuple[Tensor, Tensor]:
    # (B, n, n) -> numbers of blocks (B, 1, n), and their indices first in (B, 1, n, n)
    blocks = blocks[:, None].to(torch.int32)
    order = blocks.argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(dim=-1, dtype=torch.int32), order.to(torch.int32).contiguous()


def _rule(documents: Tensor | None, window: Tensor | None, mask_block: int | None) -> Callable[..., Tensor]:
    reach = None if window is None else _reach(window, mask_block)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = query >= key
        if reach is not None:
            seen = seen & (_place(query, mask_block) - _place(key, mask_block) < reach)
        if documents is not None:
            seen = seen & (documents[batch, query] == documents[batch, key])
        return seen

    return sees


@functools.cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: "Tensor | BlockMask | None", scale: float | None) -> Tensor:
    """Mix the values that each token sees, all of shape `(batch, heads, tokens, head_size)`.

    The mask is one of `dense_mask` for SDPA, of `block_mask` for FlexAttention; None is SDPA over all before. `scale`
    is a factor on the products of queries and keys; None is 1 / sqrt(head_size). ValueError if FlexAttention is to be
    trained on a device on which it cannot.
    """
    if mask is None or isinstance(mask, Tensor):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    if q.device.type == "cuda":
        return _compiled_flex_attention()(q, k, v, block_mask=mask, scale=scale)
    if q.requires_grad or k.requires_grad or v.requires_grad:
        raise ValueError(
            f"attention='flex' must run on CUDA to be trained, got {q.device}, where it has no backward: "
            "take attention='auto' or 'sdpa', or torch.no_grad()"
        )
    with warnings.catch_warnings():  # that it is slow when not compiled: here it is for comparison only
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        return flex_attention(q, k, v, block_mask=mask, scale=scale)
