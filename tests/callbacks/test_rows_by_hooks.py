"""Rows by hooks are of samples and make up the whole gradient, in every report; where they do not it is said."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_spectral import GradientSpectrum, per_sample_gradients
from lightning_spectral.functional.singular import gram
from tests.models import tiny_trainer

LENGTH, WIDTH, VOCAB = 8, 6, 11
WARNS = pytest.mark.filterwarnings("default::UserWarning")
NOT_OF_LAYERS = "is not the sum of what its own layers gave"


class Positions(LightningModule):
    """Token and position embeddings; ``fc`` is given time first if ``turned``."""

    def __init__(self, turned: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.turned = turned
        self.wte, self.wpe = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.fc, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCAB)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        hidden = self.wte(batch[0]) + self.wpe(torch.arange(batch[0].shape[1]))
        hidden = self.fc(hidden.transpose(0, 1)).transpose(0, 1) if self.turned else self.fc(hidden)
        return F.cross_entropy(self.head(hidden.tanh()).flatten(0, 1), batch[1].flatten())

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.0)


class Classifier(Positions):
    """Of vectors; ``term`` may be added to its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(LENGTH, WIDTH)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.fc(x).tanh()), y)

    def term(self, x: Tensor, batch_idx: int) -> Tensor | float:
        return 0.0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(*batch) + self.term(batch[0], batch_idx)


class PenalisedLater(Classifier):
    def term(self, x: Tensor, batch_idx: int) -> Tensor | float:
        return 0.1 * self.fc.weight.square().sum() if batch_idx >= 2 else 0.0


class LazyR1(Classifier):
    """A penalty on the gradient of its input, at every other step."""

    def term(self, x: Tensor, batch_idx: int) -> Tensor | float:
        if batch_idx % 2 == 0:
            return 0.0
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(self.head(self.fc(x).tanh()).sum(), x, create_graph=True)
        return slope.square().sum(1).mean()


class Adversarial(Classifier):
    """Moves its inputs along the gradient first, by a pass beside."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x = batch[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(self.loss(x, batch[1]), x)
        return self.loss(batch[0] + 0.1 * slope.sign(), batch[1])


class ByHand(LightningModule):
    """Moves its optimizer itself, so that no pass of one sample can be made."""

    automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.manual_backward(super().training_step(batch, batch_idx))
        self.optimizers().step()


class Experts(Classifier):
    """Each expert gets the tokens that are routed to it, of whichever sample."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.router = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 6)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = self.fc(x).tanh().flatten(0, 1)
        weight, chosen = self.router(hidden).softmax(-1).max(-1)
        out = torch.zeros_like(hidden)
        for index, expert in enumerate(self.experts):
            token = (chosen == index).nonzero()[:, 0]
            if len(token):
                out = out.index_add(0, token, expert(hidden[token]) * weight[token, None])
        return F.cross_entropy(self.head((hidden + out).view(*x.shape[:2], -1).mean(1)), y)


class TiedByFunction(Positions):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        hidden = self.fc(self.wte(batch[0])).tanh()
        return F.cross_entropy(F.linear(hidden, self.wte.weight).flatten(0, 1), batch[1].flatten())


def tokens(size: int, num_batches: int = 1) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randint(VOCAB, (num_batches * size, LENGTH), generator=generator) for _ in range(2))
    return DataLoader(TensorDataset(x, y), size)


def vectors(size: int, num_batches: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_batches * size, LENGTH, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(VOCAB, (len(x),), generator=generator)), size)


def fit(tmp_path: Path, model: LightningModule, loader: Any, spectrum: GradientSpectrum, **options: Any) -> Trainer:
    options["limit_val_batches"] = int(spectrum.request.stage == "validate")
    trainer = tiny_trainer(tmp_path, callbacks=[spectrum], logger=False, max_epochs=1, max_steps=-1, **options)
    trainer.fit(model, loader, loader)
    return trainer


def spectrum_of(names: Any, num_samples: int, **options: Any) -> GradientSpectrum:
    arguments = {"method": "hooks", "every_n_steps": 1, "head": (1, 3), "tail": (2, 5), **options}
    return GradientSpectrum(names, num_samples=num_samples, **arguments)


def reason(trainer: Trainer, spectrum: GradientSpectrum, name: str, text: str, recwarn: Any) -> None:
    assert math.isnan(float(trainer.callback_metrics[f"gradient/{name}/rankme"]))
    assert any(text in str(warning.message) and name in str(warning.message) for warning in recwarn)


@pytest.mark.parametrize("stage", ["train", "validate"])
@pytest.mark.parametrize(("turned", "name"), [(False, "wpe.weight"), (True, "fc.weight")])
@WARNS
def test_a_batch_as_long_as_its_sequences_gives_no_rows_of_positions(
    tmp_path: Path, turned: bool, name: str, stage: Any, recwarn: Any
) -> None:
    model, spectrum = Positions(turned), spectrum_of([name, "wte.weight"], LENGTH, stage=stage)
    trainer = fit(tmp_path, model, tokens(LENGTH), spectrum)
    reason(trainer, spectrum, name, "of its samples alone its layer gives", recwarn)
    rows = per_sample_gradients(model, next(iter(tokens(LENGTH))), "wte.weight", "loop")["wte.weight"]
    norm = float(trainer.callback_metrics["gradient/wte.weight/grad_norm"])
    assert norm == pytest.approx(float(rows.mean(0).norm()), rel=1e-4)


