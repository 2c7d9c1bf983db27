"""The rule of samples, over batches of many structures: how many there are, and what a part of them holds."""

from collections import UserDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import BatchEncoding

from lightning_spectral import per_sample_gradients
from lightning_spectral.capture.batch import Samples, batch_of, load_cutter, num_tokens, take, tensors

Pair = namedtuple("Pair", ["first", "second"])


@dataclass
class Data:
    first: Any
    second: Any = None


WRAPS = {
    "dict": lambda *parts: {f"part{index}": part for index, part in enumerate(parts)},
    "encoding": lambda *parts: BatchEncoding({f"part{index}": part for index, part in enumerate(parts)}),
    "mapping": lambda *parts: UserDict({f"part{index}": part for index, part in enumerate(parts)}),
    "tuple": lambda *parts: tuple(parts),
    "list": lambda *parts: list(parts),
    "dataclass": lambda *parts: Data(parts[0], list(parts[1:])),
    "named tuple": lambda *parts: Pair(parts[0], list(parts[1:])),
    "nested": lambda *parts: {"inputs": {"x": parts[0]}, "rest": [list(parts[1:])]},
}
lengths = st.integers(1, 7)


def numbered(size: int, *rest: int) -> Tensor:
    """Each sample's entries are its number."""
    return torch.arange(size).view(size, *(1 for _ in rest)).expand(size, *rest).clone()


@given(
    wrap=st.sampled_from(sorted(WRAPS)),
    size=lengths,
    shapes=st.lists(st.lists(lengths, min_size=1, max_size=3), min_size=1, max_size=3),
    num_labels=st.integers(0, 2),
)
def test_ordinary_batches_of_any_structure_are_cut_into_their_samples(wrap, size, shapes, num_labels) -> None:
    parts = [numbered(size, *shape) for shape in shapes] + [numbered(size) for _ in range(num_labels)]
    batch = WRAPS[wrap](*parts)
    samples = Samples()
    assert samples.count(batch) == size
    cut = samples.cut(batch)
    for index in range(size):
        one = batch_of(take(cut, index, index + 1))
        assert type(one) is type(batch)
        for part, whole in zip(tensors(one), parts, strict=True):
            assert part.shape == (1, *whole.shape[1:])
            assert bool((part == index).all())


@given(size=st.integers(2, 6), length=st.integers(2, 6), width=st.integers(2, 6), first=st.booleans())
def test_what_is_for_all_samples_stays_whole(size, length, width, first) -> None:
    x, positions = numbered(size, length, width), torch.arange(length)
    shared = {"position_ids": positions, "causal": torch.ones(length, length), "class_weights": torch.ones(width)}
    batch = {**shared, "x": x} if first else {"x": x, **shared}
    if length == size:
        del batch["causal"]  # nobody could tell
    one = batch_of(Samples().cut(batch).part(1, 2))
    assert one["x"].shape == (1, length, width)
    for name in shared.keys() & batch.keys():
        assert one[name] is batch[name], name


@given(sizes=st.lists(st.integers(1, 9), min_size=2, max_size=6).filter(lambda found: len(set(found)) > 1))
def test_ragged_lists_are_refused_and_cut_by_the_user(sizes: list[int]) -> None:
    batch = [torch.full((size,), index) for index, size in enumerate(sizes)]
    if len(set(sizes) - {1}) > 1:
        with pytest.raises(
            ValueError, match=r"^batch_dim=0 must be the axis of samples .*: give batch_dim, or samples"
        ):
            Samples().cut(batch)
        assert Samples().count(batch) is None
    samples = Samples(cutter=lambda batch: [[one] for one in batch])
    assert samples.count(batch) == len(sizes)
    cut = samples.cut(batch).part(1, len(sizes))
    assert batch_of(cut.part(0, 1))[0] is batch[1]
    assert num_tokens(batch) == sum(sizes)


@given(size=st.integers(2, 6), length=st.integers(2, 6))
def test_batch_dim_says_where_samples_are(size: int, length: int) -> None:
    tokens, labels = numbered(size, length).T.contiguous(), numbered(size)
    cut = Samples(1).cut((tokens, labels))
    assert cut.size == size
    for index in range(size):
        one, label = batch_of(cut.part(index, index + 1))
        assert one.shape == (length, 1)
        assert bool((one == index).all())
        assert label.tolist() == [index]


X = torch.zeros(8, 12)


