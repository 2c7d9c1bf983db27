"""Study 5: its runs, and that each planted change is what it is said to be."""

import copy
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.findings import planted
from benchmarks.findings.learning_or_execution_runs import (
    ARMS,
    FACTORS,
    NATURAL,
    NUM_TOKENS,
    LearningOrExecution,
    Setting,
    base_of,
)
from lightning_spectral.cli import main
from lightning_spectral.functional import covariance_spectrum
from lightning_spectral.nanogpt import NanoGPT, ShardData, next_token_loss, write_shard

SIZES: dict[str, Any] = {"num_layers": 2, "num_heads": 2, "width": 16, "vocab_size": 20, "block_size": 12}


class Known(LearningOrExecution):
    """Runs whose loss is known: best at a rate of each arm's own."""

    def loss_at(self, setting: Setting, tokens: int) -> float:
        return abs(setting.factor - FACTORS[NATURAL.index(setting.arm) % 3])

    def train_all(self, settings: Iterable[Setting], tokens: int, target: float | None = None) -> None:
        assert tokens == NUM_TOKENS
        trained.extend(settings)


trained: list[Setting] = []


def test_runs_are_those_of_the_plan() -> None:
    trained.clear()
    study = Known()
    sides = study.natural()
    assert [side[0].factor for side in sides.values()] == [FACTORS[at % 3] for at in range(7)]
    assert len(set(trained)) == 7 * 3 + 7 * 3
    trained.clear()
    changed = study.changed(sides["rope"][0])
    assert {base_of(name) for name in changed} <= {"rope", *changed}
    assert [one.arm for one in trained[: len(changed)]] == list(changed), "seeds in turn"
    assert {one.factor for one in trained} == {1.0}
    nulls = study.nulls(sides["rope"][0])
    every = [one for pair in nulls for side in pair for one in side]
    assert len(nulls) == 60
    assert sorted(one.seed for one in every) == list(range(101, 341))
    assert [[one.seed for one in side] for side in nulls[0]] == [[101, 103], [102, 104]]


