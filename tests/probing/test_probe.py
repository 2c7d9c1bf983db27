"""What a probe says of models of many kinds is what the callbacks then do with them."""

import inspect
from pathlib import Path
from typing import Any

import lightning.pytorch
import numpy as np
import pytest
import pytorch_lightning
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_spectral import ActivationSpectrum, GradientSpectrum, Probe, probe
from lightning_spectral.nanogpt import NanoGPT
from tests.models import PROBES, WIDTH, Alternating, LanguageModel, Perceptron, tiny_trainer, token_loader

QUICK: dict[str, Any] = {"num_tokens": 64, "num_samples": 8, "num_groups": 2}


def tokens(batch_size: int = 4) -> dict[str, Tensor]:
    return next(iter(token_loader(batch_size=batch_size)))


def engine(found: Probe, method: str) -> Any:
    return next(engine for engine in found.engines if engine.method == method)


def test_a_language_model() -> None:
    torch.manual_seed(0)
    model = LanguageModel()
    found = probe(model, tokens(), **QUICK)
    assert [layer.name for layer in found.layers] == [f"network.{name}" for name in PROBES]
    for layer in found.layers:
        assert (layer.kind, layer.shape, layer.channel_dim, layer.width) == ("Block", (4, 8, WIDTH), 2, WIDTH)
        assert (layer.row, layer.rows, layer.problem) == (f"positions of a sequence, {WIDTH} channels", 32, None)
    assert (found.samples.count, found.samples.rule) == (4, "axis 0, the length of input_ids")
    assert found.samples.tensors == {"input_ids": ((4, 8), 0), "labels": ((4, 8), 0)}
    expected = float(model.loss(tokens()).detach())
    assert found.loss.value == pytest.approx(expected, rel=1e-5)
    assert found.loss.of_training == pytest.approx(expected, rel=1e-5)
    assert (found.loss.is_same, found.loss.is_mean) == ("passed", "passed")
    assert found.loss.residual < 1e-5
    assert found.loss.weights_ratio == pytest.approx(1.0, rel=1e-4)
    assert [p.shape for p in found.parameters] == [(WIDTH, 2 * WIDTH)] * 5
    assert [(e.method, e.works, e.is_auto) for e in found.engines] == [
        ("vmap", True, True),
        ("hooks", True, False),
        ("loop", True, False),
    ]
    assert found.problems == []
    assert found.step is None


def test_lists_and_arrays_are_shown_with_what_becomes_of_them() -> None:
    batch = tokens() | {"names": [*"abcd"], "table": np.eye(5), "sizes": [1, 2, 3, 4]}
    found = probe(LanguageModel(), batch, **QUICK)
    assert found.samples.others is not None
    assert found.samples.others["names"] == "list of 4 cut with the samples"
    text = " ".join(str(found).split())
    for part in ("names list of 4 cut with the samples", "table array (5, 5) for all samples"):
        assert part in text
    assert "sizes list of 4 refused where it is read: samples must say whether the list sizes of 4 entries" in text
    assert [(e.method, e.works) for e in found.engines] == [("vmap", True), ("hooks", True), ("loop", True)]


def test_the_callbacks_read_what_the_probe_found(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LanguageModel()
    found = probe(model, tokens(16), num_tokens=128, num_samples=16)
    activations = ActivationSpectrum(every_n_steps=1, num_tokens=128, num_groups=1)
    gradients = GradientSpectrum(every_n_steps=1, num_samples=16, num_groups=1)
    trainer = tiny_trainer(tmp_path, callbacks=[activations, gradients], max_steps=1)
    trainer.fit(model, token_loader(batch_size=16), token_loader())
    metrics = trainer.callback_metrics
    for layer in found.layers:
        assert float(metrics[f"activation/{layer.name}/num_tokens"]) == layer.rows
    for parameter in found.parameters:
        assert float(metrics[f"gradient/{parameter.name}/num_samples"]) == found.samples.count
    assert float(metrics["gradient/sample_weights_ratio"]) == pytest.approx(found.loss.weights_ratio, rel=1e-4)


def test_defaults_are_those_of_the_callbacks() -> None:
    mine, activations, gradients = (
        {name: one.default for name, one in inspect.signature(what).parameters.items()}
        for what in (probe, ActivationSpectrum, GradientSpectrum)
    )
    mine.pop("every_n_steps")
    for theirs in (activations, gradients):
        common = mine.keys() & theirs.keys()
        assert {name: mine[name] for name in common} == {name: theirs[name] for name in common}
    assert (activations["every_n_steps"], gradients["every_n_steps"]) == (100, 500)
    assert {"layers", "mask", "channel_dim", "num_tokens"} <= mine.keys() & activations.keys()
    assert {"parameters", "loss_fn", "samples", "batch_dim", "num_samples"} <= mine.keys() & gradients.keys()


class Maps(LightningModule):
    """A stack of convolutions with batch norm."""

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[nn.Sequential(nn.Conv2d(c, 6, 3, padding=1), norm(6), nn.ReLU()) for c in (3, 6)])
        self.head = nn.Linear(6, 4)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.head(self.blocks(x).mean((2, 3))), y)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 1e-3)
        # Needs a Trainer that knows of several steps.
        steps = self.trainer.estimated_stepping_batches
        return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=int(steps))]


