"""Per-sample gradients by every engine are those of autograd on one sample at a time, and the module stays as it is."""

import copy
import functools
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from lightning_spectral import per_sample_gradients
from lightning_spectral.capture.engines import ByVmapOrLoop
from lightning_spectral.capture.per_sample import chunk_bytes, fill_rows, fitting_chunk
from lightning_spectral.capture.shadow import BatchLoss
from lightning_spectral.functional import singular_spectrum
from lightning_spectral.nanogpt import NanoGPT
from tests.models import Alternating, LanguageModel, Network, token_loader

LISTS: dict[str, Any] = {
    "floats": ([0.1 + 0.3 * index for index in range(12)], lambda some: torch.tensor(some)),
    "array": (np.linspace(0.1, 3, 12), lambda some: torch.as_tensor(some).float()),
    "strings": (["a" * (1 + index % 5) for index in range(12)], lambda some: torch.tensor([len(w) for w in some])),
    "mappings": ([{"w": 0.1 + index} for index in range(12)], lambda some: torch.tensor([one["w"] for one in some])),
}


def weighed(read: Any) -> Any:
    return lambda module, batch: (module(batch["x"]).square().mean(-1) * read(batch["some"])).mean()


@pytest.mark.parametrize("method", ["auto", "loop", "hooks"])
@pytest.mark.parametrize("chunk_size", [None, 5, 1])
@pytest.mark.parametrize("kind", LISTS)
def test_lists_and_arrays_go_with_their_samples(kind: str, chunk_size: int | None, method: Any) -> None:
    torch.manual_seed(0)
    some, read = LISTS[kind]
    model, x, loss = nn.Linear(4, 3), torch.randn(12, 4), weighed(read)
    rows = per_sample_gradients(model, {"x": x, "some": some}, "weight", method, chunk_size, loss)["weight"]
    # By a formula of its own, not by what cuts the batch.
    weights = read(some)
    of_one = lambda index: (model(x[index]).square().mean() * weights[index]).float()  # noqa: E731
    expected = [torch.autograd.grad(of_one(index), model.weight)[0].flatten() for index in range(12)]
    torch.testing.assert_close(rows, torch.stack(expected))


@pytest.mark.parametrize("kind", LISTS)
def test_vmap_maps_over_tensors_and_passes_by_lists_that_no_loss_reads(kind: str) -> None:
    some, read = LISTS[kind]
    model, batch = nn.Linear(4, 3), {"x": torch.randn(12, 4), "some": some}
    with pytest.raises(ValueError, match=r"^the \w+ some of the batch is of its samples, .*: use method='loop'$"):
        per_sample_gradients(model, batch, "weight", "vmap", 4, weighed(read))
    unread = lambda module, batch: module(batch["x"]).square().mean()  # noqa: E731
    rows = [per_sample_gradients(model, batch, "weight", method, 4, unread)["weight"] for method in ("vmap", "loop")]
    torch.testing.assert_close(*rows)


@pytest.mark.parametrize("method", ["auto", "vmap", "loop"])
def test_a_list_as_long_as_the_batch_by_chance_is_not_guessed(method: Any) -> None:
    model, batch = nn.Linear(4, 3), {"x": torch.randn(2, 4), "betas": [0.9, 0.95]}
    read = lambda module, batch: module(batch["x"]).square().mean() * batch["betas"][0]  # noqa: E731
    with pytest.raises(ValueError, match=r"^samples must say whether the list betas of 2 entries"):
        per_sample_gradients(model, batch, "weight", method, loss_fn=read)
    unread = lambda module, batch: module(batch["x"]).square().mean()  # noqa: E731
    assert per_sample_gradients(model, batch, "weight", method, loss_fn=unread)["weight"].isfinite().all()


def randomised(module: nn.Module) -> nn.Module:
    """What is initialised to zero keeps the gradients behind it at zero."""
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return module


