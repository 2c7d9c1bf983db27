"""NanoGPT under a Trainer: what is logged, how the learning rate moves, what survives a checkpoint."""

import copy
import math

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.loggers.logger import DummyLogger
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

from lightning_spectral.nanogpt import NanoGPT, TextData, module, next_token_loss

SMALL = {"num_layers": 1, "num_heads": 1, "width": 8, "block_size": 8, "vocab_size": 256}


class Recorder(DummyLogger):
    """Keeps what is logged, as (step, metrics)."""

    def __init__(self):
        super().__init__()
        self.entries = []

    def log_metrics(self, metrics, step=None):
        self.entries.append((step, dict(metrics)))

    def values(self, key):
        return [(step, metrics[key]) for step, metrics in self.entries if key in metrics]


class LearningRates(pl.Callback):
    """Keeps the learning rate of each optimizer step."""

    def __init__(self):
        self.rates = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])


@pytest.fixture
def data(tmp_path):
    """Text of period 10, of which 48 blocks of 8 tokens are for training: 6 batches an epoch."""
    (tmp_path / "text.txt").write_bytes(b"0123456789" * 48)
    return TextData(str(tmp_path / "text.txt"), block_size=8, batch_size=7, val_fraction=0.2)


def trainer(**arguments):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(
        **(quiet | {"accelerator": "cpu", "enable_model_summary": False, "num_sanity_val_steps": 0} | arguments)
    )


def nanogpt(**arguments):
    pl.seed_everything(0, verbose=False)
    return NanoGPT(**(SMALL | arguments))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"recipe": "baseline"}, (5 * 3e-4, 0.1)),
        ({"recipe": "rope"}, (5 * 6e-4, 0.0)),
        ({"recipe": "baseline", "tier": "d12"}, (3e-4, 0.1)),
        ({"recipe": "rope", "tier": "d12"}, (6e-4, 0.0)),
        ({"recipe": "rope", "learning_rate": 0.01, "weight_decay": 0.3}, (0.01, 0.3)),
    ],
)
def test_defaults_are_the_recipes(arguments, expected):
    model = nanogpt(**arguments)
    assert (model.learning_rate, model.settings.weight_decay) == pytest.approx(expected)


@pytest.mark.parametrize("recipe", ["baseline", "rope"])
def test_every_parameter_is_in_one_group(recipe):
    model = nanogpt(recipe=recipe, weight_decay=0.2)
    model.gpt.gain = torch.nn.Parameter(torch.ones(8))
    model.gpt.frozen = torch.nn.Parameter(torch.ones(8, 8), requires_grad=False)
    groups = model.configure_optimizers()["optimizer"].param_groups
    members = [id(p) for group in groups for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert [(group["weight_decay"], {p.ndim for p in group["params"]}) for group in groups] == [(0.2, {2}), (0.0, {1})]
    assert all(group["betas"] == (0.9, 0.95) for group in groups)


def test_parameters_are_trained(data):
    model = nanogpt(recipe="baseline")
    before = copy.deepcopy(model.state_dict())
    trainer(max_steps=3).fit(model, data)
    assert all(not torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "limits", [{"max_steps": 12}, {"max_epochs": 2}, {"max_epochs": 4, "accumulate_grad_batches": 2}]
)
def test_learning_rate_warms_up_and_falls_to_zero(data, limits):
    rates, model = LearningRates(), nanogpt(learning_rate=0.1, warmup_steps=4)
    run = trainer(callbacks=[rates], **limits)
    run.fit(model, data)
    expected = [0.1 * (step + 1) / 4 for step in range(4)]
    expected += [0.1 * (1 + math.cos(math.pi * (step - 4) / 8)) / 2 for step in range(4, 12)]
    assert rates.rates == pytest.approx(expected)
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0)


def test_cooldown_is_the_end_of_the_run(data):
    rates, model = LearningRates(), nanogpt(learning_rate=0.1, warmup_steps=2, cooldown=0.4)
    trainer(callbacks=[rates], max_steps=12).fit(model, data)
    falling = [0.1 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]
    assert rates.rates == pytest.approx([0.05, *[0.1] * 7, *falling])


def test_without_warmup(data):
    rates, model = LearningRates(), nanogpt(learning_rate=0.1, warmup_steps=0)
    trainer(callbacks=[rates], max_steps=4).fit(model, data)
    assert rates.rates == pytest.approx([0.1 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)])


