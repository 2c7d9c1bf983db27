"""The axis of a layer's channels, for layers as people build them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_spectral.capture.channels import (
    ChannelFinder,
    check_channel_dim,
    describe_rows,
    rows_last,
    unknown_axis,
)


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Excited(Residual):
    """Squeeze and excitation: a linear layer is registered last."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.gate = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x * self.gate(x.mean((2, 3))).sigmoid()[:, :, None, None]


class Turned(nn.Module):
    """As in ConvNeXt: linear layers see channels last, the output has them first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise, self.out = nn.Conv2d(width, width, 3, padding=1, groups=width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.depthwise(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Gated(nn.Module):
    """The weights of the gate are registered after those of the output."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.gate = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x) * self.gate(x))


class OwnNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


class Patches(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, width, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.cut(x).flatten(2).transpose(1, 2)


def first_of(layer: nn.Module, *shape: int) -> Callable[[], tuple[nn.Module, tuple[int, ...]]]:
    def output() -> tuple[nn.Module, tuple[int, ...]]:
        found = layer(torch.randn(shape))
        return layer, tuple((found[0] if isinstance(found, tuple) else found).shape)

    return output


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def gated(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.GLU())


def shuffled(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 1), nn.PixelShuffle(2))


def heads(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.Unflatten(-1, (2, width // 2)))


@pytest.mark.parametrize(
    ("made", "axis"),
    [
        pytest.param(first_of(nn.Conv2d(3, 6, 3), 2, 3, 8, 8), 1, id="conv"),
        pytest.param(first_of(nn.Conv2d(3, 6, 3), 2, 3, 8, 8), 1, id="as wide as channels"),
        pytest.param(first_of(nn.Conv1d(3, 6, 3), 2, 3, 8), 1, id="conv over 6 positions of 6 channels"),
        pytest.param(first_of(nn.ConvTranspose2d(3, 6, 2, 2), 2, 3, 4, 4), 1, id="transposed"),
        pytest.param(first_of(nn.Conv3d(3, 6, 1), 2, 3, 4, 5, 6), 1, id="volume"),
        pytest.param(first_of(nn.BatchNorm1d(5), 2, 5, 5), 1, id="batch norm"),
        pytest.param(first_of(nn.GroupNorm(2, 6), 2, 6, 6, 6), 1, id="group norm"),
        pytest.param(first_of(nn.InstanceNorm2d(6), 2, 6, 6, 6), 1, id="instance norm"),
        pytest.param(first_of(nn.Linear(3, 8), 2, 8, 3), 2, id="linear, as many positions as channels"),
        pytest.param(first_of(nn.LayerNorm(8), 2, 8, 8), 2, id="layer norm"),
        pytest.param(first_of(nn.RMSNorm(8), 2, 4, 4, 8), 3, id="rms norm over maps with channels last"),
        pytest.param(first_of(nn.LSTM(4, 5, bidirectional=True), 7, 2, 4), 2, id="recurrent"),
        pytest.param(first_of(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, 8, 8), 2, id="transformer"),
        pytest.param(first_of(Residual(6), 2, 6, 6, 6), 1, id="residual"),
        pytest.param(first_of(nn.Sequential(Residual(6), nn.MaxPool2d(2)), 2, 6, 8, 8), 1, id="container"),
        pytest.param(first_of(Excited(6), 2, 6, 8, 8), 1, id="squeeze and excitation"),
        pytest.param(first_of(Excited(8), 2, 8, 8, 8), None, id="squeeze and excitation, as wide as channels"),
        pytest.param(first_of(Turned(6), 2, 6, 8, 8), 1, id="channels turned back"),
        pytest.param(first_of(Turned(8), 2, 8, 8, 8), None, id="channels turned back, as wide"),
        pytest.param(first_of(Gated(8), 2, 8, 8), 2, id="gate registered last"),
        pytest.param(first_of(nn.Sequential(nn.Linear(8, 8), nn.GLU()), 2, 4, 8), 2, id="gated halves"),
        pytest.param(first_of(nn.Sequential(nn.Conv1d(8, 8, 1), nn.GLU(1)), 2, 8, 6), 1, id="gated halves of a conv"),
        pytest.param(first_of(Patches(8), 2, 3, 4, 6), 2, id="patches"),
        pytest.param(first_of(OwnNorm(8), 2, 8, 8), 2, id="own norm"),
        pytest.param(first_of(nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten()), 2, 3, 4, 4), 1, id="two axes"),
        pytest.param(first_of(nn.Sequential(nn.Linear(4, 12), nn.Unflatten(-1, (2, 6))), 2, 5, 4), None, id="heads"),
        # What lies on the axis of channels by a coincidence of lengths is refused, and read at other lengths.
        pytest.param(first_of(gated(16), 2, 12, 4), 2, id="gated halves, of 12 positions"),
        pytest.param(first_of(gated(16), 2, 16, 4), None, id="gated halves, of as many positions as channels"),
        pytest.param(first_of(nn.Sequential(nn.Conv1d(4, 8, 1), nn.GLU(1)), 2, 4, 8), None, id="and of a conv"),
        pytest.param(first_of(shuffled(16), 2, 3, 8, 8), None, id="pixels shuffled, as long"),
        pytest.param(first_of(shuffled(16), 2, 3, 6, 8), None, id="pixels shuffled, as wide"),
        pytest.param(first_of(heads(8), 2, 8, 8), None, id="heads, of as many positions as channels"),
        pytest.param(first_of(nn.Sequential(nn.Linear(4, 9), Transposed()), 2, 5, 4), 1, id="transposed at the end"),
        pytest.param(first_of(nn.Identity(), 2, 5, 4), 2, id="nothing known, three axes"),
        pytest.param(first_of(nn.Identity(), 2, 5, 4, 4), None, id="nothing known, four axes"),
    ],
)
def test_channels_are_where_the_layers_last_weights_work(made, axis: int | None) -> None:
    torch.manual_seed(0)
    layer, shape = made()
    assert ChannelFinder(layer).find(shape) == axis


def test_a_layer_without_weights_is_like_the_one_before_it() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 5, 1), nn.ReLU(), nn.Flatten())
    assert ChannelFinder(model[3], model).find((3, 5, 2, 2)) == 1
    words = nn.Sequential(nn.Conv1d(3, 6, 1), nn.Linear(6, 6), nn.Dropout())
    assert ChannelFinder(words[2], words).find((2, 6, 6)) == 2


