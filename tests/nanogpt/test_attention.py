"""Documents, windows, and the two ways of applying masks."""

import math

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from lightning_spectral.nanogpt import GPT, RECIPES, GPTConfig
from lightning_spectral.nanogpt.attention import attend, block_mask, dense_mask, document_ids, takes_flex
from lightning_spectral.nanogpt.config import recipe_switches

SMALL = {"vocab_size": 32, "block_size": 24, "num_layers": 4, "num_heads": 2, "width": 32, "eos_token": 5}
REDUCED = {"window": 6, "window_start": 4, "mask_block": 4, "fp8": "emulate"}
MASKED = list(RECIPES)[list(RECIPES).index("fixed_window") :]
CPU = torch.device("cpu")


def build(recipe="rope", **overrides):
    torch.manual_seed(0)
    switches = recipe_switches(recipe)
    reduced = {name: value for name, value in REDUCED.items() if name in switches}
    model = GPT(GPTConfig.from_tier("tiny", recipe, **(SMALL | reduced | overrides)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def packed():
    """One row of 24 tokens with documents at 0..6, 7..15 and 16..23, and one that is a single document."""
    input_ids = torch.randint(6, 32, (2, 24), generator=torch.Generator().manual_seed(1))
    input_ids[0, [7, 16]] = 5
    return input_ids


def changed(model, input_ids, places):
    """Which positions' logits change when the tokens at some places do."""
    other = input_ids.clone()
    other[:, places] = 6 + (other[:, places] - 5) % 26
    return ((model(other) - model(input_ids)).abs().amax(dim=2) > 0).tolist()


def test_documents_begin_at_the_eos_token():
    row = torch.tensor([[5, 1, 2, 5, 5, 3], [1, 2, 3, 4, 6, 5]])
    assert document_ids(row, 5).tolist() == [[1, 1, 1, 2, 3, 3], [0, 0, 0, 0, 0, 1]]


@pytest.mark.parametrize("recipe", MASKED)
def test_masks_never_cross_documents(recipe):
    # no float8: all else being equal, it too keeps tokens apart, but rounds small changes away
    model, input_ids = build(recipe, window=24, window_start=None, fp8="off"), packed()
    first = changed(model, input_ids, [3, 4])
    assert first[0] == [False] * 3 + [True] * 4 + [False] * 17, "the other documents do not change, this one does"
    assert first[1] == [False] * 3 + [True] * 21, "where there is one document everything later does"
    middle = changed(model, input_ids, [8])
    assert middle[0] == [False] * 8 + [True] * 8 + [False] * 8
    unmasked = build(recipe, window=24, window_start=None, fp8="off", document_mask=False)
    assert changed(unmasked, input_ids, [3, 4])[0] == [False] * 3 + [True] * 21


def test_gradients_do_not_cross_documents():
    model, input_ids = build("fixed_window", window=24), packed()
    x0 = []
    model.embedding.register_forward_hook(lambda module, args, output: x0.append(output) or output.retain_grad())
    model(input_ids)[0, 12].sum().backward()
    reached = x0[0].grad[0].abs().amax(dim=1) > 0
    assert reached.tolist() == [False] * 7 + [True] * 6 + [False] * 11


@pytest.mark.parametrize("window", [1, 3, 24, 1000])
def test_window_of_one_layer(window):
    model, input_ids = build("rope", num_layers=1, window=window), packed()
    expected = [4 <= place < 4 + window for place in range(24)]
    assert changed(model, input_ids, [4]) == [expected, expected]


def test_windows_add_up_over_layers():
    model, input_ids = build("rope", num_layers=3, window=4), packed()
    expected = [4 <= place <= 4 + 3 * 3 for place in range(24)]
    assert changed(model, input_ids, [4]) == [expected, expected]


def test_block_window_of_one_layer():
    model, input_ids = build("rope", num_layers=1, window=7, mask_block=4), packed()
    expected = [5 <= place < 12 for place in range(24)]  # the block 4..7 and the next
    assert changed(model, input_ids, [5]) == [expected, expected]


@pytest.mark.parametrize(
    ("num_layers", "long"),
    [(12, [0, 4, 7, 11]), (4, [0, 3]), (9, [0, 4, 8]), (36, [0, 4, 8, 12, 16, 19, 23, 27, 31, 35])],
)
def test_long_windows_are_mirrored(num_layers, long):
    config = GPTConfig.from_tier("d12", "long_short", num_layers=num_layers)
    assert [layer for layer in range(num_layers) if not config.has_short_window(layer)] == long


def test_window_schedule():
    model = build("flex_window", window=1792, window_start=64, window_warmup_tokens=1_728_000)
    steps = {0: 64, 63_999: 64, 64_000: 128, 864_000: 896, 1_727_999: 1728, 1_728_000: 1792, 10**12: 1792}
    for tokens, window in steps.items():
        model.set_tokens(tokens)
        assert model.window.item() == model.config.window_at(tokens) == window
    model.set_tokens(0)
    assert model.window.item() == 64, "a run that starts again starts small"
    windows = [model.config.window_at(tokens) for tokens in range(0, 1_800_000, 10_000)]
    assert windows == sorted(windows)


def test_window_that_is_no_multiple_of_the_step_is_reached():
    config = GPTConfig.from_tier("tiny", "flex_window", window=100, window_start=30, window_step=50)
    assert [config.window_at(round(x * 9e8)) for x in (0, 0.7, 0.75, 0.99, 1)] == [30, 30, 80, 80, 100]


def test_growing_window_changes_what_is_seen():
    model = build("rope", num_layers=1, window=8, window_start=2, window_step=1, window_warmup_tokens=600)
    input_ids = packed()
    for tokens, window in ((0, 2), (100, 3), (600, 8)):
        model.set_tokens(tokens)
        assert changed(model, input_ids, [4])[0] == [4 <= place < 4 + window for place in range(24)]


def test_set_tokens_without_a_growing_window():
    for model in (build("rope"), build("fixed_window")):
        before = dict(model.named_buffers())
        model.set_tokens(10**9)
        assert all(torch.equal(before[name], value) for name, value in model.named_buffers())


def test_window_is_not_in_the_checkpoint():
    assert not any("window" in name or "mask" in name for name in build("flex_window").state_dict())


@pytest.mark.parametrize("recipe", ["rope", *MASKED])
def test_flex_and_sdpa_agree(recipe):
    sdpa, flex = (build(recipe, attention=attention) for attention in ("sdpa", "flex"))
    with torch.no_grad():
        torch.testing.assert_close(flex(packed()), sdpa(packed()), rtol=1e-5, atol=1e-5)


def documents_of(num_tokens):
    starts = torch.rand(3, num_tokens, generator=torch.Generator().manual_seed(num_tokens)) < 0.04
    return starts.cumsum(dim=1)


@pytest.mark.parametrize("num_tokens", [64, 61, 7])
@pytest.mark.parametrize("with_documents", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("window", [None, 1, 9, 24, 25, 1000])
def test_blocks_and_booleans_are_the_same_mask(monkeypatch, num_tokens, with_documents, window):
    monkeypatch.setattr("lightning_spectral.nanogpt.attention.FLEX_BLOCK", 8)
    documents = documents_of(num_tokens) if with_documents else None
    reach = None if window is None else torch.tensor(window)
    for mask_block in (None, 4, 8, 16) if window else (None,):
        dense = dense_mask(num_tokens, documents, reach, mask_block, CPU).expand(3, 1, num_tokens, num_tokens)
        blocks = block_mask(num_tokens, documents, reach, mask_block, CPU)
        padded = torch.zeros(3, math.ceil(num_tokens / 8) * 8, math.ceil(num_tokens / 8) * 8, dtype=torch.bool)
        padded[:, :num_tokens, :num_tokens] = dense[:, 0]
        tiles = padded.unflatten(2, (-1, 8)).unflatten(1, (-1, 8)).transpose(2, 3)  # (3, n, n, 8, 8)
        for row in range(3):
            source = row if with_documents else 0
            for query in range(tiles.size(1)):
                partial, whole = (
                    set(indices[source, 0, query, : int(count[source, 0, query])].tolist())
                    for count, indices in (
                        (blocks.kv_num_blocks, blocks.kv_indices),
                        (blocks.full_kv_num_blocks, blocks.full_kv_indices),
                    )
                )
                assert not partial & whole
                seen = {key for key in range(tiles.size(1)) if tiles[row, query, key].any()}
                assert seen == partial | whole, "no block is looked at in vain, none is left out"
                short = {query} if num_tokens % 8 else set()  # rows of the last block that do not exist
                full = {key for key in range(tiles.size(1)) if tiles[row, query, key].all()}
                assert full - short <= whole
                inside = tiles[row, query, sorted(whole)][:, : num_tokens - 8 * query]
                assert inside.all(), "a block seen in whole is seen in whole"


def test_rule_inside_blocks_is_the_boolean_mask():
    documents, window = documents_of(40), torch.tensor(11)
    for mask_block in (None, 8):
        rule = block_mask(40, documents, window, mask_block, CPU).mask_mod
        batch, query, key = torch.meshgrid(torch.arange(3), torch.arange(40), torch.arange(40), indexing="ij")
        assert torch.equal(rule(batch, 0, query, key), dense_mask(40, documents, window, mask_block, CPU)[:, 0])


def test_flex_is_refused_in_training_on_a_cpu():
    with pytest.raises(ValueError, match=r"attention='flex' must run on CUDA to be trained, got cpu, .* take") as error:
        build("fixed_window", attention="flex")(packed())
    assert "\n" not in str(error.value)


def test_automatic_choice_on_a_cpu_is_sdpa():
    model, input_ids = build("long_short"), packed()
    model(input_ids).sum().backward()
    assert torch.equal(model(input_ids), build("long_short", attention="sdpa")(input_ids))


def test_fresh_masks_need_no_fresh_kernel():
    q = torch.randn(2, 2, 300, 16, generator=torch.Generator().manual_seed(0))
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, backend=count, dynamic=False)
    for seed, window in enumerate((64, 128, 90, 300)):
        documents = documents_of(300)[:2].roll(seed, dims=1).cummax(dim=1).values
        masks = [make(300, documents, torch.tensor(window), 128, CPU) for make in (dense_mask, block_mask)]
        expected, actual = attend(q, q, q, masks[0], None), compiled(q, q, q, block_mask=masks[1])
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("attention", "device", "masked", "head_size", "flex"),
    [
        ("auto", "cuda", True, 64, True),
        ("auto", "cuda", True, 8, False),
        ("auto", "cuda", False, 64, False),
        ("auto", "cpu", True, 64, False),
        ("auto", "mps", True, 64, False),
        ("flex", "cpu", False, 64, True),
        ("sdpa", "cuda", True, 64, False),
    ],
)
def test_choice_of_backend(attention, device, masked, head_size, flex):
    assert takes_flex(attention, torch.device(device), masked, head_size) == flex


@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")
def test_compiled_flex_skips_what_is_masked():
    """The kernel that reads the tables of blocks, not only the rule, gives SDPA's numbers."""
    q, k, v = torch.randn(3, 2, 2, 300, 16, generator=torch.Generator().manual_seed(0))
    documents, window = documents_of(300)[:2], torch.tensor(90)
    expected = attend(q, k, v, dense_mask(300, documents, window, None, CPU), 0.3)
    compiled = torch.compile(flex_attention, dynamic=False)
    actual = compiled(q, k, v, block_mask=block_mask(300, documents, window, None, CPU), scale=0.3)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
