"""Which column is what: rules, what users say, and refusals in one line."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_spectral import Run, compare
from lightning_spectral.runs.loss_names import loss_of_training, loss_of_validation

ROWS = "step,val_loss,seen\n1,3.0,10\n2,2.0,20\n4,1.0,40\n"


def log(folder: Path, text: str = ROWS, hyperparameters: str = "batch_size: 4\n") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.csv").write_text(text)
    (folder / "hparams.yaml").write_text(hyperparameters)
    return folder


def refusal(path: Path, **said: Any) -> str:
    with pytest.raises(ValueError, match=r"must|cannot") as caught:
        Run(path, **said)
    (line,) = str(caught.value).splitlines()
    return line


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"loss": "x"}, "loss must be one of its columns of numbers, got 'x': it has step, val_loss, seen (the CSV"),
        ({"loss": ""}, "loss must be a name of one line, or None, got ''"),
        ({"step": "val_loss"}, "step must be one of its columns of numbers, got 'val_loss'"),
        ({"tokens": "val_loss"}, "tokens must be those of all training so far, got 'val_loss', which does not grow"),
        ({"tokens": "seen", "batch_tokens": 3}, "batch_tokens must be left out where tokens is given, got 3 beside 's"),
        ({"batch_tokens": 0}, "batch_tokens must be a positive number, or a product such as 'batch_size*256', got 0"),
        (
            {"batch_tokens": "bs*2"},
            "batch_tokens must be a product of numbers and hyperparameters, got 'bs': it has ba",
        ),
        ({"batch_tokens": "batch_size*-1"}, "batch_tokens must be of positive factors, got '-1' = -1.0"),
        ({"batch_tokens": "1e300*1e300"}, "batch_tokens must be finite, got '1e300*1e300'"),
        ({"seconds": "x"}, "seconds must be one of its columns of numbers, got 'x'"),
        ({"loss": (one for one in "ab")}, "loss must be a name of one line, or None, got <generator object"),
        ({"batch_tokens": (one for one in "ab")}, "batch_tokens must be a positive number, or a product such as "),
        ({"family": 3}, "family must be a name of one line, or None, got 3"),
    ],
)
def test_what_is_said_and_not_there_is_refused(said: dict[str, Any], message: str, tmp_path: Path) -> None:
    if said.get("step"):
        log(tmp_path, "step,val_loss\n1,3\n", "a: 1\n")
        (tmp_path / "metrics.csv").write_text("step,val_loss,note\n1,x,3\n")
    else:
        log(tmp_path)
    assert refusal(tmp_path, **said).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step,a\n1,2\n", "loss must be named, for it has no column that is called one usually: it has step, a (the"),
        ("at,val_loss\n1,2\n", "step must be named, for it has none of step: it has at, val_loss (the CSVLogger log"),
        ("step,val_loss\n-1,2\n", "step must be whole and from 0 to 1,000,000,000,000,000, got -1 in a row (the CSVLo"),
        ("step,val_loss\n1.5,2\n", "step must be whole and from 0 to 1,000,000,000,000,000, got 1.5 in a row"),
        ("step,val_loss\n1e20,2\n", "step must be whole and from 0 to 1,000,000,000,000,000, got 1e+20 in a row"),
        ("step,val_loss,tokens\n1,2,5\n2,1,5\n", "tokens must be those of all training so far, got 'tokens', which"),
        ("step,val_loss,tokens\n1,2,-5\n2,1,5\n", "tokens must be from 0 to 1e+30, got -5 in 'tokens'"),
        ("step,val_loss\n1\n", "run has a broken log: "),
        ("step,step\n1,1\n", "run has a broken log: "),
        ("", "step must be named, for it has none of step: it has no numbers (the CSVLogger log"),
    ],
)
def test_logs_that_say_nothing_of_use_are_refused(text: str, message: str, tmp_path: Path) -> None:
    assert refusal(log(tmp_path, text)).startswith(message)


@pytest.mark.parametrize("hyperparameters", ["[1, 2]", "a: [", "&a {b: *a}", "a: b: c"])
def test_hyperparameters_that_are_none_are_refused(hyperparameters: str, tmp_path: Path) -> None:
    message = refusal(log(tmp_path, hyperparameters=hyperparameters))
    assert message.startswith("run has a broken log")
    assert "hparams.yaml" in message


def test_hyperparameters_with_objects_are_read_without_making_them(tmp_path: Path) -> None:
    text = "batch_size: 4\ncallback: !!python/object/apply:os.system ['touch made']\nmodel: {lr: 0.1, seed: 3}\n"
    run = Run(log(tmp_path, hyperparameters=text))
    assert run.about["setting"]["hyperparameters"] == {"batch_size": 4, "model.lr": 0.1}
    assert not Path("made").exists()


def test_names_without_end_are_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 {x: 1, y: 1}"] + [f"a{i}: &a{i} {{x: *a{i - 1}, y: *a{i - 1}}}" for i in range(1, 19)]
    assert "it holds more than" in refusal(log(tmp_path, hyperparameters="\n".join(lines) + "\n"))


def test_what_was_logged_later_counts_where_steps_go_back(tmp_path: Path) -> None:
    """As of a run that was resumed from step 2."""
    text = "step,val_loss\n1,3.0\n2,2.0\n3,9.0\n4,9.0\n3,1.0\n5,0.5\n"
    run = Run(log(tmp_path, text))
    np.testing.assert_array_equal(run.history.step, [1, 2, 3, 5])
    np.testing.assert_array_equal(run.history.val_loss, [3, 2, 1, 0.5])


def test_tokens_lie_between_those_that_were_logged(tmp_path: Path) -> None:
    text = "step,val_loss,tokens\n1,3,\n2,,20\n3,2,\n6,,60\n6,1,\n7,0.5,\n"
    run = Run(log(tmp_path, text))
    np.testing.assert_array_equal(run.history.tokens, [10, 30, 60, np.nan])
    assert run.about["batch_tokens"] == 10
    assert np.isnan(run.tokens_to(0.7))


def test_a_row_that_is_being_written_does_not_count(tmp_path: Path) -> None:
    run = Run(log(tmp_path, ROWS + "5,0.9"))
    np.testing.assert_array_equal(run.history.step, [1, 2, 4])


def test_runs_without_tokens_are_not_compared(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"batch_tokens must be given for .*, a CSVLogger log without a column of tok"):
        compare(log(tmp_path / "a"), log(tmp_path / "b"))


def test_logs_of_a_family_are_compared(tmp_path: Path) -> None:
    slow = "step,val_loss\n2,3.0\n4,2.0\n8,1.0\n"
    other = "step,val_loss\n2,3.0\n4,2.1\n8,1.0\n"
    base = [Run(log(tmp_path / name, of), batch_tokens=10, family="F") for name, of in (("a", slow), ("b", other))]
    variant = [Run(log(tmp_path / "c"), batch_tokens=10, family="F")]
    comparison = compare(base, variant)
    assert comparison.gains["tokens"].gain == pytest.approx(1)
    assert comparison.base[0].family == "F"
    copy = Run(log(tmp_path / "backup", slow), batch_tokens=10, family="F")
    with pytest.raises(ValueError, match=r"base must be independent runs, got .* the same to the last digit"):
        compare([base[0], copy], variant)


def test_seconds_that_begin_anew_are_no_training_time(tmp_path: Path) -> None:
    path = log(tmp_path, "step,val_loss,elapsed\n1,3.0,500\n2,2.0,900\n3,1.5,100\n4,1.0,600\n")
    with pytest.raises(
        ValueError, match="seconds must be those of all training so far, got 'elapsed', which begins anew"
    ):
        Run(path, seconds="elapsed")


@pytest.mark.parametrize(
    ("names", "validation", "training"),
    [
        (["loss", "train_loss", "val_loss", "val/loss"], "val_loss", "train_loss"),
        (["train_loss_step", "train_loss_epoch", "eval/loss"], "eval/loss", "train_loss_epoch"),
        (["train/loss", "loss", "val_accuracy"], None, "train/loss"),
        (["loss_scale", "my_loss", "val_loss/dataloader_idx_0"], None, None),
    ],
)
def test_names_of_losses(names: list[str], validation: str | None, training: str | None) -> None:
    assert loss_of_validation(names) == validation
    assert loss_of_training(names) == training


def test_a_loss_that_is_lost_is_infinite_as_in_a_record(tmp_path: Path) -> None:
    run = Run(log(tmp_path, "step,val_loss,lr\n1,3.0,\n2,,0.1\n3,2.0,\n4,nan,\n5,,0.1\n6,NaN,\n"))
    np.testing.assert_array_equal(run.history.step, [1, 3, 4, 6])
    np.testing.assert_array_equal(run.history.val_loss, [3, 2, np.inf, np.inf])
    assert run.history.diverged_at == 4


def test_nan_of_a_file_without_empty_cells_may_be_its_word_for_them(tmp_path: Path) -> None:
    run = Run(log(tmp_path, "step,val_loss,lr\n1,3.0,nan\n2,nan,0.1\n3,2.0,nan\n4,nan,0.1\n"))
    np.testing.assert_array_equal(run.history.step, [1, 3])
    assert np.isnan(run.history.diverged_at)


def test_what_says_nan_alone_is_no_column_but_of_a_loss(tmp_path: Path) -> None:
    run = Run(log(tmp_path, "step,epoch,val_loss,tokens\n1,nan,nan,nan\n2,nan,,nan\n"))
    np.testing.assert_array_equal(run.history.val_loss, [np.inf])
    assert run.history.diverged_at == 1
    assert "not known" in run.columns["tokens"]


BY_EPOCH = [
    *(f"{step},{3 - step / 20},\n" + f"{step // 10},,{3 - step / 20}\n" * (step % 10 == 0) for step in range(1, 41)),
]


def test_losses_by_different_steps_are_refused_until_one_is_named(tmp_path: Path) -> None:
    path = log(tmp_path, "step,train_loss,val_loss\n" + "".join(BY_EPOCH))
    assert refusal(path).startswith(
        "loss must be named, for 'val_loss' and 'train_loss' count different steps, epochs perhaps: the one at 1 came "
        "after the other at 10"
    )
    assert Run(path, loss="train_loss").history.step[-1] == 40
    assert Run(path, loss="val_loss").history.step[-1] == 4


@pytest.mark.parametrize("late", [0, 1, 8])
def test_losses_of_a_resumed_run_count_the_same_steps(late: int, tmp_path: Path) -> None:
    """Validation at every tenth step, logged with the step before, or up to eight late; resumed from step 20."""
    lines = []
    for step in [*range(1, 36), *range(21, 61)]:
        lines.append(f"{step},{100 - step},\n")
        if step > 10 and step % 10 == late:
            lines.append(f"{step - late - 1},,{200 - step}\n")
    run = Run(log(tmp_path, "step,train_loss,val_loss\n" + "".join(lines)))
    assert run.history.step[-1] == 60
    assert np.isfinite(run.history.val_loss).sum() == 5
