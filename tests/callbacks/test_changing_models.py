"""Models that change while they train: frozen, pruned, parametrised, averaged, lazy, grown; and what none can read."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelPruning, WeightAveraging
from torch import nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm
from torch.utils.data import DataLoader, TensorDataset

from lightning_spectral import ActivationSpectrum, GradientSpectrum, Run
from tests._reference import contiguous_groups
from tests.models import tiny_trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.nn.utils.weight_norm.* is deprecated", "ignore:Lazy modules are a new feature"
)

SAMPLES = 32
BANDS = {"tail": (2, 6), "head": (1, 4)}


class Net(LightningModule):
    """Two layers that never move, unless ``lr`` says so."""

    def __init__(self, lr: float = 0.0, **layers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.fc, self.head = layers.get("fc", nn.Linear(8, 16)), layers.get("head", nn.Linear(16, 4))
        self.lr = lr

    def training_step(self, batch, batch_idx):
        x, y = batch
        return (self.head(self.fc(x).tanh()) - y).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, 8, generator=generator)
    return x, x[:, :4] + 1


class At(Callback):
    """Changes the model at the start of an epoch, of one step."""

    def __init__(self, epoch: int, change) -> None:
        self.epoch, self.change = epoch, change

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        if trainer.current_epoch == self.epoch:
            self.change(pl_module)


def fit(folder: Path, model: LightningModule, *callbacks: Callback, epochs: int = 3):
    loader = DataLoader(TensorDataset(*data()), SAMPLES)
    trainer = tiny_trainer(folder, callbacks=list(callbacks), max_epochs=epochs, num_sanity_val_steps=0)
    trainer.fit(model, loader, loader)
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


def gradients(parameters="all", **kwargs) -> GradientSpectrum:
    return GradientSpectrum(parameters, 1, **{"num_samples": SAMPLES, "weights": True, **BANDS, **kwargs})


def activations() -> ActivationSpectrum:
    return ActivationSpectrum("*", 1, num_tokens=SAMPLES, tail=(1, 4), head=(1, 3))


def grad_norm(model: Net, parameter: nn.Parameter) -> float:
    return torch.autograd.grad(model.training_step(data(), 0), parameter)[0].norm().item()


def rankme(weight: torch.Tensor) -> float:
    shares = torch.linalg.svdvals(weight.detach().double())
    shares = shares / shares.sum()
    return float(torch.special.entr(shares).sum().exp())


def test_what_is_unfrozen_is_measured_from_then_on(tmp_path: Path) -> None:
    model = Net()
    model.fc.requires_grad_(False)
    values = fit(tmp_path, model, At(1, lambda net: net.fc.requires_grad_(True)), gradients())
    assert values["gradient/fc.weight/grad_norm"] == pytest.approx(grad_norm(model, model.fc.weight), rel=1e-5)
    assert values["gradient/failed"] == 0
    rows = torch.stack(
        [
            torch.cat(
                [g.flatten() for g in torch.autograd.grad(model.training_step(sample, 0), list(model.parameters()))]
            )
            for sample in zip(*(tensor.split(1) for tensor in data()), strict=True)
        ]
    ).double()
    squared = rows.mean(0).square().sum()
    trace = SAMPLES / (SAMPLES - 1) * (rows.square().sum(1).mean() - squared)
    assert values["gradient/noise_scale"] == pytest.approx(float(trace / (squared - trace / SAMPLES)), rel=1e-4)


@pytest.mark.parametrize("method", ["auto", "hooks"])
def test_what_is_frozen_is_nan_and_leaves_the_others(tmp_path: Path, method: str) -> None:
    model = Net()
    freeze = At(1, lambda net: net.fc.requires_grad_(False))
    with pytest.warns(UserWarning, match=r"fc\.(weight|bias): NaN, because it is not trained now"):
        values = fit(tmp_path, model, freeze, gradients(method=method))
    assert values["gradient/head.weight/grad_norm"] == pytest.approx(grad_norm(model, model.head.weight), rel=1e-5)
    assert torch.tensor(values["gradient/fc.weight/grad_norm"]).isnan()
    assert values["weight/fc.weight/rankme"] == pytest.approx(rankme(model.fc.weight))
    assert values["gradient/noise_scale"] > 0


@pytest.mark.parametrize("method", ["auto", "loop", "hooks"])
@pytest.mark.filterwarnings("ignore:.*calls the gradient of fc.weight_orig by fc.weight, the weight that is made of it")
def test_a_pruned_weight_is_followed(tmp_path: Path, method: str) -> None:
    model = Net()
    pruning = ModelPruning(
        "l1_unstructured",
        [(model.fc, "weight")],
        amount=0.8,
        apply_pruning=lambda epoch: epoch == 0,
        use_lottery_ticket_hypothesis=False,
        make_pruning_permanent=False,
    )
    values = fit(tmp_path, model, pruning, gradients("fc.weight", method=method))
    assert values["gradient/fc.weight/grad_norm"] == pytest.approx(grad_norm(model, model.fc.weight_orig), rel=1e-5)
    assert values["weight/fc.weight/rankme"] == pytest.approx(rankme(model.fc.weight))


class Double(nn.Module):
    """A parametrisation that counts how often it is asked, and draws."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return 2 * weight + 0 * torch.rand(())