def nanogpt() -> tuple[LightningModule, Any]:
    tokens = torch.randint(256, (5, 17))
    return randomised(NanoGPT(tier="tiny", recipe="rope")), {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}


class GPT2(LightningModule):
    """The one of transformers: Conv1D, a head tied to the embedding, positions that all samples share."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 30, "n_positions": 12}
        dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        self.model = GPT2LMHeadModel(GPT2Config(**sizes, **dropout))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss


def gpt2() -> tuple[LightningModule, Any]:
    tokens = torch.randint(30, (5, 12))
    return GPT2(), {"input_ids": tokens, "labels": tokens, "position_ids": torch.arange(12).unsqueeze(0)}


class Encoder(LightningModule):
    """Attention with padding, the mean over real tokens, a batch of tensors and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.query, self.value, self.out = (nn.Linear(16, 16) for _ in range(3))
        self.key = nn.Linear(16, 16, bias=False)  # softmax does not see a bias of the keys: its gradient is rounding
        self.head = nn.Linear(16, 20)

    def training_step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        mask = batch["attention_mask"].bool()
        x = self.embedding(batch["input_ids"])
        q, k, v = (layer(x).unsqueeze(1) for layer in (self.query, self.key, self.value))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :]).squeeze(1))
        loss = F.cross_entropy(self.head(x).mT, batch["input_ids"], reduction="none")
        return {"loss": (loss * mask).sum() / mask.sum()}


LENGTHS = torch.tensor([9, 4, 6, 2, 9])


def encoder() -> tuple[LightningModule, Any]:
    mask = (torch.arange(9) < LENGTHS.unsqueeze(1)).long()
    return Encoder(), {"input_ids": torch.randint(20, (5, 9)), "attention_mask": mask}


