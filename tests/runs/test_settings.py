"""Which runs are seeds of one setting, by what their records say."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_spectral import Run
from lightning_spectral.recording.family import describe_setting
from lightning_spectral.runs.settings import settings_of
from tests.runs.made_up import made_up


def numbers(folder: Path, *runs: dict[str, Any]) -> list[int]:
    made = []
    for number, about in enumerate(runs):
        kwargs = {key: about[key] for key in ("family", "batch_tokens") if key in about}
        rest = {key: value for key, value in about.items() if key not in kwargs}
        made.append(Run(made_up(folder / f"{number}", 100, 1, about={"seed": number} | rest, **kwargs)))
    return settings_of(made)


def swept(**hyperparameters: Any) -> dict[str, Any]:
    return {"setting": {"hyperparameters": hyperparameters, "optimizers": [{"class": "Adam", "lr": 0.1}]}}


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ([{}, {}, {}], [0, 0, 0]),
        ([{"batch_tokens": 64.0}, {"batch_tokens": 128.0}, {"batch_tokens": 64.0}], [0, 1, 0]),
        ([{"batch_tokens": 1000.0}, {"batch_tokens": 1030.0}, {"batch_tokens": 1060.0}], [0, 0, 0]),
        ([{"batch_tokens": 1000.0}, {"batch_tokens": 1100.0}], [0, 1]),
        ([{"batch_tokens": None}, {"batch_tokens": 64.0}, {"batch_tokens": 128.0}], [0, 0, 0]),
        ([{"family": "F"}, {"family": "G"}], [0, 1]),
        ([{"world_size": 1}, {"world_size": 2}, {"world_size": 1}], [0, 1, 0]),
        ([{"world_size": 1}, {"world_size": 2}, {}], [0, 0, 0]),
        ([swept(lr=0.1), swept(lr=0.2), swept(lr=0.1)], [0, 1, 0]),
        ([swept(lr=0.1), swept(lr=0.2), {}], [0, 0, 0]),
        ([{"tags": {"setting": "a"}}, {"tags": {"setting": "b"}}, {"tags": {"setting": "a"}}], [0, 1, 0]),
        ([{"tags": {"setting": "a"}, "batch_tokens": 64.0}, {"tags": {"setting": "a"}, "batch_tokens": 9.0}], [0, 0]),
        ([{"tags": {"idea": "a"}}, {"tags": {"idea": "b"}}], [0, 0]),
        ([], []),
    ],
)
def test_settings_are_told_by_what_all_runs_recorded(tmp_path: Path, runs: list[dict], expected: list[int]) -> None:
    assert numbers(tmp_path, *runs) == expected


class Configured(nn.Module):
    def __init__(self, **hparams: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.hparams = hparams


def test_a_setting_is_what_a_sweep_sweeps_without_the_seed() -> None:
    module = Configured(width=3, learning_rate=0.1, seed=7, optimizer={"lr": 0.2, "warmup_steps": 5}, stop_at_loss=1.0)
    data = Configured(batch_size=4, data_seed=3, path="text")
    first, second = module.layer.weight, module.layer.bias
    optimizer = torch.optim.AdamW(
        [{"params": [first]}, {"params": [second], "weight_decay": 0.5}], lr=torch.tensor(0.25)
    )
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)  # a warm-up begins at nothing
    found = describe_setting(module, data, [optimizer])
    assert found["hyperparameters"] == {
        "learning_rate": 0.1,
        "optimizer.lr": 0.2,
        "optimizer.warmup_steps": 5,
        "batch_size": 4,
    }
    common = {"class": "AdamW", "lr": 0.25, "betas": [0.9, 0.999]}
    assert found["optimizers"] == [{**common, "weight_decay": decay} for decay in (0.01, 0.5)]
    assert describe_setting(nn.Linear(2, 2), None, []) == {"hyperparameters": {}, "optimizers": []}
