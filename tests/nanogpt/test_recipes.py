"""Every recipe trains, builds by name and compiles to one graph; what makes no model is refused."""

import functools
import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lightning_spectral.nanogpt import GPT, RECIPES, GPTConfig, NanoGPT, next_token_loss
from lightning_spectral.nanogpt.attention import takes_flex
from lightning_spectral.nanogpt.config import recipe_switches

REDUCED = {"window": 16, "window_start": 8, "window_step": 1, "mask_block": 8, "fp8": "emulate"}


def build(recipe, **overrides):
    torch.manual_seed(0)
    switches = recipe_switches(recipe)
    reduced = {name: value for name, value in REDUCED.items() if name in switches}
    return GPT(GPTConfig.from_tier("tiny", recipe, **({"vocab_size": 64, "block_size": 32} | reduced | overrides)))


def batch():
    """Four rows of 32 tokens, in each of which the next token follows from the last; documents begin at 0s."""
    start, stride = torch.arange(4)[:, None], torch.arange(33)
    return (start * 16 + 3 * stride) % 64


@pytest.mark.parametrize("recipe", RECIPES)
def test_trains_thirty_steps(recipe):
    model, rows = build(recipe, window_warmup_tokens=2000, eos_token=0), batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    if model.config.softcap_kind == "sigmoid":  # which divides small logits by sqrt(width)
        body = [p for name, p in model.named_parameters() if name != "head.weight"]
        head = {"params": [model.head.weight], "lr": 1e-3 * model.config.width**0.5}
        optimizer = torch.optim.AdamW([{"params": body}, head], lr=1e-3, betas=(0.9, 0.95))
    losses = []
    for step in range(30):
        model.set_tokens(step * 128)
        loss = next_token_loss(model(rows[:, :-1]), rows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters()), "every parameter takes part"
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 4.1
    assert losses[-1] < 0.4 * losses[0]
    smooth = [sum(losses[i : i + 5]) for i in range(0, 30, 5)]
    assert all(later < earlier for earlier, later in itertools.pairwise(smooth))


@pytest.mark.parametrize("recipe", RECIPES)
def test_builds_by_name(recipe):
    model = NanoGPT(recipe=recipe)
    assert model.gpt.config == GPTConfig.from_tier("tiny", recipe, vocab_size=256, block_size=256)


@pytest.mark.parametrize("recipe", ["rope", "vte", "sub_lr"])
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated.*:DeprecationWarning")  # by the compiler
def test_compiles_to_one_graph_for_all_windows(recipe):
    model, rows = build(recipe, window_warmup_tokens=100), batch()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=count, fullgraph=True)
    for tokens in (0, 30, 60, 100):
        model.set_tokens(tokens)
        with torch.no_grad():
            torch.testing.assert_close(compiled(rows[:, :-1]), model(rows[:, :-1]))
    assert len(graphs) == 1


@pytest.mark.parametrize("recipe", ["value_mix", "sub_lr"])
def test_activation_checkpointing_changes_no_gradient(recipe):
    model, rows = build(recipe), batch()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        next_token_loss(model(rows[:, :-1]), rows[:, 1:]).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        for block in model.blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_switches_that_are_off_add_nothing():
    names = set(build("rope").state_dict())
    blocks = {f"blocks.{i}.{name}.weight" for i in range(4) for name in ("mlp.up", "mlp.down")}
    blocks |= {f"blocks.{i}.attention.{name}.weight" for i in range(4) for name in ("q", "k", "v", "out")}
    assert names == blocks | {"embedding.weight"}
    assert [name for name, _ in build("rope").named_buffers()] == ["rotary"]


def test_table_that_nobody_reads_does_not_exist():
    config = GPTConfig.from_tier("tiny", "rope", value_mix="layer", skip_attention=True)
    assert config.value_tables == [0, 1, None, 2]
    assert GPTConfig.from_tier("d12", "sparse_embed").value_tables == [0, 1, 2, *[None] * 6, 0, 1, 2]
    assert GPTConfig.from_tier("d12", "better_window").value_tables == [0, 1, 2, 3, 4, 5, 5, 4, 3, 2, 1, 0]
    assert GPTConfig.from_tier("d12", "vte").value_tables == list(range(12))
    assert GPTConfig.from_tier("d12", "unet").value_tables == [None] * 12


