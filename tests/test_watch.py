"""A loop of one's own is watched as a Trainer is: the same numbers, keys and records, and training as without."""

import doctest
import math
import random
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from lightning.fabric import Fabric
from lightning.pytorch import seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from lightning_spectral import (
    ActivationSpectrum,
    GradientSpectrum,
    HeadDrift,
    Run,
    RunRecord,
    SpectralWatch,
    TailForecaster,
    cli,
    compare,
    forecast,
)
from lightning_spectral.callbacks.loop_host import watched_module
from lightning_spectral.reporting.headline import headline
from tests.callbacks.test_do_no_harm import assert_identical, attributes
from tests.distributed import run_distributed
from tests.models import LanguageModel, Network, Tokens, tiny_trainer, token_loader

WEIGHTS = "blocks.*.mix.weight"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def loss_of(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(network(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())


def instruments(method: str = "auto", start: str = "") -> dict[str, Any]:
    """For a module whose names begin with something more than the network's."""
    return {
        "activations": ActivationSpectrum(every_n_steps=4, num_tokens=96, mask=None),
        "gradients": GradientSpectrum(f"{start}{WEIGHTS}", every_n_steps=4, num_samples=16, method=method),
        "drift": HeadDrift(rank=4, every_n_steps=4, num_tokens=96, overlap=False),
    }


def under_a_trainer(folder: Path, given: dict[str, Any], **kwargs: Any) -> dict[str, float]:
    seed_everything(0, verbose=False)
    logger = TensorBoardLogger(folder, "", "")
    limits = {"max_steps": 8, "val_check_interval": 4, "num_sanity_val_steps": 0, "logger": logger}
    trainer = tiny_trainer(folder, callbacks=[*given.values(), RunRecord(family="F")], **(limits | kwargs))
    trainer.fit(LanguageModel(), token_loader(128), token_loader(16, seed=1))
    found = {key.replace("network.", ""): float(value) for key, value in trainer.callback_metrics.items()}
    return {key: value for key, value in found.items() if key != "train_loss" and "seconds" not in key}


def in_a_loop(
    folder: Path, given: dict[str, Any], accumulate: int = 1, inside: bool = False, every: int = 4, steps: int = 8
) -> dict[str, float]:
    seed_everything(0, verbose=False)
    network = LanguageModel().network
    optimizer = torch.optim.AdamW(network.parameters(), 1e-2)
    options = {"optimizer": optimizer, "loss_fn": loss_of, "logger": TensorBoardLogger(folder, "", "")}
    with SpectralWatch(network, record=RunRecord(family="F"), **given, **options) as watch:
        for index, batch in zip(range(steps * accumulate), token_loader(128), strict=False):
            is_last = (index + 1) % accumulate == 0
            with watch.step(batch):
                loss = watch.loss(loss_of(network, batch))
                (loss / accumulate).backward()
                if inside and is_last:
                    optimizer.step()
            if is_last:
                if not inside:
                    optimizer.step()
                optimizer.zero_grad()
            if (index + 1) % (every * accumulate) == 0:
                validate(watch, network)
    return {key: value for key, value in watch.metrics.items() if "seconds" not in key}


def validate(watch: SpectralWatch, network: nn.Module) -> None:
    network.eval()
    with watch.validation(token_loader(16, seed=1)) as batches, torch.no_grad():
        losses = [float(loss_of(network, batch)) for batch in batches]
        watch.log(val_loss=sum(losses) / len(losses))
    network.train()


def assert_same(found: dict[str, float], expected: dict[str, float], tolerance: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=tolerance or 1e-12, abs=0, nan_ok=True), key


@pytest.mark.parametrize("method", ["auto", "hooks"])
@pytest.mark.parametrize("inside", [False, True], ids=["step after the block", "step in the block"])
def test_numbers_keys_and_record_are_those_of_the_callbacks(tmp_path: Path, method: str, inside: bool) -> None:
    expected = under_a_trainer(tmp_path / "trainer", instruments(method, "network."))
    found = in_a_loop(tmp_path / "loop", instruments(method), inside=inside)
    # The mean of means of a validation run is summed in another order.
    assert found.pop("val_loss") == pytest.approx(expected.pop("val_loss"), rel=1e-6)
    assert_same(found, expected)
    assert not math.isnan(found["gradient/blocks.0.mix.weight/alpha_tail"])
    assert found["gradient/failed"] == found["activation/failed"] == 0
    runs = [Run(tmp_path / name) for name in ("trainer", "loop")]
    histories = [(run.history.step, run.history.tokens, run.history.train_loss) for run in runs]
    for mine, theirs in zip(*histories, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)
    np.testing.assert_allclose(runs[0].history.val_loss, runs[1].history.val_loss, rtol=1e-6)
    same = ("batch_tokens", "validation_data", "validation_samples", "val_loss", "world_size")
    assert [runs[0].about[key] for key in same] == [runs[1].about[key] for key in same]
    for kind in ("activation", "gradient"):
        assert runs[0].steps(kind) == runs[1].steps(kind)


@pytest.mark.parametrize("method", ["auto", "hooks"])
def test_accumulation_is_seen(tmp_path: Path, method: str) -> None:
    kwargs = {"accumulate_grad_batches": 2, "val_check_interval": 8}
    expected = under_a_trainer(tmp_path / "trainer", instruments(method, "network."), **kwargs)
    found = in_a_loop(tmp_path / "loop", instruments(method), accumulate=2)
    assert found.pop("val_loss") == pytest.approx(expected.pop("val_loss"), rel=1e-6)
    assert_same(found, expected)
    run = Run(tmp_path / "loop")
    assert run.about["batch_tokens"] == 64
    assert run.history.tokens[-1] == 16 * 4 * 8


def test_its_runs_are_shown_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        in_a_loop(tmp_path / name, {"drift": HeadDrift("blocks.*", 4, every_n_steps=4, num_tokens=96)})
    assert capsys.readouterr().out.count("drift of 4 leading eigenvectors") == 2  # by each, at its end
    found = compare(str(tmp_path / "one"), str(tmp_path / "two"))
    assert {shift.name for shift in found.shifts if shift.quantity == "js" and shift.shift == 0} >= {"blocks.0"}
    cli.main(["show", str(tmp_path / "one")])
    assert "blocks.5" in capsys.readouterr().out


def copying(folder: Path, batch_size: int, seed: int, steps: int) -> None:
    """Trains a network to say what it is told, by a plain loop."""
    torch.manual_seed(seed)
    network = Network(num_blocks=2)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    spectrum = ActivationSpectrum("blocks.1", every_n_steps=4, num_tokens=512, num_groups=2, stage="validate")
    watch = SpectralWatch(network, spectrum, record=RunRecord(), optimizer=optimizer, log_dir=folder)
    for step in range(steps):
        tokens = torch.randint(40, (batch_size, 8))
        with watch.step({"input_ids": tokens}):
            watch.loss(F.cross_entropy(network(tokens).flatten(0, 1), tokens.flatten())).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 4 == 3:
            held_out = torch.arange(40 * 8).remainder(40).reshape(40, 8)
            with watch.validation(held_out.split(20)) as batches, torch.no_grad():
                watch.log(val_loss=sum(F.cross_entropy(network(x).flatten(0, 1), x.flatten()) for x in batches) / 2)
    watch.close()


def test_a_seed_is_on_record_while_it_is_in_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def recorded(name: str) -> int | None:
        watch = SpectralWatch(nn.Linear(2, 2), log_dir=tmp_path / name)
        with watch.step(torch.zeros(1, 2)):
            pass
        watch.close()
        return Run(tmp_path / name).about["seed"]

    monkeypatch.setenv("PL_GLOBAL_SEED", "")  # to be put back
    seed_everything(5, verbose=False)
    assert recorded("lightning") == 5
    torch.manual_seed(6)
    assert recorded("own") is None
    Fabric(accelerator="cpu").seed_everything(8, verbose=False)
    assert recorded("fabric") == 8


def test_its_runs_are_forecast_from_each_other(tmp_path: Path) -> None:
    for batch_size in (2, 4, 8):
        for seed in (0, 1):
            copying(tmp_path / f"{batch_size}-{seed}", batch_size, seed, 64)
    copying(tmp_path / "new", 4, 2, 16)
    (found,) = forecast(str(tmp_path / "*"), target=0.3)
    (new,) = found.forecasts
    assert new.reason is None
    assert new.num_references == 6
    assert new.low < new.value < new.high


def test_training_is_bit_identical(tmp_path: Path) -> None:
    expected, found = trained(None), trained(tmp_path)
    assert found.pop("reports") == [4, 8, 12]
    assert expected.pop("reports") == []
    assert_identical(found, expected)


class Writing(Network):
    """Counts its passes, draws from a generator of its own and from all others, and may be compiled."""

    def __init__(self) -> None:
        super().__init__(dropout=0.1)
        self.register_buffer("num_passes", torch.zeros(()))
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, tokens: Tensor) -> Tensor:
        self.num_passes += 1
        return super().forward(tokens) * (1 + torch.rand((), generator=self.generator) + random.random())


def trained(folder: Path | None) -> dict[str, Any]:
    seed_everything(0, verbose=False)
    network = Writing()
    optimizer = torch.optim.AdamW(network.parameters(), 1e-2)
    watch = None
    if folder is not None:
        watch = SpectralWatch(
            network,
            activations=ActivationSpectrum("all", every_n_steps=4, num_tokens=96, overlap=True),
            gradients=GradientSpectrum(WEIGHTS, every_n_steps=4, num_samples=16, check="off"),
            optimizer=optimizer,
            loss_fn=loss_of,
            log_dir=folder,
        )
    for batch in token_loader(48):
        if watch is None:
            loss_of(network, batch).backward()
        else:
            with watch.step(batch):
                watch.loss(loss_of(network, batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
    if watch is not None:
        watch.close()
    return {
        "reports": [] if folder is None else Run(folder).steps("activation"),
        "state": {key: value.clone() for key, value in network.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in network.modules()
        ],
        "hooks of the optimizer": (len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)),
        "generator": network.generator.get_state(),
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "attributes": [a | {"generator": None} for a in attributes(network)],
    }


def test_a_compiled_model_is_watched(tmp_path: Path) -> None:
    def train(is_watched: bool) -> tuple[list[Tensor], dict[str, float]]:
        torch._dynamo.reset()  # else code that was compiled before would be taken for this one's
        seed_everything(0, verbose=False)
        network = Network()
        model = torch.compile(network, backend="eager")
        optimizer = torch.optim.SGD(model.parameters(), 1e-2)
        given = {"activations": ActivationSpectrum(every_n_steps=4, num_tokens=96, overlap=False)} if is_watched else {}
        with SpectralWatch(model, **given, optimizer=optimizer) as watch:
            for batch in token_loader(16):
                with watch.step(batch):
                    loss_of(model, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
        return [p.clone() for p in network.parameters()], watch.metrics

    expected, _ = train(False)
    found, metrics = train(True)
    assert_identical(found, expected)
    assert metrics["activation/blocks.5/num_tokens"] == 96
    with pytest.raises(ValueError, match="compiled"):
        SpectralWatch(torch.compile(Network(), backend="eager"), gradients=GradientSpectrum(WEIGHTS, method="hooks"))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_what_checkpointing_repeats_is_read_once(use_reentrant: bool) -> None:
    network = Network()
    network.use_reentrant = use_reentrant
    watch = SpectralWatch(network, ActivationSpectrum("all", every_n_steps=1, num_groups=1, overlap=False))
    for batch in token_loader(8):
        with watch.step(batch):
            loss_of(network, batch).backward()
        assert watch.metrics["activation/blocks.0/num_tokens"] == 32


def test_the_factor_on_a_loss_is_seen() -> None:
    """As a gradient scaler and accumulation put it there; in place, too."""
    found = []
    for factor in (1.0, 128.0):
        torch.manual_seed(0)
        network = Network()
        gradients = GradientSpectrum(WEIGHTS, every_n_steps=4, num_samples=16, num_groups=1, method="hooks")
        watch = SpectralWatch(network, gradients=gradients, loss_fn=loss_of)
        for batch in token_loader(16):
            with watch.step(batch):
                loss = watch.loss(loss_of(network, batch))
                loss *= factor
                loss.backward()
        found.append({key: value for key, value in watch.metrics.items() if "seconds" not in key})
    assert found[0]["gradient/failed"] == 0
    assert_same(found[1], found[0], 1e-5)


@pytest.mark.parametrize(("given", "told"), [("mean", "sum"), ("sum", "mean")])
def test_a_loss_that_is_seen_to_be_reduced_otherwise_is_refused(given: str, told: str) -> None:
    network = nn.Linear(8, 4)
    gradients = GradientSpectrum("weight", num_samples=16, num_groups=1, method="hooks", loss_reduction=given)
    watch = SpectralWatch(network, gradients=gradients)
    inputs = torch.randn(8, 8)
    message = f"loss_reduction must be that of the loss that is told, which is a {told}, got '{given}'"
    with pytest.raises(ValueError, match=message), watch.step(inputs):
        watch.loss(F.mse_loss(network(inputs), torch.zeros(8, 4), reduction=told)).backward()


def test_a_loss_that_is_differentiated_twice_has_no_rows() -> None:
    network = Network()
    gradients = GradientSpectrum(WEIGHTS, every_n_steps=4, num_samples=16, num_groups=1, method="hooks")
    watch = SpectralWatch(network, gradients=gradients, loss_fn=loss_of)

    def train() -> None:
        for batch in token_loader(16):
            with watch.step(batch):
                loss = watch.loss(loss_of(network, batch))
                (loss / 2).backward(retain_graph=True)
                (loss / 2).backward()

    with pytest.warns(UserWarning, match="NaN, because the loss that was told is differentiated several times"):
        train()
    assert math.isnan(watch.metrics["gradient/blocks.0.mix.weight/alpha_tail"])


def test_a_loss_function_that_does_something_else_is_found_out() -> None:
    network = Network()
    gradients = GradientSpectrum(WEIGHTS, every_n_steps=4, num_samples=16, num_groups=1)
    watch = SpectralWatch(network, gradients=gradients, loss_fn=lambda model, batch: 2 * loss_of(model, batch))
    with pytest.warns(UserWarning, match="and loss_fn gives .*: have it do what the loop does"):
        run(watch, network, 16)
    assert math.isnan(watch.metrics["gradient/blocks.0.mix.weight/alpha_tail"])


@pytest.mark.filterwarnings("ignore:.*method='auto' loops over samples, because vmap cannot. the list weight")
@pytest.mark.parametrize("method", ["auto", "loop", "hooks"])
def test_a_list_in_the_batch_goes_with_its_samples(method: str) -> None:
    torch.manual_seed(0)
    model, x, weights = nn.Linear(6, 5), torch.randn(12, 6), [0.1 + index for index in range(12)]
    loss_fn = lambda model, batch: (model(batch["x"]).square().mean(-1) * torch.tensor(batch["weight"])).mean()  # noqa: E731
    spectrum = GradientSpectrum("weight", 1, num_samples=12, method=method, num_groups=2, tail=(2, 6), head=(1, 4))
    watch, batch = SpectralWatch(model, gradients=spectrum, loss_fn=loss_fn), {"x": x, "weight": weights}
    with watch.step(batch):
        watch.loss(loss_fn(model, batch)).backward()
    own = [model(one).square().mean() * weight for one, weight in zip(x, weights, strict=True)]
    rows = torch.stack([torch.autograd.grad(loss, model.weight)[0].flatten() for loss in own]).double()
    trace, mean = rows.var(0).sum(), rows.mean(0).square().sum()
    assert watch.metrics["gradient/weight/grad_norm"] == pytest.approx(float(mean.sqrt()), rel=1e-4)
    assert watch.metrics["gradient/weight/noise_scale"] == pytest.approx(float(trace / (mean - trace / 12)), rel=1e-3)


def test_the_example_runs() -> None:
    assert doctest.testmod(sys.modules[SpectralWatch.__module__]).failed == 0


def test_steps_without_an_optimizer_are_blocks() -> None:
    watch = SpectralWatch(Network(), ActivationSpectrum(every_n_steps=2, num_groups=1, overlap=False))
    for index, batch in enumerate(token_loader(32)):
        with watch.step(batch, accumulates=index % 2 == 0):
            loss_of(watch._loop.host.module, batch).backward()
    assert watch.num_steps == 4
    assert watch.metrics["activation/blocks.0/num_tokens"] == 2 * 2 * 32  # the two steps before the report


def test_alternating_optimizers_count_each_step() -> None:
    network = Network()
    optimizers = [torch.optim.SGD(part.parameters(), 1e-2) for part in (network.blocks, network.logits)]
    spectrum = ActivationSpectrum(every_n_steps=4, num_groups=1, overlap=False)
    watch = SpectralWatch(network, spectrum, optimizer=optimizers)
    seen = []
    for batch in token_loader(16):
        with watch.step(batch):
            loss_of(network, batch).backward()
        for optimizer in optimizers:
            optimizer.step()
        seen.append(watch.metrics["activation/blocks.0/num_tokens"])
    assert watch.num_steps == 8
    assert [math.isnan(rows) for rows in seen] == [True, False, False, False]
    assert seen[1] == 64


def run(watch: SpectralWatch, network: nn.Module, num_samples: int) -> None:
    for batch in token_loader(num_samples):
        with watch.step(batch):
            watch.loss(loss_of(network, batch)).backward()


class Failing(ActivationSpectrum):
    """Cannot say what a report comes to, nor draw it."""

    def take_report(self, host: Any) -> None:
        super().take_report(host)
        if host.step > 2:
            raise RuntimeError("a bug of ours")


def test_nothing_that_measuring_does_ends_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network()
    watch = SpectralWatch(network, Failing(every_n_steps=2, num_groups=1, overlap=False))
    with pytest.warns(UserWarning, match="SpectralWatch goes on without what failed: a bug of ours"):
        run(watch, network, 32)
    assert watch.num_steps == 8


def test_a_batch_that_fails_is_dropped() -> None:
    network = Network()
    watch = SpectralWatch(network, ActivationSpectrum(every_n_steps=1, num_groups=1, overlap=False))
    batches = iter(token_loader(8))
    with pytest.raises(RuntimeError, match="of the user's"), watch.step(next(batches)):
        raise RuntimeError("of the user's")
    batch = next(batches)
    with watch.step(batch):
        loss_of(network, batch).backward()
    assert watch.num_steps == 1
    assert watch.metrics["activation/blocks.0/num_tokens"] == 32


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"activations": HeadDrift()}, r"activations must be a ActivationSpectrum, got .*: give True or"),
    ({"forecast": True}, r"forecast must be a TailForecaster, got True: give TailForecaster\(target_loss\)"),
    ({"activations": ActivationSpectrum("nothing.*")}, "matches no layer"),
    ({"gradients": GradientSpectrum(WEIGHTS)}, "loss_fn must be given for Network, which has no training_step"),
    ({"optimizer": "adam"}, "optimizer must be a torch.optim.Optimizer"),
    ({"logger": "tensorboard"}, "logger must be a Lightning logger"),
    *(({"log_dir": folder}, "log_dir must be a path, got .*: give a log directory") for folder in (5, b"logs", "", [])),
    ({"loss_fn": "no.where"}, "loss_fn must be a callable or its import path"),
    ({"activations": True, "record": ActivationSpectrum()}, "record must be a RunRecord"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=[message[:20] for _, message in REFUSED])
def test_arguments_that_mean_nothing_are_refused(given: dict[str, Any], message: str) -> None:
    network = Network()
    with pytest.raises(ValueError, match=message) as caught:
        SpectralWatch(network, **given)
    assert "\n" not in str(caught.value)
    assert not any(len(module._forward_hooks) for module in network.modules())


def test_what_does_not_fit_a_batch_shows_in_the_first() -> None:
    network = Network()
    batch = next(iter(token_loader()))
    watch = SpectralWatch(network, ActivationSpectrum(mask="attention_mask"))
    with pytest.raises(ValueError, match="mask must name a tensor with axes"), watch.step(batch):
        pass
    watch = SpectralWatch(network, gradients=GradientSpectrum(WEIGHTS, method="hooks"))
    with pytest.raises(ValueError, match=r"loss must be told by watch.loss\(loss\)"), watch.step(batch):
        loss_of(network, batch).backward()
    with pytest.raises(ValueError, match="watch is closed"), watch.step(batch):
        pass


def test_blocks_that_do_not_end_are_refused() -> None:
    watch, batch = SpectralWatch(Network()), next(iter(token_loader()))
    with pytest.raises(ValueError, match="must have ended"), watch.step(batch), watch.step(batch):
        pass
    with pytest.raises(ValueError, match=r"within watch.step\(batch\)"):
        watch.loss(torch.zeros(()))
    watch = SpectralWatch(Network(), optimizer=torch.optim.SGD(Network().parameters(), 1e-2))
    with pytest.raises(ValueError, match="accumulates must be False"), watch.step(batch, accumulates=True):
        pass
    with pytest.raises(ValueError, match="loss must be a tensor with one number"), watch.step(batch):
        watch.loss(torch.zeros(2))
    with pytest.raises(ValueError, match="metrics must be numbers by key"):
        watch.log(val_loss="low")
    with pytest.raises(ValueError, match="num_batches must be a positive int"), watch.validation([], 0):
        pass


@pytest.mark.parametrize("wrapper", ["DataParallel", "FullyShardedDataParallel"])
def test_models_that_are_not_whole_are_refused(wrapper: str) -> None:
    made = type(wrapper, (nn.Sequential,), {})(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=f"model must be whole on each rank, .* got {wrapper}"):
        SpectralWatch(made, activations=True)


def test_names_begin_at_the_module_inside() -> None:
    network = Network()
    inside = type("DistributedDataParallel", (nn.Module,), {})()
    inside.module = network
    fabric = type("_FabricModule", (nn.Module,), {})()
    fabric._forward_module, fabric._original_module = inside, network
    assert watched_module(network) is watched_module(inside) is watched_module(fabric) is network
    compiled = torch.compile(network, backend="eager")
    assert watched_module(compiled) is compiled
    inside.module = compiled
    assert watched_module(fabric) is compiled
    assert watched_module(torch.compile(inside, backend="eager")) is compiled


def test_a_resumed_loop_goes_on(tmp_path: Path) -> None:
    def part(start: int, stop: int, state: dict[str, Any] | None) -> tuple[dict[str, Any], dict[str, float]]:
        torch.manual_seed(0)
        network = Network()
        optimizer = torch.optim.SGD(network.parameters(), 1e-2)
        drift = HeadDrift("blocks.*", 4, every_n_steps=2, stage="train", num_tokens=64, overlap=False)
        watch = SpectralWatch(network, drift=drift, optimizer=optimizer, log_dir=tmp_path)
        if state is not None:
            network.load_state_dict(state["network"])
            watch.load_state_dict(state["watch"])
        for batch in list(token_loader(32))[start:stop]:
            with watch.step(batch):
                watch.loss(loss_of(network, batch)).backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.save({"network": network.state_dict(), "watch": watch.state_dict()}, tmp_path / "state.pt")
        watch.close()
        return torch.load(tmp_path / "state.pt", weights_only=True), watch.metrics

    _, expected = part(0, 8, None)
    whole = Run(tmp_path).history
    state, _ = part(0, 4, None)
    _, found = part(4, 8, state)
    resumed = Run(tmp_path).history
    assert found.keys() == expected.keys()
    for key in expected:
        if "seconds" not in key:
            assert found[key] == pytest.approx(expected[key], rel=1e-9), key
    assert resumed.tokens.tolist()[-1] == whole.tokens.tolist()[-1] == 8 * 32
    assert Run(tmp_path).steps("activation") == [2, 4, 6, 8]


def test_two_optimizers_that_step_together_take_one_batch(tmp_path: Path) -> None:
    network = Network()
    parameters = list(network.parameters())
    optimizers = [torch.optim.SGD(part, 0.1) for part in (parameters[:2], parameters[2:])]
    with SpectralWatch(network, optimizer=optimizers, log_dir=tmp_path) as watch:
        for batch in token_loader(16):
            with watch.step(batch):
                watch.loss(loss_of(network, batch)).backward()
            for one in optimizers:
                one.step()
                one.zero_grad()
    run = Run(tmp_path)
    assert run.about["batch_samples"] == next(iter(token_loader(16)))["input_ids"].shape[0]


def test_a_loader_is_asked_for_no_batch_that_is_not_used() -> None:
    network, drawn = Network(), []

    def loader() -> Iterator[Any]:
        for batch in token_loader(16):
            drawn.append(batch)
            yield batch

    watch = SpectralWatch(network, activations=ActivationSpectrum(stage="validate", num_tokens=64, num_groups=1))
    with watch.validation(loader(), num_batches=2) as batches:
        for batch in batches:
            network(batch["input_ids"])
    assert len(drawn) == 2


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_a_run_whose_loss_is_lost_does_not_stand_at_its_last_number(
    tmp_path: Path, lost: float, capsys: pytest.CaptureFixture[str]
) -> None:
    network = Network()
    watch = SpectralWatch(network, log_dir=tmp_path)
    batches = iter(token_loader(16))
    for loss in (3.0, 2.0, lost):
        batch = next(batches)
        with watch.step(batch):
            watch.loss(loss_of(network, batch) * (loss if math.isnan(loss) else 1)).backward()
        with watch.validation([batch]) as given:
            for one in given:
                network(one["input_ids"])
            watch.log(val_loss=loss)
    run = Run(tmp_path)
    assert run.history.val_loss.tolist() == [3, 2, math.inf]
    assert run.history.train_loss[-1] == math.inf or not math.isnan(lost)
    found = headline(run).loss
    assert (found.last, found.lowest, found.step) == (math.inf, 2, 3)
    cli.main(["show", str(tmp_path)])
    assert "its val_loss is no finite number from step 3 on" in capsys.readouterr().out


def test_a_state_is_loaded_before_the_first_batch() -> None:
    watch, batch = SpectralWatch(Network()), next(iter(token_loader()))
    state = watch.state_dict()
    with watch.step(batch):
        pass
    with pytest.raises(ValueError, match="before the first batch"):
        watch.load_state_dict(state)


def test_a_model_that_is_moved_afterwards_is_refused() -> None:
    network = Network()
    watch = SpectralWatch(network, activations=True)
    network.to("meta")
    with pytest.raises(ValueError, match="model must be on its device when SpectralWatch is made, got cpu then"):
        watch._loop.start_batch(next(iter(token_loader())))


def test_a_forecast_is_made_and_asks_to_stop(tmp_path: Path) -> None:
    network = Network()
    forecaster = TailForecaster(1e9, every_n_steps=2, num_tokens=64)
    with SpectralWatch(network, forecast=forecaster, log_dir=tmp_path) as watch:
        with pytest.warns(UserWarning, match="TailForecaster makes no forecast: it needs 4 reference runs"):
            run(watch, network, 16)
        validate(watch, network)
        assert math.isnan(watch.metrics["forecast/actual"])  # it was reached before the first look
        assert not watch.should_stop
    assert Run(tmp_path).about["forecast"][""]["target_loss"] == 1e9


def test_part_of_a_loader_is_a_pass() -> None:
    network = Network()
    spectrum = ActivationSpectrum(every_n_steps=1, stage="validate", num_groups=1, num_tokens=64)
    watch = SpectralWatch(network, spectrum)
    for loader, num_batches, words in (
        (token_loader(64), 4, "spread over 16 samples"),
        (token_loader(64), None, "spread over 64 samples"),
        ((batch for batch in token_loader(64)), 4, "spread over 4 batches"),
        ((batch for batch in token_loader(64)), None, "the first of a pass"),
    ):
        with watch.validation(loader, num_batches) as batches, torch.no_grad():
            seen = sum(1 for batch in batches if network(batch["input_ids"]) is not None)
        assert seen == (num_batches or 16)
        assert spectrum.measurement is not None
        assert words in spectrum.measurement.reading
        with watch.step(next(iter(token_loader()))):
            pass
    assert watch.metrics["activation/blocks.0/num_tokens"] == 64


def of_a_rank(rank: int, folder: str, world: int) -> dict[str, float]:
    """Trains on every other sequence, and keeps the rows that a hook of its own sees."""
    torch.manual_seed(0)
    network = Network(num_blocks=2)
    model = DistributedDataParallel(network) if world > 1 else network
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    watch = SpectralWatch(
        model,
        activations=ActivationSpectrum("all", every_n_steps=2, num_tokens=10_000, num_groups=1, overlap=False),
        gradients=GradientSpectrum(WEIGHTS, every_n_steps=2, num_samples=16, num_groups=1),
        drift=HeadDrift("all", 4, every_n_steps=2, num_tokens=10_000, num_groups=1),
        optimizer=optimizer,
        loss_fn=loss_of,
        log_dir=folder,
    )
    with watch:
        data, held_out = ([Tokens(32)[i] for i in range(32)], [Tokens(16, 1)[i] for i in range(rank, 16, world)])
        for start in range(0, 32, 8):
            batch = DataLoader(data[start : start + 8][rank::world], batch_size=8)
            (batch,) = list(batch)
            with watch.step(batch):
                watch.loss(loss_of(model, batch)).backward()
            optimizer.step()
            optimizer.zero_grad()
        with watch.validation(DataLoader(held_out, batch_size=4)) as batches, torch.no_grad():
            losses = [loss_of(model, batch) for batch in batches]
            watch.log(val_loss=torch.stack(losses).mean())
    assert watch._loop.host.broadcast([rank]) == [0]
    return {key: value for key, value in watch.metrics.items() if "seconds" not in key and key != "val_loss"}


def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    expected = of_a_rank(0, str(tmp_path / "one"), 1)
    found = run_distributed(of_a_rank, 2, str(tmp_path / "two"), 2)
    assert_same(found[1], found[0])
    assert expected["activation/blocks.0/num_tokens"] == 128
    # Gradients that ranks have summed differ from those of one pass in their last digits, and steps carry these on.
    assert_same(found[0], expected, 1e-4)
    one, two = Run(tmp_path / "one"), Run(tmp_path / "two")
    assert one.history.tokens.tolist() == two.history.tokens.tolist()
    assert one.about["validation_data"] == two.about["validation_data"]
    np.testing.assert_allclose(one.history.val_loss, two.history.val_loss, rtol=1e-4)
    assert (one.about["world_size"], two.about["world_size"]) == (1, 2)


@pytest.mark.parametrize("framework", ["fabric", "accelerate"])
def test_other_frameworks_give_the_same_numbers(framework: str) -> None:
    """With accumulation over two batches, which each of them divides the loss by in its own way."""
    found = [of_a_framework(name) for name in ("plain", framework)]
    assert found[0]["gradient/failed"] == found[0]["activation/failed"] == 0
    assert found[0]["activation/blocks.0/num_tokens"] == 128
    assert_same(found[1], found[0], 1e-6)


def of_a_framework(name: str) -> dict[str, float]:
    torch.manual_seed(0)
    model = network = Network()
    optimizer: Any = torch.optim.AdamW(network.parameters(), 1e-2)
    loader: Any = token_loader(32)
    backward, accumulates = (lambda loss: (loss / 2).backward()), nullcontext
    if name == "fabric":
        fabric = Fabric(accelerator="cpu", devices=1)
        model, optimizer = fabric.setup(network, optimizer)
        loader = fabric.setup_dataloaders(loader)
        backward = lambda loss: fabric.backward(loss / 2)  # noqa: E731
    elif name == "accelerate":
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model, optimizer, loader = accelerator.prepare(network, optimizer, loader)
        backward, accumulates = accelerator.backward, lambda: accelerator.accumulate(model)
    watch = SpectralWatch(
        model,
        activations=ActivationSpectrum(every_n_steps=4, num_tokens=128, overlap=False),
        gradients=GradientSpectrum(WEIGHTS, every_n_steps=4, num_samples=16, method="hooks"),
        optimizer=optimizer,
        loss_fn=loss_of,
    )
    for index, batch in enumerate(loader):
        with accumulates(), watch.step(batch):
            backward(watch.loss(loss_of(model, batch)))
            if name == "accelerate" or index % 2:
                optimizer.step()
                optimizer.zero_grad()
    assert watch.num_steps == 4
    return {key: value for key, value in watch.metrics.items() if "seconds" not in key}
