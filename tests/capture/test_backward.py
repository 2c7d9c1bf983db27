"""Rows read off a training backward pass: undone scaling, no trace in the gradients, no trace in the module."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_spectral import per_sample_gradients
from lightning_spectral.capture.backward import BackwardReader
from lightning_spectral.capture.contraction import LayerRows
from tests.models import LanguageModel, token_loader

NAMES = ["network.embedding.weight", "network.blocks.1.mix.weight", "network.blocks.4.mlp.2.bias"]


@pytest.fixture
def model() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel()


def batch(size: int = 6) -> dict[str, Tensor]:
    return next(iter(token_loader(batch_size=size)))


def reader_of(model: nn.Module, names: list[str] = NAMES) -> BackwardReader:
    reader = BackwardReader()
    for name in names:
        reader.add(name, model.get_parameter(name), model)
    return reader


def rows_for(
    model: nn.Module, size: int, scale: float, taken: int | None = None, names: list[str] = NAMES
) -> LayerRows:
    count = size if taken is None else taken
    out = {name: torch.full((count, model.get_parameter(name).numel()), torch.nan) for name in names}
    return LayerRows(size, out, scale)


def assert_rows(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, rows in found.items():
        assert (rows - expected[name][: len(rows)]).norm() <= 1e-5 * expected[name].norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_loss_scale_and_accumulation_are_undone(model: LanguageModel, dtype: torch.dtype) -> None:
    data = batch()
    expected = per_sample_gradients(model, data, NAMES, method="loop")
    reader = reader_of(model)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        reader.begin(rows_for(model, 6, scale=6 * 3 / 1024.0))
        loss = model.loss(data)
    (1024.0 * loss / 3).backward()
    rows = reader.end()
    assert not rows.failures
    if dtype == torch.float32:
        assert_rows(rows.out, expected)
    for name, matrix in rows.out.items():
        assert (matrix - expected[name]).norm() < 0.02 * expected[name].norm()


def test_one_of_several_accumulated_batches_is_read(model: LanguageModel) -> None:
    batches = next(iter(token_loader(batch_size=18)))
    parts = [{key: value[start : start + 6] for key, value in batches.items()} for start in (0, 6, 12)]
    expected = per_sample_gradients(model, parts[1], NAMES, method="loop")
    gradients: list[list[Tensor]] = []
    reader = reader_of(model)
    for is_read in (False, True):
        model.zero_grad()
        for index, part in enumerate(parts):
            if is_read and index == 1:
                reader.begin(rows_for(model, 6, scale=6 * 3 / 1024.0))
            (1024.0 * model.loss(part) / 3).backward()
            if is_read and index == 1:
                rows = reader.end()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert not rows.failures
    assert_rows(rows.out, expected)
    assert all(torch.equal(with_it, without) for without, with_it in zip(*gradients, strict=True))


def test_rows_of_the_first_samples_alone(model: LanguageModel) -> None:
    data = batch()
    reader = reader_of(model)
    reader.begin(rows_for(model, 6, scale=6.0, taken=4))
    model.loss(data).backward()
    assert_rows(reader.end().out, per_sample_gradients(model, data, NAMES, method="loop"))


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_gradients_are_bit_identical_and_checkpointing_counts_once(use_reentrant: bool | None) -> None:
    torch.manual_seed(0)
    model, data = LanguageModel(), batch()
    expected = per_sample_gradients(model, data, NAMES, method="loop")
    model.network.use_reentrant = use_reentrant
    model.loss(data).backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    reader = reader_of(model)
    reader.begin(rows_for(model, 6, scale=6.0))
    model.loss(data).backward()
    rows = reader.end()
    assert not rows.failures
    assert_rows(rows.out, expected)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


def test_nothing_is_read_while_closed_and_nothing_is_left(model: LanguageModel) -> None:
    reader = reader_of(model)
    model.loss(batch()).backward()
    assert reader.end() is None
    twin = copy.deepcopy(model)
    reader.begin(rows_for(model, 6, scale=6.0))
    twin.loss(batch()).backward()
    assert not reader.end().seen
    reader.remove()
    assert not any(module._forward_hooks or module._forward_hooks_with_kwargs for module in model.modules())
    assert not any(parameter._backward_hooks for parameter in model.parameters())


def test_use_outside_of_the_layer_is_found_out(model: LanguageModel) -> None:
    class Tied(LanguageModel):
        def loss(self, batch: dict[str, Tensor]) -> Tensor:
            hidden = self.network.embedding(batch["input_ids"]).cumsum(1)
            logits = F.linear(hidden, self.network.embedding.weight)
            return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())

    tied, names = Tied(), ["network.embedding.weight"]
    reader = reader_of(tied, names)
    for _ in range(2):  # and is not forgotten
        reader.begin(rows_for(tied, 6, 6.0, names=names))
        tied.loss(batch()).backward()
        assert "is not the sum of what its own layers gave" in reader.end().failures[names[0]]


@pytest.mark.parametrize(("share", "is_short"), [(0.01, False), (0.1, True)])
def test_a_penalty_on_weights_is_found_out(model: LanguageModel, share: float, is_short: bool) -> None:
    """Of no sample; by a hundredth of the gradient in float32, where products in bfloat16 may differ by as much."""
    (name,) = names = NAMES[:1]
    weight = model.get_parameter(name)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_short):
        (gradient,) = torch.autograd.grad(model.loss(batch()), weight)
    penalty = share * float(gradient.norm()) / float(weight.detach().norm())
    for strength, is_found in ((0.0, False), (penalty, True)):
        reader = reader_of(model, names)
        reader.begin(rows_for(model, 6, 6.0, names=names))
        with torch.autocast("cpu", torch.bfloat16, enabled=is_short):
            loss = model.loss(batch())
        (loss + strength * weight.square().sum() / 2).backward()
        assert (name in reader.end().failures) == is_found
        reader.remove()


def test_an_output_without_an_axis_of_samples_is_refused() -> None:
    class SequenceFirst(LanguageModel):
        def loss(self, batch: dict[str, Tensor]) -> Tensor:
            hidden = self.network.embedding(batch["input_ids"]).transpose(0, 1)
            return self.network.logits(hidden).square().mean()

    model, names = SequenceFirst(), ["network.logits.weight"]
    reader = reader_of(model, names)
    reader.begin(rows_for(model, 6, 6.0, names=names))
    model.loss(batch()).backward()
    assert "is not the batch of 6 samples: use method='vmap'" in reader.end().failures[names[0]]


def test_rows_are_complete_once_their_gradient_comes_by(model: LanguageModel) -> None:
    data = batch()
    expected = per_sample_gradients(model, data, NAMES, method="loop")
    reader = reader_of(model)
    reader.come_whole()
    rows = rows_for(model, 6, scale=6.0)
    found: dict[str, Tensor] = {}
    reader.begin(rows, lambda name: found.update({name: rows.out[name].clone()}))
    model.loss(data).backward()
    assert list(found) == NAMES[::-1]
    assert_rows(found, expected)
    assert not reader.end().failures
    assert not any(model.get_parameter(name)._backward_hooks for name in NAMES)


def test_gradients_in_parts_are_never_taken_for_complete_twice(model: LanguageModel) -> None:
    data = batch()
    reader = reader_of(model)
    reader.come_whole()
    completed: list[str] = []
    failures = []
    for _ in range(2):
        reader.begin(rows_for(model, 6, scale=6.0), completed.append)
        for _ in range(2):
            model.loss(data).backward()
        failures.append(set(reader.end().failures))
    # The first time it is too late, and said; afterwards rows wait for the end of the batch.
    assert failures == [set(NAMES), set()]
    assert completed == NAMES[::-1]


def test_a_failure_to_use_complete_rows_is_noted_and_training_goes_on(model: LanguageModel) -> None:
    def fail(name: str) -> None:
        raise RuntimeError(f"no memory for {name}")

    reader = reader_of(model)
    reader.come_whole()
    reader.begin(rows_for(model, 6, scale=6.0), fail)
    model.loss(batch()).backward()
    assert reader.end().failures == {name: f"no memory for {name}" for name in NAMES}


@pytest.mark.parametrize("bad", ["inputs", "gradient"])
def test_hooks_that_fail_never_reach_the_passes_of_training(bad: str) -> None:
    layer = nn.Linear(3, 2)
    reader = BackwardReader()
    reader.add("weight", layer.weight, layer)
    rows = LayerRows(2, {"weight": torch.empty(2, 6)}, 1.0)
    reader.begin(rows)
    if bad == "inputs":
        reader.watch("weight", "weight", layer, (), layer(torch.randn(2, 3)))
    else:
        reader._add_gradient("weight", "no tensor")  # type: ignore[arg-type]
    assert list(reader.end().failures) == ["weight"]


def test_large_numbers_in_16_bits_do_not_pass_for_rounding() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 64).half()
    x, grad = (300 * torch.randn(8, 64, 64).half() for _ in range(2))
    rows = LayerRows(8, {"weight": torch.empty(8, 64 * 64)}, 8.0)
    rows.add("weight", layer, "weight", x, grad)
    rows.compare("weight", 1e6 * torch.randn(64, 64))
    rows.settle()
    assert "is not the sum of what its own layers gave" in rows.failures["weight"]
