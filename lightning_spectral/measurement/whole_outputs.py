"""Outputs of layers that several ranks hold in shards, brought together before anything is read off them."""

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from lightning_spectral.metrics.layout import Layout, Shard, is_distributed

UNLIKE = (
    "its output differs between the ranks that hold the same data, and is no shard that can be told for sure: let it "
    "return a DTensor (use_local_output=False), or watch another layer"
)

UNLIKE_INPUTS = (
    "its input differs between the ranks that hold the same data: give them the same batches, and begin with the same "
    "weights"
)


class WholeOutputs:
    """What one process would see of each output, under tensor and sequence parallelism.

    A DTensor says what it is. Of a plain tensor there is this to go by, in this order:

    - The layer's own weight is sharded over output features, and the output is as wide as the rank's part: a shard of
      features, if replicas were given the same.
    - All replicas hold the same, in the first output of each report: it is whole.
    - The layer's own weight is sharded, and the output is shorter than the input in one axis: a shard of that.
    - The lengths of the second axis, over replicas, add up to one that tensors of the batch have there: a shard of the
      sequence.

    Anything else is refused. All replicas decide alike, for each decision hangs on numbers that all know.

    Args:
        layout: Which ranks are replicas.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._are_alike: dict[str, bool] = {}

    def forget(self) -> None:
        """Compare replicas again."""
        self._are_alike.clear()

    def of(
        self, name: str, layer: nn.Module, output: Tensor, inputs: tuple[Any, ...], lengths: Collection[int]
    ) -> Tensor:
        """The output of a layer as a plain tensor that is whole; a collective of replicas.

        Args:
            name: Of the layer.
            layer: Itself.
            output: What it returned on this rank.
            inputs: What it was given, as far as that is known.
            lengths: Of the second axes of tensors of the batch.

        Raises:
            ValueError: If it cannot be told for sure what of the whole it is.
        """
        layout = self._layout
        if is_distributed(output):
            return layout.whole(output)  # type: ignore[arg-type]
        if not layout.has_replicas or output.ndim < 2:
            return output
        weight = getattr(layer, "weight", None)
        shard = layout.shard_of(weight)
        if shard is not None and _is_of_features(layer, shard) and output.shape[-1] == shard.size != shard.length:
            if inputs and isinstance(inputs[0], Tensor) and not self._is_alike(f"input of {name}", inputs[0]):
                raise ValueError(UNLIKE_INPUTS)
            return layout.gathered(output, -1, shard.length)
        if self._is_alike(name, output):
            return output
        total = layout.total(output.shape[1], output.device)
        if is_distributed(weight) and inputs and isinstance(inputs[0], Tensor):
            whole = inputs[0].shape[: output.ndim - 1]
            if output.ndim == 3 and tuple(whole) == (output.shape[0], total):
                return layout.gathered(output, 1, total)
        if output.ndim == 3 and total in lengths:
            return layout.gathered(output, 1, total)
        raise ValueError(UNLIKE)

    def _is_alike(self, what: str, tensor: Tensor) -> bool:
        """Whether replicas hold the same, as the first time in a report has shown."""
        if what not in self._are_alike:
            local = tensor.to_local() if is_distributed(tensor) else tensor  # type: ignore[attr-defined]
            self._are_alike[what] = self._layout.alike(local)
        return self._are_alike[what]


def _is_of_features(layer: nn.Module, shard: Shard) -> bool:
    """Whether a weight that is sharded so gives shards of the layer's output features."""
    if isinstance(layer, nn.Linear):
        return shard.axis == 0
    return isinstance(layer, nn.Embedding) and shard.axis == 1
