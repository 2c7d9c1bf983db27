"""Steps that branch on their samples have the same rows under vmap as one sample at a time, or none with the line."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_spectral import per_sample_gradients
from lightning_spectral.capture.batch import Samples


class Step(LightningModule):
    """A layer whose loss is a function of it and of a sample."""

    def __init__(self, loss: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.loss = nn.Linear(3, 2, dtype=torch.float64), loss

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(self.layer, batch)


def nested(layer: nn.Module, x: Tensor) -> Tensor:
    y = layer(x).sum()
    if (x[0, 0] > 0).item():
        return y.square() if y > 0 else y.abs() * 3
    return y.exp() if x[0, 1] > 0 else y


def after_noise(layer: nn.Module, x: Tensor) -> Tensor:
    y = layer(x + torch.randn_like(x)).sum()
    return y.square() if x[0, 0] > 0 else y


def before_noise(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x + torch.randn_like(x)).sum() if x[0, 0] > 0 else layer(x).sum().square()


def number(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x).sum() * float(x.sum())


def rows(step: LightningModule, batch: Any, method: str, **more: Any) -> Tensor:
    return per_sample_gradients(step, batch, "*.weight", method=method, **more)["layer.weight"]


def samples() -> Tensor:
    torch.manual_seed(0)
    x = torch.randn(12, 3, dtype=torch.float64)
    assert {(a > 0, b > 0) for a, b, _ in x.tolist()} == {(a, b) for a in (False, True) for b in (False, True)}
    return x


@pytest.mark.parametrize("chunk_size", [1, 5, 12])
def test_samples_that_take_other_branches_have_their_own_gradients(chunk_size: int) -> None:
    step, x = Step(nested), samples()
    found = rows(step, x, "vmap", chunk_size=chunk_size)
    for row, one in zip(found, x, strict=True):
        (expected,) = torch.autograd.grad(nested(step.layer, one.unsqueeze(0)), step.layer.weight)
        torch.testing.assert_close(row, expected.flatten())


def test_a_branch_that_is_taken_before_numbers_are_drawn_leaves_them_to_chance() -> None:
    step, x = Step(before_noise), samples()
    found = rows(step, x, "vmap")
    is_noisy = x[:, 0] > 0
    plain = rows(Step(lambda layer, x: layer(x).sum()), x, "loop")
    noise = (found - plain)[is_noisy][:, :3]
    assert len(noise) == len({tuple(row.tolist()) for row in noise}) > 1  # each draws its own
    torch.testing.assert_close(found[~is_noisy], rows(step, x, "loop")[~is_noisy])


@pytest.mark.parametrize(
    ("loss", "words"), [(after_noise, "after random numbers were drawn"), (number, "which torch.func does not give")]
)
def test_what_cannot_be_followed_is_told_with_its_line(loss: Any, words: str) -> None:
    line = loss.__code__.co_firstlineno + (2 if loss is after_noise else 1)
    with pytest.raises(RuntimeError, match=rf"^test_branches\.py:{line} asks for a value of each sample.*{words}$"):
        rows(Step(loss), samples(), "vmap")
    assert rows(Step(loss), samples(), "auto").shape == (12, 6)


def test_a_condition_that_is_the_same_for_all_or_no_single_one_stays_as_it_is() -> None:
    step = Step(lambda layer, x: layer(x).sum() if torch.ones(()) > 0 else layer(x).mean())
    torch.testing.assert_close(rows(step, samples(), "vmap"), rows(step, samples(), "loop"))
    with pytest.raises(RuntimeError, match=r"ambiguous|vmap"):
        rows(Step(lambda layer, x: layer(x).sum() if x > 0 else x.sum()), samples(), "vmap")


def test_samples_are_picked_on_their_axis() -> None:
    batch = {"x": torch.arange(12).reshape(3, 4), "y": torch.arange(4), "table": torch.arange(5)}
    picked = Samples(1).cut(batch).pick(torch.tensor([3, 0]))
    assert picked.size == 2
    assert picked.data["x"].tolist() == [[3, 0], [7, 4], [11, 8]]
    assert picked.data["y"].tolist() == [3, 0]
    assert picked.data["table"] is batch["table"]


class PaddedGPT2(LightningModule):
    """Whose attention asks whether a mask has padding."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=30, n_positions=12)
        self.model = GPT2LMHeadModel(config).double().eval()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss


@pytest.mark.skipif(torch.__version__ < "2.5", reason="torch 2.4 has no rule of vmap to fill masks of float64")
def test_padded_batches_of_transformers_are_vectorised() -> None:
    torch.manual_seed(0)
    module = PaddedGPT2()
    lengths = [6, 3, 6, 4]
    ids = torch.randint(30, (4, 6))
    mask = (torch.arange(6) < torch.tensor(lengths)[:, None]).long()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask == 1, -100)}
    found = per_sample_gradients(module, batch, "all", method="vmap")
    parameters = dict(module.named_parameters())
    for index, length in enumerate(lengths):
        alone = ids[index : index + 1, :length]  # without its padding
        loss = module.model(input_ids=alone, labels=alone).loss
        for name, gradient in zip(found, torch.autograd.grad(loss, [parameters[n] for n in found]), strict=True):
            torch.testing.assert_close(found[name][index], gradient.flatten(), atol=1e-12, rtol=1e-9)
