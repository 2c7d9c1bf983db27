"""Steps that write in place, draw from generators of their own or keep things elsewhere train as if nobody watched."""

import copy
import dataclasses
import functools
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, TensorDataset, WeightedRandomSampler

from lightning_spectral import GradientSpectrum
from tests.models import tiny_trainer

WIDTH, BATCH, STEPS = 6, 8, 6

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*method='auto' loops over samples", "ignore:.*NaN, because the loss is no mean"
)

noise = torch.Generator()
dice = random.Random()
bits = np.random.RandomState(0)
history: list[Tensor] = []
counts: dict[str, int] = {"steps": 0}


@dataclasses.dataclass(slots=True)
class Tally:
    """Counts where no dictionary is."""

    steps: int = 0


tally = Tally()


class Base(LightningModule):
    """A linear layer and, perhaps, a teacher of it."""

    total = 0

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(WIDTH, WIDTH)
        self.prepare()

    def prepare(self) -> None:
        """Make what a subclass needs beside."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self.net(batch[0]) - self.target(batch[0])).square().mean()

    def target(self, x: Tensor) -> Tensor:
        """What to regress on; a subclass writes here."""
        raise NotImplementedError

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Teacher(Base):
    def prepare(self) -> None:
        self.teacher = nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    @torch.no_grad()
    def target(self, x: Tensor) -> Tensor:
        for mine, other in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            mine.mul_(0.9).add_(other, alpha=0.1)
        return self.teacher(x + 0.1)


class TeacherByData(Teacher):
    def target(self, x: Tensor) -> Tensor:
        for mine, other in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            mine.data = 0.9 * mine.data + 0.1 * other.data
            mine.data.mul_(1.01)
        return self.teacher(x + 0.1)


class SeldomTeacher(Teacher):
    def target(self, x: Tensor) -> Tensor:
        return super().target(x) if self.global_step in (0, 2, 4) else self.teacher(x)


class Averaged(Base):
    def prepare(self) -> None:
        self.average = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(0.9))

    def target(self, x: Tensor) -> Tensor:
        self.average.update_parameters(self.net)
        with torch.no_grad():
            return self.average(x) + 0.1


class Queue(Base):
    def prepare(self) -> None:
        self.register_buffer("queue", torch.randn(16, WIDTH))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def target(self, x: Tensor) -> Tensor:
        start = int(self.pointer)
        self.queue[start : start + len(x)] = x
        self.pointer[0] = (start + len(x)) % 16
        return self.queue.mean(0, keepdim=True).expand_as(x)


class Centre(Base):
    def prepare(self) -> None:
        self.register_buffer("centre", torch.zeros(WIDTH))
        self.beside = torch.zeros(WIDTH)
        self.seen: list[Tensor] = []

    @torch.no_grad()
    def target(self, x: Tensor) -> Tensor:
        self.centre.lerp_(x.mean(0), 0.5)
        self.beside += self.centre
        self.seen.append(self.beside.clone())
        return self.centre + self.beside + x


class Normalised(Base):
    """Writes the very weights that are differentiated, as prototypes are."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        with torch.no_grad():
            self.net.weight.copy_(nn.functional.normalize(self.net.weight, dim=1))
        return self.net(batch[0]).square().mean()


class Generators(Base):
    def prepare(self) -> None:
        self.noise = torch.Generator().manual_seed(1)
        self.dice = random.Random(1)
        self.bits = np.random.default_rng(1)

    def target(self, x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=self.noise) + self.dice.random() + float(self.bits.normal())


def drawn(shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=noise) + dice.random() + float(bits.normal())


class GlobalGenerators(Base):
    def target(self, x: Tensor) -> Tensor:
        return drawn(x.shape)


class Elsewhere(Base):
    """Keeps things in globals, on its class, in a closure, and in what a hook encloses."""

    def prepare(self) -> None:
        kept = torch.zeros(WIDTH)
        outputs: list[Tensor] = []

        def note(module: nn.Module, args: Any, output: Tensor) -> None:
            outputs.append(output.detach())
            self.latest = output.detach()

        def shift(x: Tensor) -> Tensor:
            kept.add_(x.detach().mean(0))
            return x + kept

        self.net.register_forward_hook(note)
        self.shift, self.outputs, self.kept = functools.partial(shift), outputs, kept

    def target(self, x: Tensor) -> Tensor:
        counts["steps"] += 1
        history.append(x.detach())
        type(self).total += 1
        return self.shift(x) + 0.01 * counts["steps"] + 0.01 * len(history) + 0.01 * self.total