class CNN(LightningModule):
    """BatchNorm in evaluation mode, a batch that is a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Linear(4 * 36, 3)
        self.inplace = True

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        features = F.relu(self.norm(self.conv(images)), inplace=self.inplace)
        return F.cross_entropy(self.head(features.flatten(1)), labels)


def cnn() -> tuple[LightningModule, Any]:
    model = CNN()
    model.norm.running_mean.normal_()
    model.norm.eval()
    return model, (torch.randn(5, 2, 8, 8), torch.randint(3, (5,)))


MODELS = {
    "nanogpt": (nanogpt, ["*.weight"], ["gpt.blocks.*.weight"]),
    "gpt2": (gpt2, "all", ["*.c_*", "model.lm_head.weight"]),
    "encoder": (encoder, "all", None),
    "cnn": (cnn, "all", ["head.*"]),
}
"""How a model is made, the parameters to differentiate, and those of them that hooks read."""


def one(batch: Any, index: int) -> Any:
    """A batch of one, of tensors with five samples."""
    if isinstance(batch, dict):
        return {key: one(value, index) for key, value in batch.items()}
    if isinstance(batch, tuple):
        return tuple(one(value, index) for value in batch)
    return batch[index : index + 1] if len(batch) == 5 else batch


def by_autograd(module: LightningModule, batch: Any, names: list[str]) -> dict[str, Tensor]:
    """One call a sample, on the module itself."""
    by_name = dict(module.named_parameters(remove_duplicate=False))
    rows = []
    for index in range(5):
        step = module.training_step
        output = step(one(batch, index)) if isinstance(module, Encoder) else step(one(batch, index), 0)
        loss = output["loss"] if isinstance(output, dict) else output
        rows.append(torch.autograd.grad(loss, [by_name[name] for name in names], allow_unused=True))
    return {
        name: torch.stack([torch.zeros_like(by_name[name]) if g is None else g for g in column]).flatten(1)
        for name, column in zip(names, zip(*rows, strict=True), strict=True)
    }


def assert_rows(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, rows in expected.items():
        assert found[name].shape == rows.shape
        assert float((found[name] - rows).norm()) <= 1e-5 * float(rows.norm()), name


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[LightningModule, Any, Any, Any]:
    torch.manual_seed(0)
    make, chosen, hooked = MODELS[request.param]
    module, batch = make()
    module.log = lambda *args, **kwargs: None  # there is no Trainer here
    return module, batch, chosen, hooked


@pytest.mark.parametrize("method", ["vmap", "loop", "auto"])
def test_rows_are_those_of_autograd(case: tuple, method: str) -> None:
    module, batch, chosen, _ = case
    found = per_sample_gradients(module, batch, chosen, method=method, chunk_size=2)
    assert_rows(found, by_autograd(module, batch, list(found)))


@pytest.mark.parametrize("method", ["vmap", "loop"])
def test_size_of_chunks_changes_nothing(case: tuple, method: str) -> None:
    module, batch, chosen, _ = case
    expected = per_sample_gradients(module, batch, chosen, method=method, chunk_size=5)
    for chunk_size in (1, 2, 3, None):
        assert_rows(per_sample_gradients(module, batch, chosen, method=method, chunk_size=chunk_size), expected)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, None])
def test_size_of_chunks_changes_nothing_by_hooks(chunk_size: int | None) -> None:
    torch.manual_seed(0)
    module, batch = gpt2()
    found = per_sample_gradients(module, batch, "*.c_*", method="hooks", chunk_size=chunk_size)
    assert_rows(found, by_autograd(module, batch, list(found)))


def test_auto_is_vmap_where_that_works(case: tuple) -> None:
    module, batch, _, hooked = case
    names = list(per_sample_gradients(module, batch, hooked or "*.weight"))
    engine, loss = ByVmapOrLoop(), BatchLoss(module)
    with loss.isolated():
        out = {name: torch.empty(5, loss.parameter(name)[1].numel()) for name in names}
        fill_rows(engine, loss, names, batch, out)
    assert engine.cause is None


def test_rows_by_hooks_are_those_of_autograd(case: tuple) -> None:
    module, batch, _, hooked = case
    if hooked is None:
        hooked = ["query.*", "out.*", "head.*", "embedding.weight"]
        # Of a mean over unequal numbers of tokens a sample has a share of its own.
        share = LENGTHS * 5 / LENGTHS.sum()
    else:
        share = torch.ones(5)
    found = per_sample_gradients(module, batch, hooked, method="hooks", chunk_size=5)
    expected = by_autograd(module, batch, list(found))
    assert_rows(found, {name: rows * share.unsqueeze(1) for name, rows in expected.items()})


def test_rows_by_hooks_of_one_sample_at_a_time_are_those_of_autograd(case: tuple) -> None:
    module, batch, _, hooked = case
    found = per_sample_gradients(module, batch, hooked or ["query.*", "out.*"], method="hooks", chunk_size=1)
    assert_rows(found, by_autograd(module, batch, list(found)))


@pytest.mark.parametrize("method", ["vmap", "loop", "hooks"])
def test_singular_values_are_those_of_the_stacked_rows(case: tuple, method: str) -> None:
    module, batch, _, hooked = case
    hooked = hooked or ["query.weight", "out.weight"]
    chunk = 1 if isinstance(module, Encoder) else None
    for name, rows in per_sample_gradients(module, batch, hooked, method=method, chunk_size=chunk).items():
        expected = torch.linalg.svdvals(by_autograd(module, batch, [name])[name].double())
        large = expected > 1e-4 * expected[0]
        torch.testing.assert_close(singular_spectrum(rows)[large], expected[large], rtol=1e-4, atol=0, msg=name)


# Opacus refuses layers with buffers, BatchNorm among them, and activations in place.
@pytest.mark.parametrize("name", ["gpt2", "encoder", "cnn", "nanogpt"])
def test_opacus_agrees_where_it_supports_the_model(name: str) -> None:
    torch.manual_seed(0)
    module, batch = MODELS[name][0]()
    module.log = lambda *args, **kwargs: None
    if name == "cnn":
        module.norm, module.inplace = nn.Identity(), False
    hooked = {
        "gpt2": "*.c_*.weight",
        "encoder": ["query.*", "value.*", "out.*", "head.*"],
        "cnn": "all",
        "nanogpt": "gpt.blocks.*.weight",
    }[name]
    ours = per_sample_gradients(module, batch, hooked, method="vmap")
    share = LENGTHS * 5 / LENGTHS.sum() if name == "encoder" else torch.ones(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        GradSampleModule = pytest.importorskip("opacus").GradSampleModule

        peer = GradSampleModule(copy.deepcopy(module), loss_reduction="mean", strict=False)
        step = peer._module.training_step
        output = step(batch) if name == "encoder" else step(batch, 0)
        (output["loss"] if isinstance(output, dict) else output).backward()
    theirs = dict(peer._module.named_parameters())
    for parameter, rows in ours.items():
        expected = theirs[parameter].grad_sample.flatten(1)
        assert (rows * share.unsqueeze(1) - expected).norm() <= 1e-5 * expected.norm(), parameter


def language_batch() -> dict[str, Tensor]:
    return next(iter(token_loader(batch_size=4)))


def streams() -> list[Any]:
    return [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]  # noqa: NPY002


class Throwing(LanguageModel):
    """Throws dice of every make, keeps its losses, and takes the batch apart."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        random.random()
        np.random.rand()  # noqa: NPY002
        loss = super().training_step({"input_ids": batch.pop("input_ids"), "labels": batch.pop("labels")}, batch_idx)
        self.outputs.append(loss)
        return loss


