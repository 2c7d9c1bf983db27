"""Weights in the speed runs' layout give here what they gave there: a small twin of that layout says what."""

import os
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_spectral.nanogpt.checkpoints import from_speedrun, load_speedrun
from lightning_spectral.nanogpt.model import GPT, GPTConfig

LAYERS, HEADS, WIDTH, VOCAB, LENGTH = 4, 2, 16, 50, 12
SIZES = {"num_layers": LAYERS, "num_heads": HEADS, "width": WIDTH, "vocab_size": VOCAB, "block_size": 32}
TOKENS = torch.randint(VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(1))


def config_of(recipe: str) -> GPTConfig:
    return GPTConfig.from_tier("tiny", recipe, **SIZES)


def speedrun_state(recipe: str) -> dict[str, Tensor]:
    """Random weights under their names there."""
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> Tensor:
        return 0.3 * torch.randn(*shape, generator=generator)

    state = {"transformer.wte.weight": weight(VOCAB, WIDTH)}
    if recipe == "baseline":
        state["transformer.wpe.weight"] = weight(32, WIDTH)
    if recipe in ("value_mix", "unet", "vte", "untied"):
        state["lm_head.weight"] = weight(VOCAB, WIDTH)
    else:
        state["lm_head.weight"] = state["transformer.wte.weight"]
    for layer in range(LAYERS):
        start = f"transformer.h.{layer}"
        if recipe == "baseline":
            state[f"{start}.attn.c_attn.weight"] = weight(3 * WIDTH, WIDTH)
        else:
            state |= {f"{start}.attn.c_{part}.weight": weight(WIDTH, WIDTH) for part in "qkv"}
        state[f"{start}.attn.c_proj.weight"] = weight(WIDTH, WIDTH)
        state[f"{start}.mlp.c_fc.weight"] = weight(4 * WIDTH, WIDTH)
        state[f"{start}.mlp.c_proj.weight"] = weight(WIDTH, 4 * WIDTH)
        if recipe in ("value_mix", "unet", "vte"):
            state[f"{start}.attn.lamb"] = torch.tensor(0.3 + 0.1 * layer)
            state[f"{start}.lambdas"] = torch.tensor([0.9, 0.2])
    if recipe in ("unet", "vte"):
        state["skip_weights"] = torch.tensor([0.7, 1.2])
    if recipe == "vte":
        state["transformer.vte.weight"] = weight(VOCAB, LAYERS * WIDTH)
    return state


def turn(x: Tensor, sign: float) -> Tensor:
    """Rotary positions of (batch, tokens, heads, features), by plus or minus the angle."""
    half = x.shape[-1] // 2
    angles = torch.outer(torch.arange(LENGTH), 1e4 ** -(torch.arange(half) / half))[:, None]
    a, b, sin = x[..., :half], x[..., half:], sign * angles.sin()
    return torch.cat([a * angles.cos() - b * sin, a * sin + b * angles.cos()], -1)


def speedrun_logits(state: dict[str, Tensor], recipe: str, sign: float) -> Tensor:
    """What their forward pass computes, in plain words."""
    has_values, has_skips = recipe in ("value_mix", "unet", "vte"), recipe in ("unet", "vte")
    rms = lambda x: F.rms_norm(x, x.shape[-1:])  # noqa: E731
    x = state["transformer.wte.weight"][TOKENS]
    if recipe == "baseline":
        x = x + state["transformer.wpe.weight"][:LENGTH]
    if has_values or recipe == "untied":
        x = rms(x)
    x0, first, skips = x, None, []
    tables = state["transformer.vte.weight"][TOKENS].split(WIDTH, -1) if recipe == "vte" else None
    for layer in range(LAYERS):
        get = lambda name, layer=layer: state[f"transformer.h.{layer}.{name}"]  # noqa: E731
        if has_skips and layer >= LAYERS // 2:
            x = x + state["skip_weights"][layer - LAYERS // 2] * skips.pop()
        if has_values:
            x = get("lambdas")[0] * x + get("lambdas")[1] * x0
        h = rms(x)
        if recipe == "baseline":
            q, k, v = (h @ get("attn.c_attn.weight").T).split(WIDTH, -1)
        else:
            q, k, v = (h @ get(f"attn.c_{part}.weight").T for part in "qkv")
        if has_values:
            first = v if first is None else first
            other = first if tables is None else tables[layer]
            v = (1 - get("attn.lamb")) * v + get("attn.lamb") * other
        q, k, v = (part.view(3, LENGTH, HEADS, -1) for part in (q, k, v))
        if recipe != "baseline":
            q, k = turn(rms(q), sign), turn(rms(k), sign)
        y = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)), is_causal=True)
        x = x + y.transpose(1, 2).reshape(3, LENGTH, WIDTH) @ get("attn.c_proj.weight").T
        x = x + F.relu(rms(x) @ get("mlp.c_fc.weight").T).square() @ get("mlp.c_proj.weight").T
        if has_skips and layer < LAYERS // 2:
            skips.append(x)
    logits = rms(x) @ state["lm_head.weight"].T
    return 30 * torch.tanh(logits / 30) if has_values else logits


@pytest.mark.parametrize("turns_back", [True, False])
@pytest.mark.parametrize("recipe", ["baseline", "rope", "muon", "untied", "value_mix", "unet", "vte"])
def test_logits_are_those_of_the_speed_run(recipe: str, turns_back: bool) -> None:
    state = speedrun_state(recipe)
    gpt = GPT(config_of(recipe))
    gpt.load_state_dict(from_speedrun(state, gpt.config, turns_back))
    expected = speedrun_logits(state, recipe, -1.0 if turns_back else 1.0)
    torch.testing.assert_close(gpt(TOKENS), expected, rtol=1e-4, atol=1e-4)


