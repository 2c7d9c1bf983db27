"""Study 6: which runs it makes."""

import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from benchmarks.findings.depth_runs import DEPTHS, FACTORS, NUM_TOKENS, TUNING_TOKENS, Depth, Setting
from lightning_spectral.cli import main


class Known(Depth):
    """Runs whose loss is known: best at a rate of each batch size's own."""

    def loss_at(self, setting: Setting, tokens: int) -> float:
        assert tokens == TUNING_TOKENS
        return abs(setting.factor - {4: FACTORS[0], 8: FACTORS[1], 16: FACTORS[2]}[setting.batch_size])

    def train_all(self, settings: Iterable[Setting], tokens: int, target: float | None = None) -> None:
        trained.extend((setting, tokens) for setting in settings)


trained: list[tuple[Setting, int]] = []


def test_runs_are_those_of_the_plan() -> None:
    trained.clear()
    runs = Known().runs(36)
    assert [(one.batch_size, one.factor, one.seed) for one in runs[:4]] == [
        (4, 0.5, 1),
        (8, 1, 1),
        (16, 2, 1),
        (4, 0.5, 2),
    ]
    assert [tokens for _, tokens in trained] == [TUNING_TOKENS] * 9 + [NUM_TOKENS] * 9
    assert len({one.name for one, _ in trained}) == 9 + 6


@pytest.mark.parametrize("depth", DEPTHS)
def test_every_run_is_accepted_by_the_command_line(
    tmp_path: Path, depth: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-spectral"])
    study = Depth(tmp_path)
    for size in (4, 8, 16):
        options = study.arguments(Setting(depth, size, 0.5), NUM_TOKENS)
        assert options["trainer.max_steps"] * size * 128 == NUM_TOKENS
        assert options["trainer.val_check_interval"] * size * 128 == 16_384
    with pytest.raises(SystemExit) as ended:
        main([*study.words(Setting(depth, 8, 0.5), NUM_TOKENS), "--print_config"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for word in (f"num_layers: {depth}", "lr_multiplier: 0.5", "learning_rate: 0.001", "width: 64"):
        assert word in shown