@pytest.mark.parametrize("method", ["vmap", "loop", "hooks", "auto"])
def test_module_and_random_streams_stay_as_they_are(method: str) -> None:
    torch.manual_seed(0)
    model, batch = Throwing(Network(dropout=0.1)), language_batch()
    calls: list[Any] = []
    model.network.logits.register_forward_hook(lambda *_: calls.append(None))
    model.outputs = [model.loss(batch)]  # a tensor with a history, as many modules keep
    model.loss(batch).backward()
    calls.clear()
    before = {
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "gradients": [p.grad.clone() for p in model.parameters()],
        "metric": model.mean_loss.metric_state["mean_value"].clone(),
        "streams": streams(),
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "flags": [p.requires_grad for p in model.parameters()],
    }
    rows = per_sample_gradients(model, batch, "*.mix.weight", method=method)
    assert all(matrix.any() for matrix in rows.values())
    assert list(batch) == ["input_ids", "labels"]
    assert len(model.outputs) == 1
    assert not calls
    assert len(model.network.logits._forward_hooks) == 1
    assert all(torch.equal(value, before["state"][key]) for key, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before["gradients"], strict=True))
    assert torch.equal(model.mean_loss.metric_state["mean_value"], before["metric"])
    assert streams() == before["streams"]
    assert [sorted(vars(module)) for module in model.modules()] == before["attributes"]
    assert [p.requires_grad for p in model.parameters()] == before["flags"]


@pytest.mark.parametrize("method", ["vmap", "loop", "hooks"])
@pytest.mark.parametrize("chunk_size", [1, 2, 4])
def test_every_sample_meets_a_mask_of_its_own(method: str, chunk_size: int) -> None:
    torch.manual_seed(0)
    model = LanguageModel(Network(dropout=0.5))
    same = {key: value[:1].expand(4, -1).clone() for key, value in language_batch().items()}
    rows = per_sample_gradients(model, same, "network.logits.weight", method=method, chunk_size=chunk_size)
    (matrix,) = rows.values()
    assert len({tuple(row.tolist()) for row in matrix}) == 4
    model.eval()
    rows = per_sample_gradients(model, same, "network.logits.weight", method=method, chunk_size=chunk_size)
    torch.testing.assert_close(*(next(iter(rows.values()))[i] for i in (0, 3)))


