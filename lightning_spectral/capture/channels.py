"""Which axis of a layer's output holds its channels, and what a row of it is in words."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from lightning_spectral.capture.contraction import is_linear


class _Claim(NamedTuple):
    """What one module says of the output of the layer that it ends, or is a part of."""

    axis: int
    """1 or -1."""
    width: int | None
    """Its channels; None where it does not say."""
    num_axes: int | None
    """Axes of its own output; None where it takes any. An output of others was rearranged since."""


class ChannelFinder:
    """Finds the axis of a layer's channels, by one rule.

    It is the axis on which the last module with weights in the layer works: axis 1 for convolutions and batch, group
    and instance norms, the last for linear layers, layer and RMS norms, embeddings, attention and recurrent layers. Of
    an output of two axes it is the last.

    What the modules of a layer say is checked against the output, for the last to be registered need not be the last to
    run: only those count whose number of channels is the length of their axis. Where none of them fits, the last whose
    number of channels is found on one other axis only, unless there may be fewer of them on its own, as of gates, heads
    and shuffles to pixels. Modules of other kinds are asked where there is no known one: an axis that one of their
    weights has, too. A layer without weights (an activation, a pooling) is like the module registered before it. Where
    nothing speaks for another, three axes are ``(batch, position, channel)``. If two axes would do, or of four and more
    none, the layer is refused; so it is where the axis that is found is as long as the other one, and memory shows that
    both may have changed places since: channels that are last are next to each other, and those of signals, on axis 1
    of three, are not.

    Args:
        layer: The module whose output is read.
        root: The tree it is in, for a layer without weights.
    """

    def __init__(self, layer: nn.Module, root: nn.Module | None = None) -> None:
        self._claims = list(_claims(layer))
        self._shapes = [tuple(p.shape) for p in reversed(list(layer.parameters()))]
        if not self._claims and not self._shapes and root is not None:
            self._claims = _claims_before(layer, root)

    def find(self, shape: tuple[int, ...], strides: tuple[int, ...] | None = None) -> int | None:
        """The axis in an output of this shape, from 0; None if it cannot be told.

        Args:
            shape: Of the output.
            strides: Likewise, in numbers; None to go without.
        """
        axis = self._find(shape)
        return None if axis is not None and strides is not None and _may_be_turned(shape, strides, axis) else axis

    def _find(self, shape: tuple[int, ...]) -> int | None:
        last = len(shape) - 1
        if last <= 1:
            return last
        direct = [claim for claim in self._claims if claim.num_axes in (None, len(shape))]
        fitting = {claim.axis % len(shape) for claim in direct if claim.width in (None, shape[claim.axis])}
        if fitting:
            return fitting.pop() if len(fitting) == 1 else None
        for claim in self._claims:
            found = [axis for axis in range(1, len(shape)) if shape[axis] == claim.width]
            if found:
                is_clear = len(found) == 1 and found[0] in (1, last) and not _may_be_regrouped(claim, shape)
                return found[0] if is_clear else None
        if direct and (last == 2 or direct[0].axis == 1):
            # Halves of a gated unit; of more axes they could be heads.
            gated = {claim.axis % len(shape) for claim in direct if claim.width == 2 * shape[claim.axis]}
            return gated.pop() if len(gated) == 1 and len({claim.axis for claim in direct}) == 1 else None
        if self._claims:
            return None
        for weights in self._shapes:
            found = [axis for axis in (1, last) if shape[axis] in weights and shape[axis] > 1]
            if found:
                # Vectors and matrices work on the last axis by themselves; among maps somebody may have turned it.
                return found[-1] if len(found) == 1 or (last == 2 and len(weights) <= 2) else None
        return last if last == 2 else None


def _may_be_regrouped(claim: _Claim, shape: tuple[int, ...]) -> bool:
    """Whether channels may still lie on their own axis, fewer of them: halves of a gate, heads, a shuffle to pixels.

    Another axis that is as long as they are many may then be so by chance, as a sequence as long as a layer is wide.
    """
    there = shape[claim.axis]
    return claim.width is not None and 1 < there < claim.width and claim.width % there == 0


def _may_be_turned(shape: tuple[int, ...], strides: tuple[int, ...], axis: int) -> bool:
    """Whether an axis of channels is as long as the other that could be one, and is laid out as that would be."""
    last = len(shape) - 1
    if last < 2 or axis not in (1, last) or shape[1] != shape[last] or shape[1] == 1:
        return False
    # Of maps the channels on axis 1 may well be next to each other.
    return strides[last] >= strides[1] and (axis == last or last == 2)


def _claims(layer: nn.Module) -> Iterator[_Claim]:
    """Of all known modules in a layer, from the last to be registered to the first."""
    for module in reversed(list(layer.modules())):
        if (claim := _claim(module)) is not None:
            yield claim


def _claims_before(layer: nn.Module, root: nn.Module) -> list[_Claim]:
    """Of the nearest known module that is registered before a layer."""
    nearest: list[_Claim] = []
    for module in root.modules():
        if module is layer:
            return nearest
        if (claim := _claim(module)) is not None:
            nearest = [claim]
    return nearest


def _claim(module: nn.Module) -> _Claim | None:
    if isinstance(module, _ConvNd):
        return _Claim(1, module.out_channels, 2 + len(module.kernel_size))
    if isinstance(module, _NormBase):
        return _Claim(1, module.num_features, _axes_of_norm(module))
    if isinstance(module, nn.GroupNorm):
        return _Claim(1, module.num_channels, None)
    if is_linear(module):
        return _Claim(-1, getattr(module, "out_features", None) or getattr(module, "nf", None), None)
    if isinstance(module, nn.Bilinear):
        return _Claim(-1, module.out_features, None)
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        # A norm over several axes at once does not say which of them is of channels.
        return _Claim(-1, module.normalized_shape[0], None) if len(module.normalized_shape) == 1 else None
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return _Claim(-1, module.embedding_dim, None)
    if isinstance(module, nn.MultiheadAttention):
        return _Claim(-1, module.embed_dim, None)
    if isinstance(module, nn.RNNBase):
        return _Claim(-1, (module.proj_size or module.hidden_size) * (1 + module.bidirectional), None)
    return None


def _axes_of_norm(module: _NormBase) -> int | None:
    """Axes of what a batch or instance norm takes, by the digit in the name of its class; None for any."""
    kinds = (kind.__name__ for kind in type(module).__mro__)
    return next((2 + int(name[-2]) for name in kinds if name[-2:] in ("1d", "2d", "3d")), None)


def check_channel_dim(channel_dim: int, layer: str, shape: tuple[int, ...]) -> int:
    """The axis from 0 that a user means; ValueError where the output has none of it."""
    if not -len(shape) <= channel_dim < len(shape):
        raise ValueError(f"channel_dim must be an axis of the output {shape} of layer {layer!r}, got {channel_dim}")
    return channel_dim % len(shape)


def unknown_axis(layer: str, shape: tuple[int, ...]) -> str:
    """Why a layer is refused whose channels are on no axis for sure."""
    axes = f"channel_dim=1 (rows of {shape[1]} channels) or channel_dim=-1 (of {shape[-1]})"
    return f"channel_dim must say which axis of the output {shape} of layer {layer!r} holds its channels: give {axes}"


def describe_rows(output: Tensor, axis: int) -> str:
    """What a row of an output is, in words: ``"positions of a 64-channel map"`` for example."""
    width = output.shape[axis]
    if output.ndim == 2:
        return f"one of {width} channels a sample"
    if axis == output.ndim - 1 and output.ndim == 3:
        return f"positions of a sequence, {width} channels"
    return f"positions of a {width}-channel map"


def rows_last(output: Tensor, axis: int) -> Tensor:
    """An output with its channels last, a view ``(..., C)``."""
    return output if axis == output.ndim - 1 else output.movedim(axis, -1)