REPARAMETRISED = {
    "spectral_norm": (parametrizations.spectral_norm, "fc.weight"),
    "old spectral_norm": (spectral_norm, "fc.weight"),
    "weight_norm": (parametrizations.weight_norm, "fc.parametrizations.weight.original1"),
    "old weight_norm": (weight_norm, "fc.weight_v"),
    "of one's own": (lambda layer: parametrize.register_parametrization(layer, "weight", Double()), "fc.weight"),
}


@pytest.mark.parametrize("wrap", REPARAMETRISED)
@pytest.mark.parametrize("parameters", ["all", "fc.weight"])
@pytest.mark.filterwarnings("ignore:.*calls the gradient of", "ignore:.*loops over samples")
def test_reparametrised_weights_are_read_as_used_and_left_alone(tmp_path: Path, wrap: str, parameters: str) -> None:
    reparametrise, name = REPARAMETRISED[wrap]
    twins = [Net(lr=0.1, fc=reparametrise(nn.Linear(8, 16))) for _ in range(2)]
    twins[1].load_state_dict(twins[0].state_dict())
    random = []
    for model, callbacks in zip(twins, ([gradients(parameters)], []), strict=True):
        torch.manual_seed(5)
        values = fit(tmp_path / str(len(callbacks)), model, *callbacks, epochs=3)
        random.append(torch.rand(()))
        if callbacks:
            measured = values
    assert random[0] == random[1]
    for (key, mine), (_, theirs) in zip(twins[0].state_dict().items(), twins[1].state_dict().items(), strict=True):
        assert torch.equal(mine, theirs), key
    twins[0].eval()
    assert measured["weight/fc.weight/rankme"] == pytest.approx(rankme(twins[0].fc.weight), rel=1e-4)
    assert measured[f"gradient/{name}/grad_norm"] > 0
    assert measured["gradient/failed"] == 0


@pytest.mark.parametrize("is_first", [True, False], ids=["ours first", "ours last"])
def test_validation_reads_averaged_weights_in_any_order(tmp_path: Path, is_first: bool) -> None:
    class Norms(Net):
        def on_validation_batch_end(self, *args, **kwargs) -> None:
            with torch.inference_mode(False), torch.enable_grad():
                twin = Net()
                twin.load_state_dict({key: value.clone() for key, value in self.state_dict().items()})
                self.norm, self.rank = grad_norm(twin, twin.fc.weight), rankme(twin.fc.weight)

    ours = [gradients("fc.weight", stage="validate"), gradients("fc.weight", prefix="train/")]
    averaging = WeightAveraging(avg_fn=lambda mean, new, number: 0.9 * mean + 0.1 * new)
    model = Norms(lr=0.5)
    values = fit(tmp_path, model, *(([*ours, averaging]) if is_first else [averaging, *ours]), epochs=5)
    assert values["gradient/fc.weight/grad_norm"] == pytest.approx(model.norm, rel=1e-5)
    assert values["weight/fc.weight/rankme"] == pytest.approx(model.rank, rel=1e-5)
    assert values["train/weight/fc.weight/rankme"] != pytest.approx(model.rank, rel=1e-4)
    assert [callback.title() for callback in ours] == [
        "gradient spectra, validate (averaged weights)",
        "gradient spectra, train (trained weights)",
    ]
    run = Run(tmp_path)
    read = {stage: run.settings(f"gradient-{stage}")["weights_read"] for stage in ("validate", "train")}
    assert read == {"validate": "averaged", "train": "trained"}


@pytest.mark.parametrize("method", ["auto", "loop", "hooks"])
def test_lazy_layers_are_measured_once_they_are_made(tmp_path: Path, method: str) -> None:
    model = Net(fc=nn.LazyLinear(16))
    values = fit(tmp_path, model, gradients(method=method), activations())
    assert values["gradient/fc.weight/grad_norm"] == pytest.approx(grad_norm(model, model.fc.weight), rel=1e-5)
    assert values["weight/fc.weight/rankme"] == pytest.approx(rankme(model.fc.weight))
    assert values["activation/fc/num_tokens"] == SAMPLES
    assert values["gradient/failed"] == values["activation/failed"] == 0