@pytest.mark.parametrize(
    "batch",
    [
        pytest.param((X.T, torch.zeros(8)), id="time first with labels"),
        pytest.param({"text": X.T.long(), "label": torch.zeros(8)}, id="time first, named"),
        pytest.param({"input_ids": X.T.long(), "labels": torch.zeros(8)}, id="time first, input_ids"),
        pytest.param({"a": X, "b": torch.zeros(4, 12)}, id="loaders of unequal sizes"),
        pytest.param([{"input_ids": X}, {"input_ids": X[:3]}], id="loaders of unequal sizes, input_ids"),
        pytest.param([torch.zeros(3, 5), torch.zeros(4, 5)], id="ragged"),
        pytest.param({"x": X, "boxes": [torch.zeros(n, 4) for n in (2, 5, 1)]}, id="detection"),
        pytest.param(SimpleNamespace(x=torch.zeros(9, 5), edge_index=torch.zeros(2, 20).long()), id="graph"),
        pytest.param({"text": ["a", "b"]}, id="no tensor"),
    ],
)
def test_what_cannot_be_told_is_refused_in_one_line(batch: Any) -> None:
    with pytest.raises(ValueError, match=r"batch_dim|samples") as caught:
        Samples().cut(batch)
    assert "\n" not in str(caught.value)
    assert Samples().count(batch) is None


def test_a_graph_like_object_of_samples_counts_them() -> None:
    assert Samples().count(SimpleNamespace(x=X, y=torch.zeros(8))) == 8


def test_what_was_seen_to_be_for_all_samples_stays_so() -> None:
    samples = Samples(0)
    samples.cut({"x": X, "grid": torch.arange(12)})
    one = samples.cut({"x": torch.zeros(12, 12), "grid": torch.arange(12)}).part(0, 1)
    assert batch_of(one)["grid"].shape == (12,)


X32 = torch.zeros(32, 5)


@pytest.mark.parametrize(
    ("whole", "expected"),
    [
        pytest.param([0.5 * index for index in range(32)], [3.5, 4.0], id="floats"),
        pytest.param(tuple(f"word {index}" for index in range(32)), ("word 7", "word 8"), id="strings"),
        pytest.param([{"weight": index} for index in range(32)], [{"weight": 7}, {"weight": 8}], id="mappings"),
        pytest.param(
            [{"weight": torch.tensor(index), "box": torch.full((3,), index)} for index in range(32)],
            [{"weight": torch.tensor(index), "box": torch.full((3,), index)} for index in (7, 8)],
            id="mappings of tensors",
        ),
        pytest.param([(index, -index) for index in range(32)], [(7, -7), (8, -8)], id="pairs"),
        pytest.param(np.arange(32), np.array([7, 8]), id="array"),
        pytest.param(
            np.array([f"word {index}" for index in range(32)], "U7"), np.array(["word 7", "word 8"], "U7"), id="words"
        ),
        pytest.param(np.array([{index} for index in range(32)]), np.array([{7}, {8}]), id="array of objects"),
        pytest.param(np.arange(64).reshape(32, 2), np.array([[14, 15], [16, 17]]), id="array of two axes"),
        pytest.param([("a",) * 32, [*"b" * 32]], [("a", "a"), ["b", "b"]], id="as collation turns lists of words"),
    ],
)
@pytest.mark.parametrize("wrap", ["dict", "dataclass", "nested", "tuple"])
def test_lists_and_arrays_with_an_entry_for_each_sample_are_cut(wrap: str, whole: Any, expected: Any) -> None:
    cut = Samples().cut(WRAPS[wrap](X32, whole))
    for part in (cut.part(7, 9), cut.pick(torch.tensor([7, 8])), cut.part(2, 30).part(5, 7)):
        assert str(batch_of(part)) == str(WRAPS[wrap](X32[:2], expected))


@pytest.mark.parametrize(
    "shared",
    [
        [0.9, 0.95],
        ("low", "high"),
        np.arange(31),
        "x" * 32,
        {"table": np.eye(5), "names": [*"abcde"]},
        Pair("a", "b"),
        torch.Size([32, 5]),
        [torch.zeros(5), torch.zeros(7)],
        np.array(3.0),
    ],
    ids=str,
)
def test_lists_and_arrays_of_another_length_are_for_all_samples(shared: Any) -> None:
    for batch in ({"x": X32, "shared": shared}, {"shared": shared, "x": X32}):
        assert str(batch_of(Samples().cut(batch).part(3, 4))["shared"]) == str(shared)


