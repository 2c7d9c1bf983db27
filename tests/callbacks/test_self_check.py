"""GradientSpectrum asks whether its samples' losses make up the loss of training; where they do not it says so."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanAbsoluteError

from lightning_spectral import GradientSpectrum
from tests.models import tiny_trainer

WIDTH, BATCH = 8, 16
METHODS = pytest.mark.parametrize("method", ["vmap", "loop", "hooks"])


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        self.norms: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fc(x).tanh())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[1])

    def on_after_backward(self) -> None:
        self.norms.append(float(self.fc.weight.grad.norm()))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class TokenMean(Net):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        losses = (self(batch[0]) - batch[1]).square().mean(-1)
        return (losses * batch[2]).sum() / batch[2].sum()


class Summed(Net):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[1], reduction="sum") / 64


class Dropping(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.dropout(self.fc(x + 0.1 * torch.randn_like(x)).tanh(), 0.3, self.training))


class Annealed(Net):
    """Its hook moves what its loss depends on, before each step."""

    factor = 1.0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.factor *= 0.5

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.factor * super().training_step(batch, batch_idx)


class Contrastive(Net):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]) @ batch[1].mT, torch.arange(len(batch[0])))


class Normed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x).unsqueeze(-1).expand(-1, -1, 2) * torch.tensor([1.0, 2.0])).sum(-1)


class TimeFirst(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fc(x).cumsum(0).tanh())


class NormedRows(Net):
    """Fails for one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fc(self.norm(x)).tanh())


class Spread(Net):
    """VICReg's term, NaN for one sample."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        y = self(batch[0])
        return F.mse_loss(y, batch[1]) + F.relu(1 - y.std(0)).mean()


class BarlowTwins(Net):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        a, b = ((y - y.mean(0)) / y.std(0) for y in (self(batch[0]), self(batch[0] + 0.1)))
        return (a.T @ b / len(a) - torch.eye(4)).square().sum()


class Pairs(Net):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        first, second = self(batch[0]).view(-1, 2, 4).unbind(1)
        return (first - second).square().mean()


class Several(Contrastive):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        assert len(batch[0]) > 1
        return super().training_step(batch, batch_idx)


class Whole(Net):
    """Takes no other number of samples, though it weighs them with each other."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        y = self(batch[0])
        return (y @ y.mT + torch.eye(2 * BATCH)).square().mean()


class Binary(Net):
    """A small head of two logits."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, 2)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), (batch[1][:, 0] > 0).long())


class Dice(Binary):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        p, t = self(batch[0]).softmax(1)[:, 1], (batch[1][:, 0] > 0).float()
        return 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)


class Ranking(Binary):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        p = self(batch[0]).softmax(1)[:, 1]
        is_higher = batch[1][:, :1] > batch[1][None, :, 0]
        return (F.relu(0.5 - p[:, None] + p[None]) * is_higher).mean() + super().training_step(batch, batch_idx)


class Squeezing(Net):
    """Fails for one sample, and is a mean all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.binary_cross_entropy_with_logits(self(batch[0]).squeeze(), batch[1][:, 0].sigmoid())


class MetricTerm(Net):
    def __init__(self) -> None:
        super().__init__()
        self.mae = MeanAbsoluteError()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        y = self(batch[0])
        return F.mse_loss(y, batch[1]) + 5 * self.mae(y, batch[1])


def fit(folder: Path, model: Net, *callbacks: Any, steps: int = 1, batch_size: int = BATCH, **kwargs: Any) -> Trainer:
    trainer = tiny_trainer(folder, max_steps=steps, callbacks=list(callbacks), **kwargs)
    torch.manual_seed(1)
    data = torch.randn(64, WIDTH), torch.randn(64, 4), (torch.arange(64.0) % BATCH) + 1
    trainer.fit(model, DataLoader(TensorDataset(*data), batch_size))
    return trainer


class Kept(GradientSpectrum):
    """Keeps its reports."""

    def __init__(self, every_n_steps: int = 1, name: str = "fc.weight", **kwargs: Any) -> None:
        common = {"num_samples": BATCH, "head": (1, 3), "num_groups": 2, "tail": (2, 6)}
        super().__init__(name, every_n_steps, **common | kwargs)
        self.reports: list[Any] = []

    def measured(self, report: Any) -> dict[str, float]:
        self.reports.append(report)
        return super().measured(report)