@pytest.mark.parametrize("arm", ARMS)
def test_every_run_is_accepted_by_the_command_line(
    tmp_path: Path, arm: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-spectral"])
    words = LearningOrExecution(tmp_path).words(Setting(arm, 2.0, 3, 32), NUM_TOKENS)
    with pytest.raises(SystemExit) as ended:
        main([*words, "--print_config"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert f"lr_multiplier: {0.5 if arm == 'quarter_rate' else 2.0}" in shown
    for name in (ARMS[arm].callback, *(str(ARMS[arm].options.get(part, "")) for part in ("model", "data"))):
        assert name in shown
    for kept in ("tier: tiny", "vocab_size: 512", "eos_token: 0", "shuffle: true"):
        assert kept in shown


def test_steps_are_those_of_whole_batches_of_the_same_tokens() -> None:
    study = LearningOrExecution()
    for arm in ("rope", "micro_batches"):
        options = study.arguments(Setting(arm, 1.0), NUM_TOKENS)
        parts = options.get("trainer.accumulate_grad_batches", 1)
        assert options["data.batch_size"] * parts == 8
        assert options["trainer.max_steps"] * 8 * 128 == NUM_TOKENS
        assert options["trainer.val_check_interval"] * options["data.batch_size"] * 128 == 16_384


def _model(kind: type[NanoGPT] = NanoGPT, **arguments: Any) -> NanoGPT:
    torch.manual_seed(1)
    return kind(**SIZES, **arguments)


def _fill_writers(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith(("out.weight", "down.weight")):
            parameter.data.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))


def _outputs(gpt: nn.Module, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    seen: list[Tensor] = []
    handles = [block.register_forward_hook(lambda *given: seen.append(given[2])) for block in gpt.blocks]
    logits = gpt(ids)
    for handle in handles:
        handle.remove()
    return logits, seen


IDS = torch.randint(20, (8, 12), generator=torch.Generator().manual_seed(0))


def test_a_rotation_changes_neither_logits_nor_spectra_but_the_streams_basis() -> None:
    model = _model().double()
    _fill_writers(model)
    rotated = copy.deepcopy(model)
    basis = planted.rotation(16)
    torch.testing.assert_close(basis @ basis.T, torch.eye(16, dtype=torch.float64))
    planted.rotate(rotated.gpt, basis)
    (logits, seen), (others, turned) = _outputs(model.gpt, IDS), _outputs(rotated.gpt, IDS)
    torch.testing.assert_close(others, logits)
    for one, two in zip(seen, turned, strict=True):
        torch.testing.assert_close(two, one @ basis.T)
        assert not torch.allclose(two, one)
        spectra = (covariance_spectrum(rows.detach().flatten(0, 1)) for rows in (one, two))
        torch.testing.assert_close(*spectra)
    started = _model(planted.Rotated)
    torch.testing.assert_close(started(IDS), _model()(IDS), atol=1e-5, rtol=1e-5)


def test_a_scaled_channel_is_scaled_and_changes_neither_loss_nor_gradient_by_a_bit() -> None:
    model, scaled = _model(), _model(planted.ScaledChannel)
    after = torch.rand(1)
    torch.manual_seed(1)
    NanoGPT(**SIZES)
    assert torch.equal(after, torch.rand(1)), "the stream of random numbers is the base's"
    for one in (model, scaled):
        _fill_writers(one)
    (logits, seen), (others, changed) = _outputs(model.gpt, IDS), _outputs(scaled.gpt, IDS)
    assert torch.equal(logits, others)
    for one, two in zip(seen, changed, strict=True):
        assert torch.equal(two[..., 0], 4 * one[..., 0])
        assert torch.equal(two[..., 1:], one[..., 1:])
    for found in (logits, others):
        next_token_loss(found, IDS).backward()
    gradients = [{name: p.grad for name, p in one.named_parameters()} for one in (model, scaled)]
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_coordinates_are_changed_of_rope_alone() -> None:
    for kind in (planted.Rotated, planted.ScaledChannel):
        with pytest.raises(ValueError, match="recipe must be rope"):
            _model(kind, recipe="untied")


def test_noise_has_half_of_each_gradients_norm_and_a_stream_of_its_own() -> None:
    torch.manual_seed(5)
    layer = nn.Linear(300, 40)
    drawn = torch.get_rng_state()
    noise = planted.GradientNoise()
    noise.on_train_start(None, layer)
    for _ in range(2):
        added = []
        for parameter in layer.parameters():
            parameter.grad = torch.ones_like(parameter) * 3
        noise.on_before_optimizer_step(None, layer, None)
        for parameter in layer.parameters():
            difference = parameter.grad - 3
            added.append(difference)
            assert difference.norm() == pytest.approx(0.5 * 3 * parameter.numel() ** 0.5, rel=1e-5)
    assert abs(added[0].mean() / added[0].std()) < 0.05
    assert torch.equal(drawn, torch.get_rng_state())


def test_the_fused_kernel_is_taken() -> None:
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters())
    planted.FusedOptimizer().on_train_start(SimpleNamespace(optimizers=[optimizer]), model)
    next_token_loss(model(IDS), IDS).backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        optimizer.step()
    assert any("_fused_adamw_" in event.key for event in profiled.key_averages())


def test_sleep_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(planted.time, "sleep", slept.append)
    planted.Sleep().on_train_batch_start(None, None, None, 0)
    assert slept == [0.01]


@pytest.fixture
def shards(tmp_path: Path) -> dict[str, Any]:
    tokens = np.random.default_rng(0).integers(1, 20, 2000)
    write_shard(tmp_path / "a_train_0.bin", tokens)
    write_shard(tmp_path / "a_val_0.bin", tokens[:50])
    return {"path": str(tmp_path), "block_size": 12, "batch_size": 4, "val_tokens": 24, "shuffle": True, "seed": 3}


def _rows(data: ShardData, key: str = "input_ids") -> Tensor:
    return torch.cat([batch[key] for batch in data.train_dataloader()])


def test_every_sequence_is_shown_twice_in_a_row_in_the_bases_order(shards: dict[str, Any]) -> None:
    once, twice = _rows(ShardData(**shards)), _rows(planted.Twice(**shards))
    assert len(twice) == len(once)
    assert torch.equal(twice[::2], twice[1::2])
    assert torch.equal(twice[::2], once[: len(once) // 2])


def test_repacked_tokens_and_labels_are_the_same_in_other_sequences(shards: dict[str, Any]) -> None:
    part, repacked = (planted.Repacked(part_tokens=480, shift=shift, **shards) for shift in (0, 6))
    for key in ("input_ids", "labels"):
        one, two = _rows(part, key), _rows(repacked, key)
        assert one.shape == two.shape == (40, 12)
        assert Counter(one.flatten().tolist()) == Counter(two.flatten().tolist())
        assert not {tuple(row) for row in one.tolist()} & {tuple(row) for row in two.tolist()}
    text = part.train_blocks.tokens[:480]
    assert torch.equal(torch.from_numpy(np.sort(text)).long(), _rows(part).flatten().sort().values)
    for row in _rows(repacked)[:, 0:12]:
        assert row.tolist() in [np.roll(text, -start)[:12].tolist() for start in range(6, 480, 12)]


@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")
def test_a_compiled_model_is_compiled() -> None:
    assert _model(planted.Compiled).gpt._compiled_call_impl is not None
