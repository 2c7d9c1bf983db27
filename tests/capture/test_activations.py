"""Hooks that read every kind of output, compiled or not, and are gone without a trace."""

import copy
import gc
import pickle
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from lightning_spectral.capture import ActivationReader
from lightning_spectral.capture.activations import hidden_states
from tests.models import Network


@dataclass
class Output:
    index: Tensor
    states: Tensor


HIDDEN = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "output",
    [
        pytest.param(HIDDEN, id="tensor"),
        pytest.param((HIDDEN, HIDDEN + 1), id="tuple"),
        pytest.param([None, (HIDDEN,)], id="nested"),
        pytest.param({"loss": torch.tensor(1.0), "x": HIDDEN}, id="dict after a scalar"),
        pytest.param(Output(torch.zeros(2, 3, dtype=torch.long), HIDDEN), id="dataclass after indices"),
        pytest.param(BaseModelOutput(last_hidden_state=HIDDEN), id="ModelOutput"),
    ],
)
def test_hidden_states_are_the_first_rows_in_an_output(output) -> None:
    assert hidden_states(output) is HIDDEN


@pytest.mark.parametrize(
    "output", [None, "text", torch.tensor(1.0), torch.zeros(2, 3, dtype=torch.long), [[]]], ids=str
)
def test_output_without_rows_is_empty(output) -> None:
    assert hidden_states(output).shape == (0, 0)


class Seen:
    """A reader of all blocks of a network, and what it handed on."""

    def __init__(self, network: Network) -> None:
        self.rows: list[tuple[str, Tensor]] = []
        self.reader = ActivationReader(lambda name, output: self.rows.append((name, output.clone())))
        for i, block in enumerate(network.blocks):
            self.reader.add(f"blocks.{i}", block)


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return Network(width=8, num_blocks=3)


TOKENS = torch.arange(12).view(2, 6)


def plain_outputs(network: Network) -> list[tuple[str, Tensor]]:
    """What a hook of three lines sees."""
    rows: list[tuple[str, Tensor]] = []
    handles = [
        block.register_forward_hook(lambda _, __, output, i=i: rows.append((f"blocks.{i}", output.detach().clone())))
        for i, block in enumerate(network.blocks)
    ]
    network(TOKENS)
    for handle in handles:
        handle.remove()
    return rows


def assert_equal(found: list[tuple[str, Tensor]], expected: list[tuple[str, Tensor]]) -> None:
    assert [name for name, _ in found] == [name for name, _ in expected]
    for (_, mine), (_, theirs) in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_open_reader_hands_on_what_a_plain_hook_sees(network: Network) -> None:
    expected = plain_outputs(network)
    seen = Seen(network)
    network(TOKENS)
    assert seen.rows == []
    seen.reader.is_open = True
    network(TOKENS)
    assert_equal(seen.rows, expected)
    assert not any(rows.requires_grad for _, rows in seen.rows)
    seen.reader.is_open = False
    network(TOKENS)
    assert len(seen.rows) == 3


def test_removed_hooks_are_gone(network: Network) -> None:
    before = [{key: copy.copy(value) for key, value in vars(module).items()} for module in network.modules()]
    seen = Seen(network)
    seen.reader.is_open = True
    seen.reader.remove()
    assert [dict(vars(module)) for module in network.modules()] == before
    network(TOKENS)
    assert seen.rows == []


def test_collected_reader_leaves_harmless_hooks(network: Network) -> None:
    seen = Seen(network)
    expected = network(TOKENS)
    rows, reader_id = seen.rows, seen.reader.id
    seen.reader.is_open = True
    del seen
    gc.collect()
    assert torch.equal(network(TOKENS), expected)
    assert rows == []
    assert ActivationReader(lambda name, output: None).id != reader_id


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copy_of_a_hooked_module_runs_and_is_not_read(network: Network, duplicate) -> None:
    seen = Seen(network)
    seen.reader.is_open = True
    double = duplicate(network)
    assert torch.equal(double(TOKENS), network(TOKENS))
    assert len(seen.rows) == 3