def test_file_is_loaded_without_wrappers_and_optimizers(tmp_path: Path) -> None:
    state = speedrun_state("rope")
    checkpoint = {"step": 7, "model": {f"_orig_mod.{name}": value for name, value in state.items()}, "optimizers": [{}]}
    torch.save(checkpoint, tmp_path / "state_step000007.pt")
    gpt = GPT(config_of("rope"))
    load_speedrun(tmp_path / "state_step000007.pt", gpt)
    torch.testing.assert_close(gpt(TOKENS), speedrun_logits(state, "rope", -1.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("recipe", "trained", "message"),
    [
        ("rope", "baseline", r"got transformer.wpe.weight|got positions.weight, .* beyond them and not blocks.0"),
        ("unet", "value_mix", "got none beyond them and not skip_weights: build the model with the recipe"),
    ],
)
def test_another_recipe_is_refused(recipe: str, trained: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_speedrun(speedrun_state(trained), config_of(recipe))


def test_a_bias_is_refused_and_other_sizes_are() -> None:
    state = speedrun_state("rope")
    with pytest.raises(ValueError, match=r"got transformer.h.0.attn.c_proj.bias beyond them"):
        from_speedrun(state | {"transformer.h.0.attn.c_proj.bias": torch.zeros(WIDTH)}, config_of("rope"))
    name = "transformer.h.0.mlp.c_fc.weight"
    with pytest.raises(ValueError, match=r"blocks.0.mlp.up.weight of shape \(64, 16\), got \(16, 64\)"):
        from_speedrun(state | {name: state[name].T}, config_of("rope"))
    state["transformer.wte.weight"] = torch.zeros(VOCAB + 1, WIDTH)
    with pytest.raises(ValueError, match=r"embedding.weight of shape \(50, 16\), got \(51, 16\)"):
        from_speedrun(state, config_of("rope"))


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save([1, 2], tmp_path / "list.pt")
    gpt = GPT(config_of("rope"))
    with pytest.raises(ValueError, match=r"path must be a checkpoint of tensors, got '.*text.pt'"):
        load_speedrun(tmp_path / "text.pt", gpt)
    with pytest.raises(ValueError, match=r"path must be a checkpoint with a state dict, got '.*list.pt'"):
        load_speedrun(tmp_path / "list.pt", gpt)


class Code:
    def __reduce__(self):
        return os.mkdir, ("executed",)


BAD = {
    "code": ({"x": Code()}, "holds more than tensors and plain values, which could run code"),
    "a number for a key": ({5: torch.ones(2)}, "must hold parameters by name, got the key 5"),
    "a vector of tables": ({"transformer.vte.weight": torch.ones(3)}, r"of shape \(vocab, layers \* 32\), got \(3,\)"),
    "sparse": ({"transformer.h.0.mlp.c_fc.weight": torch.eye(4).to_sparse()}, "that is not dense"),
    "meta": ({"transformer.h.0.mlp.c_fc.weight": torch.ones(4, device="meta")}, "without data"),
    "NaN": ({"transformer.h.0.mlp.c_fc.weight": torch.full((4, 4), torch.nan)}, "with NaN or infinity"),
    "infinite": ({"transformer.h.0.mlp.c_fc.weight": torch.full((4, 4), torch.inf)}, "with NaN or infinity"),
    "complex": ({"transformer.h.0.mlp.c_fc.weight": torch.ones(4) * 1j}, "of type complex64"),
    "ints": ({"transformer.h.0.mlp.c_fc.weight": torch.ones(4, dtype=torch.int64)}, "of type int64"),
    "twice": (
        {"module.lm_head.weight": torch.ones(2), "lm_head.weight": torch.ones(2)},
        "each parameter once, got two for 'lm_head.weight'",
    ),
    "twice by two names": (
        {"emb.0.weight": torch.ones(2, 32), "transformer.vte.weight": torch.ones(2, 32)},
        r"each parameter once, got two for value_tables\.0\.weight",
    ),
    "a list": ([torch.ones(2)], "it holds something else"),
    "a text": ({"model": "x"}, "it holds something else"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_checkpoint_is_refused_in_one_line(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state, message = BAD[what]
    torch.save(state, tmp_path / "checkpoint.pt")
    gpt = GPT(GPTConfig(num_layers=1, num_heads=2, width=32, block_size=16, vocab_size=64))
    with pytest.raises(ValueError, match=message) as caught:
        load_speedrun(tmp_path / "checkpoint.pt", gpt)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_what_is_no_checkpoint_file_is_refused_in_one_line(tmp_path):
    gpt = GPT(GPTConfig(num_layers=1, num_heads=2, width=32, block_size=16, vocab_size=64))
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "text").write_text("no checkpoint")
    (tmp_path / "empty").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "grows", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(10**6))
    for name, message in {
        "pipe": "a pipe or a device",
        "missing": "or not there",
        "text": "got",
        "empty": "got",
        "grows": "would grow to 1,000,000 bytes",
        "": "a pipe or a device",
    }.items():
        with pytest.raises(ValueError, match=f"path must be a checkpoint of tensors, .*{message}") as caught:
            load_speedrun(tmp_path / name, gpt)
        assert "\n" not in str(caught.value)
        assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("arguments", [(5, None), ("x", None), ("x\0", None)])
def test_wrong_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match=r"path must be a path|gpt must be a GPT, got a NoneType"):
        load_speedrun(*arguments)
