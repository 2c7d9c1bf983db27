"""What a batch says of itself, for the kinds of batches that data loaders yield."""

from collections import UserDict, namedtuple
from dataclasses import dataclass
from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_spectral.capture import num_samples, token_mask
from lightning_spectral.capture.batch import hold, num_tokens, take, tensors

X = torch.zeros(3, 5, dtype=torch.long)
Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Batch:
    name: str
    tokens: Tensor
    mask: Tensor | None = None


class Split(Enum):
    TRAIN = 1


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        pytest.param({"ids": X, "y": X[:1]}, 3, id="dict"),
        pytest.param({"time_first": X.T, "input_ids": X}, 3, id="input_ids before others"),
        pytest.param(UserDict(ids=X), 3, id="mapping"),
        pytest.param((X, X[0]), 3, id="tuple"),
        pytest.param([[X], X[0]], 3, id="nested list"),
        pytest.param(Pair(X, X[0]), 3, id="namedtuple"),
        pytest.param(X, 3, id="tensor"),
        pytest.param(Batch("a", X), 3, id="dataclass"),
        pytest.param({"temperature": torch.tensor(1.0), "text": ["a", "b"], "x": X}, 3, id="scalars and strings first"),
        pytest.param({"split": Split.TRAIN, "x": X}, 3, id="enum"),
        pytest.param({"split": Split.TRAIN, "x": 7}, None, id="no tensor"),
        pytest.param(torch.tensor(1.0), None, id="scalar"),
        pytest.param(None, None, id="none"),
    ],
)
def test_num_samples_is_the_length_of_the_first_tensor(batch, expected) -> None:
    assert num_samples(batch) == expected


REAL = torch.tensor([[True, True, False], [True, False, False]])


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(REAL, id="bool"),
        pytest.param(REAL.long(), id="0/1"),
        pytest.param(REAL.float(), id="0./1."),
        pytest.param(torch.where(REAL, torch.tensor([[7, 0, 9], [1, 2, 3]]), -100), id="labels"),
        pytest.param(torch.where(REAL, 1, -100), id="labels that are all 1"),
    ],
)
@pytest.mark.parametrize(
    "wrap", [dict, UserDict, lambda mask: Batch("a", X, mask["mask"])], ids=["dict", "map", "class"]
)
def test_token_mask_is_true_where_a_token_is_real(value: Tensor, wrap) -> None:
    mask = token_mask(wrap({"mask": value}), "mask")
    assert mask.dtype == torch.bool
    assert torch.equal(mask, REAL)


def test_labels_without_padding_are_all_real() -> None:
    assert token_mask({"labels": torch.tensor([[0, 5, 1]])}, "labels").all()


@pytest.mark.parametrize(
    ("batch", "held"),
    [
        ({"input_ids": X, "labels": X}, r"\['input_ids', 'labels'\]"),
        ({"mask": [1, 0]}, r"\['mask'\]"),
        ({"mask": torch.tensor(1)}, r"\['mask'\]"),
        ((X, X), "tuple"),
        (Batch("a", X), "Batch"),
    ],
    ids=["missing", "no tensor", "no axes", "tuple", "dataclass"],
)
def test_mask_that_is_not_there_is_refused_in_one_line(batch, held: str) -> None:
    with pytest.raises(ValueError, match=rf"^mask must name a tensor with axes in the batch, got 'mask': .* {held}$"):
        token_mask(batch, "mask")


def test_an_object_that_refers_to_itself_is_walked_once() -> None:
    class Node:
        pass

    node = Node()
    node.itself, node.tensor = node, torch.zeros(5, 2)
    assert num_samples(node) == 5


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda x, shared: {"x": x, "shared": shared}, id="dict"),
        pytest.param(lambda x, shared: UserDict(x=x, shared=shared), id="mapping"),
        pytest.param(lambda x, shared: Pair(x, shared), id="namedtuple"),
        pytest.param(lambda x, shared: [x, [shared]], id="nested list"),
        pytest.param(lambda x, shared: Batch("a", x, shared), id="dataclass"),
    ],
)
def test_take_cuts_the_axis_of_samples_and_leaves_the_rest(make) -> None:
    x, shared = torch.arange(12).view(4, 3), torch.arange(3)
    assert str(take(make(x, shared), 1, 3)) == str(make(x[1:3], shared))


def test_take_refuses_a_part_of_what_it_cannot_cut() -> None:
    class Graph:
        def __init__(self) -> None:
            self.nodes = X

    graph = Graph()
    assert take(graph, 0, 3) is graph
    with pytest.raises(ValueError, match=r"^batch must hold tensors in mappings, .*, got a Graph$"):
        take(graph, 0, 1)


def test_held_batch_outlives_what_a_training_step_takes_out() -> None:
    batch = {"x": X, "labels": [X]}
    held = hold(batch)
    batch.pop("x")
    batch["labels"].clear()
    assert held["x"] is X
    assert held["labels"][0] is X


def test_held_batch_can_be_differentiated_through() -> None:
    with torch.inference_mode():
        batch = {"x": torch.ones(2, 3)}
    assert not hold(batch)["x"].is_inference()


def test_shared_parts_are_seen_once_and_deep_ones_at_all() -> None:
    nodes = [SimpleNamespace(x=torch.ones(2)) for _ in range(30)]
    for node in nodes:
        node.others = nodes  # every path through this graph would be longer than the age of the universe
    assert len(list(tensors(nodes[0]))) == 30
    chain: SimpleNamespace = SimpleNamespace(x=torch.ones(3))
    for _ in range(5000):
        chain = SimpleNamespace(inner=chain)
    assert num_samples(chain) == 3


@pytest.mark.parametrize(
    ("batch", "per_sample", "expected"),
    [
        ({"input_ids": torch.ones(2, 5, dtype=torch.long), "x": torch.ones(2, 9, dtype=torch.long)}, None, 10),
        ([torch.randn(3, 7), torch.ones(3, 4, dtype=torch.int32)], None, 12),
        ((torch.randn(3, 7), torch.ones(3)), None, 3),
        ({"mask": torch.ones(3, 4, dtype=torch.bool), "x": torch.randn(3, 4)}, None, 3),
        ({"mask": torch.tensor([[1, 1, 0], [1, 0, 0]]), "x": torch.randn(2, 3)}, "mask", 3),
        ({"labels": torch.tensor([[7, -100], [-100, -100]]), "x": torch.randn(2, 2)}, "labels", 1),
        (torch.randn(4, 8), 100, 400),
    ],
)
def test_tokens_are_counted_by_the_rule(batch: Any, per_sample: Any, expected: int) -> None:
    assert int(num_tokens(batch, per_sample)) == expected


def test_batches_without_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="batch must hold a tensor with an axis of samples for its tokens"):
        num_tokens({"name": "x"})