def test_lists_once_seen_to_be_for_all_samples_and_those_named_so_stay_whole() -> None:
    samples, names = Samples(), [*"abcdefghijkl"]
    samples.cut({"x": X, "names": names})
    batch = {"x": torch.zeros(12, 12), "names": names, "class_weights": [1.0] * 12, "positions": np.arange(12)}
    one = batch_of(samples.cut(batch).part(0, 1))
    assert [len(one[key]) for key in ("x", "names", "class_weights", "positions")] == [1, 12, 12, 12]


def test_an_array_has_its_samples_on_the_axis_of_tensors() -> None:
    one = batch_of(Samples(1).cut({"x": torch.zeros(5, 32), "y": np.arange(96).reshape(3, 32)}).part(7, 8))
    assert one["y"].tolist() == [[7], [39], [71]]
    assert one["x"].shape == (5, 1)


DOUBTFUL = {
    "two betas": (2, [0.9, 0.95]),
    "a mean of colours": (3, (0.485, 0.456, 0.406)),
    "lists of as many": (9, [[*range(9)] for _ in range(9)]),
    "tensors": (9, [torch.zeros(index + 10) for index in range(9)]),
    "arrays": (9, [np.zeros(3)] * 9),
}


@pytest.mark.parametrize("name", DOUBTFUL)
def test_a_list_that_may_be_as_long_by_chance_is_refused_where_it_is_read(name: str) -> None:
    size, doubtful = DOUBTFUL[name]
    batch = {"x": torch.zeros(size, 21, 3), "some": doubtful}
    cut = Samples().cut(batch)
    assert batch_of(cut) is batch
    for part in (cut.part(0, 1), cut.pick(torch.tensor([0])), cut.part(0, 1).part(0, 1)):
        one = batch_of(part)
        assert one["x"].shape == (1, 21, 3)
        with pytest.raises(ValueError, match=rf"^samples must say whether the \w+ some of {size} .*: give samples"):
            len(one["some"])
    with pytest.raises(ValueError, match=r"^samples must say"):
        take(batch, 0, 1)["some"][0]


@pytest.mark.parametrize("name", DOUBTFUL)
def test_batches_of_two_sizes_show_whose_a_list_is(name: str) -> None:
    size, doubtful = DOUBTFUL[name]
    for shorter, expected in ((doubtful[:-1], 1), (doubtful, size)):
        samples = Samples()
        samples.cut({"x": torch.zeros(size, 21, 3), "some": doubtful})
        samples.cut({"x": torch.zeros(size - 1, 21, 3), "some": shorter})
        one = batch_of(samples.cut({"x": torch.zeros(size, 21, 3), "some": doubtful}).part(0, 1))
        assert len(one["some"]) == expected


def test_a_list_of_one_in_a_batch_of_one_is_the_same_either_way() -> None:
    batch = {"x": torch.zeros(1, 5), "betas": [0.9]}
    assert batch_of(Samples().cut(batch).part(0, 1))["betas"] == [0.9]


def test_keys_with_dots_hide_no_list() -> None:
    batch = {"x": X32, "meta": [*range(32)], "meta.x": torch.zeros(32)}
    assert batch_of(Samples().cut(batch).part(7, 8))["meta"] == [7]


def cut_lists(batch: list[Tensor]) -> list[list[Tensor]]:
    return [[one] for one in batch]