def test_flex_attention_is_refused_where_torch_lacks_it(monkeypatch):
    monkeypatch.setattr("lightning_spectral.nanogpt.config.HAS_FLEX", False)
    monkeypatch.setattr("lightning_spectral.nanogpt.attention.HAS_FLEX", False)
    wanted = r"attention must be 'auto' or 'sdpa' with torch \d.*, got 'flex', which needs torch>=2.5$"
    with pytest.raises(ValueError, match=wanted):
        GPTConfig.from_tier("d12", "flex_window", attention="flex")
    assert not takes_flex("auto", torch.device("cuda"), masked=True, head_size=64)


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"attention": "flash"}, "attention must be one of auto, flex, sdpa, got 'flash'"),
        (
            {"attention": "flex", "width": 16},
            "width / num_heads must be at least 16 for attention='flex', got 16 / 2 =",
        ),
        ({"rotary_frequencies": "some"}, "rotary_frequencies must be one of full, truncated, got 'some'"),
        (
            {"rotary_frequencies": "truncated", "positions": "learned"},
            "'truncated' must have rotary .*: take positions=",
        ),
        (
            {"rotary_frequencies": "truncated", "width": 12},
            "must be a multiple of 4 for .*'truncated', .* got 12 / 2 = 6",
        ),
        ({"attention_scale": 0.0}, "attention_scale must be positive, or None, got 0.0: take"),
        ({"softcap": -1.0}, "softcap must be positive, or None, got -1.0: take"),
        ({"softcap_kind": "relu"}, "softcap_kind must be one of tanh, sigmoid, got 'relu'"),
        ({"softcap_kind": "sigmoid"}, "softcap_kind='sigmoid' must have a bound, got softcap=None: take softcap=15"),
        ({"eos_token": -1}, "eos_token must be at least 0, got -1"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"window_start": 8}, "window_start=8 must have a window, got window=None: take window=1024"),
        ({"mask_block": 8}, "mask_block=8 must have a window, got window=None: take"),
        ({"window_pattern": "long_short"}, "window_pattern='long_short' must have a window, got window=None: take"),
        ({"window": 8, "window_start": 9}, "window_start must be at most window=8, .* got 9: take 8 or None"),
        ({"window": 8, "window_start": 4, "window_step": 0}, "window_step must be at least 1, got 0"),
        ({"window": 8, "window_start": 4, "window_warmup_tokens": 0}, "window_warmup_tokens must be at least 1, got 0"),
        ({"window": 8, "mask_block": 0}, "mask_block must be at least 1, got 0"),
        ({"window": 8, "window_pattern": "short"}, "window_pattern must be one of equal, long_short, got 'short'"),
        ({"value_mix": "all"}, "value_mix must be one of none, first, layer, mirrored, sparse, got 'all'"),
        ({"value_weights": "two"}, "value_weights='two' must have something to mix, got value_mix='none': take"),
        ({"value_mix": "first", "num_layers": 1}, "num_layers must be at least 2 for value_mix='first', got 1: take 2"),
        (
            {"value_mix": "sparse", "num_layers": 2},
            "num_layers must be at least 3 for value_mix='sparse', got 2: take 3",
        ),
        ({"unet": True, "num_layers": 1}, "num_layers must be at least 2 for unet=True, got 1: take 2 or another unet"),
        ({"skip_attention": True, "num_layers": 2}, "num_layers must be at least 3 for skip_attention=True, got 2"),
        ({"fp8": "yes"}, "fp8 must be one of off, on, emulate, got 'yes'"),
        (
            {"fp8": "on", "vocab_size": 250},
            "multiples of 16 for fp8='on', got 128 and 250: round .* take fp8='emulate'",
        ),
        ({"fp8_scales": (1.0, 0.0, 1.0)}, r"fp8_scales must be three positive factors, .* got \(1.0, 0.0, 1.0\): \(2,"),
    ],
)
def test_refuses_what_does_not_fit(switches, message):
    with pytest.raises(ValueError, match=message) as error:
        GPTConfig.from_tier("tiny", "rope", **switches)
    assert "\n" not in str(error.value)


def test_refuses_the_float8_recipe_on_a_cpu():
    model = build("fp8_head", fp8="on")
    with pytest.raises(ValueError, match=r"fp8='on' must run on a CUDA device .*, got cpu: take fp8='emulate'"):
        model(batch()[:, :-1])