@pytest.mark.parametrize(("axis", "found"), [(1, 1), (-1, 3), (-3, 1), (0, 0)])
def test_an_axis_that_is_said_counts_from_either_end(axis: int, found: int) -> None:
    assert check_channel_dim(axis, "net", (2, 6, 8, 8)) == found


def test_refusals_name_argument_layer_shape_and_remedy() -> None:
    with pytest.raises(ValueError, match=r"^channel_dim must be an axis of the output \(2, 6\) of layer 'net', got 2$"):
        check_channel_dim(2, "net", (2, 6))
    assert unknown_axis("net", (2, 6, 8, 9)) == (
        "channel_dim must say which axis of the output (2, 6, 8, 9) of layer 'net' holds its channels: give "
        "channel_dim=1 (rows of 6 channels) or channel_dim=-1 (of 9)"
    )


def test_rows_are_said_in_words_and_have_channels_last() -> None:
    output = torch.arange(48).view(2, 3, 2, 4)
    assert torch.equal(rows_last(output, 1), output.permute(0, 2, 3, 1))
    assert rows_last(output, 3) is output
    assert describe_rows(output, 1) == "positions of a 3-channel map"
    assert describe_rows(output[0], 2) == "positions of a sequence, 4 channels"
    assert describe_rows(output[0, 0], 1) == "one of 4 channels a sample"


class Turned(nn.Module):
    """A layer between two transposes."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.transpose(1, 2)).tanh().transpose(1, 2)


@pytest.mark.parametrize(
    ("layer", "length", "axis"),
    [
        (nn.Linear(6, 6), 6, 2),
        (nn.Conv1d(6, 6, 3, padding=1), 6, 1),
        (Turned(nn.Linear(6, 6)), 6, None),
        (Turned(nn.Conv1d(6, 6, 3, padding=1)), 6, None),
        (Turned(nn.Linear(6, 6)), 9, 1),
        (Turned(nn.Conv1d(6, 6, 3, padding=1)), 9, 2),
    ],
)
def test_a_turned_output_of_as_many_positions_as_channels_is_seen_in_memory(
    layer: nn.Module, length: int, axis: int | None
) -> None:
    has_channels_last = isinstance(layer, nn.Linear) or isinstance(getattr(layer, "layer", None), nn.Conv1d)
    output = layer(torch.randn(4, length, 6) if has_channels_last else torch.randn(4, 6, length))
    assert ChannelFinder(layer).find(tuple(output.shape), output.stride()) == axis


def test_maps_may_be_laid_out_with_their_channels_last() -> None:
    layer = nn.Conv2d(6, 6, 1).to(memory_format=torch.channels_last)
    output = layer(torch.randn(2, 6, 6, 6).to(memory_format=torch.channels_last))
    assert output.stride(1) == 1
    assert ChannelFinder(layer).find(tuple(output.shape), output.stride()) == 1
