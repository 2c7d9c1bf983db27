"""What the graph that autograd has made of a loss shows of how the loss came about."""

from typing import Any, Literal, NamedTuple

from torch import Tensor

from lightning_spectral.capture.precision import SHORT


class Graph(NamedTuple):
    """What the graph of a loss shows."""

    leaves: list[Tensor]
    """What it leads back to."""
    is_reentrant: bool
    """Whether reentrant checkpointing, whoever's, hides a part of it: ``torch.autograd.grad`` sees no parameter in."""
    is_short: bool
    """Whether something is cast to 16 bits, as autocast does."""


REDUCTIONS: dict[int, Literal["mean", "sum"]] = {1: "mean", 2: "sum"}
"""How torch's losses call their reductions in a graph."""


def reduction_of(node: Any) -> Literal["mean", "sum"] | None:
    """How one of torch's own losses was reduced, by its node; None for any other node."""
    return REDUCTIONS.get(getattr(node, "_saved_reduction", 0))


def graph_of(value: Tensor) -> Graph:
    """Look through the graph of a loss."""
    nodes: list[Any] = [value.grad_fn]
    seen: set[Any] = set()
    leaves = [value] if value.is_leaf and value.requires_grad else []
    is_reentrant = is_short = False
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        kind = type(node).__name__
        if kind == "AccumulateGrad":
            leaves.append(node.variable)
        elif kind.startswith("CheckpointFunction"):
            is_reentrant = True
        elif kind.startswith("ToCopy"):
            made = getattr(node, "_input_metadata", None)
            # An older torch does not say to what: rather a wider tolerance than a sound loss refused.
            is_short = is_short or made is None or any(about.dtype in SHORT for about in made)
        nodes.extend(following for following, _ in node.next_functions)
    return Graph(leaves, is_reentrant, is_short)
