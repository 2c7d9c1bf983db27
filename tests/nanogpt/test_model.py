"""The GPT against its float64 twin, and what its design promises."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_spectral.capture.layers import resolve_layers
from lightning_spectral.nanogpt import GPT, RECIPES, TIERS, GPTConfig, next_token_loss
from lightning_spectral.nanogpt.model import _rotary_table, _rotate, recipe_switches

# tests are imported by path (importlib mode), so that a neighbour is not a module
_spec = importlib.util.spec_from_file_location("nanogpt_reference", Path(__file__).with_name("_reference.py"))
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

SMALL = {"vocab_size": 11, "block_size": 9, "num_layers": 4, "num_heads": 2, "width": 16, "eos_token": 5}
REDUCED = {"window": 5, "window_start": 3, "mask_block": 2, "fp8": "emulate"}


def small(recipe):
    """The switches of a recipe at sizes at which the smallest model shows them."""
    switches = recipe_switches(recipe)
    return switches | {name: value for name, value in REDUCED.items() if name in switches}


ROPE = recipe_switches("rope")
ALONE = {
    "untied": {"tied_head": False},
    "embedding_norm": {"embedding_norm": True},
    "first_values": {"value_mix": "first"},
    "first_values_free": {"value_mix": "first", "value_weights": "two"},
    "first_values_fused": {"value_mix": "first", "fused_qkv": True},
    "tables": {"value_mix": "layer"},
    "mirrored_tables": {"value_mix": "mirrored", "num_layers": 5},
    "sparse_tables": {"value_mix": "sparse", "num_layers": 5},
    "x0_mix": {"x0_mix": True},
    "unet": {"unet": True},
    "unet_odd": {"unet": True, "num_layers": 5},
    "no_attention": {"skip_attention": True},
    "no_attention_odd": {"skip_attention": True, "num_layers": 5},
    "documents": {"document_mask": True},
    "window": {"window": 3},
    "growing_window": {"window": 7, "window_start": 2},
    "block_window": {"window": 3, "mask_block": 2},
    "long_short": {"window": 4, "window_pattern": "long_short", "num_layers": 5},
    "long_short_blocks": {"window": 6, "window_pattern": "long_short", "mask_block": 2},
    "truncated": {"rotary_frequencies": "truncated", "num_heads": 1},
    "tanh": {"softcap": 3.0},
    "sigmoid": {"softcap": 3.0, "softcap_kind": "sigmoid"},
    "fp8": {"fp8": "emulate", "tied_head": False},
    "fp8_tied": {"fp8": "emulate"},
    "scale": {"attention_scale": 0.12},
}
VARIANTS = [
    *(pytest.param(small(name), id=name) for name in RECIPES),
    pytest.param({"positions": "learned", "qk_norm": True, "fused_qkv": False}, id="learned_qk_norm"),
    pytest.param({"positions": "rotary", "rotary_base": 100.0, "fused_qkv": True}, id="rotary_fused"),
    *(pytest.param(ROPE | switches, id=f"rope_{name}") for name, switches in ALONE.items()),
]


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def build(recipe="rope", randomize=True, **overrides):
    torch.manual_seed(0)
    model = GPT(GPTConfig.from_tier("tiny", recipe, **(SMALL | small(recipe) | overrides)))
    if randomize:  # else the zero projections hide everything between embedding and head
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    return model


def tokens(batch=3, length=9, vocab_size=11):
    """Random tokens, where documents begin at positions 2 and 6 of the first row and at 4 of the second."""
    input_ids = torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))
    input_ids[input_ids == 5] = 4
    for row, place in ((0, 2), (0, 6), (1, 4)):
        input_ids[row : row + 1, place : place + 1] = 5
    return input_ids


def expected_logits(model, input_ids):
    weights = {name: w.double().numpy() for name, w in model.state_dict().items()}
    window = None if model.window is None else model.window.item()
    return np.stack([reference.gpt(row, weights, model.config, window) for row in input_ids.tolist()])


@pytest.mark.parametrize("switches", VARIANTS)
def test_equals_float64_twin(float64, switches):
    model, input_ids = build(**switches), tokens()
    expected = expected_logits(model, input_ids)
    np.testing.assert_allclose(model(input_ids).detach().numpy(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("switches", VARIANTS)
def test_float32_is_near_the_twin(switches):
    if "fp8" in switches:
        switches = switches | {"fp8": "off"}  # there, the last bit of float32 can decide the rounding
    model, input_ids = build(**switches), tokens()
    expected = expected_logits(model, input_ids)
    np.testing.assert_allclose(model(input_ids).detach().numpy(), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ALONE)
def test_each_switch_does_something_alone(name):
    sizes = {key: value for key, value in ALONE[name].items() if key in ("num_layers", "num_heads")}
    off, on = build(**sizes), build(**ALONE[name])
    shared = {key: value for key, value in off.state_dict().items() if key in on.state_dict()}
    on.load_state_dict(shared, strict=False)
    assert (on(tokens()) - off(tokens())).abs().max() > 1e-3


@pytest.mark.parametrize("recipe", RECIPES)
def test_logits_do_not_depend_on_later_tokens(recipe):
    model, input_ids = build(recipe), tokens()
    before = model(input_ids)
    input_ids[:, 5] = (input_ids[:, 5] + 1) % 11
    after = model(input_ids)
    torch.testing.assert_close(after[:, :5], before[:, :5], rtol=0, atol=0)
    assert ((after[:, 5] - before[:, 5]).abs().amax(dim=1) > 1e-3).all()
    if not model.config.document_mask:
        assert ((after[:, 5:] - before[:, 5:]).abs().amax(dim=(0, 2)) > 1e-3).all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_shorter_sequences_are_prefixes(recipe):
    model, input_ids = build(recipe), tokens()
    torch.testing.assert_close(model(input_ids[:, :4]), model(input_ids)[:, :4])


@pytest.mark.parametrize("recipe", RECIPES)
def test_blocks_start_as_the_identity(recipe):
    model, input_ids = build(recipe, randomize=False), tokens()
    streams = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, args, output: streams.append((args[0], output)))
    logits = model(input_ids)
    assert len(streams) == 4
    for x, y in streams:
        assert torch.equal(x, y)
    if not model.config.tied_head:
        assert torch.equal(logits, torch.full_like(logits, 15 if model.config.softcap_kind == "sigmoid" else 0))
        return
    x = model.embedding(input_ids) + (model.positions.weight if recipe == "baseline" else 0)
    x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(logits, x @ model.embedding.weight.T)


def test_first_loss_is_nearly_that_of_a_uniform_guess():
    model = build("rope", randomize=False, vocab_size=256, width=128)
    labels = torch.randint(256, (3, 9))
    assert next_token_loss(model(tokens(vocab_size=256)), labels).item() == pytest.approx(math.log(256), abs=0.3)


def test_head_is_the_embedding():
    model = build()
    assert not any("head" in name for name in model.state_dict())
    zeros = torch.zeros(1, 4, dtype=torch.long)
    next_token_loss(model(zeros), zeros).backward()
    gradient = model.embedding.weight.grad.abs().sum(dim=1)
    assert (gradient[1:] > 0).all(), "tokens that are not put in get the head's gradient"


def hand_count(tier, recipe):
    """Parameters by hand, vocabulary 50304 and sequences of 1024."""
    layers, width = TIERS[tier]["num_layers"], TIERS[tier]["width"]
    since = {name: list(RECIPES).index(recipe) >= i for i, name in enumerate(RECIPES)}
    table = 50304 * width
    count = 12 * layers * width**2 + table
    if recipe == "baseline":
        count += 1024 * width
    if since["untied"]:
        count += table
    if since["value_mix"]:
        count += 2 * layers  # x0
    if since["unet"]:
        count += layers // 2
    if since["sparse_embed"]:
        num_tables = 1 if tier == "tiny" else 3
        count += num_tables * table + 2 * 2 * num_tables - 4 * width**2
    elif since["better_window"]:
        count += layers // 2 * table + layers
    elif since["vte"]:
        count += layers * table + layers
    elif since["value_mix"]:
        count += layers - 1  # the first layer's values are not mixed with themselves
    return count


def on_meta(tier, recipe):
    with torch.device("meta"):
        return GPT(GPTConfig.from_tier(tier, recipe, vocab_size=50304, block_size=1024))


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_number_of_parameters(tier, recipe):
    assert sum(p.numel() for p in on_meta(tier, recipe).parameters()) == hand_count(tier, recipe)


def test_d12_tables_have_464_million_parameters():
    model = on_meta("d12", "vte")
    assert sum(p.numel() for p in model.value_tables.parameters()) == 12 * 50304 * 768 == 463_601_664
    assert sum(p.numel() for p in model.parameters()) == 625_803_306


@pytest.mark.parametrize("recipe", ["baseline", "sub_lr"])
@pytest.mark.parametrize(("tier", "probed"), [("d36", [0, 9, 18, 26, 35]), ("d48", [0, 12, 24, 35, 47])])
def test_probed_layers(tier, recipe, probed):
    assert list(resolve_layers(on_meta(tier, recipe), None)) == [f"blocks.{i}" for i in probed]


@pytest.mark.parametrize(("tier", "layer"), [("d12", 7), ("d36", 19), ("d48", 25)])
def test_layer_without_attention(tier, layer):
    blocks = on_meta(tier, "sparse_embed").blocks
    assert [i for i, block in enumerate(blocks) if block.attention is None] == [layer]


def test_d12_baseline_is_gpt2_small():
    config = GPTConfig.from_tier("d12")
    assert config == GPTConfig(num_layers=12, num_heads=6, width=768, vocab_size=50304, block_size=1024)
    assert config.head_size == 128


def test_recipes_accumulate():
    assert recipe_switches("rope") == RECIPES["baseline"] | RECIPES["rope"]
    assert GPTConfig.from_tier("tiny", "rope", qk_norm=False).positions == "rotary"


def test_same_seed_same_weights():
    first, second = build("rope", randomize=False), build("rope", randomize=False)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_rotation_keeps_norms_and_depends_on_distance_only(float64):
    table = _rotary_table(GPTConfig(width=16, num_heads=1, block_size=40, positions="rotary"))
    q, k = torch.randn(2, 16, generator=torch.Generator().manual_seed(2))
    turned_q, turned_k = (_rotate(x.expand(40, 16), table) for x in (q, k))
    torch.testing.assert_close(turned_q.norm(dim=1), q.norm().expand(40))
    products = turned_q @ turned_k.T
    for distance in (0, 1, 7):
        diagonal = products.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand(len(diagonal)))
    assert (products[0, 0] - products[7, 0]).abs() > 1e-2


def test_loss_ignores_masked_labels():
    logits, labels = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    labels[0, :3] = -100
    rows = [-logits[b, t].log_softmax(0)[labels[b, t]] for b in range(2) for t in range(5) if labels[b, t] >= 0]
    torch.testing.assert_close(next_token_loss(logits, labels), torch.stack(rows).mean())
    assert next_token_loss(logits, torch.full((2, 5), -100)) == 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_per_sample_gradients_under_vmap(recipe):
    model, input_ids = build(recipe), tokens()
    parameters = dict(model.named_parameters())

    def loss(parameters, row):
        return next_token_loss(functional_call(model, parameters, (row[None, :-1],)), row[None, 1:])

    with sdpa_kernel(SDPBackend.MATH):
        vectorized = vmap(grad(loss), in_dims=(None, 0))(parameters, input_ids)
        loop = [grad(loss)(parameters, row) for row in input_ids]
    for name in parameters:
        torch.testing.assert_close(vectorized[name], torch.stack([one[name] for one in loop]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("recipe", RECIPES)
def test_bfloat16_autocast_stays_close(recipe):
    model, input_ids = build(recipe), tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids)
    assert (logits.float() - model(input_ids)).norm() < 0.05 * model(input_ids).norm()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tier": "d13"}, "tier must be one of tiny, d12, d24, d36, d48, got 'd13'"),
        ({"recipe": "rop"}, "recipe must be one of baseline, rope, .*, sub_lr, got 'rop'"),
        ({"num_heads": 3}, "width must be a multiple of num_heads=3, got 128: take 126"),
        ({"num_heads": 200}, "width must be a multiple of num_heads=200, got 128: take 200"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"positions": "alibi"}, "positions must be one of learned, rotary, got 'alibi'"),
        ({"positions": "rotary", "width": 6}, "width / num_heads must be even .* got 6 / 2 = 3"),
        ({"rotary_base": 1.0}, "rotary_base must be above 1, got 1.0"),
        ({"depth": 3}, "overrides must be fields of GPTConfig .*num_layers.*, got 'depth'"),
    ],
)
def test_refuses_what_makes_no_model(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        GPTConfig.from_tier(**({"tier": "tiny"} | arguments))
    assert "\n" not in str(error.value)


def test_refuses_sequences_beyond_the_block():
    with pytest.raises(ValueError, match="input_ids must have at most block_size=9 tokens a row, got 10"):
        build()(tokens(length=10))
