"""Attempts on two real ranks: what fails on one of them, wherever, both learn, and go on in step."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_spectral.metrics.collectives import OtherRankError, Together, all_reduce
from tests.distributed import run_distributed

PLACES = ["before", "between", "after", "outside before", "outside after"]


def attempt(together: Together, rank: int, fails: dict[int, str]) -> list[Any]:
    """Three inner attempts of two collectives each in an outer one; what came of each, and of all."""
    seen: list[Any] = []

    def place(name: str, number: int) -> None:
        if fails.get(rank) == name and number == 1:
            raise torch.OutOfMemoryError(f"no memory {name}\nand more of it")

    def inner(number: int) -> float:
        total = torch.tensor([rank + 1.0 + number])
        place("before", number)
        all_reduce(total)
        place("between", number)
        all_reduce(total)
        place("after", number)
        return float(total)

    def outer() -> str:
        for number in range(3):
            place("outside before", number)
            try:
                seen.append(together.attempt(lambda number=number: inner(number)))
            except Exception as error:
                if together.ends(error):
                    raise
                seen.append((type(error).__name__, str(error).partition("\n")[0]))
            place("outside after", number)
        return "whole"

    try:
        seen.append(together.attempt(outer))
    except Exception as error:
        seen.append((type(error).__name__, str(error).partition("\n")[0]))
    return seen


def on_rank(rank: int) -> dict[str, Any]:
    together = Together(torch.device("cpu"))
    seen: dict[str, Any] = {"none": attempt(together, rank, {})}
    for place in PLACES:
        seen[place] = attempt(together, rank, {1: place})
        seen[f"{place}, both"] = attempt(together, rank, {0: "before", 1: place})
    seen["reasons"] = [together.reasons(one if rank else None) for one in ("ä" * 300, "short")]
    total = torch.ones(1)
    dist.all_reduce(total)  # nobody is behind
    seen["last"] = float(total)
    return seen


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_distributed(on_rank, 2)


def test_attempts_that_succeed_give_what_they_return(ranks: list[dict[str, Any]]) -> None:
    # Rank r has r + 1 + number: 3 + 2 number in sum, twice that of the second.
    assert [seen["none"] for seen in ranks] == [[6.0, 10.0, 14.0, "whole"]] * 2


@pytest.mark.parametrize("place", PLACES[:3])
def test_an_attempt_that_fails_on_one_rank_fails_on_both_and_the_next_goes_on(ranks: list, place: str) -> None:
    assert ranks[1][place] == [6.0, ("OutOfMemoryError", f"no memory {place}"), 14.0, "whole"]
    assert ranks[0][place] == [6.0, (OtherRankError.__name__, f"rank 1: no memory {place}"), 14.0, "whole"]


@pytest.mark.parametrize("place", PLACES[3:])
def test_what_fails_further_out_ends_what_is_inside(ranks: list, place: str) -> None:
    assert ranks[1][place][-1] == ("OutOfMemoryError", f"no memory {place}")
    assert ranks[0][place][-1] == (OtherRankError.__name__, f"rank 1: no memory {place}")
    assert [seen[place][0] for seen in ranks] == [6.0, 6.0]
    assert "whole" not in [*ranks[0][place], *ranks[1][place]]


@pytest.mark.parametrize("place", PLACES)
def test_both_may_fail_at_different_places(ranks: list, place: str) -> None:
    first, second = (seen[f"{place}, both"] for seen in ranks)
    assert (first[-1] == "whole") == (second[-1] == "whole") == (place in PLACES[:3])
    assert [first[0], second[0]] == [6.0, 6.0]


def test_nobody_is_behind_and_reasons_are_shared(ranks: list) -> None:
    for seen in ranks:
        assert seen["last"] == 2
        assert seen["reasons"] == [f"rank 1: {'ä' * 120}", "rank 1: short"]


def test_one_process_raises_its_own() -> None:
    together = Together(torch.device("cpu"))
    assert together.attempt(lambda: 3) == 3
    with pytest.raises(torch.OutOfMemoryError, match=r"^no memory$"):
        together.attempt(lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory")))
    assert together.reasons("mine") == ""