def test_without_a_limit_the_learning_rate_stays(data):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 8

    rates, model = LearningRates(), nanogpt(learning_rate=0.1, warmup_steps=2)
    trainer(callbacks=[rates, Stop()], max_epochs=-1).fit(model, data)
    assert rates.rates == pytest.approx([0.05] + [0.1] * 7)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_tokens_count_all_micro_batches(data, accumulate):
    logger, model = Recorder(), nanogpt()
    run = trainer(logger=logger, log_every_n_steps=1, max_steps=3, accumulate_grad_batches=accumulate)
    run.fit(model, data)
    batch = 7 * 8
    assert logger.values("tokens") == [(step, (step + 1) * accumulate * batch) for step in range(3)]
    assert model.tokens == 3 * accumulate * batch
    assert isinstance(model.tokens, int)


def test_tokens_are_logged_exactly(data):
    logger, model = Recorder(), nanogpt()
    model.tokens = 2**31 + 1
    trainer(logger=logger, log_every_n_steps=1, max_steps=1).fit(model, data)
    assert logger.values("tokens") == [(0, 2**31 + 1 + 56)]


def test_tokens_of_all_ranks(data):
    model, batch = nanogpt(), {"input_ids": torch.zeros(3, 5, dtype=torch.long)}
    model.trainer = type("FourRanks", (), {"world_size": 4, "global_step": 0})()
    model.on_train_batch_start(batch, 0)
    assert model.tokens == 60


def test_rate_leaves_out_validation(data, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])

    class Wait(pl.Callback):
        def on_train_batch_start(self, *_):
            now[0] += 2

        def on_validation_batch_start(self, *_):
            now[0] += 1000

    logger, model = Recorder(), nanogpt()
    arguments = {"log_every_n_steps": 2, "max_steps": 7, "val_check_interval": 1, "limit_val_batches": 2}
    trainer(logger=logger, callbacks=[Wait()], **arguments).fit(model, data)
    assert logger.values("tokens_per_second") == [(step, pytest.approx(28)) for step in (1, 3, 5)]
    assert [step for step, _ in logger.values("train_loss")] == [1, 3, 5]


def test_validation_loss_weighs_tokens():
    def batch(size, ignored):
        rows = torch.randint(256, (size, 9), generator=torch.Generator().manual_seed(size))
        labels = rows[:, 1:].clone()
        labels.flatten()[:ignored] = -100
        return {"input_ids": rows[:, :-1], "labels": labels}

    batches = [batch(4, 0), batch(2, 15), batch(1, 8)]
    model = nanogpt()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    logged = trainer().validate(model, DataLoader(batches, batch_size=None), verbose=False)[0]
    losses = [next_token_loss(model(b["input_ids"]), b["labels"]).item() for b in batches]
    assert losses[2] == 0
    assert logged == {"val_loss": pytest.approx((32 * losses[0] + losses[1]) / 33, rel=1e-5)}


def test_all_commands_work_on_text(data):
    model, run = nanogpt(), trainer(max_steps=2)
    run.fit(model, data)
    assert run.callback_metrics.keys() >= {"train_loss", "tokens"}
    assert run.validate(model, data, verbose=False)[0].keys() == {"val_loss"}
    assert run.test(model, data, verbose=False)[0].keys() == {"test_loss"}
    predicted = torch.cat(run.predict(model, data))
    inputs = torch.cat([batch["input_ids"] for batch in data.predict_dataloader()])
    assert torch.equal(predicted, model.eval()(inputs).argmax(-1))


@pytest.mark.parametrize("recipe", ["baseline", "rope"])
def test_learns_a_periodic_text(data, recipe):
    model = nanogpt(recipe=recipe, width=32, learning_rate=0.01, warmup_steps=5)
    run = trainer(max_steps=60, gradient_clip_val=1.0)
    run.fit(model, data)
    assert run.validate(model, data, verbose=False)[0]["val_loss"] < 0.1


def test_checkpoint_is_plain(data, tmp_path):
    model = nanogpt(recipe="baseline", betas=(0.8, 0.9), switches={"qk_norm": True})
    run = trainer(max_steps=2)
    run.fit(model, data)
    run.save_checkpoint(tmp_path / "last.ckpt")
    loaded = NanoGPT.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert loaded.hparams == model.hparams
    assert (loaded.tokens, loaded.settings, loaded.gpt.config) == (2 * 56, model.settings, model.gpt.config)
    assert loaded.settings.betas == (0.8, 0.9)
    batch = next(iter(data.val_dataloader()))["input_ids"]
    assert torch.equal(loaded(batch), model.eval()(batch))


