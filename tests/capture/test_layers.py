"""Which layers a choice means: the stack of equal blocks in models of many makes, patterns, and what is refused."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_spectral.capture import clean_name, resolve_layers
from lightning_spectral.capture.layers import check_one_mask, find_blocks, towers_spanned
from tests.capture.test_stacks import WIDTH, Parts, blocks, transformers_model, unets
from tests.models import Block, LanguageModel, Network, Perceptron


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


@pytest.mark.parametrize(
    ("num_blocks", "probes"),
    [
        (12, [0, 3, 6, 8, 11]),
        (36, [0, 9, 18, 26, 35]),
        (48, [0, 12, 24, 35, 47]),
        (6, [0, 1, 2, 4, 5]),
        (3, [0, 1, 2]),
        (2, [0, 1]),
    ],
)
def test_default_takes_blocks_spread_over_the_stack(num_blocks: int, probes: list[int]) -> None:
    network = Network(width=4, num_blocks=num_blocks)
    assert list(resolve_layers(network, None)) == [f"blocks.{i}" for i in probes]
    assert resolve_layers(network, None)[f"blocks.{probes[1]}"] is network.blocks[probes[1]]


def test_all_takes_every_block() -> None:
    module = LanguageModel()
    assert list(resolve_layers(module, "all").values()) == list(module.network.blocks)


def test_stack_may_be_attributes_or_hide_in_a_larger_tree() -> None:
    plain = nn.Module()
    for i in range(3):
        plain.add_module(f"h{i}", Block(4))
    assert list(find_blocks(plain)) == ["h0", "h1", "h2"]
    tree = nn.ModuleDict({"small": Network(4, 2), "large": nn.ModuleDict({"net": Network(8, 4)})})
    assert list(find_blocks(tree)) == [f"large.net.blocks.{i}" for i in range(4)]


def tiny_transformer(kind: str) -> nn.Module:
    import transformers

    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=4, n_head=2, vocab_size=20))
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    if kind == "bert":
        return transformers.BertModel(transformers.BertConfig(vocab_size=20, **sizes))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=20, num_key_value_heads=2, **sizes))


@pytest.mark.parametrize(
    ("kind", "stack", "num_blocks"),
    [
        ("gpt2", "transformer.h", 4),
        ("llama", "model.layers", 3),
        ("bert", "encoder.layer", 3),
    ],
)
def test_stack_of_transformers_is_found(kind: str, stack: str, num_blocks: int) -> None:
    assert list(find_blocks(tiny_transformer(kind))) == [f"{stack}.{i}" for i in range(num_blocks)]


def wrap_blocks(network: Network, wrapper) -> Network:
    network.blocks = nn.ModuleList(wrapper(block) for block in network.blocks)
    return network


def compile_in_place(network: Network) -> Network:
    for block in network.blocks:
        block.compile(backend="eager")
    return network


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(nn.DataParallel, id="data parallel"),
        pytest.param(compiled, id="compiled model"),
        pytest.param(lambda network: wrap_blocks(network, compiled), id="compiled blocks"),
        pytest.param(compile_in_place, id="blocks compiled in place"),
        pytest.param(lambda network: wrap_blocks(network, checkpoint_wrapper), id="checkpoint_wrapper"),
        pytest.param(
            lambda network: nn.DataParallel(
                compiled(wrap_blocks(network, lambda block: compiled(checkpoint_wrapper(block))))
            ),
            id="all at once",
        ),
    ],
)
@pytest.mark.parametrize("layers", [None, "all", "blocks.*", ["blocks.2", "blocks.[013]"]], ids=str)
def test_wrappers_leave_no_trace_in_names(wrap, layers) -> None:
    network = Network(width=4, num_blocks=4)
    wrapped = wrap(network)
    found = resolve_layers(wrapped, layers)
    assert list(found) == [f"blocks.{i}" for i in range(4)]
    # The outermost wrapper: what is hooked there fires however the layer is called.
    assert list(found.values()) == list(network.blocks)


def test_patterns_stay_between_dots_unless_nothing_matches_so() -> None:
    module = LanguageModel(Network(4, 3))
    assert list(resolve_layers(module, "network.*")) == ["network.embedding", "network.blocks", "network.logits"]
    assert list(resolve_layers(module, "*.mlp")) == [f"network.blocks.{i}.mlp" for i in range(3)]
    assert list(resolve_layers(module, ["network.blocks.2", "network.blocks.0"])) == [
        "network.blocks.0",
        "network.blocks.2",
    ]


def test_clean_name_drops_wrappers_wherever_they_are() -> None:
    inner = nn.Sequential(checkpoint_wrapper(nn.Linear(2, 2)))
    assert clean_name(nn.DataParallel(compiled(inner)), "module._orig_mod.0._checkpoint_wrapped_module.weight") == (
        "0.weight"
    )


class Residual(nn.Module):
    """Calls its part by a name that wrappers use."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = self._orig_mod = module


