"""Rows of parameters of which a rank has a shard: its part of their columns, read off what its part of a layer sees."""

from collections.abc import Mapping

from torch import Tensor, nn

from lightning_spectral.capture.contraction import owners
from lightning_spectral.measurement.whole_outputs import UNLIKE_INPUTS
from lightning_spectral.metrics.layout import Layout, Shard, is_distributed

UNLIKE_GRADIENTS = UNLIKE_INPUTS.replace("its input", "the gradient of its output")


class ShardedParameters:
    """What replicas share of each parameter, and what that makes of a layer's input and of its output's gradient.

    A linear layer that is sharded over its output features has the whole input and its features of the output; one that
    is sharded over its input features has these of the input and the whole output. Either way the rank's columns of a
    sample's gradient are the contraction of what is there, and the Gram matrices of all columns add up. Gradients that
    lie in shards of the sequence are brought together first, in the backward pass, as tensor parallelism itself does.

    Args:
        layout: Which ranks are replicas.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._shards: dict[str, Shard] = {}
        self._are_alike: dict[str, bool] = {}

    def forget(self) -> None:
        """Compare replicas again."""
        self._are_alike.clear()

    def take_up(self, module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, str]:
        """Look at parameters; returns why some cannot be read, by name."""
        refused = {}
        for name, parameter in parameters.items():
            self._shards.pop(name, None)
            try:
                shard = self._layout.shard_of(parameter)
            except ValueError as error:
                refused[name] = f"method='hooks' cannot read parameter {name!r}: {error}"
                continue
            if shard is None:
                continue
            self._shards[name] = shard
            kinds = {type(owner).__name__ for owner, _ in owners(module, parameter) if not isinstance(owner, nn.Linear)}
            if kinds:
                refused[name] = (
                    f"method='hooks' reads linear layers where tensor parallelism shards them, got parameter {name!r} "
                    f"of {', '.join(sorted(kinds))}: choose other parameters"
                )
        return refused

    def __contains__(self, name: str) -> bool:
        """Whether replicas share a parameter."""
        return name in self._shards

    def numel(self, name: str, parameter: nn.Parameter) -> int:
        """Numbers of a parameter that are read on this rank."""
        shard = self._shards.get(name)
        return parameter.numel() if shard is None else parameter.numel() // shard.length * shard.size

    def local(self, name: str, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """What of a layer's input and of its output's gradient gives this rank's columns; a collective of replicas.

        Args:
            name: Of the parameter.
            x: The input, ``(B, ..., d_in)`` of the whole or of a shard.
            grad: Gradient of the output, likewise.

        Raises:
            ValueError: Where they are sharded in a way that does not.
        """
        layout, shard = self._layout, self._shards.get(name)
        if not layout.has_replicas:
            return _plain(x), _plain(grad)
        of_output, of_input = shard is not None and shard.axis == 0, shard is not None and shard.axis == 1
        x, grad = self._part(x, of_input), self._part(grad, of_output)
        if grad.ndim == x.ndim == 3 and grad.shape[1] != x.shape[1] == layout.total(grad.shape[1], grad.device):
            grad = layout.gathered(grad, 1, x.shape[1])
        if shard is None:
            return x, grad
        if name not in self._are_alike:
            self._are_alike[name] = layout.alike(x if of_output else grad)
        if not self._are_alike[name]:
            raise ValueError(UNLIKE_INPUTS if of_output else UNLIKE_GRADIENTS)
        if of_output and grad.shape[-1] == shard.length:
            grad = grad.narrow(-1, shard.start, shard.size)
        width = (grad if of_output else x).shape[-1]
        if width != shard.size or x.shape[:-1] != grad.shape[:-1]:
            raise ValueError(
                f"its layer's input {tuple(x.shape)} and output {tuple(grad.shape)} are no shards that go with the "
                f"{shard.size} of {shard.length} features that its weight has here: choose other parameters"
            )
        return x, grad

    def _part(self, tensor: Tensor, may_be_shard: bool) -> Tensor:
        """A tensor as it is for these data, but for shards of the last axis, where they may be, those of this rank."""
        if not is_distributed(tensor):
            return tensor
        shards = [one.dim % tensor.ndim for one in tensor.placements if one.is_shard()]  # type: ignore[attr-defined]
        is_shard = may_be_shard and shards == [tensor.ndim - 1]
        return _plain(tensor) if is_shard else self._layout.whole(tensor)  # type: ignore[arg-type]


def _plain(tensor: Tensor) -> Tensor:
    return tensor.to_local() if is_distributed(tensor) else tensor  # type: ignore[attr-defined]