class Branching(LanguageModel):
    """Its loss depends on data in a way that vmap cannot follow."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        return loss if loss.item() > 0 else -loss


class Doubling(torch.autograd.Function):
    """Written in the old style, without setup_context."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


class OldStyle(LanguageModel):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return Doubling.apply(self.loss(batch))


@pytest.mark.parametrize(
    ("make", "cause"), [(Branching, "asks for a value of each sample"), (OldStyle, "setup_context")]
)
def test_auto_loops_where_vmap_fails_and_knows_why(make: Callable[[], LanguageModel], cause: str) -> None:
    torch.manual_seed(0)
    model, batch = make(), language_batch()
    engine, loss, names = ByVmapOrLoop(), BatchLoss(model), ["network.logits.weight"]
    out = {names[0]: torch.empty(4, model.network.logits.weight.numel())}
    with loss.isolated():
        fill_rows(engine, loss, names, batch, out, chunk_size=2)
    assert cause in engine.cause
    assert_rows(out, per_sample_gradients(model, batch, names, method="loop"))


class Holding(LanguageModel):
    """Its head holds the weight itself, where no other tensor can take its place."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.head = functools.partial(F.linear, weight=self.network.embedding.weight)
        self.dropout = dropout

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        hidden = F.dropout(self.network.embedding(batch["input_ids"]), self.dropout)
        return F.cross_entropy(self.head(hidden).flatten(0, 1), batch["labels"].flatten())


@pytest.mark.parametrize("dropout", [0.0, 1e-6])
def test_a_weight_that_is_held_beside_its_module_is_not_left_out(dropout: float) -> None:
    torch.manual_seed(0)
    model, batch, name = Holding(dropout), language_batch(), "network.embedding.weight"
    expected = per_sample_gradients(model, batch, name, method="loop")
    assert_rows(per_sample_gradients(model, batch, name), expected)
    with pytest.raises(ValueError, match=f"^{name} is used by another way than its module, held in a list or by"):
        per_sample_gradients(model, batch, name, method="vmap")
    # Of others the gradients are whole.
    other = per_sample_gradients(model, batch, "network.logits.bias", method="vmap", loss_fn=lambda m, b: m.loss(b))
    assert other["network.logits.bias"].any()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_loop_works_through_activation_checkpointing(use_reentrant: bool) -> None:
    torch.manual_seed(0)
    model, batch = LanguageModel(), language_batch()
    expected = per_sample_gradients(model, batch, "*.mix.weight", method="loop")
    model.network.use_reentrant = use_reentrant
    assert_rows(per_sample_gradients(model, batch, "*.mix.weight", method="loop"), expected)
    assert all(parameter.grad is None for parameter in model.parameters())


class Shared(LanguageModel):
    """One weight inside of checkpointing and after it."""

    def __init__(self) -> None:
        super().__init__()
        self.use_reentrant: bool | None = None
        self.after = nn.Linear(32, 32)
        self.after.weight = self.network.blocks[0].mix.weight

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        x, block = self.network.embedding(batch["input_ids"]), self.network.blocks[0]
        x = block(x) if self.use_reentrant is None else checkpoint(block, x, use_reentrant=self.use_reentrant)
        return F.cross_entropy(self.network.logits(self.after(x)).mT, batch["labels"])


@pytest.mark.parametrize("names", ["network.blocks.0.mix.weight", ["network.embedding.weight", "after.bias"]], ids=str)
def test_reentrant_checkpointing_hides_no_part_of_a_gradient(names: Any) -> None:
    torch.manual_seed(0)
    model, batch = Shared(), language_batch()
    expected = per_sample_gradients(model, batch, names, method="loop")
    model.use_reentrant = True
    assert_rows(per_sample_gradients(model, batch, names, method="loop"), expected)
    with pytest.raises(ValueError, match="hooks' cannot see through reentrant checkpointing: use method='loop'"):
        per_sample_gradients(model, batch, names, method="hooks")


@pytest.mark.parametrize("method", ["vmap", "loop", "hooks"])
def test_manual_optimisation_asks_for_a_loss_function(method: str) -> None:
    torch.manual_seed(0)
    model, batch, name = Alternating(), language_batch(), "network.logits.weight"
    with pytest.raises(ValueError, match=r"^loss_fn must be given for Alternating") as caught:
        per_sample_gradients(model, batch, name, method=method)
    assert "\n" not in str(caught.value)
    expected = {
        name: torch.stack(
            [
                torch.autograd.grad(model.loss({k: v[i : i + 1] for k, v in batch.items()}), model.get_parameter(name))[
                    0
                ]
                for i in range(4)
            ]
        ).flatten(1)
    }
    for loss_fn in (loss_of, f"{__name__}.loss_of"):
        assert_rows(per_sample_gradients(model, batch, name, method=method, loss_fn=loss_fn), expected)


def loss_of(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return module.loss(batch)


def test_rows_by_hooks_of_a_sum_need_no_factor() -> None:
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(9, 6, padding_idx=0)
            self.head = nn.Linear(6, 3)

    torch.manual_seed(0)
    model, tokens = Summed(), torch.arange(35).view(5, 7) % 9
    assert (tokens == 0).sum() == 4

    def loss_fn(module: nn.Module, batch: Tensor) -> Tensor:
        return module.head(module.embedding(batch)).tanh().square().sum()

    found = per_sample_gradients(model, tokens, "all", method="hooks", loss_fn=loss_fn, loss_reduction="sum")
    rows = [torch.autograd.grad(loss_fn(model, tokens[i : i + 1]), list(model.parameters())) for i in range(5)]
    expected = [torch.stack(column).flatten(1) for column in zip(*rows, strict=True)]
    assert_rows(found, dict(zip(found, expected, strict=True)))
    model.embedding.scale_grad_by_freq = True
    with pytest.raises(ValueError, match=r"got parameter 'embedding\.weight' of Embedding"):
        per_sample_gradients(model, tokens, "all", method="hooks", loss_fn=loss_fn)


def test_works_where_gradients_are_off() -> None:
    torch.manual_seed(0)
    model = LanguageModel()
    expected = per_sample_gradients(model, language_batch(), "*.mix.weight")
    for method in ("vmap", "loop", "hooks"):
        with torch.inference_mode():
            found = per_sample_gradients(model, language_batch(), "*.mix.weight", method=method)
        assert_rows(found, expected)


def test_a_layer_used_twice_gets_the_sum() -> None:
    class Twice(LanguageModel):
        def loss(self, batch: dict[str, Tensor]) -> Tensor:
            logits = self.network(batch["input_ids"]) + self.network(batch["labels"])
            return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())

    torch.manual_seed(0)
    model, names = Twice(), ["network.blocks.0.mix.*", "network.embedding.weight"]
    assert_rows(
        per_sample_gradients(model, language_batch(), names, method="hooks"),
        per_sample_gradients(model, language_batch(), names, method="loop"),
    )


def test_hooks_refuse_what_they_cannot_read() -> None:
    module, batch = gpt2()
    with pytest.raises(ValueError, match=r"wpe.weight: the first axis of its layer's input .* batch of 5 samples"):
        per_sample_gradients(module, batch, "*.wpe.weight", method="hooks")
    module, batch = nanogpt()
    with pytest.raises(ValueError, match=r"gpt.embedding.weight: its gradient is not the sum of what its own"):
        per_sample_gradients(module, batch, "gpt.embedding.weight", method="hooks")
    with pytest.raises(
        ValueError, match=r"linear layers and embeddings, got parameter .*norm.weight' of LayerNorm: use"
    ):
        per_sample_gradients(LanguageModel(), language_batch(), "*.norm.weight", method="hooks")


class Greedy:
    """An engine for which more than a few samples are too many."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.sizes: list[int] = []

    def __call__(self, loss: BatchLoss, names: list[str], batch: Any, out: dict[str, Tensor]) -> None:
        size = len(batch["input_ids"])
        self.sizes.append(size)
        if size > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        for name in names:
            out[name].fill_(float(size))