def images(size: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 3, 5, 5), torch.arange(size) % 4


def test_maps_with_batch_norm() -> None:
    torch.manual_seed(0)
    found = probe(Maps(), images(), **QUICK)
    for layer in found.layers:
        assert (layer.channel_dim, layer.width, layer.rows) == (1, 6, 8 * 25)
        assert layer.row == "positions of a 6-channel map"
    # No linear layer in the blocks: refused, and tried on what the refusal names.
    assert found.parameters_problem.startswith("parameters must be patterns or 'all', got None, for blocks.0 has no")
    assert found.parameters[0].name == "blocks.0.0.weight"
    # Statistics of a batch are terms between samples.
    assert (found.loss.is_same, found.loss.is_mean) == ("passed", "failed")
    assert found.loss.residual > 0.01
    assert found.loss.problem.startswith("the loss is no mean of samples' losses")
    assert found.parameters[0].problem == found.loss.problem
    assert engine(found, "vmap").problem is None
    assert "reads linear layers and embeddings" in engine(found, "hooks").problem
    assert engine(found, "vmap").is_auto


def test_maps_with_group_norm_pass() -> None:
    torch.manual_seed(0)
    found = probe(Maps(lambda width: nn.GroupNorm(2, width)), images(), parameters="head.weight", **QUICK)
    assert (found.loss.is_mean, found.parameters_problem) == ("passed", None)
    assert all(engine.works for engine in found.engines)


class Padded(LightningModule):
    """PyTorch's own encoder over padded sequences, with dropout in its attention; the loss is a mean over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 16)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
        self.out = nn.Linear(16, 30)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        x = self.encoder(self.embedding(batch["input_ids"]), src_key_padding_mask=batch["attention_mask"] == 0)
        return F.cross_entropy(self.out(x).flatten(0, 1), batch["labels"].flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def padded_batch() -> dict[str, Tensor]:
    ids = torch.randint(30, (4, 9), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(9) < torch.tensor([[9], [9], [6], [3]])).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def test_a_padded_encoder() -> None:
    torch.manual_seed(0)
    found = probe(Padded(), padded_batch(), mask="attention_mask", **QUICK)
    mask = found.mask
    assert (mask.key, mask.meaning, mask.num_real, mask.num_all) == ("attention_mask", "mask", 27, 36)
    assert [layer.rows for layer in found.layers] == [27, 27]
    assert found.loss.is_mean == "passed"
    assert found.loss.weights_ratio == pytest.approx(3.0, rel=1e-3)
    # Attention takes the weight past its layer.
    assert "no gradient reached its layers" in engine(found, "hooks").problem


def test_masks_that_could_be_named_are_told() -> None:
    found = probe(Padded(), padded_batch(), **QUICK)
    assert found.mask.key is None
    assert found.mask.others == {"attention_mask": "27 of 36", "labels": "27 of 36"}
    assert [layer.rows for layer in found.layers] == [36, 36]


def test_a_mask_for_two_towers_is_refused_and_the_rest_told() -> None:
    class Both(Padded):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            x = self.decoder(self.encoder(self.embedding(batch["input_ids"])))
            return F.cross_entropy(self.out(x).flatten(0, 1), batch["labels"].flatten())

    found = probe(Both(), padded_batch(), mask="attention_mask", **QUICK)
    assert found.mask.problem.startswith(
        "mask must be of all layers that it is laid over, got 'attention_mask' for lay"
    )
    assert [layer.rows for layer in found.layers] == [36] * 4
    one = probe(Both(), padded_batch(), layers="encoder.layers.*", mask="attention_mask", **QUICK)
    assert (one.mask.problem, [layer.rows for layer in one.layers]) == (None, [27, 27])


@pytest.mark.parametrize("key", ["input_ids", "not_there"])
def test_a_mask_that_is_none_is_refused_and_the_rest_told(key: str) -> None:
    found = probe(Padded(), padded_batch(), mask=key, **QUICK)
    assert found.mask.problem.startswith("mask must name ")
    assert [layer.rows for layer in found.layers] == [36, 36]
    assert found.loss.is_same == "passed"


class Adversarial(LightningModule):
    """Two networks, two optimizers, moved by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 12))
        self.critic = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 1))

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        first, second = self.optimizers()
        fake = self.generator(torch.randn(len(batch), 4))
        first.zero_grad()
        self.manual_backward(F.softplus(-self.critic(fake)).mean())
        first.step()
        second.zero_grad()
        self.manual_backward((F.softplus(-self.critic(batch)) + F.softplus(self.critic(fake.detach()))).mean())
        second.step()
        self.log("steps", 1.0)

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters()) for part in (self.generator, self.critic)]


