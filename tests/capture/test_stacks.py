"""What default layers are in models of many makes: mixed blocks, lists that never run, stages, towers, LSTMs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_spectral import ActivationSpectrum
from lightning_spectral.capture import resolve_layers
from lightning_spectral.capture.stacks import find_stacks
from tests.models import Block, tiny_trainer

WIDTH = 16


class Attention(Block):
    """Any other class of blocks."""


class Parts(nn.Module):
    """Modules in lists and attributes, which are called one after the other."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.children():
            for layer in part if isinstance(part, nn.ModuleList) else [part]:
                x = layer(x)
        return x


def blocks(count: int, width: int = WIDTH, kind: type[nn.Module] = Block) -> nn.ModuleList:
    return nn.ModuleList(kind(width) for _ in range(count))


class Convolutions(nn.Module):
    """A residual block of images, which halves them and widens."""

    def __init__(self, inside: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, out, 3, 1 + (out > inside), 1)
        self.norm = nn.BatchNorm2d(out)
        self.skip = nn.Sequential(nn.Conv2d(inside, out, 1, 1 + (out > inside)), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)) + self.skip(x))


class ResNet(nn.Module):
    """Stages as attributes, as in torchvision."""

    def __init__(self, depths: tuple[int, ...] = (2, 2, 2, 2)) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        for stage, depth in enumerate(depths):
            inside, out = 8 * 2 ** max(stage - 1, 0), 8 * 2**stage
            made = [Convolutions(inside if index == 0 else out, out) for index in range(depth)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*made))
        self.depth = len(depths)
        self.fc = nn.Linear(out, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for stage in range(self.depth):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return self.fc(x.mean((2, 3)))


def test_a_resnet_s_stages_are_one_stack() -> None:
    names = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    assert list(resolve_layers(ResNet(), "all")) == names
    assert list(resolve_layers(ResNet(), None)) == [names[i] for i in (0, 2, 4, 5, 7)]
    # A stage of a single block belongs to them, too.
    uneven = list(resolve_layers(ResNet((1, 2, 1)), "all"))
    assert uneven == ["layer1.0", "layer2.0", "layer2.1", "layer3.0"]


@pytest.mark.parametrize(
    ("kinds", "found"),
    [
        ("MMMAMMM", range(7)),  # attention among state-space layers
        ("AMAM", range(4)),
        ("MAMA", range(4)),
        ("AAMMMA", range(6)),
    ],
)
def test_blocks_of_several_classes_in_one_list_are_one_stack(kinds: str, found: range) -> None:
    layers = nn.ModuleList(Attention(WIDTH) if kind == "A" else Block(WIDTH) for kind in kinds)
    model = Parts(stem=nn.Linear(WIDTH, WIDTH), layers=layers)
    assert list(resolve_layers(model, "all")) == [f"layers.{i}" for i in found]


def test_what_stands_before_and_after_a_stack_is_none_of_it() -> None:
    stem, head = (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(2))
    assert list(resolve_layers(nn.Sequential(stem, *blocks(3), head), "all")) == ["1", "2", "3"]
    model = Parts(stem=stem, layers=blocks(3), heads=nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 2)) for _ in "ab"))
    assert list(resolve_layers(model, "all")) == [f"layers.{i}" for i in range(3)]
    attributes = Parts(stem=stem, first=Block(WIDTH), second=Block(WIDTH), head=head)
    assert list(resolve_layers(attributes, "all")) == ["first", "second"]