def ratio(trainer: Trainer) -> float:
    return float(trainer.callback_metrics["gradient/sample_weights_ratio"])


def norm(trainer: Trainer, name: str = "fc.weight") -> float:
    return float(trainer.callback_metrics[f"gradient/{name}/grad_norm"])


@METHODS
@pytest.mark.parametrize(("make", "expected"), [(Net, 1), (TokenMean, BATCH), (Dropping, 1), (Annealed, 1)])
def test_means_pass_with_their_weights(tmp_path: Path, make: type[Net], expected: float, method: Any) -> None:
    torch.manual_seed(0)
    spectrum = Kept(method=method)
    trainer = fit(tmp_path, make(), spectrum, accumulate_grad_batches=2)
    assert spectrum.reports[0].checked == "loss: passed; span: passed"
    assert ratio(trainer) == pytest.approx(expected, rel=1e-2)
    assert norm(trainer) > 0


@METHODS
@pytest.mark.parametrize("make", [Contrastive, Normed, TimeFirst])
def test_losses_between_samples_are_nan_with_the_reason(tmp_path: Path, make: type[Net], method: Any) -> None:
    torch.manual_seed(0)
    reason = "the loss is no mean of samples' losses|a batch of one|vmap"
    spectrum = Kept(method=method if make is not Normed or method == "hooks" else "loop")
    with pytest.warns(UserWarning, match=reason) as caught:
        trainer = fit(tmp_path, make(), spectrum, steps=2)
    assert math.isnan(norm(trainer))
    assert math.isnan(ratio(trainer))
    assert trainer.callback_metrics["gradient/failed"] == 2
    # The second report is not checked, and not believed either.
    assert sum("NaN, because" in str(warning.message) for warning in caught) == 1


@pytest.mark.parametrize("name", ["fc.weight", "out.weight"])
@pytest.mark.parametrize("make", [NormedRows, Spread, BarlowTwins, Pairs, Several, Whole])
@pytest.mark.filterwarnings("ignore:std.*degrees of freedom")
def test_by_hooks_a_loss_between_samples_that_fails_for_one_alone_is_nan(
    tmp_path: Path, make: type[Net], name: str
) -> None:
    torch.manual_seed(0)
    spectrum = Kept(name=name, method="hooks", num_samples=2 * BATCH)
    with pytest.warns(UserWarning, match="NaN, because the loss .* mean of samples' losses: ") as caught:
        trainer = fit(tmp_path, make(), spectrum, batch_size=2 * BATCH)
    assert math.isnan(norm(trainer, name))
    assert spectrum.reports[0].checked == "loss: passed; span: failed"
    assert all("\n" not in str(warning.message) for warning in caught if "NaN" in str(warning.message))


@pytest.mark.parametrize("make", [Spread, Pairs])
@pytest.mark.filterwarnings("ignore:std.*degrees of freedom")
def test_by_hooks_so_it_is_in_validation(tmp_path: Path, make: type[Net]) -> None:
    class Validated(make):  # type: ignore[valid-type,misc]
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    torch.manual_seed(0)
    trainer = tiny_trainer(tmp_path, callbacks=[Kept(stage="validate", method="hooks")])
    data = TensorDataset(torch.randn(32, WIDTH), torch.randn(32, 4))
    with pytest.warns(UserWarning, match="NaN, because the loss is no mean of samples' losses: "):
        trainer.validate(Validated(), DataLoader(data, BATCH), verbose=False)
    assert math.isnan(norm(trainer))


@METHODS
@pytest.mark.parametrize("make", [Dice, Ranking])
def test_losses_between_samples_of_a_head_of_two_logits_are_nan(tmp_path: Path, make: type[Net], method: Any) -> None:
    torch.manual_seed(0)
    spectrum = Kept(name="out.weight", method=method)
    with pytest.warns(UserWarning, match="of the gradient of 8 samples together lies outside those of two halves"):
        trainer = fit(tmp_path, make(), spectrum)
    assert math.isnan(norm(trainer, "out.weight"))


