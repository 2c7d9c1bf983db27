"""Weights of the public GPT-2 speed runs, whose modules have other names, for recipes that share their parameters."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_spectral.nanogpt.config import GPTConfig
from lightning_spectral.nanogpt.model import GPT

# Their name, as a pattern, and ours.
NAMES: dict[str, str] = {
    r"transformer\.wte\.weight": "embedding.weight",
    r"transformer\.wpe\.weight": "positions.weight",
    r"transformer\.h\.(\d+)\.attn\.c_attn\.weight": r"blocks.\1.attention.qkv.weight",  # rows: queries, keys, values
    r"transformer\.h\.(\d+)\.attn\.c_([qkv])\.weight": r"blocks.\1.attention.\2.weight",
    r"transformer\.h\.(\d+)\.attn\.c_proj\.weight": r"blocks.\1.attention.out.weight",
    r"transformer\.h\.(\d+)\.attn\.(?:lamb|mix)": r"blocks.\1.attention.value_weights",  # one number, or two
    r"transformer\.h\.(\d+)\.mlp\.c_fc\.weight": r"blocks.\1.mlp.up.weight",
    r"transformer\.h\.(\d+)\.mlp\.c_proj\.weight": r"blocks.\1.mlp.down.weight",
    r"transformer\.h\.(\d+)\.lambdas": r"blocks.\1.x0_weights",
    r"emb\.(\d+)\.weight": r"value_tables.\1.weight",
    r"skip_weights": "skip_weights",
    r"lm_head\.weight": "head.weight",
}
_ALL_TABLES = "transformer.vte.weight"  # side by side in one: (vocab, layers * width)
_WRAPPERS = re.compile(r"(_orig_mod|module)\.")


def from_speedrun(state: Mapping[str, Tensor], config: GPTConfig, turns_back: bool = True) -> dict[str, Tensor]:
    """Rename the parameters of a speed run, and bring them into the shapes they have here.

    Args:
        state: A state dict in the layout of the public speed runs and of the scripts released with *Spectral Lens*.
        config: Sizes and switches of the model they are for.
        turns_back: Whether rotary positions turn queries and keys by minus the angle, as in the speed runs, or by plus
            the angle, as here and in the released scripts from the recipe unet on. The one becomes the other by
            exchanging the two halves of each head's features.

    Returns:
        A state dict for `GPT.load_state_dict`.

    Raises:
        ValueError: If the model has other parameters, or others of their shapes.
    """
    found: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, value in ((_WRAPPERS.sub("", name), value) for name, value in state.items()):
        if name == _ALL_TABLES:
            tables = enumerate(value.split(config.width, dim=1))
            found |= {f"value_tables.{number}.weight": table for number, table in tables}
        elif (ours := _our_name(name)) is not None:
            found[ours] = value
        else:
            unknown.append(name)
    with torch.device("meta"):
        wanted = {name: parameter.shape for name, parameter in GPT(config).named_parameters()}
    # What a tied head repeats, and what the first layer has no use for: its values are the ones that others mix in.
    spare = {"head.weight"} if config.tied_head else set()
    spare |= {"blocks.0.attention.value_weights"} if config.value_mix == "first" else set()
    unknown += [name for name in found if name not in wanted and name not in spare]
    missing = [name for name in wanted if name not in found]
    if unknown or missing:
        raise ValueError(
            f"checkpoint must hold the parameters of the model, got {_some(unknown)} beyond them and not "
            f"{_some(missing)}: build the model with the recipe that was trained"
        )
    for name, shape in wanted.items():
        is_number = name.endswith("value_weights") and found[name].numel() == shape.numel()
        if found[name].shape != shape and not is_number:  # a number there is a vector of one here
            raise ValueError(
                f"checkpoint must hold {name} of shape {tuple(shape)}, got {tuple(found[name].shape)}: build the "
                "model with the sizes that were trained"
            )
    if turns_back and config.positions == "rotary":
        _exchange_halves(found, config)
    return {name: found[name].reshape(shape) for name, shape in wanted.items()}


def load_speedrun(path: str | Path, gpt: GPT, turns_back: bool = True) -> None:
    """Load a checkpoint of a speed run into a model.

    Args:
        path: A file that `torch.save` wrote: a state dict, or a dict with one under `model`. Read without unpickling
            anything but tensors and plain values.
        gpt: The model, of the recipe and sizes that were trained.
        turns_back: See `from_speedrun`.

    Raises:
        ValueError: If the file cannot be read, or does not fit the model.
    """
    try:
        checkpoint: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"path must be a checkpoint of tensors, got {str(path)!r}: {reason}") from error
    state = checkpoint.get("model", checkpoint) if isinstance(checkpoint, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"path must be a checkpoint with a state dict, got {str(path)!r}: it holds something else")
    gpt.load_state_dict(from_speedrun(state, gpt.config, turns_back))


def _our_name(name: str) -> str | None:
    for theirs, ours in NAMES.items():
        if match := re.fullmatch(theirs, name):
            return match.expand(ours)
    return None


def _exchange_halves(state: dict[str, Tensor], config: GPTConfig) -> None:
    half = config.head_size // 2
    for name, value in state.items():
        kind = name.removesuffix(".weight").rpartition(".")[2]
        if kind in ("q", "k"):
            heads = value.view(config.num_heads, 2, half, -1)  # (heads, halves, head / 2, width)
            state[name] = heads.flip(1).reshape(value.shape)
        elif kind == "qkv":
            heads = value.view(3, config.num_heads, 2, half, -1)
            state[name] = torch.cat([heads[:2].flip(2), heads[2:]]).reshape(value.shape)


def _some(names: list[str]) -> str:
    return ", ".join([*names[:3], "..."] if len(names) > 3 else names) or "none"