def test_a_chunk_that_does_not_fit_is_halved() -> None:
    loss, engine = BatchLoss(LanguageModel()), Greedy(2)
    out = {"x": torch.zeros(7, 1)}
    batch = {"input_ids": torch.zeros(7, 2)}
    assert fill_rows(engine, loss, ["x"], batch, out, chunk_size=7) == 2
    assert engine.sizes == [7, 4, 2, 2, 2, 1]
    assert out["x"].flatten().tolist() == [2.0] * 6 + [1.0]
    with pytest.raises(MemoryError, match="the gradient of one sample does not fit into memory: CUDA out of memory"):
        fill_rows(Greedy(0), loss, ["x"], batch, out, chunk_size=4)


def test_chunk_is_what_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_spectral.capture import per_sample

    module, batch = nanogpt()
    loss, names = BatchLoss(module), ["gpt.blocks.0.mlp.up.weight"]
    saved = per_sample.saved_bytes(loss, names, batch)
    # At least the outputs of all matrices of all blocks, in float32.
    assert saved > 4 * 16 * 4 * 128 * (4 + 4 + 1)
    needed = chunk_bytes(1, saved, loss.parameter(names[0])[1].numel())
    for samples, expected in ((0.5, 1), (3.5, 3), (1000, 8)):
        free = samples * needed / per_sample.MEMORY_SHARE
        monkeypatch.setattr(per_sample, "free_bytes", lambda device, free=free: int(free))
        assert fitting_chunk(loss, names, batch) == expected