@pytest.mark.parametrize("method", ["auto", "hooks"])
def test_a_layer_that_is_replaced_is_followed(tmp_path: Path, method: str) -> None:
    def widen(net: Net) -> None:
        net.fc, net.head = nn.Linear(8, 20), nn.Linear(20, 4)
        net.trainer.strategy.optimizers = [torch.optim.SGD(net.parameters(), 0.0)]

    model, spectra = Net(), activations()
    values = fit(tmp_path, model, At(1, widen), gradients(method=method), spectra)
    assert values["gradient/fc.weight/grad_norm"] == pytest.approx(grad_norm(model, model.fc.weight), rel=1e-5)
    assert values["weight/fc.weight/rankme"] == pytest.approx(rankme(model.fc.weight))
    assert values["activation/fc/rankme"] > 0
    assert values["activation/failed"] == values["gradient/failed"] == 0
    assert not model.fc._forward_hooks


class Two(Net):
    """Beside the layers, an embedding with sparse gradients, and parameters of odd kinds."""

    def __init__(self, odd: str) -> None:
        super().__init__()
        self.odd = odd
        if odd == "sparse":
            self.table = nn.Embedding(5, 8, sparse=True)
        else:
            self.table = nn.Parameter(torch.randn(8, dtype=torch.complex64))

    def training_step(self, batch, batch_idx):
        x, y = batch
        extra = self.table((x[:, 0] > 0).long()) if self.odd == "sparse" else self.table.real
        return super().training_step((x + extra, y), batch_idx)


def test_sparse_gradients_are_rows_like_others(tmp_path: Path) -> None:
    model = Two("sparse")
    values = fit(tmp_path, model, gradients(method="loop"))
    loss = model.training_step(data(), 0)
    dense = torch.autograd.grad(loss, model.table.weight)[0].to_dense()
    assert values["gradient/table.weight/grad_norm"] == pytest.approx(dense.norm().item(), rel=1e-5)
    assert values["gradient/failed"] == 0


def test_one_bad_parameter_is_nan_and_leaves_the_others(tmp_path: Path) -> None:
    model = Two("complex")
    with pytest.warns(UserWarning, match="table: NaN, because it is complex"):
        values = fit(tmp_path, model, gradients())
    assert torch.tensor(values["gradient/table/grad_norm"]).isnan()
    assert values["gradient/fc.weight/grad_norm"] == pytest.approx(grad_norm(model, model.fc.weight), rel=1e-5)


class Nested(Net):
    """Hands a nested tensor from one layer to the next."""

    def __init__(self, layout: torch.layout) -> None:
        super().__init__()
        self.layout = layout

    def training_step(self, batch, batch_idx):
        x, y = batch
        rows = [row.expand(2 + index % 3, 8) for index, row in enumerate(x)]
        nested = torch.nested.as_nested_tensor(rows, layout=self.layout)
        out = torch.stack([part.mean(0) for part in self.fc(nested).unbind()])
        return (self.head(out.tanh()) - y).square().mean()


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_rows_of_nested_tensors_are_their_values_and_their_samples_make_groups(tmp_path: Path, layout) -> None:
    reports = []

    class Kept(ActivationSpectrum):
        def measured(self, report):
            reports.append(report)
            return super().measured(report)

    model = Nested(layout)
    fit(tmp_path, model, Kept("fc", 1, num_tokens=10**4, tail=(1, 4), head=(1, 3), normalize=False), epochs=1)
    samples = [model.fc(row.expand(2 + index % 3, 8)).detach().double() for index, row in enumerate(data()[0])]
    spectrum = reports[0].spectra["activation"]["fc"]
    assert spectrum.count == sum(map(len, samples))
    groups = contiguous_groups(range(len(samples)), 4)
    for group in (None, *range(4)):
        left_out = () if group is None else groups[group]
        rows = torch.cat([sample for index, sample in enumerate(samples) if index not in left_out])
        expected = torch.linalg.eigvalsh(rows.T.cov()).flip(0)
        found = spectrum.values if group is None else spectrum.leave_one_out[group]
        torch.testing.assert_close(found[:8], expected[:8], rtol=1e-4, atol=1e-6)


class NestedChannels(Nested):
    """Its positions are the same for all, its channels are not."""

    def training_step(self, batch, batch_idx):
        nested = torch.nested.as_nested_tensor(list(batch[0].expand(3, -1, 8).mT), layout=self.layout)
        self.odd(nested)
        return super().training_step(batch, batch_idx)


class Unequal(nn.Module):
    def forward(self, nested):
        return torch.nested.nested_tensor([part[:, : 3 + i % 2] for i, part in enumerate(nested.unbind())])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_of_unequal_channels_cost_their_layer_s_report_and_no_run(tmp_path: Path) -> None:
    model = NestedChannels(torch.strided)
    model.odd = Unequal()
    with pytest.warns(
        UserWarning, match="odd: NaN, because its output is a nested tensor whose channels are of unequal"
    ):
        values = fit(
            tmp_path,
            model,
            ActivationSpectrum(["odd", "head"], 1, num_tokens=SAMPLES, channel_dim=-1, tail=(1, 3), head=(1, 3)),
        )
    assert torch.tensor(values["activation/odd/rankme"]).isnan()
    assert values["activation/head/num_tokens"] == SAMPLES