def test_manual_optimisation_is_read_by_hooks() -> None:
    torch.manual_seed(0)
    found = probe(Adversarial(), torch.randn(8, 12), layers=["generator", "critic.0"], **QUICK)
    # The critic looks at two fakes and the batch.
    assert [(layer.width, layer.rows) for layer in found.layers] == [(12, 8), (16, 24)]
    assert found.loss.problem.startswith("loss_fn must be given for Adversarial with automatic_optimization=False")
    assert engine(found, "vmap").problem == engine(found, "loop").problem == found.loss.problem
    assert engine(found, "hooks").works
    (_, gradient) = found.costs
    assert gradient.reads.endswith("by hooks")
    assert "loss_fn" in str(found)


def test_manual_optimisation_with_a_loss() -> None:
    found = probe(Alternating(), tokens(), loss_fn=lambda module, batch: module.loss(batch), **QUICK)
    assert found.loss.problem is None
    assert (found.loss.is_same, found.loss.is_mean) == ("loss_fn has one of its own", "passed")
    assert found.loss.value > 0
    assert engine(found, "vmap").is_auto


def test_a_loss_between_samples_fails_the_self_check() -> None:
    class Contrastive(Perceptron):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            z = self.net[:3](batch[0])
            return F.cross_entropy(z @ z.mT, torch.arange(len(z)))

    torch.manual_seed(0)
    batch = torch.randn(8, 4), torch.randn(8, 1)
    found = probe(Contrastive(), batch, layers="net.*", parameters="net.2.weight", **QUICK)
    assert found.loss.is_mean == "failed"
    assert found.parameters[0].problem == found.loss.problem
    assert "self-check  refused: the loss is no mean of samples' losses" in str(found)