class FeedForward(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.ff = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.ff(x)


class Mixing(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.to_out(x.cumsum(1)), None


class Residual(nn.Module):
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return x + residual


class AttentionLayers(nn.Module):
    """Lists of norms, block and residual, whose forward takes them out one by one, as in x-transformers."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        parts = [kind for _ in range(depth) for kind in (Mixing, FeedForward)]
        norms = (nn.ModuleList([nn.LayerNorm(WIDTH)]) for _ in parts)
        self.layers = nn.ModuleList(
            nn.ModuleList([norm, kind(), Residual()]) for norm, kind in zip(norms, parts, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        for (norm,), block, residual in self.layers:
            out = block(norm(x))
            x = residual(out[0] if isinstance(out, tuple) else out, x)
        return x


def test_lists_that_never_run_give_their_place_to_what_is_in_them() -> None:
    assert list(resolve_layers(AttentionLayers(3), "all")) == [f"layers.{i}.1" for i in range(6)]


class Down(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([Convolutions(8, 8), Convolutions(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        return x


class CrossDown(Down):
    """With the same parts."""


class Up(Down): ...


class Mid(Down): ...


def unets() -> dict[str, tuple[nn.Module, list[str]]]:
    """Models, and their layers: as in diffusers, CompVis's, and the first of all."""
    lists = {"down_blocks": nn.ModuleList([CrossDown(), CrossDown(), Down()]), "up_blocks": nn.ModuleList([Up(), Up()])}
    listed = Parts(conv_in=nn.Conv2d(8, 8, 1), **lists, mid_block=Mid())
    names = [f"down_blocks.{i}" for i in range(3)] + ["mid_block", "up_blocks.0", "up_blocks.1"]

    def level() -> nn.Module:
        holder = nn.Module()
        holder.block = nn.ModuleList([Convolutions(8, 8), Convolutions(8, 8)])
        return holder

    middle = nn.Module()
    middle.block_1, middle.block_2 = Convolutions(8, 8), Convolutions(8, 8)
    parts = Parts(down=nn.ModuleList([level(), level()]), mid=middle, up=nn.ModuleList([level(), level()]))
    levels = [f"{side}.{i}.block.{j}" for side in ("down", "up") for i in (0, 1) for j in (0, 1)]
    inner = [*levels[:4], "mid.block_1", "mid.block_2", *levels[4:]]

    def double() -> nn.Module:
        return Convolutions(8, 8)

    plain = Parts(inc=double(), down1=CrossDown(), down2=CrossDown(), up1=Up(), up2=Up(), outc=nn.Conv2d(8, 3, 1))
    for part in ("down1", "down2", "up1", "up2"):
        plain.get_submodule(part).resnets = nn.Sequential(double())
    return {
        "lists": (listed, names),
        "holders": (parts, inner),
        "attributes": (plain, ["down1", "down2", "up1", "up2"]),
    }


@pytest.mark.parametrize("kind", unets())
def test_the_way_down_the_middle_and_the_way_up_are_all_there(kind: str) -> None:
    model, names = unets()[kind]
    assert list(resolve_layers(model, "all")) == names


def tower(count: int = 3, kind: type[nn.Module] = Block) -> Parts:
    return Parts(layers=blocks(count, kind=kind))


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: Parts(encoder=tower(7), decoder=tower(6, Attention)), {"encoder.layers": 7, "decoder.layers": 6}),
        (lambda: Parts(decoder=tower(2, Attention), encoder=tower(9)), {"encoder.layers": 9, "decoder.layers": 2}),
        (lambda: Parts(encoder=blocks(3), decoder=blocks(3)), {"encoder": 3, "decoder": 3}),
        (lambda: Parts(text_model=tower(2), vision_model=tower(3)), {"text_model.layers": 2, "vision_model.layers": 3}),
        (lambda: Parts(blocks=blocks(4), decoder_blocks=blocks(2)), {"blocks": 4, "decoder_blocks": 2}),
        # What only looks like a tower: a teacher, an average of weights, another's frozen encoder.
        (lambda: Parts(student=tower(3), teacher=tower(3)), {"student.layers": 3}),
        (lambda: Parts(teacher=tower(6).requires_grad_(False), student=tower(3)), {"student.layers": 3}),
        (lambda: Parts(teacher=tower(6).requires_grad_(False)), {"teacher.layers": 6}),
        (lambda: Parts(decoder=tower(4), encoder=tower(3).requires_grad_(False)), {"decoder.layers": 4}),
        (lambda: Parts(net=tower(3), average=torch.optim.swa_utils.AveragedModel(tower(3))), {"net.layers": 3}),
    ],
)
def test_towers_of_one_model_are_all_taken(make: Callable[[], nn.Module], found: dict[str, int]) -> None:
    stacks = find_stacks(make())
    assert [list(stack) for stack in stacks] == [[f"{name}.{i}" for i in range(n)] for name, n in found.items()]


def test_each_tower_has_its_five_blocks() -> None:
    model = Parts(encoder=tower(12), decoder=tower(12, Attention))
    probes = [0, 3, 6, 8, 11]
    assert list(resolve_layers(model, None)) == [
        f"{side}.layers.{i}" for side in ("encoder", "decoder") for i in probes
    ]