def test_cutters_are_loaded_and_checked() -> None:
    assert load_cutter(f"{__name__}.cut_lists") is not None
    assert load_cutter(None) is None
    for wrong in ("nowhere.at_all", "cut_lists", 3):
        with pytest.raises(ValueError, match=r"^samples must be a function"):
            load_cutter(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^samples must return a list of batches of one, got a int$"):
        Samples(cutter=lambda _: 3).cut([X])  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("method", ["auto", "loop"])
def test_gradients_of_samples_that_a_user_cuts(method: Any) -> None:
    torch.manual_seed(0)
    model, batch = nn.Linear(3, 1), [torch.randn(size, 3) for size in (2, 4, 3)]
    loss = lambda module, batch: torch.stack([module(one).square().mean() for one in batch]).mean()  # noqa: E731
    rows = per_sample_gradients(model, batch, "weight", method, loss_fn=loss, samples=cut_lists)["weight"]
    expected = [torch.autograd.grad(loss(model, [one]), model.weight)[0].flatten() for one in batch]
    torch.testing.assert_close(rows, torch.stack(expected))


@pytest.mark.parametrize("method", ["vmap", "loop"])
def test_gradients_of_time_first_batches(method: Any) -> None:
    torch.manual_seed(0)
    model, batch = nn.GRU(3, 4), torch.randn(5, 2, 3)
    loss = lambda module, x: module(x)[0].square().mean()  # noqa: E731
    rows = per_sample_gradients(model, batch, "weight_hh_l0", "loop", loss_fn=loss, batch_dim=1)["weight_hh_l0"]
    expected = [torch.autograd.grad(loss(model, batch[:, i : i + 1]), model.weight_hh_l0)[0] for i in range(2)]
    torch.testing.assert_close(rows, torch.stack(expected).flatten(1))
    flat = nn.Linear(3, 4)
    squared = lambda module, x: module(x).square().mean()  # noqa: E731
    rows = per_sample_gradients(flat, batch, "weight", method, loss_fn=squared, batch_dim=1)["weight"]
    expected = [torch.autograd.grad(squared(flat, batch[:, i : i + 1]), flat.weight)[0] for i in range(2)]
    torch.testing.assert_close(rows, torch.stack(expected).flatten(1))


@pytest.mark.parametrize("size", [4, 8])
def test_chunks_as_long_as_what_is_for_all_do_not_cut_it(size: int) -> None:
    torch.manual_seed(0)
    model, batch = nn.Linear(3, 1), {"x": torch.randn(size, 4, 3), "grid": torch.randn(4)}
    loss = lambda module, batch: (module(batch["x"]).squeeze(-1) * batch["grid"]).square().mean()  # noqa: E731
    if size == 4:
        batch["position_grid"] = batch.pop("grid")
        inner = loss
        loss = lambda module, batch: inner(module, {**batch, "grid": batch["position_grid"]})  # noqa: E731
    rows = [
        per_sample_gradients(model, batch, "weight", m, c, loss, batch_dim=0) for m in ("vmap", "loop") for c in (4, 1)
    ]
    for other in rows[1:]:
        torch.testing.assert_close(other["weight"], rows[0]["weight"])
    total = torch.autograd.grad(loss(model, batch), model.weight)[0].flatten()
    torch.testing.assert_close(rows[0]["weight"].mean(0), total)


@pytest.mark.parametrize(
    ("batch", "batch_dim", "rule", "axes"),
    [
        (
            {"input_ids": torch.zeros(8, 12), "position_ids": torch.zeros(12)},
            None,
            "axis 0, the length of input_ids",
            {"input_ids": 0, "position_ids": None},
        ),
        (
            (torch.zeros(8, 12), torch.zeros(8)),
            None,
            "axis 0, the length on which tensors of two or more axes agree",
            {"0": 0, "1": 0},
        ),
        (torch.zeros(8), None, "axis 0, the length on which tensors of one axis agree", {"": 0}),
        (
            {"x": torch.zeros(12, 8)},
            1,
            "batch_dim=1, the length on which tensors of two or more axes agree",
            {"x": 1},
        ),
    ],
    ids=["ids", "pair", "vector", "said"],
)
def test_the_rule_is_told_in_words(batch: Any, batch_dim: int | None, rule: str, axes: dict[str, int | None]) -> None:
    samples = Samples(batch_dim)
    assert samples.count(batch) == 8
    assert samples.rule(batch) == rule
    assert samples.axes(batch) == axes


def test_what_becomes_of_lists_and_arrays_is_told_in_words() -> None:
    batch = {
        "x": torch.zeros(4, 5),
        "names": [*"abcd"],
        "table": np.eye(5),
        "labels": np.arange(4),
        "columns": ("a", "b"),
        "sizes": [(1, 2)] * 4,
        "views": [torch.zeros(4, 5), torch.zeros(4, 5), ([*"abcd"], 3)],
    }
    found = Samples().others(batch)
    assert found.pop("sizes").startswith("list of 4 refused where it is read: samples must say whether the list sizes")
    assert found == {
        "names": "list of 4 cut with the samples",
        "table": "array (5, 5) for all samples",
        "labels": "array (4,) on axis 0",
        "columns": "tuple of 2 for all samples",
        "views.2.0": "list of 4 cut with the samples",
    }
    assert Samples(cutter=list).others(batch) == {}


def test_a_function_that_cuts_is_the_rule() -> None:
    samples = Samples(cutter=list)
    assert samples.rule([1, 2]) == "samples=builtins.list cuts"
    assert samples.axes([1, 2]) == {}