class Sequences(LightningModule):
    """Takes a list of sequences of any lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(20, 6), nn.Linear(6, 20)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return torch.stack([F.cross_entropy(self.layer(self.embedding(ids)), ids) for ids in batch]).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def one_by_one(batch: list[Tensor]) -> list[list[Tensor]]:
    return [[ids] for ids in batch]


def test_ragged_lists_are_refused_until_they_are_cut() -> None:
    torch.manual_seed(0)
    batch = [torch.arange(length) for length in (3, 5, 7)]
    arguments = {"layers": "layer", "parameters": ["layer.weight"], **QUICK}
    found = probe(Sequences(), batch, **arguments)
    assert "samples, a function that cuts a batch" in found.samples.problem
    assert not any(engine.works for engine in found.engines)
    assert (found.layers[0].rows, found.layers[0].problem) == (15, None)
    cut = probe(Sequences(), batch, samples=one_by_one, **arguments)
    assert (cut.samples.count, cut.samples.problem, cut.loss.is_mean) == (3, None, "passed")
    assert cut.samples.rule.endswith("one_by_one cuts")
    assert [engine.works for engine in cut.engines] == [False, False, True]


def test_a_model_without_blocks_is_told_what_it_could_name() -> None:
    found = probe(Perceptron(), (torch.randn(8, 4), torch.randn(8, 1)), **QUICK)
    assert found.layers_problem.startswith("layers must be patterns, got None or 'all'")
    assert [(layer.name, layer.width) for layer in found.layers] == [("net.0", 24), ("net.2", 24), ("net.4", 1)]
    assert found.parameters_problem.startswith("parameters must be patterns or 'all', got None")
    assert [parameter.name for parameter in found.parameters] == ["net.0.weight"]
    assert found.loss.is_mean == "passed"


def test_a_pattern_that_matches_nothing_is_told() -> None:
    found = probe(LanguageModel(), tokens(), layers="network.blcks.*", parameters="nothing", **QUICK)
    assert found.layers_problem.startswith("layers='network.blcks.*' matches no layer: did you mean ")
    assert found.layers == ()
    assert found.parameters_problem.startswith("parameters='nothing' matches no parameter")
    assert found.loss.is_mean == "passed"


def test_bands_beyond_the_width_are_told() -> None:
    found = probe(LanguageModel(), tokens(), tail=(3, WIDTH + 1), **QUICK)
    assert all(layer.problem.startswith("tail must end at or before rank") for layer in found.layers)


class Heads(LightningModule):
    """Its layer's channels could be on either of two axes."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.Sequential(nn.Linear(8, 8), nn.Unflatten(-1, (2, 4)))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.heads(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_layer_of_no_known_axis_is_refused_and_the_rest_told() -> None:
    found = probe(Heads(), torch.randn(4, 6, 8), layers=["heads", "heads.0"], parameters="heads.0.weight", **QUICK)
    assert found.layers[0].problem.startswith("channel_dim must say which axis of the output (4, 6, 2, 4)")
    assert (found.layers[1].width, found.layers[1].problem) == (8, None)
    said = probe(Heads(), torch.randn(4, 6, 8), layers="heads", channel_dim=-1, **QUICK)
    assert (said.layers[0].channel_dim, said.layers[0].width, said.layers[0].rows) == (3, 4, 48)


class Broken(LanguageModel):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        raise KeyError("mine [bold]own[/bold]")


def test_a_step_that_fails_is_told_with_all_that_can_be_told() -> None:
    found = probe(Broken(), tokens(), **QUICK)
    assert found.step == "KeyError: 'mine [bold]own[/bold]'"
    assert found.samples.count == 4
    assert [layer.name for layer in found.layers] == [f"network.{name}" for name in PROBES]
    assert [parameter.shape for parameter in found.parameters] == [(WIDTH, 2 * WIDTH)] * 5
    assert "step        failed: KeyError: 'mine [bold]own[/bold]'" in str(found)


def test_a_step_without_a_loss_is_read_all_the_same() -> None:
    class Skipping(LanguageModel):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.loss(batch)

    found = probe(Skipping(), tokens(), **QUICK)
    assert found.step is None
    assert [layer.rows for layer in found.layers] == [32] * 5
    assert (found.loss.value, found.loss.of_training) == (None, None)
    assert not any(engine.works for engine in found.engines)
    assert engine(found, "vmap").problem == "loss must be a tensor with one number, got None"


def test_a_step_that_is_skipped_is_told() -> None:
    class Never(LanguageModel):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int:
            return -1

    found = probe(Never(), tokens(), **QUICK)
    assert found.step == "ValueError: no training step was made: on_train_batch_start returned -1"


@pytest.mark.parametrize("has_data_module", [False, True])
def test_a_module_of_pytorch_lightning_is_taken_as_one_of_lightning(has_data_module: bool) -> None:
    def found(package: Any) -> Probe:
        class Small(package.LightningModule):  # type: ignore[name-defined, misc]
            def __init__(self) -> None:
                super().__init__()
                self.layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))

            def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
                self.log("train_loss", loss := self.layers(batch).square().mean())
                return loss

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.SGD(self.parameters(), 0.1)

        class Data(package.LightningDataModule):  # type: ignore[name-defined, misc]
            def train_dataloader(self) -> DataLoader:
                return DataLoader(torch.randn(16, 8, generator=torch.Generator().manual_seed(1)), 16)

        torch.manual_seed(0)
        module, data = Small(), Data()
        batch = data if has_data_module else next(iter(data.train_dataloader()))
        return probe(module, batch, parameters="layers.*.weight", **QUICK)

    one, other = found(lightning.pytorch), found(pytorch_lightning)
    assert one.step is None
    assert (other.layers, other.parameters, other.loss) == (one.layers, one.parameters, one.loss)
    assert [engine.works for engine in other.engines] == [engine.works for engine in one.engines]
    assert other.loss.is_mean == "passed"