def counted(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    @functools.wraps(function)
    def call(x: Tensor) -> Tensor:
        call.calls += 1
        return function(x) * call.calls

    call.calls = 0
    return call


@counted
def halved(x: Tensor) -> Tensor:
    return x / 2


class Slots(Base):
    """Counts in slots, a global's and its own, and in an attribute of a function."""

    def prepare(self) -> None:
        self.own = Tally()

    def target(self, x: Tensor) -> Tensor:
        tally.steps += 1
        self.own.steps += 1
        return halved(x) + 0.1 * tally.steps + 0.1 * self.own.steps


class ByTheTrainer(Base):
    """Counts on the Trainer, on a loop, on the strategy and in the loader's dataset."""

    def target(self, x: Tensor) -> Tensor:
        loader = self.trainer.train_dataloader
        parts = (self.trainer, self.trainer.fit_loop, self.trainer.strategy, loader, loader.dataset, loader.sampler)
        for part in parts:
            part.steps = getattr(part, "steps", 0) + 1
        for group in self.optimizers().param_groups:
            group["steps"] = group.get("steps", 0) + 1
        return x + 0.1 * sum(part.steps for part in parts) + 0.1 * group["steps"]


class InPlaceBatch(Base):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self.net(batch[0].sub_(1.0).mul_(2.0)) - 1).square().mean()


class ByTheOptimizer(Base):
    """Reads the learning rate, and sets it."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        for group in self.optimizers().param_groups:
            group["lr"] *= 0.9
        self.log("rate", self.trainer.optimizers[0].param_groups[0]["lr"])
        return self.net(batch[0]).square().mean()


STEPS_THAT_WRITE = [
    Teacher,
    TeacherByData,
    SeldomTeacher,
    Averaged,
    Queue,
    Centre,
    Normalised,
    Generators,
    GlobalGenerators,
    Elsewhere,
    Slots,
    ByTheTrainer,
    InPlaceBatch,
    ByTheOptimizer,
]


def state_of(model: Any) -> dict[str, Any]:
    """All that a step may have changed, in plain numbers."""
    found: dict[str, Any] = {name: value.tolist() for name, value in model.state_dict().items()}
    for name in ("beside", "seen", "outputs", "kept", "latest"):
        if hasattr(model, name):
            held = getattr(model, name)
            found[name] = [part.tolist() for part in held] if isinstance(held, list) else held.tolist()
    if isinstance(model, Generators):
        found["own"] = (model.noise.get_state().tolist(), model.dice.getstate(), str(model.bits.bit_generator.state))
    found["globals"] = (noise.get_state().tolist(), dice.getstate(), str(bits.get_state()))
    found["streams"] = (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()))  # noqa: NPY002
    found["elsewhere"] = (dict(counts), [part.tolist() for part in history], type(model).total)
    found["slots"] = (tally.steps, halved.calls, model.own.steps if isinstance(model, Slots) else 0)
    loader = model.trainer.train_dataloader
    parts = (model.trainer.fit_loop, loader, loader.dataset, loader.sampler)
    found["trainer"] = [getattr(part, "steps", 0) for part in parts]
    found["rates"] = [group["lr"] for optimizer in model.trainer.optimizers for group in optimizer.param_groups]
    return found


def train(folder: Path, make: type[Base], *callbacks: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    noise.manual_seed(0)
    dice.seed(0)
    bits.seed(0)
    history.clear()
    counts["steps"] = tally.steps = halved.calls = 0
    make.total = 0
    model, trainer = make(), tiny_trainer(folder, max_steps=STEPS, callbacks=list(callbacks))
    generator = torch.Generator().manual_seed(0)
    trainer.fit(model, DataLoader(TensorDataset(torch.randn(STEPS * BATCH, WIDTH, generator=generator)), BATCH))
    return copy.deepcopy(state_of(model))


@pytest.mark.parametrize("method", ["auto", "loop", "hooks"])
@pytest.mark.parametrize("make", STEPS_THAT_WRITE)
def test_run_is_bit_identical(tmp_path: Path, make: type[Base], method: Any) -> None:
    spectrum = GradientSpectrum("net.weight", 2, num_samples=12, method=method, head=(1, 3), num_groups=2)
    expected, found = train(tmp_path, make), train(tmp_path, make, spectrum)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == value, name
    assert spectrum.num_failed in (0, STEPS // 2)


def test_rows_are_of_the_state_that_training_has(tmp_path: Path) -> None:
    """Each sample is asked for with the teacher of the report's step, moved once, as for a batch of its own."""
    norms = {}
    for method in ("auto", "loop"):
        spectrum = GradientSpectrum("net.weight", STEPS, num_samples=BATCH, method=method, head=(1, 3), num_groups=2)
        trainer = tiny_trainer(tmp_path, max_steps=STEPS, callbacks=[spectrum])
        torch.manual_seed(0)
        model, data = Teacher(), torch.randn(STEPS * BATCH, WIDTH)
        trainer.fit(model, DataLoader(TensorDataset(data), BATCH))
        norms[method] = float(trainer.callback_metrics["gradient/net.weight/grad_norm"])
    gradients = []
    for x in data[-BATCH:]:
        twin = copy.deepcopy(model)
        gradients.append(torch.autograd.grad(twin.training_step([x[None]], 0), twin.net.weight)[0])
    true = float(torch.stack(gradients).mean(0).norm())
    assert norms == pytest.approx({"auto": true, "loop": true}, rel=1e-5)