class Recurrent(nn.Module):
    """A list of LSTMs, which return tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.LSTM(WIDTH, WIDTH, batch_first=True) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)[0]
        return x


def transformers_model(kind: str) -> nn.Module:
    """The real thing, tiny."""
    import transformers

    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    sizes: dict[str, Any] = {"vocab_size": 20, "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 5}
    both = {"d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    both |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 20}
    configs = {
        "Jamba": sizes
        | heads
        | {"num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 4, "attn_layer_period": 4, "attn_layer_offset": 2}
        | {"use_mamba_kernels": False},  # an older transformers would insist on them
        "T5": {"d_model": WIDTH, "d_kv": 4, "d_ff": 32, "num_layers": 3, "num_heads": 2, "vocab_size": 20},
        "Bart": both | {"decoder_start_token_id": 0},
        "ResNet": {"hidden_sizes": [8, 16, 32], "depths": [1, 2, 1], "embedding_size": 8, "layer_type": "basic"},
    }
    # As a model is made: without the head.
    return getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**configs[kind]))


FAMILIES: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "Jamba": (lambda: transformers_model("Jamba"), [f"layers.{i}" for i in range(5)]),
    "T5": (
        lambda: transformers_model("T5"),
        [f"{side}.block.{i}" for side in ("encoder", "decoder") for i in range(3)],
    ),
    "BART": (
        lambda: transformers_model("Bart"),
        ["encoder.layers.0", "encoder.layers.1", *(f"decoder.layers.{i}" for i in range(3))],
    ),
    "ResNet": (lambda: transformers_model("ResNet"), [f"encoder.stages.{i}" for i in range(3)]),
    "LSTMs": (Recurrent, [f"layers.{i}" for i in range(3)]),
    "lists in a list": (lambda: AttentionLayers(2), [f"layers.{i}.1" for i in range(4)]),
    "torchvision's ResNet": (lambda: ResNet((1, 2, 1)), ["layer1.0", "layer2.0", "layer2.1", "layer3.0"]),
    "U-Net": (lambda: unets()["lists"][0], unets()["lists"][1]),
}


class Whatever(LightningModule):
    """Trains whatever it is given on noise."""

    def __init__(self, family: str) -> None:
        super().__init__()
        self.family = family
        self.net = FAMILIES[family][0]()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        has_towers = self.family in ("T5", "BART")
        out = self.net(input_ids=batch, decoder_input_ids=batch) if has_towers else self.net(batch)
        return (out if isinstance(out, Tensor) else out.last_hidden_state).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_default_layer_of_a_model_that_trains_has_a_spectrum(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    if family in ("Jamba", "T5", "BART"):
        data = torch.randint(3, 20, (16, 12))
    else:
        shapes = {"ResNet": (3, 64, 64), "torchvision's ResNet": (3, 16, 16), "U-Net": (8, 8, 8)}
        data = torch.randn(16, *shapes.get(family, (12, WIDTH)))
    callback = ActivationSpectrum(every_n_steps=2, num_tokens=10**4, head=(1, 4), tail=(2, 6))
    trainer = tiny_trainer(tmp_path, max_steps=2, callbacks=[callback])
    trainer.fit(Whatever(family), DataLoader(data, 8))
    names = [f"net.{name}" for name in FAMILIES[family][1]]
    assert [key for key in trainer.callback_metrics if key.endswith("/alpha_tail")] == [
        f"activation/{name}/alpha_tail" for name in names
    ]
    assert trainer.callback_metrics["activation/failed"] == 0
    assert all(trainer.callback_metrics[f"activation/{name}/alpha_tail"].isfinite() for name in names)


class Distilled(nn.Module):
    """A network and its teacher, plain attributes of one class; layers of the network may be frozen."""

    def __init__(self, num_frozen: int) -> None:
        super().__init__()
        self.online, self.target = (nn.Sequential(*blocks(3)) for _ in range(2))
        self.target.requires_grad_(False)
        for block in list(self.online)[:num_frozen]:
            block.requires_grad_(False)


@pytest.mark.parametrize("num_frozen", [0, 2])
def test_a_frozen_network_beside_the_trained_one_is_no_depth_of_it(num_frozen: int) -> None:
    (stack,) = find_stacks(Distilled(num_frozen))
    assert list(stack) == [f"online.{index}" for index in range(3)]


class Networks(nn.Module):
    """Two networks that are no stacks themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.online, self.target = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(2))


def test_networks_beside_each_other_are_a_stack_only_if_both_are_trained() -> None:
    model = Networks()
    assert [list(stack) for stack in find_stacks(model)] == [["online", "target"]]
    model.target.requires_grad_(False)
    assert find_stacks(model) == []
