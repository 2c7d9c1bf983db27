"""What records say of their validation data tells other data only where it is known, and of as many samples."""

import pytest

from lightning_spectral.runs.validation_data import ValidationData


def data(*prints: str, num: int | None = None) -> ValidationData:
    named = {str(loader): one for loader, one in enumerate(prints)}
    return ValidationData(named, {} if num is None else dict.fromkeys(named, num))


@pytest.mark.parametrize(
    ("one", "other", "is_other"),
    [
        (data("a"), data("a"), False),
        (data("a"), data("b"), True),
        (data("a"), data(), False),
        (data("a"), data("a", "b"), False),
        (data("a", "c"), data("a", "b"), True),
        (data("a", num=64), data("b", num=512), True),
        (data("a", num=64), data("b"), True),
        (data("a", num=64), data("b", num=16), True),
        (data("a", num=64), data("b", num=8), False),  # a limit leaves eight: they may be the first of the 64
        (data("a", num=8), data("b", num=8), True),
        (data("a", num=8), data("b", num=4), False),
    ],
)
def test_other_data_are_told_where_they_are_known(one: ValidationData, other: ValidationData, is_other: bool) -> None:
    assert one.is_other(other) == other.is_other(one) == is_other


def test_what_a_record_says_is_read_back() -> None:
    for one in (data("a", "b", num=9), data("a"), data()):
        assert ValidationData.of(one.as_facts()) == one
    assert ValidationData.of({}) == ValidationData.of({"validation_data": None}) == data()


def test_one_loader_stands_for_itself() -> None:
    both = data("a", "b", num=9)
    assert both.of_loader(1) == data("b", num=9)
    assert both.of_loader(2) == data()
