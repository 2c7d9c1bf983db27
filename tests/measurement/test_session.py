"""One conductor: each event once, equal requests shared, one writer a key, and nothing left when all have left."""

import gc
import weakref
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from lightning_spectral.measurement import ActivationRequest, Measurement, Report, Request, Scene, Session
from lightning_spectral.measurement.stopwatch import Stopwatch


class Log:
    """A recorder that notes what it hears, in one list with the measurements."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self.heard: list[tuple[Any, ...]] = []

    def __getattr__(self, event: str) -> Any:
        return lambda *args: self.heard.append(("recorder", event, *args))


@dataclass(frozen=True, kw_only=True)
class Counting(Request):
    """Makes a report at every due step, of nothing."""

    kind: ClassVar[str] = "activation"
    name: str = "a"

    def measure(self, scene: Scene) -> "Counter":
        return Counter(self, scene)


class Counter(Measurement):
    def __init__(self, request: Counting, scene: Scene) -> None:
        super().__init__(request, 1, scene.stopwatch, scene.device)
        self.name, self.heard = request.name, scene.make_loss
        self.is_removed = False

    def open(self, batch: Any, step: int, has_right_stage: bool) -> None:
        self.heard.append((self.name, "open", batch))

    def close(self) -> None:
        self.heard.append((self.name, "close"))

    def agree_on_rows(self) -> float:
        return 1.0

    def make_report(self, step: int) -> None:
        self.report = Report(step, {})
        self.reset()

    def remove(self) -> None:
        self.is_removed = True


class Member:
    measurement = None


def counting(**kwargs: Any) -> Counting:
    return Counting(**{"stage": "train", "every_n_steps": 2, "num_groups": 1, **kwargs})


def joined(*requests: Counting) -> tuple[Session, list[Member], list[tuple[Any, ...]]]:
    session: Session = Session(Log)
    members = []
    heard = session.recorder.heard
    for request in requests:
        members.append(Member())
        session.join(members[-1])
        scene = Scene(torch.nn.Identity(), torch.device("cpu"), session.stopwatch, heard)  # type: ignore[arg-type]
        members[-1].measurement = session.share(members[-1], request, scene)
    return session, members, heard


def test_equal_requests_share_a_measurement_that_ends_with_its_last_member() -> None:
    session, (first, second, third), _ = joined(counting(), counting(), counting(name="b"))
    assert first.measurement is second.measurement is not third.measurement
    assert session.measurements == [first.measurement, third.measurement]
    session.leave(first)
    assert not second.measurement.is_removed
    session.leave(second)
    assert second.measurement.is_removed
    assert not third.measurement.is_removed


def test_the_first_that_has_not_left_leads() -> None:
    session, (first, second), heard = joined(counting(), counting())
    assert [session.is_led_by(member) for member in (first, second)] == [True, False]
    session.leave(first)
    assert [session.is_led_by(member) for member in (first, second)] == [False, True]
    assert heard == []
    session.leave(second)
    assert not session.is_led_by(second)
    assert heard == [("recorder", "end")]


def test_an_event_reaches_the_recorder_first_and_each_measurement_once() -> None:
    session, _, heard = joined(counting(), counting(), counting(name="b", every_n_steps=1))
    session.start_training(0)
    session.start_train_batch("batch", 0)
    assert heard == [("recorder", "start_train_batch", "batch"), ("a", "open", "batch"), ("b", "open", "batch")]
    heard.clear()
    session.end_train_batch(None, 1)
    b = session.measurements[1]
    assert heard == [
        ("recorder", "end_train_batch", None, 1),
        ("a", "close"),
        ("b", "close"),
        ("recorder", "add_report", b, b.report),
    ]
    heard.clear()
    session.end_train_batch(None, 2)
    reports = [event[2:] for event in heard if event[1] == "add_report"]
    assert reports == [(one, one.report) for one in session.measurements]
    assert [one.report.step for one in session.measurements] == [2, 2]


def test_validation_batches_go_to_those_of_their_loader() -> None:
    session, _, heard = joined(*(counting(stage="validate", name=str(i), dataloader_idx=i) for i in range(2)))
    session.start_validation(4, always=False)
    session.start_validation_batch("batch", 1, 4, is_check=False)
    session.end_validation_rows(4)
    assert [event for event in heard if event[0] != "recorder"] == [("1", "open", "batch")]
    assert [event[1] for event in heard if event[0] == "recorder"] == [
        "start_validation",
        "start_validation_batch",
        "end_validation_rows",
        "add_report",
        "add_report",
    ]
    heard.clear()
    session.start_validation_batch("batch", 0, 4, is_check=True)
    assert [event[0] for event in heard] == ["0"]


def test_one_key_has_one_writer_until_it_leaves() -> None:
    session, (first, second), _ = joined(counting(), counting())
    session.claim(["a/x"], first)
    session.claim(["a/x"], first)
    with pytest.raises(ValueError, match=r"^Member and Member would both write 'a/x': give one of them a prefix$"):
        session.claim(["a/x"], second)
    assert session.claim_shared("seconds", first)
    assert not session.claim_shared("seconds", second)
    session.leave(first)
    session.claim(["a/x"], second)
    assert session.claim_shared("seconds", second)


def test_once_for_all_members() -> None:
    session, _, _ = joined()
    assert [session.is_first("a"), session.is_first("a"), session.is_first("b")] == [True, False, True]


def test_a_member_that_is_gone_holds_no_key() -> None:
    session: Session = Session(Log)
    member = Member()
    session.claim(["x"], member)
    gone = weakref.ref(member)
    del member
    gc.collect()
    assert gone() is None
    session.claim(["x"], Member())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be a positive int, got 0"),
        ({"num_groups": True}, "num_groups must be a positive int, got True"),
        ({"stage": "test"}, "stage must be 'train' or 'validate', got 'test'"),
        ({"dataloader_idx": -1}, "dataloader_idx must be an int from 0, got -1"),
        ({"num_tokens": 2.5}, "num_tokens must be a positive int, got 2.5"),
        ({"dtype": "float16"}, "dtype must be 'auto', 'float32' or 'float64', got 'float16'"),
        ({"mask": 3}, "mask must be a key of the batch, or None for all tokens, got 3"),
    ],
)
def test_a_request_checks_itself(wrong: dict[str, Any], message: str) -> None:
    right = {
        "stage": "train",
        "every_n_steps": 2,
        "num_groups": 1,
        "num_tokens": 8,
        "normalize": True,
        "dtype": "float32",
    }
    ActivationRequest(**right)
    with pytest.raises(ValueError, match=f"^{message}$"):
        ActivationRequest(**(right | wrong))