@pytest.mark.parametrize("stage", ["train", "validate"])
def test_time_first_layers_are_read_where_batch_dim_says_so(tmp_path: Path, stage: Any) -> None:
    class TimeFirst(Positions):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return F.cross_entropy(self.head(self.fc(self.wte(batch[0])).tanh()).flatten(0, 1), batch[1].flatten())

    model, size = TimeFirst(), LENGTH  # as long as its sequences
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randint(VOCAB, (LENGTH, size), generator=generator) for _ in range(2))
    trainer = fit(
        tmp_path, model, DataLoader([[x, y]], batch_size=None), spectrum_of("fc.weight", size, stage=stage, batch_dim=1)
    )
    rows = per_sample_gradients(model, [x, y], "fc.weight", "loop", batch_dim=1)["fc.weight"]
    by_hooks = per_sample_gradients(model, [x, y], "fc.weight", "hooks", batch_dim=1)["fc.weight"]
    torch.testing.assert_close(by_hooks, rows, rtol=1e-4, atol=1e-6)
    values = gram(rows.double()).diagonal().sqrt()
    assert values.max() > 1.1 * values.min()  # samples can be told apart
    norm = float(trainer.callback_metrics["gradient/fc.weight/grad_norm"])
    assert norm == pytest.approx(float(rows.mean(0).norm()), rel=1e-4)
    singular = torch.linalg.svdvals(rows.double())
    share = singular / singular.sum()
    rankme = float(torch.exp(-torch.special.xlogy(share, share).sum()))
    assert float(trainer.callback_metrics["gradient/fc.weight/rankme"]) == pytest.approx(rankme, rel=1e-3)


@pytest.mark.parametrize("make", [PenalisedLater, LazyR1])
@WARNS
def test_gradient_from_elsewhere_in_a_later_step_is_found_out(
    tmp_path: Path, make: type[Classifier], recwarn: Any
) -> None:
    spectrum = spectrum_of("fc.weight", 8)
    trainer = fit(tmp_path, make(), vectors(8, 4), spectrum)
    reason(trainer, spectrum, "fc.weight", NOT_OF_LAYERS, recwarn)
    good = [not math.isnan(report["rows"]["fc.weight"]["rankme"]) for report in spectrum.display.reports]
    assert good[0] is True
    assert good[-1] is False


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_pass_beside_is_no_part_of_a_row(tmp_path: Path, accumulate: int) -> None:
    """Also where the gradient of the batch before is still there."""
    model, spectrum = Adversarial(), spectrum_of("fc.weight", 8 * accumulate)
    trainer = fit(tmp_path, model, vectors(8, 2), spectrum, accumulate_grad_batches=accumulate)
    batches = list(vectors(8, 2))[-accumulate:]
    rows = torch.cat([per_sample_gradients(model, batch, "fc.weight", "loop")["fc.weight"] for batch in batches])
    norm = float(trainer.callback_metrics["gradient/fc.weight/grad_norm"])
    assert norm == pytest.approx(float(rows.mean(0).norm()), rel=1e-4)


@WARNS
def test_a_batch_of_more_samples_than_are_wanted_is_compared_whole(tmp_path: Path, recwarn: Any) -> None:
    trainer = fit(tmp_path, TiedByFunction(), tokens(12), spectrum := spectrum_of("wte.weight", 5))
    reason(trainer, spectrum, "wte.weight", NOT_OF_LAYERS, recwarn)
    model = Positions()
    trainer = fit(tmp_path, model, tokens(12), spectrum_of(["wte.weight", "fc.weight", "fc.bias"], 5))
    batch = next(iter(tokens(12)))
    rows = per_sample_gradients(model, [part[:5] for part in batch], ["wte.weight", "fc.weight", "fc.bias"], "loop")
    for name, of_one in rows.items():
        norm = float(trainer.callback_metrics[f"gradient/{name}/grad_norm"])
        assert norm == pytest.approx(float(of_one.mean(0).norm()), rel=1e-4)


def test_a_second_gradient_of_what_was_complete_is_found_out(tmp_path: Path) -> None:
    class Twice(Classifier):
        """Asks for a second backward pass of its own from the second step on."""

        def on_after_backward(self) -> None:
            if self.global_step > 0:
                (0.1 * self.fc.weight.square().sum()).backward()

    spectrum = spectrum_of("fc.weight", 8)
    with pytest.warns(UserWarning, match="its gradient came in parts for the first time"):
        fit(tmp_path, Twice(), vectors(8, 2), spectrum)