def compile_blocks_in_place(network: Network) -> nn.Module:
    for block in network.blocks:
        block.compile(backend="aot_eager")
    return network


def wrap_blocks(network: Network) -> nn.Module:
    network.blocks = nn.ModuleList(torch.compile(block, backend="aot_eager") for block in network.blocks)
    return network


def compile_whole(network: Network) -> nn.Module:
    return torch.compile(network, backend="aot_eager")


COMPILED = [
    pytest.param(compile_blocks_in_place, id="blocks in place"),
    pytest.param(wrap_blocks, id="wrapped blocks"),
    pytest.param(compile_whole, id="whole model"),
]

# Both come from inside torch.compile, which asks for no such warnings; pytest's "error" overrides that.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*attribute of a Tensor that is not a leaf.*"),
    pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def num_graphs() -> int:
    return torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)


def run(model: nn.Module) -> list[Tensor]:
    """Gradients of a training step, for it is the backward pass that could be changed unnoticed."""
    model.zero_grad()
    model(TOKENS).logsumexp(-1).sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("compile_network", COMPILED)
def test_compiled_layers_are_read_at_no_extra_graph(network: Network, compile_network) -> None:
    bare = compile_network(copy.deepcopy(network))
    expected_gradients = run(bare)
    graphs_without = num_graphs()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    expected = plain_outputs(network)
    model = compile_network(network)
    seen = Seen(network)
    for is_open in (False, True, False, True):
        seen.reader.is_open = is_open
        with torch._dynamo.config.patch(error_on_recompile=num_graphs() > 0):
            gradients = run(model)
        for mine, theirs in zip(gradients, expected_gradients, strict=True):
            assert torch.equal(mine, theirs)
    assert_equal(seen.rows, expected * 2)
    assert num_graphs() == graphs_without


def test_compiled_layers_are_read_in_inference_mode(network: Network) -> None:
    expected = plain_outputs(network)
    model = compile_whole(network)
    seen = Seen(network)
    seen.reader.is_open = True
    with torch.inference_mode():
        model(TOKENS)
    assert_equal(seen.rows, expected)


def test_fullgraph_is_possible(network: Network) -> None:
    seen = Seen(network)
    seen.reader.is_open = True
    torch.compile(network, backend="aot_eager", fullgraph=True)(TOKENS)
    assert len(seen.rows) == 3


def test_inductor_keeps_the_hooks() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2)))
    x = torch.randn(3, 4)
    rows: list[Tensor] = []
    reader = ActivationReader(lambda name, output: rows.append(output.clone()))
    for i, block in enumerate(network):
        reader.add(str(i), block)
    reader.is_open = True
    with torch.no_grad():
        torch.compile(network)(x)
    assert num_graphs() == 1
    reader.remove()
    torch.testing.assert_close(rows, [network[0](x), network(x)], check_layout=False)


def test_a_consumer_that_raises_never_reaches_the_forward_pass() -> None:
    failures = []

    def consume(name: str, output: torch.Tensor) -> None:
        raise RuntimeError("no memory\nfor anything")

    layer = torch.nn.Linear(3, 3)
    reader = ActivationReader(consume, lambda name, reason: failures.append((name, reason)))
    reader.add("layer", layer)
    reader.is_open = True
    layer(torch.zeros(2, 3))
    assert failures == [("layer", "no memory")]


def test_a_layer_can_be_watched_instead_of_another() -> None:
    seen = []
    reader = ActivationReader(lambda name, output: seen.append((name, output.shape[-1])))
    layers = [torch.nn.Linear(3, width) for width in (4, 5)]
    for layer in layers:
        reader.add("layer", layer)
    reader.is_open = True
    for layer in layers:
        layer(torch.zeros(2, 3))
    assert seen == [("layer", 5)]
    assert reader.watches("layer", layers[1])
    reader.drop("layer")
    assert not any(layer._forward_hooks for layer in layers)
