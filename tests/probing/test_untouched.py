"""A probe leaves everything as it was: the module, the batch, random streams, and what a step reaches beside them."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_spectral import probe
from tests.callbacks.test_do_no_harm import assert_identical, attributes
from tests.models import LanguageModel, Network, tiny_trainer, token_loader

NOTES: list[float] = []
GENERATOR = torch.Generator().manual_seed(3)


class Writing(LanguageModel):
    """Writes wherever a step can: into buffers, a teacher, metrics, its batch, attributes, globals and generators."""

    def __init__(self) -> None:
        super().__init__(Network(dropout=0.1))
        self.teacher = Network()
        self.register_buffer("queue", torch.zeros(4))
        self.losses: list[Tensor] = []
        self.steps = 0
        self.network.blocks[0].register_forward_hook(lambda module, args, output: NOTES.append(2.0))

    def setup(self, stage: str) -> None:
        self.stage = stage

    def prepare_data(self) -> None:
        NOTES.append(1.0)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx) + 0 * torch.rand(1, generator=GENERATOR)
        with torch.no_grad():
            for mine, theirs in zip(self.teacher.parameters(), self.network.parameters(), strict=True):
                mine.lerp_(theirs, 0.5)
            self.queue.add_(1)
            batch["weights"] = batch.get("weights", torch.ones(4)).zero_()
            batch["new"] = batch.pop("input_ids")
        self.steps += 1
        self.losses.append(loss)
        NOTES.append(random.random() + np.random.rand())  # noqa: NPY002
        print("a word of the user's")
        return loss * (1 + torch.rand(()))


def state(model: LightningModule, batch: Any) -> dict[str, Any]:
    return {
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "versions": [t._version for t in (*model.parameters(), *model.buffers())],
        "metric": {key: value.clone() for key, value in model.mean_loss.metric_state.items()},
        "attributes": attributes(model),
        "modes": [module.training for module in model.modules()],
        "hooks": [[list(part) for part in (m._forward_hooks, m._forward_pre_hooks)] for m in model.modules()],
        "losses": list(model.losses),
        "batch": {key: value.clone() for key, value in batch.items()},
        "notes": list(NOTES),
        "generator": GENERATOR.get_state(),
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].copy(),  # noqa: NPY002
        "python": random.getstate(),
        "class": set(vars(type(model))),
    }


@pytest.mark.parametrize("is_training", [True, False])
def test_nothing_is_left_of_a_probe(is_training: bool, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model, batch = Writing().train(is_training), {**next(iter(token_loader())), "weights": torch.ones(4)}
    model.network.blocks[1].eval()
    model.network.embedding.requires_grad_(False)
    model.network.logits.weight.grad = torch.ones_like(model.network.logits.weight)
    tensors = [*model.parameters(), *model.buffers()]
    before = state(model, batch)
    found = probe(model, batch, num_tokens=64, num_samples=8, num_groups=2)
    assert found.step is None
    assert_identical(state(model, batch), before)
    assert all(mine is theirs for mine, theirs in zip([*model.parameters(), *model.buffers()], tensors, strict=True))
    assert model._trainer is None
    # A program reads stdout.
    assert capsys.readouterr().out == ""


class Probing(Writing):
    """Is probed in the middle of a run."""

    is_probed = False

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.is_probed:
            self.is_probed = False
            assert probe(self, self.sample, num_tokens=64, num_samples=8).step is None


def test_a_run_goes_on_as_if_there_had_been_no_probe(tmp_path: Path) -> None:
    ends = []
    for is_probed in (False, True):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        GENERATOR.manual_seed(0)
        model = Probing()
        model.sample = next(iter(token_loader()))  # which draws from the run's stream
        model.is_probed = is_probed
        trainer = tiny_trainer(tmp_path, max_steps=3)
        trainer.fit(model, token_loader(), token_loader())
        ends.append({key: value.clone() for key, value in model.state_dict().items()})
    assert_identical(*ends)


def test_what_the_probe_was_given_is_used_and_left() -> None:
    # In inference mode, without gradients, on a batch with a history.
    net = nn.Sequential(nn.Linear(4, 4))
    x = torch.randn(8, 4, requires_grad=True) * 2
    with torch.no_grad():
        found = probe(net, x, layers="0", parameters="0.weight", loss_fn=lambda net, x: net(x).square().mean())
    assert (found.step, found.loss.is_mean) == (None, "passed")
    assert x.grad_fn is not None