@WARNS
@pytest.mark.parametrize("batch_dim", [None, 0])
def test_where_no_pass_of_one_sample_can_be_made_batch_dim_must_tell(
    tmp_path: Path, batch_dim: int | None, recwarn: Any
) -> None:
    class Manual(ByHand, Positions):
        pass

    spectrum = spectrum_of("head.weight", LENGTH, batch_dim=batch_dim)
    trainer = fit(tmp_path, Manual(), tokens(LENGTH), spectrum)
    if batch_dim is None:
        reason(trainer, spectrum, "head.weight", "give batch_dim, 0 for samples first", recwarn)
    else:
        assert float(trainer.callback_metrics["gradient/head.weight/grad_norm"]) > 0


@WARNS
@pytest.mark.parametrize("seed", range(4))
def test_tokens_of_an_expert_as_many_as_samples_are_no_rows_of_samples(tmp_path: Path, seed: int) -> None:
    """In most batches some expert gets as many tokens as there are samples; they are right if each sends it one."""
    names = [f"experts.{index}.weight" for index in range(6)]
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(16, 6, 5, generator=generator), torch.randint(VOCAB, (16,), generator=generator)
    model, loader = Experts(), DataLoader(TensorDataset(x, y), 4)
    spectrum = spectrum_of(names, 4, tail=(1, 4))
    fit(tmp_path, model, loader, spectrum)
    by_loop = [per_sample_gradients(model, batch, names, "loop") for batch in loader]
    for report, expected in zip((one["rows"] for one in spectrum.display.reports), by_loop, strict=False):
        for name, row in report.items():
            assert math.isnan(row["rankme"]) or row["grad_norm"] == pytest.approx(float(expected[name].mean(0).norm()))
    for batch, expected in zip(loader, by_loop, strict=True):
        for name in names:
            try:
                rows = per_sample_gradients(model, batch, name, "hooks")[name]
            except ValueError:
                continue
            torch.testing.assert_close(rows, expected[name])


@WARNS
@pytest.mark.parametrize("by_hand", [False, True])
def test_a_table_of_positions_is_of_no_samples_at_any_length(tmp_path: Path, by_hand: bool, recwarn: Any) -> None:
    """In the second report there are as many samples as positions, though the batch does not look it."""

    class Shifted(Positions):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            length = 4 if batch_idx == 0 and not by_hand else 6
            return super().training_step([part[:, :length] for part in batch], batch_idx)

    class Manual(ByHand, Shifted):
        pass

    spectrum = spectrum_of("wpe.weight", 6)
    trainer = fit(tmp_path, Manual() if by_hand else Shifted(), tokens(6, 2), spectrum)
    reason(trainer, spectrum, "wpe.weight", "no pass of one sample" if by_hand else "(4,) and output", recwarn)
    assert all(math.isnan(report["rows"]["wpe.weight"]["rankme"]) for report in spectrum.display.reports)


@pytest.mark.parametrize("what", ["by hand", "squeezing"])
def test_as_many_features_as_samples_are_no_cause_for_doubt(tmp_path: Path, what: str) -> None:
    class Manual(ByHand, Classifier):
        pass

    class Squeezing(Classifier):
        """Cannot take a batch of one."""

        def loss(self, x: Tensor, y: Tensor) -> Tensor:
            return F.binary_cross_entropy_with_logits(self.head(self.fc(x).tanh())[:, :1].squeeze(), y / VOCAB)

    model = Manual() if what == "by hand" else Squeezing()
    trainer = fit(tmp_path, model, vectors(LENGTH, 2), spectrum_of(["fc.weight", "head.weight"], LENGTH))
    assert trainer.callback_metrics["gradient/failed"] == 0
    if what == "squeezing":
        rows = per_sample_gradients(model, next(iter(vectors(LENGTH, 1))), "fc.weight", "hooks")["fc.weight"]
        assert rows.isfinite().all()


@WARNS
def test_a_layer_that_begins_to_run_later_is_read_then(tmp_path: Path) -> None:
    class Later(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.Linear(WIDTH, WIDTH)

        def loss(self, x: Tensor, y: Tensor) -> Tensor:
            hidden = self.fc(x).tanh()
            return F.cross_entropy(self.head(self.more(hidden) if self.global_step > 0 else hidden), y)

    spectrum = spectrum_of("more.weight", LENGTH)
    fit(tmp_path, Later(), vectors(LENGTH, 3), spectrum)
    found = [report["rows"]["more.weight"]["rankme"] for report in spectrum.display.reports]
    assert math.isnan(found[0])
    assert found[-1] > 1


@WARNS
def test_a_gradient_that_is_rounding_is_said_to_be(tmp_path: Path, recwarn: Any) -> None:
    class Attending(Classifier):
        """Softmax does not see what is added to all scores, as a key's bias is."""

        def __init__(self) -> None:
            super().__init__()
            self.key = nn.Linear(1, 3)

        def loss(self, x: Tensor, y: Tensor) -> Tensor:
            weights = self.key(x.unsqueeze(-1)).softmax(1)
            return F.cross_entropy(self.head(self.fc(weights.sum(-1) * x).tanh()), y)

    trainer = fit(tmp_path, Attending(), vectors(32, 1), spectrum := spectrum_of("key.bias", 32, tail=(1, 3)))
    reason(trainer, spectrum, "key.bias", "zero up to rounding", recwarn)
