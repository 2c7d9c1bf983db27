"""The shadow of a module: it computes the same loss, and nothing it does reaches the module or the Trainer."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MaxMetric, MeanMetric, MetricCollection, MinMaxMetric

from lightning_spectral.capture.activations import ActivationReader
from lightning_spectral.capture.shadow import BatchLoss, load_loss
from tests.models import Alternating, LanguageModel, token_loader


def batch() -> dict[str, Tensor]:
    return next(iter(token_loader(batch_size=4)))


def some_loss(module: nn.Module, batch: Any) -> Tensor:
    return module.loss(batch) * 2


class Nosy(LanguageModel):
    """Reads and writes all that a training step can reach."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.logger.experiment.add_scalar("loss", loss)
        self.trainer.should_stop = True
        self.log_dict({"step": self.global_step})
        self.mean_loss.update(loss.detach())
        self.log("mean", self.mean_loss.compute())
        batch.pop("labels")
        return loss + self.global_step


def test_shadow_sees_the_trainer_and_touches_nothing() -> None:
    torch.manual_seed(0)
    model, data = Nosy(), batch()
    trainer = SimpleNamespace(global_step=7, callback_metrics={}, should_stop=False, logger=None, loggers=[])
    loss = BatchLoss(model, trainer=trainer)
    expected = model.loss(data).item() + 7
    before = float(model.num_forwards)
    assert loss(dict(data)).item() == pytest.approx(expected)
    assert float(model.num_forwards) == before
    assert trainer.should_stop is False
    assert float(model.mean_loss.weight) == 0
    assert model._trainer is None


class Measured(LanguageModel):
    """Metrics in a collection in a dict, one inside another, and a sum of two."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleDict({"fit": MetricCollection({"mean": MeanMetric(), "max": MaxMetric()})})
        self.range = MinMaxMetric(MeanMetric())
        self.sum = self.mean_loss + self.range._base_metric

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log_dict(self.stages["fit"](loss.detach()))
        self.stages["fit"].update(loss.detach())
        self.range(loss.detach())
        self.sum.update(loss.detach())
        return loss


def test_nested_metrics_are_neither_updated_nor_computed() -> None:
    model, data = Measured(), batch()
    loss = BatchLoss(model)
    assert loss(data).item() == pytest.approx(model.loss(data).item())
    for owner in (model, loss.shadow):
        metrics = [*owner.stages["fit"].values(), owner.range._base_metric, owner.mean_loss]
        assert not any(metric.update_called for metric in metrics)
        assert float(owner.range.max_val) == -torch.inf
    assert set(loss.shadow.stages["fit"].compute()) == {"mean", "max"}
    assert model.stages["fit"]["mean"].forward.__func__ is MeanMetric.forward


def test_parameters_are_copies() -> None:
    model = LanguageModel()
    loss = BatchLoss(model)
    for name, parameter in model.named_parameters():
        _, mine = loss.parameter(name)
        assert mine is not parameter
        assert mine.data_ptr() != parameter.data_ptr()
        assert torch.equal(mine, parameter)
    loss(batch()).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    loss.freeze()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not loss(batch()).requires_grad
    loss.unfreeze()
    assert loss(batch()).requires_grad


def test_hooks_of_the_user_stay_and_mean_the_shadow() -> None:
    model = LanguageModel()
    with pytest.warns(FutureWarning, match="weight_norm"):
        torch.nn.utils.weight_norm(model.network.logits)
    seen: list[Tensor] = []

    def halve(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        model.halved = True
        seen.append(output)
        return output / 2

    model.network.logits.register_forward_hook(halve)
    loss, data = BatchLoss(model), batch()
    with loss.isolated():
        value = loss(dict(data))
        value.backward()
    assert loss.shadow.network.logits.weight_g.grad.any()
    assert loss.shadow.halved
    assert not hasattr(model, "halved")
    assert seen == []
    assert value.item() == pytest.approx(model.loss(data).item())


def test_hooks_of_ours_do_not_see_the_shadow() -> None:
    model, seen = LanguageModel(), []
    reader = ActivationReader(lambda name, rows: seen.append(name))
    reader.add("logits", model.network.logits)
    reader.is_open = True
    loss = BatchLoss(model)
    with loss.isolated():
        loss(batch())
    assert seen == []
    model.loss(batch())
    assert seen == ["logits"]


def test_tied_parameters_stay_tied() -> None:
    model = LanguageModel()
    model.network.logits.weight = nn.Parameter(torch.zeros(40, 32))
    model.network.embedding.weight = model.network.logits.weight
    loss = BatchLoss(model)
    names = [f"network.{layer}.weight" for layer in ("embedding", "logits")]
    (first, one), (second, two) = (loss.parameter(name) for name in names)
    assert first == second
    assert one is two


def test_scale_multiplies_the_loss() -> None:
    model, data = LanguageModel(), batch()
    assert BatchLoss(model, scale=8.0)(data).item() == pytest.approx(8 * BatchLoss(model)(data).item())


def test_loss_function_takes_the_place_of_the_training_step() -> None:
    model, data = Alternating(), batch()
    for given in (some_loss, "tests.capture.test_shadow.some_loss"):
        loss = BatchLoss(model, load_loss(given))
        assert loss(data).item() == pytest.approx(2 * model.loss(data).item())


class Silent(LightningModule):
    """Returns no loss."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        return None


class Unique:
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("cannot pickle 'socket' object")


def test_what_has_no_loss_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"loss_fn must be given for Alternating with automatic_optimization=False"):
        BatchLoss(Alternating())
    with pytest.raises(ValueError, match="loss_fn must be given for Linear, which has no training_step"):
        BatchLoss(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="loss must be a tensor with one number, got None"):
        BatchLoss(Silent())(batch())
    with pytest.raises(ValueError, match=r"loss must be a tensor with one number, got shape \(2,\)"):
        BatchLoss(nn.Linear(2, 2), lambda module, batch: torch.ones(2))(batch())
    model = LanguageModel()
    model.connection = Unique()
    with pytest.raises(RuntimeError, match="LanguageModel cannot be copied: cannot pickle 'socket' object"):
        BatchLoss(model)


@pytest.mark.parametrize("path", ["nowhere.loss", "tests.models.no_such_loss", "loss", "tests.models.WIDTH", 3])
def test_bad_import_paths_get_one_line(path: Any) -> None:
    with pytest.raises(ValueError, match="loss_fn must be a callable or its import path, got") as caught:
        load_loss(path)
    assert "\n" not in str(caught.value)


def test_gathering_over_ranks_is_refused() -> None:
    class Gathering(LanguageModel):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return self.all_gather(self.loss(batch))

    with pytest.raises(RuntimeError, match="training_step gathers over ranks"):
        BatchLoss(Gathering())(batch())


def test_a_hook_that_cannot_look_at_one_sample_is_passed_over() -> None:
    module, seen = torch.nn.Linear(3, 2), []

    def look(_: Any, __: Any, output: torch.Tensor) -> None:
        if len(output) == 1:
            raise IndexError("this looks at pairs")
        seen.append(output.shape)

    module.register_forward_hook(look)
    loss = BatchLoss(module, lambda module, batch: module(batch).square().mean())
    rows = torch.randn(4, 3)
    with loss.isolated(rows), torch.no_grad():
        for size in (1, 4):
            expected = (rows[:size] @ module.weight.T + module.bias).square().mean()
            assert float(loss(rows[:size])) == pytest.approx(float(expected))
    assert seen == []  # what it noted of the shadow is taken back