def test_a_module_that_cannot_be_copied_is_told() -> None:
    model = LanguageModel()
    model.stream = (number for number in range(3))
    found = probe(model, tokens(), **QUICK)
    assert found.step.startswith("LanguageModel cannot be copied: ")
    assert len(found.layers) == 5
    assert len(found.parameters) == 5


def test_any_module_with_a_loss() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    found = probe(net, torch.randn(16, 8), layers="*", loss_fn=lambda net, x: net(x).square().mean(), **QUICK)
    assert [layer.name for layer in found.layers] == ["0", "1"]
    assert found.loss.is_mean == "passed"
    with pytest.raises(
        ValueError,
        match=r"^loss_fn must be given for Sequential, which has no training_step: a function of module and batch, ",
    ):
        probe(net, torch.randn(16, 8))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Linear, r"got <class 'torch\.nn\.modules\.linear\.Linear'>: make one, Linear\(...\)"),
        (None, "got None: give the model itself"),
        ([nn.Linear(2, 2)], r"got \[Linear\(.*\)\]: give the model itself"),
        (lambda batch: batch, "got <function .*: give the model itself"),
    ],
)
@pytest.mark.parametrize("loss_fn", [None, lambda net, x: net(x).mean()], ids=["alone", "with a loss"])
def test_what_is_no_module_is_refused(module: Any, message: str, loss_fn: Any) -> None:
    with pytest.raises(ValueError, match=f"^module must be a torch.nn.Module, {message}$") as caught:
        probe(module, torch.randn(4, 2), loss_fn=loss_fn)
    assert "\n" not in str(caught.value)


class Tokens(LightningDataModule):
    def setup(self, stage: str) -> None:
        self.stage = stage

    def train_dataloader(self) -> DataLoader:
        assert self.stage == "fit"
        return token_loader(batch_size=6)


class SelfSupplied(LanguageModel):
    def train_dataloader(self) -> DataLoader:
        return token_loader(batch_size=5)


def test_a_batch_may_come_from_data_or_from_the_module() -> None:
    assert probe(LanguageModel(), Tokens(), **QUICK).samples.count == 6
    assert probe(SelfSupplied(), **QUICK).samples.count == 5
    nothing = DataLoader(TensorDataset(torch.randn(0, 2)))

    class Empty(LanguageModel):
        def train_dataloader(self) -> DataLoader:
            return nothing

    step = probe(Empty(), **QUICK).step
    assert step == "ValueError: batch must come from a train_dataloader that gives one, got none"


def test_lazy_layers_are_there_after_the_batch() -> None:
    class Lazy(Perceptron):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.LazyLinear(24), nn.ReLU(), nn.Linear(24, 1))

    found = probe(Lazy(), (torch.randn(8, 4), torch.randn(8, 1)), layers="net.0", parameters="net.0.weight", **QUICK)
    assert found.parameters[0].shape == (24, 4)
    assert found.parameters[0].problem is None
    assert found.layers[0].width == 24


def test_a_model_of_ours_in_short_precision() -> None:
    model = NanoGPT(num_layers=2, width=32, block_size=16, vocab_size=64)
    batch = {name: torch.randint(64, (4, 16)) for name in ("input_ids", "labels")}
    found = probe(model, batch, precision="bf16-mixed", **QUICK)
    assert (found.loss.is_same, found.loss.is_mean) == ("passed", "passed")
    assert found.problems == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 1}, "num_samples must be at least 2"),
        ({"layers": 3}, "layers must be None, 'all', a pattern"),
        ({"tail": (4, 3)}, "tail must be two ascending ranks"),
        ({"loss_fn": "no.where"}, "loss_fn must be a callable or its import path"),
        ({"samples": "no.where"}, "samples must be a function"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        probe(LanguageModel(), tokens(), **arguments)


def test_hooks_are_refused_where_training_would_run_compiled() -> None:
    module = LanguageModel()
    batch = next(iter(token_loader()))
    assert {engine.method: engine.works for engine in probe(module, batch).engines}["hooks"]
    for block in module.blocks:
        block.compile(backend="eager")
    (hooks,) = (engine for engine in probe(module, batch).engines if engine.method == "hooks")
    assert not hooks.works
    assert "inside network.blocks.0, which is compiled" in str(hooks.problem)