class Halved(prune.BasePruningMethod):
    """A mask of one's own, of other numbers than 0 and 1."""

    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        return torch.where(torch.arange(t.numel()).view_as(t) % 3 == 0, 0.5, default_mask)


def test_rows_pass_the_masks_of_pruned_weights() -> None:
    torch.manual_seed(0)
    module = nn.ModuleDict({"embed": nn.Embedding(7, 5), "mix": nn.Linear(5, 5)})
    for name in ("weight", "bias"):
        prune.random_unstructured(module["mix"], name, amount=0.5)
    prune.random_unstructured(module["mix"], "weight", amount=0.2)
    Halved.apply(module["embed"], "weight")

    def loss_fn(module: Any, ids: Tensor) -> Tensor:
        x = module["embed"](ids)
        return module["mix"](module["mix"](x).tanh()).square().sum((1, 2)).mean()  # twice, so that rows add up

    ids = torch.randint(7, (6, 3))
    found = per_sample_gradients(module, ids, "all", "hooks", loss_fn=loss_fn)
    assert list(found) == ["embed.weight", "mix.weight", "mix.bias"]
    sources = [module["embed"].weight_orig, module["mix"].weight_orig, module["mix"].bias_orig]
    for index, one in enumerate(ids.split(1)):
        for rows, gradient in zip(found.values(), torch.autograd.grad(loss_fn(module, one), sources), strict=True):
            torch.testing.assert_close(rows[index], gradient.flatten())
    assert float((found["mix.weight"] == 0).all(0).float().mean()) > 0.5


def test_hooks_refuse_other_weights_that_are_made_and_auto_reads_them() -> None:
    module = nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"method='hooks' reads weights as they are.*use method='vmap', or 'loop'"):
        per_sample_gradients(module, torch.randn(3, 4), "weight", "hooks", loss_fn=square)
    rows = per_sample_gradients(module, x := torch.randn(3, 4), "weight", "auto", loss_fn=square)["weight"]
    (mean,) = torch.autograd.grad(square(module, x), list(module.parametrizations.weight.parameters()))
    torch.testing.assert_close(rows.mean(0), mean.flatten(), rtol=1e-4, atol=1e-6)


def square(module: nn.Module, x: Tensor) -> Tensor:
    return (module(x) - x[:, :1]).square().sum(1).mean()