@pytest.mark.parametrize("make", [Slots, ByTheTrainer])
def test_each_sample_finds_what_is_beside_as_the_step_did(tmp_path: Path, make: type[Base]) -> None:
    """Of the last step, at weights that did not move, against the gradient of what the counters should give."""
    norms, data = {}, torch.randn(STEPS * BATCH, WIDTH)

    class Still(make):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.0)

    for method in ("auto", "loop"):
        tally.steps = halved.calls = 0
        spectrum = GradientSpectrum("net.weight", STEPS, num_samples=BATCH, method=method, head=(1, 3), num_groups=2)
        trainer = tiny_trainer(tmp_path, max_steps=STEPS, callbacks=[spectrum])
        torch.manual_seed(0)
        trainer.fit(model := Still(), DataLoader(TensorDataset(data), BATCH))
        norms[method] = float(trainer.callback_metrics["gradient/net.weight/grad_norm"])
    x = data[-BATCH:]
    # Each of the counters has been moved once a step, and once more for the sample.
    moves = STEPS + 1
    target = moves * x / 2 + 0.2 * moves if make is Slots else x + 0.7 * moves
    (gradient,) = torch.autograd.grad((model.net(x) - target).square().mean(), model.net.weight)
    assert norms == pytest.approx(dict.fromkeys(norms, float(gradient.norm())), rel=1e-5)


class Hardness(LightningDataModule):
    """Samples are drawn by priorities and grow harder, both at the word of the training step."""

    def __init__(self) -> None:
        super().__init__()
        self.priorities, self.dataset, self.steps = torch.ones(STEPS * BATCH), Growing(), 0

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.dataset, BATCH, sampler=WeightedRandomSampler(self.priorities, STEPS * BATCH))


class Growing(Dataset):
    def __init__(self) -> None:
        self.data = torch.randn(STEPS * BATCH, WIDTH, generator=torch.Generator().manual_seed(0))
        self.size = 1.0

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return index, self.data[index] * self.size


