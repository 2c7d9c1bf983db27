"""What the values of a named tensor mean: decided in the first batch, kept in later ones, refused in one line."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_spectral.capture.masks import Mask, find, fit_rows

REAL = torch.tensor([[True, True, False], [True, False, False]])
FULL = torch.ones(2, 3, dtype=torch.bool)
WORDS = torch.tensor([[7, 1, 9], [1, 2, 0]])


@pytest.mark.parametrize(
    ("key", "first", "real", "later", "later_real"),
    [
        pytest.param("m", REAL, REAL, FULL, FULL, id="bool"),
        pytest.param("attention_mask", REAL.long(), REAL, FULL.long(), FULL, id="0/1 integers"),
        pytest.param("Mask", FULL.float(), FULL, REAL.float(), REAL, id="0/1 floats, first full"),
        pytest.param("mask", 0 * WORDS, ~FULL, REAL.long(), REAL, id="first batch without a token"),
        pytest.param("m", torch.where(REAL, WORDS, -1), REAL, WORDS, FULL, id="labels with -1"),
        pytest.param("m", torch.where(REAL, 0, -100), REAL, REAL.long(), FULL, id="labels 0/1, later full"),
        pytest.param("labels", WORDS, FULL, torch.where(REAL, WORDS, -100), REAL, id="labels, first full"),
        pytest.param("y.target_ids", REAL.long(), FULL, torch.where(REAL, 1, -9), REAL, id="targets 0/1"),
        pytest.param("m", (~REAL) * -1e9, REAL, torch.zeros(2, 3), FULL, id="additive"),
        pytest.param("m", torch.zeros(2, 3), FULL, (~REAL) * -1e4, REAL, id="additive, first full"),
        pytest.param("mask", torch.zeros(2, 3), FULL, (~REAL) * -1e4, REAL, id="additive mask by name"),
        pytest.param("m", torch.zeros(2, 3).masked_fill(~REAL, -torch.inf), REAL, FULL * 0.0, FULL, id="infinite"),
    ],
)
def test_meaning_is_decided_once(key: str, first: Tensor, real: Tensor, later: Tensor, later_real: Tensor) -> None:
    mask = Mask(key)
    for value, expected in ((first, real), (later, later_real), (first, real)):
        found = mask(nested(key, value))
        assert found.dtype == torch.bool
        assert torch.equal(found, expected)


def nested(key: str, value: Any) -> Any:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("segment", torch.tensor([[1, 1, 2, 0]]), "'segment' of integers from 0 to 2: add to the batch"),
        ("mask", torch.tensor([[1, 1, 2, 0]]), "'mask' of integers from 0 to 2: add"),
        ("mask", torch.tensor([[0, 255, 255]]), "'mask' of integers from 0 to 255: add"),
        ("mask", torch.tensor([[0.0, 0.5, 1.0]]), "'mask' of floats from 0 to 1: add"),
        ("mask", torch.tensor([[0.0, -5.0]]), "'mask' of floats from -5 to 0: add"),
        ("mask", torch.tensor([[0.0, torch.nan]]), "'mask' of floats from nan to nan: add"),
        ("weights", torch.tensor([[0.0, 1.0]]), "'weights' of floats from 0 to 1: call it a mask"),
        ("m", torch.tensor([[0, 1]]), "'m' of integers from 0 to 1: call it a mask"),
    ],
)
def test_what_can_mean_anything_is_refused_by_name(key: str, value: Tensor, what: str) -> None:
    with pytest.raises(ValueError, match=r"^mask must name booleans, 0 and 1 under a name with 'mask', ") as caught:
        Mask(key)({key: value})
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "first", "later", "what"),
    [
        ("attention_mask", FULL.long(), WORDS, "'attention_mask' of integers from 0 to 9, which was read as mask"),
        ("loss_mask", FULL.float(), REAL * 0.5, "'loss_mask' of floats from 0 to 0.5, which was read as mask"),
        ("m", torch.zeros(2, 3), REAL.float(), "'m' of floats from 0 to 1, which was read as additive"),
        ("m", torch.zeros(2, 3), REAL * -5.0 - 1, "'m' of floats from -6 to -1, which was read as additive"),
    ],
)
def test_what_no_longer_means_the_same_is_refused(key: str, first: Tensor, later: Tensor, what: str) -> None:
    mask = Mask(key)
    mask({key: first})
    with pytest.raises(ValueError, match=r"^mask must name what means the same in every batch") as caught:
        mask({key: later})
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)
    assert float(mask.count({key: first})) == 6
    assert mask.count({key: later}).isnan()


@pytest.mark.parametrize("key", ["key_padding_mask", "padding_mask", "inputs.pad_mask"])
@pytest.mark.parametrize("value", [REAL, REAL.long(), REAL.float()], ids=["booleans", "integers", "floats"])
def test_names_of_padding_say_nothing_of_what_is_true(key: str, value: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^mask must say which tokens are real, got '.*pad") as caught:
        Mask(key)(nested(key, value))
    assert f"add to the batch batch['real'] = batch[{key!r}] == 0" in str(caught.value)
    assert Mask(key)(nested(key, (~REAL) * -1e9)).equal(REAL), "what is added to scores speaks for itself"


def test_a_step_may_write_to_its_mask() -> None:
    batch = {"m": REAL.clone()}
    found = Mask("m")(batch)
    batch["m"].logical_not_()
    assert found.equal(REAL)


def test_an_empty_batch_decides_nothing() -> None:
    mask = Mask("m")
    assert mask({"m": torch.zeros(0, 3)}).shape == (0, 3)
    assert mask({"m": torch.where(REAL, WORDS, -1)}).equal(REAL)


@pytest.mark.parametrize(
    "batch",
    [
        {"inputs": {"attention_mask": REAL}},
        {"inputs.attention_mask": REAL},
        {"inputs": SimpleNamespace(attention_mask=REAL)},
        SimpleNamespace(inputs={"attention_mask": REAL}),
    ],
    ids=["mappings", "literal key", "attribute in a mapping", "mapping in an attribute"],
)
def test_nested_keys(batch: Any) -> None:
    assert find(batch, "inputs.attention_mask") is REAL
    assert Mask("inputs.attention_mask")(batch).equal(REAL)


def test_indices_of_sequences_and_what_is_not_there() -> None:
    assert find(({"mask": REAL}, WORDS), "0.mask") is REAL
    assert find([WORDS, REAL], "1") is REAL
    assert find([WORDS], "1") is None
    assert find({"a": {"b": 1}}, "a.c") is None


def test_tokens_may_be_counted_by_the_ids_themselves() -> None:
    counted = Mask("decoder_input_ids", "tokens_per_sample", counts_ids=True)
    assert int(counted({"decoder_input_ids": WORDS}).sum()) == 6
    with pytest.raises(ValueError, match=r"^tokens_per_sample must name"):
        Mask("segment", "tokens_per_sample", counts_ids=True)({"segment": WORDS})


@pytest.mark.parametrize(
    ("mask", "rows", "fitted"),
    [
        ((4, 6), (4, 6), (4, 6)),
        ((4, 6), (6, 4), (4, 6)),
        ((4, 1, 6), (4, 6), (4, 1, 6)),
        ((4, 6), (4, 1, 6), (4, 6)),
        ((4, 1, 1, 6), (4, 6), (4, 1, 1, 6)),
        ((4, 6), (24,), (24,)),
    ],
)
def test_rows_are_put_in_the_order_of_the_mask(mask: Any, rows: Any, fitted: Any) -> None:
    assert fit_rows(torch.zeros(*rows, 3), torch.ones(mask, dtype=torch.bool), False).shape == (*fitted, 3)


def test_a_square_mask_is_turned_where_time_is_known_to_be_first() -> None:
    output, mask = torch.arange(12).view(2, 2, 3), torch.ones(2, 2, dtype=torch.bool)
    assert fit_rows(output, mask, False) is output
    assert torch.equal(fit_rows(output, mask, True), output.transpose(0, 1))
