"""Choosing parameters: the attention output projections of model families, patterns, and what is said of mistakes."""

import pytest
import torch
from torch import nn

from lightning_spectral.capture import resolve_parameters
from lightning_spectral.nanogpt import NanoGPT
from tests.models import Network, Perceptron


def transformers_model(family: str) -> nn.Module:
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    name = {"bert": "Bert", "llama": "Llama", "gpt_neox": "GPTNeoX"}.get(family)
    if name is not None:
        config = getattr(transformers, f"{name}Config")(vocab_size=30, **sizes)
        return getattr(transformers, f"{name}Model")(config)
    return transformers.GPT2Model(transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=30))


FAMILIES = {
    "nanogpt": (lambda: NanoGPT(), [f"gpt.blocks.{i}.attention.out.weight" for i in range(4)]),
    "gpt2": (lambda: transformers_model("gpt2"), [f"h.{i}.attn.c_proj.weight" for i in range(2)]),
    "bert": (
        lambda: transformers_model("bert"),
        [f"encoder.layer.{i}.attention.output.dense.weight" for i in range(2)],
    ),
    "llama": (lambda: transformers_model("llama"), [f"layers.{i}.self_attn.o_proj.weight" for i in range(2)]),
    "gpt_neox": (lambda: transformers_model("gpt_neox"), [f"layers.{i}.attention.dense.weight" for i in range(2)]),
    "torch": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 2, enable_nested_tensor=False),
        [f"layers.{i}.self_attn.out_proj.weight" for i in range(2)],
    ),
    "no attention": (Network, [f"blocks.{i}.mlp.2.weight" for i in (0, 1, 2, 4, 5)]),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_default_is_the_output_projection_of_the_probed_blocks(family: str) -> None:
    make, expected = FAMILIES[family]
    model = make()
    found = resolve_parameters(model, None)
    assert list(found) == expected
    for name, parameter in found.items():
        assert parameter is model.get_parameter(name)


def test_wrappers_leave_no_trace_in_names() -> None:
    model = nn.Module()
    model.inner = torch.compile(Network(), backend="eager")
    assert list(resolve_parameters(model, "inner.blocks.[01].mix.bias")) == [
        f"inner.blocks.{index}.mix.bias" for index in (0, 1)
    ]


def test_all_are_the_trained_ones_once() -> None:
    model = Network()
    model.logits.weight = nn.Parameter(torch.zeros(40, 32))
    model.embedding.weight = model.logits.weight
    model.logits.bias.requires_grad_(False)
    found = resolve_parameters(model, "all")
    assert "embedding.weight" in found
    assert not {"logits.weight", "logits.bias"} & set(found)
    with pytest.raises(ValueError, match=r"parameters='logits\.bias' matches no trained parameter, only "):
        resolve_parameters(model, "logits.bias")
    # By pattern a tied parameter answers to each of its names, and is one parameter still.
    assert list(resolve_parameters(model, "logits.weight")) == ["logits.weight"]
    assert list(resolve_parameters(model, ["logits.weight", "embedding.weight"])) == ["embedding.weight"]


class Adapter(nn.Module):
    """A frozen linear layer with two trained matrices of low rank beside it, as LoRA has them."""

    def __init__(self, frozen: nn.Linear) -> None:
        super().__init__()
        self.weight = frozen.weight
        self.down, self.up = nn.Linear(32, 2, bias=False), nn.Linear(2, 32, bias=False)


def adapted() -> nn.Module:
    model = Network().requires_grad_(False)
    for block in model.blocks:
        block.mix = Adapter(block.mix)
    return model


def test_default_beside_frozen_weights_is_the_last_matrix_of_an_adapter() -> None:
    assert list(resolve_parameters(adapted(), None)) == [f"blocks.{i}.mix.up.weight" for i in (0, 1, 2, 4, 5)]


@pytest.mark.parametrize(
    ("model", "parameters", "message"),
    [
        (
            Network(),
            "blocks.*.mixx.weight",
            r"parameters='blocks.\*.mixx.weight' matches no parameter: did you mean 'blocks.\d.mix.weight', ",
        ),
        (Network(), [], r"parameters must name at least one, got \[\]: use None for the default, or 'all'"),
        (Perceptron(), None, r"got None, for there is no stack of equal blocks in Perceptron: take for example "),
        (nn.ReLU(), "all", "parameters must be trained, and ReLU has none with requires_grad=True"),
        (
            Network().requires_grad_(False),
            None,
            "for blocks.0 has no trained linear layer: take for example parameters=",
        ),
        (
            nn.Sequential(*(nn.Sequential(nn.BatchNorm1d(3), nn.Conv1d(3, 3, 1)) for _ in range(2))),
            None,
            r"for 0 has no trained linear layer: take for example parameters='0\.1\.weight'",
        ),
        (
            adapted(),
            ["*.up.weight", "blocks.*.mix.weight"],
            r"='blocks.\*.mix.weight' matches no trained parameter, only such as 'blocks.0.mix.weight' with "
            r"requires_grad=False: did you mean 'blocks.\d.mix.up.weight', ",
        ),
    ],
    ids=["pattern", "empty", "no stack", "nothing", "frozen", "convolutions", "frozen pattern"],
)
def test_mistakes_get_one_line(model: nn.Module, parameters, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        resolve_parameters(model, parameters)
    assert "\n" not in str(caught.value)


def test_patterns_may_be_several_and_keep_the_order_of_the_model() -> None:
    found = resolve_parameters(Network(), ["logits.*", "blocks.[05].mix.weight"])
    assert list(found) == ["blocks.0.mix.weight", "blocks.5.mix.weight", "logits.weight", "logits.bias"]


def test_default_passes_over_frozen_projections() -> None:
    model = Network()
    for block in model.blocks:
        block.mlp[2].weight.requires_grad_(False)
    assert list(resolve_parameters(model, None)) == [f"blocks.{i}.mlp.0.weight" for i in (0, 1, 2, 4, 5)]
