"""What a loss was divided by is read off its graph exactly, or not at all."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from lightning_spectral.integrations.divided_loss import own_mean_factor
from lightning_spectral.integrations.trained_loss import OwnLoss, is_multiple, times_of

CLASSES = 7


def logits_and_targets(shape: tuple[int, ...], ignored: int = -100, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits with classes second, and targets of which some are to be ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape[0], CLASSES, *shape[1:], generator=generator, dtype=torch.float64)
    targets = torch.randint(CLASSES, shape, generator=generator)
    targets[torch.rand(shape, generator=generator) < 0.4] = ignored
    return logits.requires_grad_(), targets


@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
    ignored=st.sampled_from([-100, -1, 0, 3, 255]),
    total=st.integers(1, 10_000),
    is_tensor=st.booleans(),
    seed=st.integers(0, 100),
)
def test_the_mean_over_a_batch_is_found(
    shape: tuple[int, ...], ignored: int, total: int, is_tensor: bool, seed: int
) -> None:
    logits, targets = logits_and_targets(shape, ignored, seed)
    if bool((targets == ignored).all()):
        targets.view(-1)[0] = 1 if ignored != 1 else 2
    divisor: Any = torch.tensor(total) if is_tensor else total
    loss = cross_entropy(logits, targets, ignore_index=ignored, reduction="sum") / divisor
    factor = own_mean_factor(loss, torch.tensor(total))
    assert factor is not None
    torch.testing.assert_close(loss * factor, cross_entropy(logits, targets, ignore_index=ignored))


def test_a_batch_without_targets_has_a_loss_of_zero() -> None:
    logits, targets = logits_and_targets((3, 4))
    loss = cross_entropy(logits, torch.full_like(targets, -100), reduction="sum") / 12
    factor = own_mean_factor(loss, 12)
    assert factor is not None
    assert float((loss * factor).detach()) == 0


@pytest.mark.parametrize(
    "loss_of",
    [
        cross_entropy,
        lambda logits, targets: cross_entropy(logits, targets, weight=torch.rand(CLASSES, dtype=torch.float64)),
        lambda logits, targets: mse_loss(logits, torch.zeros_like(logits)),
        lambda logits, targets: binary_cross_entropy_with_logits(logits, torch.ones_like(logits)),
    ],
)
def test_a_mean_was_not_divided(loss_of: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert own_mean_factor(loss_of(*logits_and_targets((5, 3))), torch.tensor(99)) == 1


@pytest.mark.parametrize(
    "loss_of",
    [
        lambda logits, targets: cross_entropy(logits, targets, reduction="sum") / 98,
        lambda logits, targets: cross_entropy(logits, targets, reduction="sum") / 99 + 0.01 * logits.square().mean(),
        lambda logits, targets: cross_entropy(logits, targets) / 99,
        lambda logits, targets: cross_entropy(logits, targets, reduction="sum"),
        lambda logits, targets: cross_entropy(logits, targets, label_smoothing=0.1),
        lambda logits, targets: mse_loss(logits, torch.zeros_like(logits), reduction="sum") / 99,
        lambda logits, targets: (
            cross_entropy(logits, targets, weight=torch.ones(CLASSES, dtype=torch.float64), reduction="sum") / 99
        ),
        lambda logits, targets: (cross_entropy(logits, targets, reduction="sum") / 99).detach(),
    ],
)
def test_anything_else_is_not_known(loss_of: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert own_mean_factor(loss_of(*logits_and_targets((5, 3))), torch.tensor(99)) is None


@pytest.mark.parametrize("num_processes", [1, 3])
def test_what_processes_multiply_by_is_undone(num_processes: int) -> None:
    logits, targets = logits_and_targets((4,))
    expected = cross_entropy(logits, targets).detach()
    loss = cross_entropy(logits, targets, reduction="sum") / 10
    loss *= num_processes
    assert own_mean_factor(loss, 10) is None
    assert own_mean_factor(loss, 10, num_processes + 1) is None
    torch.testing.assert_close(loss * own_mean_factor(loss, 10, num_processes), expected)


def test_a_model_has_its_own_loss_back_from_the_trainer_or_another() -> None:
    logits, targets = logits_and_targets((4,))
    loss = cross_entropy(logits, targets)
    own = OwnLoss(loss.detach().clone(), loss.grad_fn, 1.0)
    others = loss * 0.5, loss + logits.square().mean(), loss + 1, loss * loss.detach()
    assert [times_of(one, own, 2) for one in (loss, loss.clone(), loss * 2, *others)] == [1, 1, 2, *[None] * 4]
    assert [is_multiple(one, loss.grad_fn) for one in (loss, loss / 4, 2 * loss / 3)] == [True] * 3
    assert not any(is_multiple(one, loss.grad_fn) for one in (loss + 1, loss * loss, logits.sum()))
    in_place = cross_entropy(logits, targets)
    own = OwnLoss(in_place.detach().clone(), in_place.grad_fn, 1.0)
    in_place *= 2
    assert times_of(in_place, own, 2) == 2
    in_place += logits.square().mean()
    assert times_of(in_place, own, 2) is None