def test_names_that_only_look_like_a_wrapper_s_stay() -> None:
    model = nn.Sequential(Residual(nn.Sequential(nn.Linear(2, 2))), nn.Linear(2, 2))
    assert list(resolve_layers(model, "*")) == ["0", "1"]
    assert list(resolve_layers(model, "*.*.0")) == ["0.module.0"]
    assert clean_name(model, "0._orig_mod.0.bias") == "0._orig_mod.0.bias"


def test_a_name_is_tried_as_it_stands_before_it_is_a_pattern() -> None:
    keys = ["task[0]", "task0", "task?", "task1"]
    model = nn.ModuleDict({"heads": nn.ModuleDict({key: nn.Sequential(nn.Linear(2, 2)) for key in keys})})
    assert list(resolve_layers(model, "heads.task[0]")) == ["heads.task[0]"]
    assert list(resolve_layers(model, "heads.task[0].*")) == ["heads.task[0].0"]
    assert list(resolve_layers(model, "heads.task?")) == ["heads.task?"]
    assert list(resolve_layers(model, "heads.task[01]")) == ["heads.task0", "heads.task1"]


def two_towers() -> nn.Module:
    """With what stands beside the blocks of each, and beside both."""
    encoder, decoder = (Parts(layers=blocks(3), norm=nn.LayerNorm(WIDTH)) for _ in range(2))
    return Parts(model=Parts(norm=nn.LayerNorm(WIDTH), encoder=encoder, decoder=decoder), head=nn.Linear(WIDTH, WIDTH))


BLOCKS = [["model.encoder.layers.*"], ["model.decoder.layers.*"]]


@pytest.mark.parametrize(
    ("layers", "towers"),
    [
        (None, BLOCKS),
        ("all", BLOCKS),
        ("*.*.layers.*", BLOCKS),
        (["head", "*.*.layers.*"], BLOCKS),
        ("*.*.norm", [["model.encoder.norm"], ["model.decoder.norm"]]),
        ("model.??coder", [["model.encoder"], ["model.decoder"]]),
        ("*.mlp", [["model.encoder.layers.*.mlp"], ["model.decoder.layers.*.mlp"]]),
        ("model.encoder.layers.*", []),
        ("*.encoder.*.mlp", []),
        (["model.encoder.layers.*", "model.decoder.layers.*"], []),
        (["model.encoder.layers.0", "model.decoder.layers.0"], []),
        (["model.norm", "head"], []),
        ("model", []),
    ],
    ids=str,
)
def test_a_part_of_a_choice_that_spans_towers_is_told(layers, towers) -> None:
    assert towers_spanned(two_towers(), layers) == towers


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(two_towers, id="two"),
        pytest.param(lambda: Parts(blocks=blocks(4), decoder_blocks=blocks(2)), id="one without a word"),
        *(pytest.param(lambda kind=kind: transformers_model(kind), id=kind) for kind in ("T5", "Bart")),
        *(pytest.param(lambda kind=kind: unets()[kind][0], id=kind) for kind in ("lists", "holders")),
    ],
)
def test_a_mask_for_several_towers_is_refused_until_each_is_named(make) -> None:
    model = make()
    towers = towers_spanned(model, None)
    first, every = towers[0][0], [pattern for tower in towers for pattern in tower]
    with pytest.raises(ValueError, match=r"^mask must be of all layers that it is laid over, got 'm' ") as raised:
        check_one_mask(model, None, "m")
    assert f" for layers=None, of several towers: give layers={first!r} and each" in str(raised.value)
    assert str(raised.value).endswith(f"layers={every!r}")
    assert "\n" not in str(raised.value)
    # What it says helps, and means the same blocks.
    check_one_mask(model, first, "m")
    check_one_mask(model, every, "m")
    assert set(resolve_layers(model, every)) == set(find_blocks(model))
    check_one_mask(model, None, None)


def test_a_model_of_one_tower_takes_any_mask() -> None:
    for layers in (None, "all", "*.mlp", ["network.*", "*.mlp"]):
        check_one_mask(LanguageModel(), layers, "m")
    check_one_mask(Perceptron(), "net.*", "m")


@pytest.mark.parametrize("layers", ["blocs.*", ["network.blocks.0", "blocs.*"]], ids=str)
def test_pattern_without_match_is_refused_with_close_names(layers) -> None:
    expected = r"^layers='blocs\.\*' matches no layer: did you mean 'network\.blocks\.5', 'network\.blocks\.4', .*\?$"
    with pytest.raises(ValueError, match=expected) as raised:
        resolve_layers(LanguageModel(), layers)
    assert "\n" not in str(raised.value)


def test_no_layers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^layers must name at least one layer, got \[\]"):
        resolve_layers(LanguageModel(), [])


def test_model_without_stack_is_refused_with_an_example() -> None:
    with pytest.raises(ValueError, match=r"no stack of equal blocks in Perceptron: .* layers='net\.0'$") as raised:
        resolve_layers(Perceptron(), None)
    assert "\n" not in str(raised.value)
