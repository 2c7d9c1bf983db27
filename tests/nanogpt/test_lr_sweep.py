"""The learning-rate sweep runs at toy size, promotes by validation loss, and makes no run twice."""

import importlib.util
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

PATH = Path(__file__).parents[2] / "examples" / "lr_sweep.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("lr_sweep", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sweep(script, folder, multipliers, **arguments):
    console = Console(file=io.StringIO(), width=120)
    settings = {"tokens": 64, "rounds": 3, "seed": 1, "model": {}, "data": {}} | arguments
    best = script.sweep(folder, multipliers, console=console, **settings)
    return best, json.loads((folder / "sweep.json").read_text())["runs"], console.file.getvalue()


def multipliers_of(runs, number):
    return [run["settings"]["multiplier"] for run in runs if run["round"] == number]


def test_trains_at_toy_size(script, tmp_path):
    (tmp_path / "text.txt").write_bytes(b"0123456789" * 100)
    model = {"optimizer": "untied", "num_layers": 1, "num_heads": 1, "width": 8, "val_tokens": 64}
    data = {"path": str(tmp_path / "text.txt"), "block_size": 8, "batch_size": 4, "val_fraction": 0.2}
    arguments = {"model": model, "data": data, "tokens": 320, "rounds": 2}
    best, runs, _ = sweep(script, tmp_path / "runs", [1e-6, 0.01], **arguments)
    assert best == 0.01
    assert [run["settings"]["tokens"] for run in runs] == [320, 320, 640]
    losses = [run["val_loss"] for run in runs]
    assert losses[2] < losses[0] < losses[1]


def test_promotes_the_better_half_to_twice_the_tokens(script, tmp_path, monkeypatch):
    calls = []

    def train(multiplier, tokens, **_):
        calls.append((multiplier, tokens))
        # a high learning rate is good only in short runs
        return abs(multiplier - (4 if tokens == 64 else 2)) + 1

    monkeypatch.setattr(script, "train", train)
    best, runs, printed = sweep(script, tmp_path, [16, 1, 2, 4, 8])
    assert [multipliers_of(runs, number) for number in (1, 2, 3)] == [[4, 2, 1, 8, 16], [2, 1, 4], [2, 1]]
    assert calls == [*((m, 64) for m in (1, 2, 4, 8, 16)), *((m, 128) for m in (1, 2, 4)), *((m, 256) for m in (1, 2))]
    assert best == 2
    assert "round 2 of 3, run 3 of 3: learning rates x 4, 128 tokens: val_loss 3.0000" in printed
    assert "edge" not in printed


def test_makes_no_run_twice(script, tmp_path, monkeypatch):
    calls = []

    def train(multiplier, tokens, **_):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append((multiplier, tokens))
        return multiplier

    monkeypatch.setattr(script, "train", train)
    with pytest.raises(KeyboardInterrupt):
        sweep(script, tmp_path, [1, 2, 4])
    monkeypatch.setattr(script, "train", lambda multiplier, tokens, **_: calls.append((multiplier, tokens)) or 1.0)
    _, first, printed = sweep(script, tmp_path, [1, 2, 4])
    assert len(calls) == len(set(calls)) == 3 + 2 + 1
    assert "edge" in printed
    assert sweep(script, tmp_path, [1, 2, 4])[1] == first
    with pytest.raises(ValueError, match=r"folder must hold runs of the same settings, got others in .*: take a new"):
        sweep(script, tmp_path, [1, 2, 4], seed=2)


def test_runs_that_diverge_come_last(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "train", lambda multiplier, **_: float("nan") if multiplier > 1 else 5.0)
    best, runs, printed = sweep(script, tmp_path, [1, 2], rounds=1)
    assert (best, multipliers_of(runs, 1)) == (1, [1, 2])
    assert runs[1]["val_loss"] is None
    assert "diverged" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [("--tokens 100", "--tokens must be at least 2048, two steps"), ("--rounds 0", "--rounds must be at least 1")],
)
def test_refuses(script, words, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main([str(tmp_path), *words.split()])
    assert message in capsys.readouterr().err
