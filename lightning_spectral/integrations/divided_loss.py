"""What a model's loss was divided by, read off its graph: nothing else tells a mean from a share of a larger sum."""

from typing import Any

from torch import Tensor

from lightning_spectral.capture.graph import reduction_of


def own_mean_factor(loss: Tensor, total: Any, num_processes: int | None = None) -> Tensor | float | None:
    """What makes a loss the mean over its own batch, whose model was told of the targets of several batches.

    Args:
        loss: A tensor with one number, before its backward pass.
        total: How many targets the batches of a step have together: a tensor with one number, or a number.
        num_processes: What it was multiplied with afterwards, if it was; None if it was not.

    Returns:
        1 where the loss is one of torch's, reduced to its mean; the total over the batch's own targets where it is a
        sum of cross-entropies divided by the total; None for anything else, of which it is not known.
    """
    node: Any = loss.grad_fn
    times = 1
    if num_processes is not None and multiplier_of(node) == num_processes:
        node, times = node.next_functions[0][0], num_processes
    factor = _factor(node, total)
    return None if factor is None else factor / times


def multiplier_of(node: Any) -> float | None:
    """The number that a node multiplies a loss with; None for any other node."""
    if node is None or node.name() != "MulBackward0":
        return None
    (first, _), (other, _) = node.next_functions
    number = node._saved_other
    return float(number) if first is not None and other is None and number.numel() == 1 else None


def _factor(node: Any, total: Any) -> Tensor | float | None:
    if reduction_of(node) == "mean":
        return 1.0
    if node is None or node.name() != "DivBackward0" or not _is(node._saved_other, total):
        return None
    node = node.next_functions[0][0]
    if reduction_of(node) != "sum" or not hasattr(node, "_saved_ignore_index"):
        return None
    if node._saved_weight is not None:
        return None
    # Graphs show it without its sign.
    ignored = (node._saved_ignore_index + 2**63) % 2**64 - 2**63
    own = node._saved_target.ne(ignored).sum().clamp(min=1)
    return (total.to(own.device) if isinstance(total, Tensor) else total) / own


def _is(found: Tensor | None, total: Any) -> bool:
    """Whether a graph's divisor is the total: by its memory, so that a GPU need not be waited for, or by its value."""
    if found is None or found.numel() != 1:
        return False
    if isinstance(total, Tensor) and found.device.type != "cpu":
        return found.device == total.device and found.data_ptr() == total.data_ptr()
    return float(found) == float(total)