def test_resumed_run_goes_on_counting_and_scheduling(data, tmp_path):
    whole, rest = LearningRates(), LearningRates()
    trainer(callbacks=[whole], max_steps=9).fit(nanogpt(warmup_steps=2), data)
    stop = trainer(max_steps=9, limit_val_batches=0)

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "four.ckpt")

    stop.callbacks.append(Save())
    stop.fit(nanogpt(warmup_steps=2), data)
    resumed = nanogpt(warmup_steps=2)
    trainer(callbacks=[rest], max_steps=9).fit(resumed, data, ckpt_path=tmp_path / "four.ckpt", weights_only=True)
    assert rest.rates == pytest.approx(whole.rates[4:])
    assert resumed.tokens == 9 * 56


def test_per_sample_gradients_of_training_step(data):
    model = nanogpt(switches={"qk_norm": False})
    parameters, batch = dict(model.named_parameters()), next(iter(data.train_dataloader()))
    shadow = copy.deepcopy(model, memo={id(p): p for p in model.parameters()})
    shadow.log = lambda *_, **__: None

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.shadow = shadow

        def forward(self, sample):
            return self.shadow.training_step({key: value[None] for key, value in sample.items()}, 0)

    def loss(parameters, sample):
        return functional_call(Step(), {f"shadow.{name}": p for name, p in parameters.items()}, (sample,))

    with sdpa_kernel(SDPBackend.MATH):
        rows = vmap(grad(loss), in_dims=(None, 0))(parameters, batch)
        model.log = lambda *_, **__: None
        model.training_step(batch, 0).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(rows[name].mean(0), parameter.grad, rtol=1e-4, atol=1e-6)
    assert model.tokens == shadow.tokens == 0


@pytest.mark.parametrize("stage", ["fit", "validate", "predict"])
def test_refuses_a_vocabulary_smaller_than_the_data(data, stage):
    message = "vocab_size must be at least 256, the number of token values in TextData, got 64: build"
    with pytest.raises(ValueError, match=message):
        getattr(trainer(max_steps=1), stage)(nanogpt(vocab_size=64), data)


def test_refuses_longer_sequences_than_its_own(data):
    with pytest.raises(
        ValueError, match="block_size must be at least 8, the length of the sequences in TextData, got 4"
    ):
        trainer(max_steps=1).fit(nanogpt(block_size=4), data)


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_refuses_unknown_tokens_of_a_bare_loader(stage):
    batch = {"input_ids": torch.full((1, 8), 70), "labels": torch.full((1, 8), 7)}
    loaders = [DataLoader([batch], batch_size=None)] * (2 if stage == "fit" else 1)
    message = r"vocab_size must be at least 71, as the data has the token 70, got 64: build"
    with pytest.raises(ValueError, match=message):
        getattr(trainer(max_steps=1, limit_val_batches=1), stage)(nanogpt(vocab_size=64), *loaders)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"cooldown": 0.0}, r"cooldown must be a fraction in \(0, 1\], got 0.0"),
        ({"tier": "huge"}, "tier must be one of tiny, d12, d24, d36, d48, got 'huge'"),
        ({"recipe": "rop"}, r"recipe must be one of baseline, rope.*, got 'rop'"),
        ({"switches": {"depth": 2}}, "overrides must be fields of GPTConfig .*, got 'depth'"),
        ({"switches": {"vocab_size": 2}}, "switches must be other fields of GPTConfig, got 'vocab_size'"),
    ],
)
def test_refuses_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        NanoGPT(**arguments)


def test_arguments_are_those_of_the_command_line():
    parser = ArgumentParser()
    parser.add_class_arguments(NanoGPT, "model")
    parser.add_class_arguments(TextData, "data")
    arguments = ["--model.recipe=baseline", "--model.switches={qk_norm: true}", "--model.betas=[0.8, 0.9]"]
    config = parser.parse_args([*arguments, "--data.block_size=16"])
    model, text = NanoGPT(**config.model.as_dict()), TextData(**config.data.as_dict())
    assert (model.gpt.config.positions, model.gpt.config.qk_norm) == ("learned", True)
    assert (model.settings.betas, text.block_size) == ((0.8, 0.9), 16)
    undocumented = [action.dest for action in parser._actions if not action.help]
    assert undocumented == []


def test_initial_losses_are_those_of_uniform_guesses(data):
    logged = trainer().validate(nanogpt(), data, verbose=False)[0]
    assert logged["val_loss"] == pytest.approx(np.log(256), abs=0.1)