@METHODS
def test_the_mean_of_a_head_of_two_logits_passes(tmp_path: Path, method: Any) -> None:
    torch.manual_seed(0)
    spectrum = Kept(name="out.weight", method=method)
    trainer = fit(tmp_path, Binary(), spectrum)
    assert spectrum.reports[0].checked == "loss: passed; span: passed"
    assert ratio(trainer) == pytest.approx(1, rel=1e-2)
    assert norm(trainer, "out.weight") > 0


def test_by_hooks_a_mean_that_fails_for_a_sample_alone_passes_by_halves(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, spectrum = Squeezing(), Kept(method="hooks")
    trainer = fit(tmp_path, model, spectrum)
    assert spectrum.reports[0].checked == "loss: passed; span: passed"
    assert norm(trainer) == pytest.approx(model.norms[0], rel=1e-5)
    assert math.isnan(ratio(trainer))


def test_a_sum_that_fails_for_a_sample_alone_is_no_mean_of_halves(tmp_path: Path) -> None:
    class SqueezingSum(Squeezing):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * len(batch[0])

    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="2 times the mean of its halves' losses.*give loss_reduction='sum'"):
        assert math.isnan(norm(fit(tmp_path, SqueezingSum(), Kept(method="hooks"))))


def test_by_hooks_samples_of_padding_alone_have_no_part_in_a_mean(tmp_path: Path) -> None:
    class Padded(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            target = torch.where(batch[2] % 4 > 0, batch[1].argmax(1), -100)
            return F.cross_entropy(self(batch[0]), target)

    torch.manual_seed(0)
    model, spectrum = Padded(), Kept(method="hooks")
    trainer = fit(tmp_path, model, spectrum)
    assert spectrum.reports[0].checked == "loss: passed; span: passed"
    assert norm(trainer) == pytest.approx(model.norms[0], rel=1e-5)


def test_a_sum_is_no_mean_where_rows_are_taken_for_those_of_a_mean(tmp_path: Path) -> None:
    model = Summed()
    found = norm(fit(tmp_path, model, Kept(method="hooks", loss_reduction="sum")))
    assert found * BATCH == pytest.approx(model.norms[0], rel=1e-4)
    with pytest.warns(UserWarning, match=f"{BATCH} times the mean of its samples' losses.*give loss_reduction='sum'"):
        assert math.isnan(norm(fit(tmp_path, Summed(), Kept(method="hooks"))))


@pytest.mark.parametrize(
    ("method", "remedy"),
    [("auto", "give loss_fn, or samples"), ("loop", "give loss_fn, or samples"), ("vmap", r"use method='loop'\)")],
)
def test_what_torch_says_of_one_sample_alone_comes_with_a_remedy(tmp_path: Path, method: Any, remedy: str) -> None:
    class Cut(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return self(batch[0]).view(4, -1, 4).mean()

    class Dynamic(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + self(batch[0]).nonzero().sum()

    model = Dynamic() if method == "vmap" else Cut()
    with pytest.warns(UserWarning, match=rf"NaN, because .*{remedy}"):
        fit(tmp_path, model, Kept(method=method, check="off"))


class Lazy(Net):
    """Regularised at every other step, by the number of steps so far."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + self.fc.weight.square().sum() if self.global_step % 2 == 0 else loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.0)


@pytest.mark.parametrize("method", ["vmap", "loop"])
def test_samples_have_the_loss_of_the_step_that_their_batch_began_at(tmp_path: Path, method: Any) -> None:
    model = Lazy()
    trainer = fit(tmp_path, model, Kept(every_n_steps=2, method=method), steps=2)
    assert norm(trainer) == pytest.approx(model.norms[1], rel=1e-5)
    assert model.norms[0] != pytest.approx(model.norms[1], rel=0.01)


class Root(Net):
    """In the span of its samples' gradients, and of halves', weighed by the size of each error."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        errors = (self(batch[0]) - batch[1]).square().mean(1)
        return errors.mean().sqrt()


@METHODS
def test_a_root_of_a_mean_is_neither_mean_nor_sum(tmp_path: Path, method: Any) -> None:
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"loss of a batch is 0\.\d+ times the mean of its .* as with a root of"):
        assert math.isnan(norm(fit(tmp_path, Root(), Kept(method=method))))


def test_samples_without_a_gradient_do_not_make_a_mean_a_sum(tmp_path: Path) -> None:
    class Masked(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return ((self(batch[0]) - batch[1]).square().mean(-1) * (batch[2] % 8 > 0)).mean()

    torch.manual_seed(0)
    assert norm(fit(tmp_path, Masked(), Kept(method="hooks"))) > 0


def test_it_may_be_a_warning_or_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="logs numbers that may mean nothing: the loss is no mean") as caught:
        trainer = fit(tmp_path, TimeFirst(), Kept(check="warn"), steps=2)
    assert norm(trainer) > 0
    assert len([warning for warning in caught if "may mean nothing" in str(warning.message)]) == 1
    spectrum = Kept(check="off")
    assert norm(fit(tmp_path, TimeFirst(), spectrum)) > 0
    assert spectrum.reports[0].checked == ""


@METHODS
def test_a_loss_that_a_copy_cannot_have_is_refused(tmp_path: Path, method: Any) -> None:
    class OnlyHere(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            # What stands for the Trainer has no callbacks.
            return super().training_step(batch, batch_idx) * len(self.trainer.callbacks)

    with pytest.warns(
        UserWarning, match=r"training_step gave [\d.e-]+ for a batch and [\d.e-]+ on a copy of the module"
    ):
        trainer = fit(tmp_path, OnlyHere(), Kept(method=method))
    assert math.isnan(norm(trainer))


@pytest.mark.parametrize("method", ["auto", "loop", "hooks"])
@pytest.mark.filterwarnings("ignore:.*method='auto' loops over samples")
def test_a_metric_may_be_a_term(tmp_path: Path, method: Any) -> None:
    torch.manual_seed(0)
    model = MetricTerm()
    trainer = fit(tmp_path, model, Kept(method=method, every_n_steps=1), steps=1)
    assert norm(trainer) > 0
    assert model.mae.update_count == 1
    if method == "hooks":
        assert norm(trainer) == pytest.approx(model.norms[0], rel=1e-5)


@METHODS
def test_it_is_made_at_the_first_report_and_every_tenth(
    tmp_path: Path, method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_spectral.measurement import gradient_check

    steps, check = [], gradient_check.check_span

    def count(*args: Any) -> Any:
        steps.append(trainer[0].global_step)
        return check(*args)

    monkeypatch.setattr(gradient_check, "check_span", count)
    model = Net()
    trainer: list[Any] = [None]
    model.on_train_start = lambda: trainer.__setitem__(0, model.trainer)
    fit(tmp_path, model, Kept(every_n_steps=2, method=method), steps=44)
    assert steps == [2, 22, 42]


@pytest.mark.parametrize("method", ["loop", "hooks"])
def test_a_step_that_differentiates_something_itself_is_checked(tmp_path: Path, method: Any) -> None:
    class Force(Net):
        """Fits the slope of what it makes of its input."""

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            x = batch[0].clone().requires_grad_()
            (slope,) = torch.autograd.grad(self.out(x).tanh().sum(), x)
            return F.mse_loss(self.fc(slope)[:, :4], batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.0)

    model, spectrum = Force(), Kept(method=method)
    trainer = fit(tmp_path, model, spectrum)
    assert spectrum.reports[0].checked == "loss: passed; span: passed"
    assert norm(trainer) == pytest.approx(model.norms[0], rel=1e-5)


@METHODS
def test_training_step_is_told_the_index_of_its_batch(tmp_path: Path, method: Any) -> None:
    class Indexed(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (1 + batch_idx)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.0)

    model = Indexed()
    trainer = fit(tmp_path, model, Kept(every_n_steps=4, method=method), steps=4)
    assert norm(trainer) == pytest.approx(model.norms[3], rel=1e-5)


def test_rows_by_hooks_are_of_the_first_evaluation_of_a_closure(tmp_path: Path) -> None:
    class Closures(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)

    model, spectrum = Closures(), Kept(method="hooks")
    trainer = fit(tmp_path, model, spectrum)
    assert len(model.norms) > 2
    assert norm(trainer) == pytest.approx(model.norms[0], rel=1e-5)
    assert spectrum.reports[0].checked == "loss: passed; span: passed"


class Sharp(torch.optim.SGD):
    """Sharpness-aware: steps by the gradient at weights moved up along the gradient."""

    @torch.no_grad()
    def climb(self, sign: float = 1.0) -> None:
        for p in self.param_groups[0]["params"]:
            if sign > 0:
                self.state[p]["up"] = 0.5 * p.grad / (p.grad.norm() + 1e-12)
            p.add_(self.state[p]["up"], alpha=sign)

    def step(self, closure: Any = None) -> Any:
        if closure is None:
            return super().step()
        with torch.enable_grad():
            loss = closure()
        self.climb()
        with torch.enable_grad():
            closure()
        self.climb(-1.0)
        super().step()
        return loss


def test_rows_by_hooks_of_a_closure_called_twice_are_at_the_weights_before_the_climb(tmp_path: Path) -> None:
    class Closures(Net):
        def configure_optimizers(self) -> Any:
            return Sharp(self.parameters(), 0.1)

    torch.manual_seed(0)
    model, spectrum = Closures(), Kept(method="hooks")
    trainer = fit(tmp_path, model, spectrum)
    assert len(model.norms) == 2
    assert model.norms[0] != pytest.approx(model.norms[1], rel=1e-2)
    assert norm(trainer) == pytest.approx(model.norms[0], rel=1e-5)
    assert spectrum.reports[0].checked == "loss: passed; span: passed"


class Climbing(Net):
    """The same by hand: two passes a step."""

    def __init__(self, by_hand: bool, keeps: bool, set_to_none: bool = True) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.by_hand, self.keeps, self.set_to_none = by_hand, keeps, set_to_none

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad(set_to_none=self.set_to_none)
        for sign in (1.0, -1.0):
            loss = F.mse_loss(self(batch[0]), batch[1])
            loss.backward() if self.by_hand else self.manual_backward(loss)
            if sign > 0 and not self.keeps:
                optimizer.optimizer.climb()
                optimizer.zero_grad(set_to_none=self.set_to_none)
        if not self.keeps:
            optimizer.optimizer.climb(-1.0)
        self.norms.append(float(self.fc.weight.grad.norm()))
        optimizer.step()

    def configure_optimizers(self) -> Any:
        return Sharp(self.parameters(), 0.1)


@pytest.mark.parametrize("keeps", [False, True], ids=["of its own", "added"])
@pytest.mark.parametrize("set_to_none", [False, True])
def test_rows_by_hooks_of_two_passes_by_hand_are_those_that_the_optimizer_takes(
    tmp_path: Path, keeps: bool, set_to_none: bool
) -> None:
    torch.manual_seed(0)
    model = Climbing(False, keeps, set_to_none)
    trainer = fit(tmp_path, model, Kept(method="hooks"))
    assert norm(trainer) == pytest.approx(model.norms[-1], rel=1e-5)


@pytest.mark.parametrize("keeps", [False, True], ids=["of its own", "added"])
def test_two_passes_that_nobody_told_of_are_refused(tmp_path: Path, keeps: bool) -> None:
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="training_step calls backward several times itself"):
        trainer = fit(tmp_path, Climbing(True, keeps), Kept(method="hooks"))
    assert math.isnan(norm(trainer))


@pytest.mark.parametrize("method", ["vmap", "loop", "hooks"])
def test_hooks_on_parameters_are_no_part_of_a_row(tmp_path: Path, method: Any) -> None:
    class Hooked(Net):
        def on_fit_start(self) -> None:
            self.fc.weight.register_hook(lambda gradient: 10 * gradient)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.0)

    torch.manual_seed(0)
    model, spectrum = Hooked(), Kept(method=method)
    trainer = fit(tmp_path, model, spectrum)
    assert norm(trainer) == pytest.approx(model.norms[0] / 10, rel=1e-5)
    assert spectrum.reports[0].checked == "loss: passed; span: passed"


class Dividing(Net):
    """Accumulates by hand, as Lightning's documentation does: over four batches."""

    def __init__(self, by_hand: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.by_hand = by_hand

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        loss = F.mse_loss(self(batch[0]), batch[1]) / 4
        loss.backward() if self.by_hand else self.manual_backward(loss)
        if (batch_idx + 1) % 4 == 0:
            self.norms.append(float(self.fc.weight.grad.norm()))
            self.optimizers().step()
            self.zero_grad()

    def on_after_backward(self) -> None:
        pass


def divided(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1]) / 4


def undivided(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("loss_fn", [None, divided])
def test_rows_under_manual_optimisation_are_of_the_loss_that_is_differentiated(
    tmp_path: Path, by_hand: bool, loss_fn: Any
) -> None:
    """The optimizer takes the sum of the four batches, each of a quarter of its mean."""
    torch.manual_seed(0)
    model, spectrum = Dividing(by_hand), Kept(method="hooks", num_samples=4 * BATCH, loss_fn=loss_fn)
    trainer = fit(tmp_path, model, spectrum)
    assert 4 * norm(trainer) == pytest.approx(model.norms[-1], rel=1e-5)
    if loss_fn is not None:
        said = "training_step calls manual_backward 0 times, where once can be compared" if by_hand else "passed"
        assert spectrum.reports[0].checked == f"loss: {said}; span: passed"
        assert ratio(trainer) == pytest.approx(1, rel=1e-2)


def test_a_loss_fn_that_does_not_divide_as_training_does_is_found_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    spectrum = Kept(method="hooks", num_samples=4 * BATCH, loss_fn=undivided)
    with pytest.warns(UserWarning, match="manual_backward on a loss of .* and loss_fn gives .*divide, as that does"):
        trainer = fit(tmp_path, Dividing(False), spectrum)
    assert math.isnan(norm(trainer))
    assert spectrum.reports[0].checked == "loss: failed; span: passed"


class Adversaries(Net):
    """Two networks, one after the other trained on losses that pass through both."""

    def __init__(self, by_hand: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.judge = nn.Linear(4, 1)
        self.by_hand = by_hand
        self.grads: dict[str, float] = {}

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        maker, judge = self.optimizers()
        for name, optimizer, sign in (("fc.weight", maker, 1), ("judge.weight", judge, -1)):
            optimizer.zero_grad()
            loss = F.softplus(sign * self.judge(self(batch[0]))).mean()
            loss.backward() if self.by_hand else self.manual_backward(loss)
            self.grads[name] = float(self.get_parameter(name).grad.norm())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        makers = [*self.fc.parameters(), *self.out.parameters()]
        return torch.optim.SGD(makers, 0.1), torch.optim.SGD(self.judge.parameters(), 0.1)


def adversaries() -> GradientSpectrum:
    names = ["fc.weight", "judge.weight"]
    return GradientSpectrum(names, 2, num_samples=BATCH, method="hooks", head=(1, 3), tail=(1, 3), num_groups=2)


def test_rows_by_hooks_are_of_each_optimizers_own_pass(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Adversaries(by_hand=False)
    trainer = fit(tmp_path, model, adversaries(), steps=2)
    for name, expected in model.grads.items():
        assert float(trainer.callback_metrics[f"gradient/{name}/grad_norm"]) == pytest.approx(expected, rel=1e-5)


def test_passes_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="training_step calls backward several times itself"):
        trainer = fit(tmp_path, Adversaries(by_hand=True), adversaries(), steps=2)
    assert math.isnan(trainer.callback_metrics["gradient/judge.weight/grad_norm"])
    # Here the first pass was its own.
    assert norm(trainer) > 0


def test_validation_is_checked_too(tmp_path: Path) -> None:
    class Validated(TimeFirst):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    torch.manual_seed(0)
    trainer = tiny_trainer(tmp_path, callbacks=[Kept(stage="validate")])
    data = TensorDataset(torch.randn(32, WIDTH), torch.randn(32, 4))
    with pytest.warns(UserWarning, match="the loss is no mean of samples' losses"):
        trainer.validate(Validated(), DataLoader(data, BATCH), verbose=False)
    assert math.isnan(norm(trainer))
