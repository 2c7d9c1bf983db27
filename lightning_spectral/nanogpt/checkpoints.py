"""Weights of the public GPT-2 speed runs, whose modules have other names, for recipes that share their parameters."""

import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_spectral.nanogpt.arguments import check_flag, check_path, shown
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
        ValueError: If the model has other parameters, or others of their shapes; if one is there twice, or is no dense
            tensor of finite real numbers.
    """
    if not isinstance(config, GPTConfig):
        raise ValueError(f"config must be a GPTConfig, got {shown(config)}: take that of the model")
    check_flag(turns_back=turns_back)
    found: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, value in _parameters(state).items():
        if name == _ALL_TABLES:
            if value.ndim != 2 or not value.shape[1] or value.shape[1] % config.width:
                raise ValueError(
                    f"checkpoint must hold {name} of shape (vocab, layers * {config.width}), got {tuple(value.shape)}: "
                    "build the model with the width that was trained"
                )
            tables = enumerate(value.split(config.width, dim=1))
            parts = {f"value_tables.{number}.weight": table for number, table in tables}
        elif (ours := _our_name(name)) is not None:
            parts = {ours: value}
        else:
            unknown.append(name)
            continue
        if twice := sorted(found.keys() & parts.keys()):
            raise ValueError(f"checkpoint must hold each parameter once, got two for {twice[0]}: leave one out")
        found |= parts
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
        ValueError: If the file cannot be read, holds anything but tensors and plain values, or does not fit the model.
    """
    check_path(hint="a file that torch.save wrote", path=path)
    if not isinstance(gpt, GPT):
        raise ValueError(f"gpt must be a GPT, got a {type(gpt).__name__}: give NanoGPT(...).gpt")
    try:
        _check_file(path)
        checkpoint: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"path must be a checkpoint of tensors, got {str(path)!r}: {_reason(error)}") from error
    state = checkpoint.get("model", checkpoint) if isinstance(checkpoint, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"path must be a checkpoint with a state dict, got {str(path)!r}: it holds something else")
    gpt.load_state_dict(from_speedrun(state, gpt.config, turns_back))


def _check_file(path: str | Path) -> None:
    """Refuse, by a ValueError, what is no file, and an archive that would grow: torch.save compresses nothing."""
    if not os.path.isfile(path):
        raise ValueError("it is a folder, a pipe or a device, or not there")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            total = sum(entry.file_size for entry in archive.infolist())
        if total > os.path.getsize(path):
            raise ValueError(f"it would grow to {total:,} bytes, and torch.save compresses nothing")


def _reason(error: Exception) -> str:
    """Why a file cannot be read, without PyTorch's advice to run what it holds."""
    text = " ".join(str(error).partition("\n")[0].split()) or type(error).__name__
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in text:
        return "it is damaged, or holds more than tensors and plain values, which could run code: save its state_dict()"
    return text


def _parameters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters by their names without wrappers; ValueError for what is none, or there twice."""
    if not isinstance(state, Mapping):
        raise ValueError(f"state must be a state dict, got {shown(state)}")
    found: dict[str, Tensor] = {}
    for full_name, value in state.items():
        if not isinstance(full_name, str):
            raise ValueError(f"checkpoint must hold parameters by name, got the key {shown(full_name)}")
        name = _WRAPPERS.sub("", full_name)
        if name in found:
            raise ValueError(f"checkpoint must hold each parameter once, got two for {shown(name)}: leave one out")
        if (reason := _fault(value)) is not None:
            raise ValueError(f"checkpoint must hold dense tensors of finite numbers, got {shown(name)} {reason}")
        found[name] = value
    return found


def _fault(value: Any) -> str | None:
    """Why something is no parameter, a clause; None if it is one."""
    if not isinstance(value, Tensor):
        return f"that is a {type(value).__name__}"
    if value.is_meta or value.layout != torch.strided or value.is_nested or value.is_quantized:
        return "without data" if value.is_meta else "that is not dense"
    if not value.is_floating_point():
        return f"of type {str(value.dtype).removeprefix('torch.')}"
    return None if bool(value.float().isfinite().all()) else "with NaN or infinity"


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
