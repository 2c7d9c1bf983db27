"""Recipes' optimizers: the published numbers, who is moved by what, and Muon against its definition in a few lines."""

import math

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_spectral.nanogpt import RECIPES, TIERS, NanoGPT, TextData
from lightning_spectral.nanogpt.combined import CombinedOptimizer
from lightning_spectral.nanogpt.optimizers import (
    OPTIMIZERS,
    build_optimizer,
    group_table,
    parameters_by_role,
    settings_for,
)

MUON = [name for name, settings in OPTIMIZERS.items() if settings.matrix_optimizer == "muon"]
SMALL = {"num_layers": 2, "num_heads": 1, "width": 8, "block_size": 8, "vocab_size": 256, "warmup_steps": 0}


class EveryRole(nn.Module):
    """Holds, under the names that a model of this family may give them, parameters of every role."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(16, 4)
        self.value_tables = nn.ModuleList([nn.Embedding(16, 4)])
        self.value_embed = nn.Parameter(torch.ones(2, 16, 4))
        self.blocks = nn.ModuleList([nn.Linear(4, 8, bias=True), nn.Embedding(16, 4)])
        self.blocks.mix = nn.Parameter(torch.ones(2, 4))
        self.skip_weights = nn.Parameter(torch.ones(3))
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.head = nn.Linear(4, 16, bias=False)
        self.again = nn.Linear(4, 16, bias=False)
        self.again.weight = self.head.weight
        self.frozen = nn.Parameter(torch.ones(4, 4), requires_grad=False)


def trainer(**arguments):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
    return pl.Trainer(**(quiet | {"accelerator": "cpu", "enable_model_summary": False} | arguments))


@pytest.fixture
def data(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"0123456789" * 48)
    return TextData(str(tmp_path / "text.txt"), block_size=8, batch_size=7, val_fraction=0.2)


@pytest.fixture
def every_role():
    return EveryRole()


@pytest.mark.parametrize(
    ("recipes", "rates", "lookup_beta", "first_momentum"),
    [
        ("muon", (0.0036, 0.0036, 0.0036, 0.00036), 0.9, 0.95),
        ("untied", (0.3, 0.002, 0.02, 0.02), 0.9, 0.95),
        ("value_mix", (0.3, 0.002, 0.02, 0.02), 0.9, 0.85),
        ("unet fixed_window flex_window vte better_window", (0.6, 0.008, 0.04, 0.04), 0.9, 0.85),
        ("sparse_embed truncated_rope softcap fp8_head", (0.6, 0.008, 0.04, 0.04), 0.8, 0.85),
        ("long_short attn_scale", (0.6, 0.008, 0.04, 0.04), 0.8, 0.85),
        ("sub_lr", (75 * 0.008, 27.5 * 0.008, 5 * 0.008, 0.04), 0.8, 0.85),
    ],
)
def test_recipes_with_muon_have_the_published_numbers(recipes, rates, lookup_beta, first_momentum):
    for recipe in recipes.split():
        settings = OPTIMIZERS[recipe]
        assert settings[:4] == rates
        assert settings[4:] == (
            ("muon", 0.0, (0.9, 0.95), (lookup_beta, 0.95), (first_momentum, 0.95), "linear", 0.1)
        ), recipe


@pytest.mark.parametrize(("recipe", "rate", "decay"), [("baseline", 3e-4, 0.1), ("rope", 6e-4, 0.0)])
def test_recipes_with_adamw_have_the_published_numbers(recipe, rate, decay):
    settings = OPTIMIZERS[recipe]
    assert settings[:6] == (rate, rate, rate, rate, "adamw", decay)
    assert (settings.betas, settings.decay, settings.cooldown) == ((0.9, 0.95), "cosine", 1.0)


def test_there_are_seventeen_in_the_order_of_the_architectures():
    assert len(OPTIMIZERS) == 17
    assert [name for name in OPTIMIZERS if name in RECIPES] == list(RECIPES)


def test_roles(every_role):
    names = {id(parameter): name for name, parameter in every_role.named_parameters()}
    found = {role: [names[id(p)] for p in ps] for role, ps in parameters_by_role(every_role).items()}
    assert found == {
        "embeddings": ["value_embed", "embedding.weight", "value_tables.0.weight", "blocks.1.weight"],
        "head": ["head.weight"],
        "scalars": ["skip_weights", "scale", "blocks.mix", "blocks.0.bias"],
        "matrices": ["blocks.0.weight"],
    }


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_groups_move_by_the_rates_of_their_role(optimizer, every_role):
    settings = OPTIMIZERS[optimizer]
    built = build_optimizer(every_role, settings)
    members = [id(p) for group in built.param_groups for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in every_role.parameters() if p.requires_grad)
    if settings.matrix_optimizer == "adamw":
        assert [group["name"] for group in built.param_groups] == ["matrices_and_embeddings", "scalars"]
        return
    assert [type(part).__name__ for part in built.optimizers] == ["Muon", "AdamW"]
    assert [group["name"] for group in built.param_groups] == ["matrices", "embeddings", "head", "scalars"]
    for group in built.param_groups:
        assert group["lr"] == getattr(settings, group["name"])
        assert group["weight_decay"] == 0
    lookup, usual = settings.lookup_betas, settings.betas
    assert [group["betas"] for group in built.param_groups[1:]] == [lookup, usual, lookup]
    assert built.param_groups[0]["momentum"] == settings.momentum[0]


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_parameter_is_in_one_group(tier, recipe):
    with torch.device("meta"):
        model = NanoGPT(tier, recipe, vocab_size=50304)
    optimizer = model.configure_optimizers()["optimizer"]
    members = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(members) == sorted(map(id, model.parameters()))
    assert all(p.ndim == 2 for p in parameters_by_role(model)["matrices"])
    blocks = [p for p in model.gpt.blocks.parameters() if p.ndim == 2]
    if isinstance(optimizer, CombinedOptimizer):
        assert {id(p) for p in optimizer.optimizers[0].param_groups[0]["params"]} == set(map(id, blocks))


def naive_muon(weight, gradients, lr, momentum):
    """In float64: Newton-Schulz brings all singular values near 1, the factor makes up for tall matrices."""
    weight, velocity = weight.double(), 0
    for gradient in gradients:
        velocity = momentum * velocity + gradient.double()
        x = gradient.double() + momentum * velocity
        x = x / x.norm()
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        weight = weight - lr * math.sqrt(max(1, weight.size(0) / weight.size(1))) * x
    return weight


def test_without_muon_only_the_recipes_with_it_are_refused(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    build_optimizer(EveryRole(), OPTIMIZERS["rope"])
    wanted = r"matrix_optimizer must be 'adamw' with torch \d.*, got 'muon', which needs torch>=2.9$"
    with pytest.raises(ValueError, match=wanted):
        build_optimizer(EveryRole(), OPTIMIZERS["untied"])
    build_optimizer(EveryRole(), settings_for("tiny", "untied", matrix_optimizer="adamw"))


@pytest.mark.parametrize("shape", [(32, 8), (8, 32), (16, 16)], ids=str)
def test_muon_is_its_definition(shape):
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(shape[1], shape[0], bias=False)])
    weight = model.blocks[0].weight
    optimizer = build_optimizer(model, OPTIMIZERS["untied"])
    assert isinstance(optimizer, torch.optim.Muon)
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator) for _ in range(3)]
    start = weight.detach().clone()
    for weight.grad in gradients:
        optimizer.step()
    moved, expected = weight.detach() - start, naive_muon(start, gradients, 0.02, 0.95) - start
    # torch iterates in bfloat16
    assert (moved - expected).norm() < 0.02 * expected.norm()
    other = moved / math.sqrt(max(1, shape[0] / shape[1])) * 0.2 * math.sqrt(max(shape))  # torch's other factor
    assert (other - expected).norm() > 0.1 * expected.norm()


def test_multipliers_of_sub_lr_act(every_role):
    model = every_role
    optimizer = build_optimizer(model, OPTIMIZERS["sub_lr"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-2)
    optimizer.step()
    # AdamW's first step is as long as the learning rate
    moved = {name: (p.detach() - before[name]).abs().mean().item() / 0.008 for name, p in model.named_parameters()}
    picked = [moved[name] for name in ("embedding.weight", "value_tables.0.weight", "head.weight", "skip_weights")]
    assert picked == pytest.approx([75, 75, 27.5, 5], rel=1e-4)


def test_one_multiplier_moves_all_rates():
    for recipe in OPTIMIZERS:
        base, double = settings_for("d12", recipe), settings_for("d12", recipe, lr_multiplier=2.0)
        assert base == OPTIMIZERS[recipe]
        assert double[:4] == tuple(2 * rate for rate in base[:4])
        assert double[4:] == base[4:]


@pytest.mark.parametrize(
    ("recipe", "factor"), [("baseline", 5), ("rope", 5), ("muon", 5), ("untied", 1), ("sub_lr", 1)]
)
def test_tiny_models_bear_more_of_adamw(recipe, factor):
    tiny, usual = settings_for("tiny", recipe), settings_for("d12", recipe)
    assert tiny[:4] == pytest.approx([factor * rate for rate in usual[:4]])
    assert tiny[4:] == usual[4:]


def test_matrices_may_be_adamws(every_role):
    settings = settings_for("d12", "long_short", matrix_optimizer="adamw")
    built = build_optimizer(every_role, settings)
    assert type(built) is torch.optim.AdamW
    assert [group["lr"] for group in built.param_groups] == [0.6, 0.008, 0.04, 0.004]
    assert built.param_groups[3]["betas"] == (0.9, 0.95)
    assert settings_for("tiny", "muon", matrix_optimizer="adamw").matrices == 0.004


def test_arguments_override_the_recipe(every_role):
    settings = settings_for("d12", "unet", weight_decay=0.3, betas=(0.5, 0.6), cooldown=0.7)
    groups = build_optimizer(every_role, settings).param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.3, 0.3, 0.0]
    assert {group["betas"] for group in groups[1:]} == {(0.5, 0.6)}
    assert settings.cooldown == 0.7


class Schedule(pl.Callback):
    """Keeps momentum and relative learning rates of each optimizer step, as it is taken."""

    def __init__(self):
        self.momenta, self.rates = [], []

    def on_train_start(self, trainer, pl_module):
        trainer.optimizers[0].register_step_post_hook(self.keep)

    def keep(self, optimizer, *_):
        self.momenta.append(optimizer.optimizers[0].param_groups[0]["momentum"])
        rates = {
            round(group["lr"] / group["initial_lr"], 9) for part in optimizer.optimizers for group in part.param_groups
        }
        self.rates.append(rates)


def test_momentum_rises_and_all_rates_fall_in_the_last_tenth(data):
    schedule, model = Schedule(), NanoGPT(optimizer="unet", lr_multiplier=0.01, **SMALL)
    trainer(max_steps=20, callbacks=[schedule]).fit(model, data)
    assert schedule.momenta == pytest.approx([0.85 + 0.1 * step / 500 for step in range(20)])
    assert schedule.rates == [{1.0}] * 19 + [{0.5}]


def test_momentum_stays_after_its_rise():
    settings = OPTIMIZERS["value_mix"]
    assert [settings.momentum_at(step) for step in (0, 250, 500, 9999)] == pytest.approx([0.85, 0.9, 0.95, 0.95])


def test_table_shows_every_group(data, capsys):
    model = NanoGPT(optimizer="unet", **SMALL)
    trainer(max_steps=1, enable_model_summary=True).fit(model, data)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    matrices, embeddings = (next(row for row in rows if row[:1] == [name]) for name in ("matrices", "embeddings"))
    rates = model.settings
    assert matrices == ["matrices", "Muon", "12", f"{2 * 12 * 64:,}", f"{rates.matrices:.3g}", "0"]
    assert embeddings == ["embeddings", "AdamW", "1", f"{256 * 8:,}", f"{rates.embeddings:.3g}", "0"]
    trainer(max_steps=1).fit(model, data)
    assert capsys.readouterr().out == ""


def test_table_of_one_optimizer(every_role):
    table = group_table(build_optimizer(every_role, OPTIMIZERS["baseline"]))
    assert list(table.columns[0].cells) == ["matrices_and_embeddings", "scalars"]
    assert list(table.columns[5].cells) == ["0.1", "0"]


def test_learning_rates_are_logged_by_name(data):
    class Names(pl.callbacks.LearningRateMonitor):
        def on_train_end(self, *_):
            self.names = sorted(self.lrs)

    monitor = Names()
    run = trainer(max_steps=1, callbacks=[monitor], logger=pl.loggers.logger.DummyLogger())
    run.fit(NanoGPT(optimizer="untied", **SMALL), data)
    assert monitor.names == ["lr-CombinedOptimizer/embeddings", "lr-CombinedOptimizer/matrices"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizer": "unett"}, "optimizer must be one of baseline, .*, sub_lr, got 'unett'"),
        ({"lr_multiplier": 0.0}, "lr_multiplier must be above 0, got 0.0: 1 leaves"),
        ({"optimizer": "unet", "learning_rate": 0.1}, r"learning_rate must be None .*head .*, got 0.1: multiply them"),
        ({"recipe": "rope", "matrix_optimizer": "muon"}, "matrix_optimizer must be adamw for rope, .*got 'muon'"),
        ({"optimizer": "unet", "matrix_optimizer": "sgd"}, "matrix_optimizer must be one of muon, adamw, got 'sgd'"),
        ({"stop_at_loss": 0.0}, "stop_at_loss must be above 0, got 0.0"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        NanoGPT(**(SMALL | arguments))