class Mining(Base):
    """Prioritised replay and a curriculum."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        index, x = batch
        losses = (self.net(x) - x.roll(1, 1)).square().mean(1)
        data = self.trainer.datamodule
        data.priorities[index] = 0.5 * data.priorities[index] + losses.detach()
        data.steps += 1
        self.trainer.train_dataloader.dataset.size *= 1.1
        return losses.mean() * data.steps


@pytest.mark.parametrize("method", ["auto", "loop", "hooks"])
def test_a_run_whose_step_writes_to_its_datamodule_is_bit_identical(tmp_path: Path, method: Any) -> None:
    def run(*callbacks: Any) -> list[Any]:
        torch.manual_seed(0)
        model, data = Mining(), Hardness()
        # Of two epochs, so that the second draws by the priorities of the first.
        kwargs = {"max_epochs": 2, "reload_dataloaders_every_n_epochs": 1, "callbacks": list(callbacks)}
        tiny_trainer(tmp_path, max_steps=-1, **kwargs).fit(model, datamodule=data)
        return [model.net.weight.tolist(), data.priorities.tolist(), data.steps, data.dataset.size]

    spectrum = GradientSpectrum("net.weight", 2, num_samples=16, method=method, head=(1, 3), tail=(2, 4), num_groups=2)
    expected = run()
    assert expected[2] == 2 * STEPS
    assert run(spectrum) == expected
    assert spectrum.num_failed == 0


ITERATORS: dict[str, Callable[[], Any]] = {
    "count": lambda: itertools.count(1),
    "cycle": lambda: itertools.cycle([1.0, 2.0, 3.0]),
    "list_iterator": lambda: iter([1.0] * STEPS),
    "generator": lambda: (float(number) for number in range(1, 100)),
    "_SingleProcessDataLoaderIter": lambda: iter(DataLoader(torch.ones(100))),
}


@pytest.mark.parametrize("place", ["attribute", "list", "slot"])
@pytest.mark.parametrize("kind", ITERATORS)
def test_an_iterator_of_the_module_is_refused_in_one_line_when_it_is_drawn_from(
    tmp_path: Path, kind: str, place: str
) -> None:
    class Drawing(Base):
        is_drawing = True

        def prepare(self) -> None:
            found = ITERATORS[kind]()
            self.held = {"attribute": found, "list": [{"iterator": found}], "slot": Tally(found)}[place]

        def target(self, x: Tensor) -> Tensor:
            held: Any = self.held
            found = {"list": lambda: held[0]["iterator"], "slot": lambda: held.steps}.get(place, lambda: held)()
            return x * next(found) if self.is_drawing else x / 2

    class Holding(Drawing):
        is_drawing = False

    for method in ("auto", "loop"):
        options: dict[str, Any] = {"num_samples": 12, "method": method, "head": (1, 3), "num_groups": 2}
        with pytest.warns(
            UserWarning, match=f"draws from an iterator, a {kind}, which cannot .*: give loss_fn"
        ) as said:
            train(tmp_path, Drawing, spectrum := GradientSpectrum("net.weight", 2, **options))
        assert spectrum.num_failed == STEPS // 2
        assert sum("iterator" in str(warning.message) for warning in said) == 1
        train(tmp_path, Holding, spectrum := GradientSpectrum("net.weight", 2, **options))
        assert spectrum.num_failed == 0


def test_by_hooks_a_step_may_draw_from_an_iterator_for_it_is_that_of_training(tmp_path: Path) -> None:
    class Counting(Base):
        def prepare(self) -> None:
            self.numbers = itertools.count(1)

        def target(self, x: Tensor) -> Tensor:
            return x * next(self.numbers)

    spectrum = GradientSpectrum("net.weight", 2, num_samples=12, method="hooks", head=(1, 3), num_groups=2)
    assert train(tmp_path, Counting, spectrum) == train(tmp_path, Counting)
    assert spectrum.num_failed == 0


def test_an_iterator_that_is_exhausted_is_told_with_the_remedy(tmp_path: Path) -> None:
    class Exhausted(Base):
        def target(self, x: Tensor) -> Tensor:
            return next(iter([x] if len(x) == BATCH else []))

    spectrum = GradientSpectrum("net.weight", 2, num_samples=12, method="loop", head=(1, 3), num_groups=2)
    with pytest.warns(UserWarning, match="draws from an iterator that is exhausted: give loss_fn, which takes all"):
        train(tmp_path, Exhausted, spectrum)
    assert spectrum.num_failed == STEPS // 2


def test_a_datamodule_that_holds_an_iterator_is_refused_by_each_method(tmp_path: Path) -> None:
    class Streaming(Hardness):
        def __init__(self) -> None:
            super().__init__()
            self.lines = iter(range(100))

    class Reading(Base):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return self.net(batch[1]).square().mean() * next(self.trainer.datamodule.lines)

    for method in ("auto", "loop"):
        spectrum = GradientSpectrum("net.weight", 2, num_samples=12, method=method, head=(1, 3), num_groups=2)
        data = Streaming()
        with pytest.warns(UserWarning, match="from an iterator that a copy shares with training, got a range_iterator"):
            tiny_trainer(tmp_path, max_steps=STEPS, callbacks=[spectrum]).fit(Reading(), datamodule=data)
        assert next(data.lines) == STEPS


def test_an_iterator_that_cannot_be_put_back_is_refused_in_one_line(tmp_path: Path) -> None:
    lines = (torch.full((1,), float(index)) for index in range(10**6))

    class Drawing(Base):
        def target(self, x: Tensor) -> Tensor:
            return next(lines) + x

    spectrum = GradientSpectrum("net.weight", 2, num_samples=12, head=(1, 3), num_groups=2)
    with pytest.warns(UserWarning, match="training_step must not draw from an iterator that a copy shares") as caught:
        train(tmp_path, Drawing, spectrum)
    assert spectrum.num_failed == STEPS // 2
    assert next(lines) == STEPS
    assert sum("iterator" in str(warning.message) for warning in caught) == 1
