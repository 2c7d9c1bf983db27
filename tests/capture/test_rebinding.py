"""Modules whose methods have been replaced by wrapped ones: a loss of the copy runs on the copy, or is refused."""

import copy
import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.compile import from_compiled
from torch import Tensor, nn

from lightning_spectral.capture.engines import Method
from lightning_spectral.capture.per_sample import per_sample_gradients

pytestmark = pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.seen = 0
        self.inner: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1
        return self.last((self.first if self.inner is None else self.inner)(x).tanh())


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Net()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).square().sum(-1).mean()


def unnamed(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def named(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


compiled = functools.partial(torch.compile, backend="eager")
autocast = torch.autocast("cpu", dtype=torch.bfloat16)


def compile_whole(model: Model) -> None:
    from_compiled(compiled(model))


def compile_part(model: Model) -> None:
    model.net = compiled(model.net)


def compile_in_place(model: Model) -> None:
    model.net.compile(backend="eager")


def compile_step(model: Model) -> None:
    model.training_step = compiled(model.training_step)


def compile_forward(model: Model) -> None:
    model.net.forward = compiled(model.net.forward)


def compile_autocast(model: Model) -> None:
    model.net.forward = compiled(autocast(model.net.forward))


def autocast_compiled(model: Model) -> None:
    model.net.forward = autocast(compiled(model.net.forward))


def not_compiled(model: Model) -> None:
    model.net.forward = torch.compiler.disable(model.net.forward)


def decorate(model: Model) -> None:
    model.net.forward = unnamed(named(model.net.forward))


def decorate_step(model: Model) -> None:
    model.training_step = named(model.training_step)


def decorate_call(model: Model) -> None:
    model.net._call_impl = unnamed(model.net._call_impl)


def partial(model: Model) -> None:
    model.net.forward = functools.update_wrapper(functools.partial(call, model.net.forward), model.net.forward)


def method_of_closure(model: Model) -> None:
    forward = model.net.forward
    model.net.forward = types.MethodType(lambda self, x: forward(x), model.net)


def closures(model: Model) -> None:
    first = model.net.first
    model.helpers = {"all": [lambda x: first(x)], "pair": (lambda x, net=model.net: net.last(x), 1)}
    model.net.inner = lambda x: model.helpers["all"][0](x)


def weak(model: Model) -> None:
    owner = weakref.ref(model)
    model.net.inner = lambda x: owner().net.first(x)


def mutual(model: Model) -> None:
    def even(x: Tensor, times: int = 0) -> Tensor:
        return odd(x, times + 1)

    def odd(x: Tensor, times: int) -> Tensor:
        return model.net.first(x) if times > 2 else even(x, times)

    model.net.inner = even


METHODS: tuple[Method, ...] = ("loop", "vmap", "hooks")


def cyclic(model: Model) -> None:
    held: dict[str, Any] = {"net": model.net}
    held["itself"] = held
    model.net.inner = lambda x: held["itself"]["net"].first(x)


def shared_count(model: Model) -> None:
    count = 0
    first = model.net.first

    def step() -> int:
        nonlocal count
        count += 1
        return count

    def scaled(x: Tensor) -> Tensor:
        return first(x) * step() / count

    model.net.inner = scaled


def of_globals(x: Tensor) -> Tensor:
    return used_by_globals(x)


def used_by_globals(x: Tensor) -> Tensor:
    return global_models[-1](x)


global_models: list[nn.Module] = []


def through_globals(model: Model) -> None:
    global_models.append(model.net.first)
    model.net.inner = of_globals


WAYS = [
    compile_whole,
    compile_part,
    compile_in_place,
    compile_step,
    compile_forward,
    compile_autocast,
    autocast_compiled,
    not_compiled,
    decorate,
    decorate_step,
    decorate_call,
    partial,
    method_of_closure,
    closures,
    weak,
    mutual,
    cyclic,
    shared_count,
    through_globals,
]


def state(model: Model) -> dict[str, Any]:
    net = model.net
    tensors = {name: t.clone() for name, t in (*model.named_parameters(), *model.named_buffers())}
    return tensors | {"seen": net.seen, "attributes": {name: id(value) for name, value in vars(net).items()}}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value) if isinstance(value, Tensor) else found[name] == value


@pytest.mark.parametrize("wrap", WAYS, ids=lambda way: way.__name__)
def test_rows_are_exact_and_the_module_stays_as_it_is(wrap: Callable[[Model], None]) -> None:
    batch = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    twin = Model()
    wrap(twin)
    names = ["net.first.weight", "net.last.bias"]
    expected: dict[str, list[Tensor]] = {name: [] for name in names}
    # What it was made for, in the ordinary way, on a module of its own.
    parameters = {name.replace("_orig_mod.", ""): p for name, p in twin.named_parameters()}
    for x in batch:
        gradients = torch.autograd.grad(twin.training_step(x.unsqueeze(0), 0), [parameters[name] for name in names])
        for name, gradient in zip(names, gradients, strict=True):
            expected[name].append(gradient.flatten())
    model = Model()
    wrap(model)
    model.training_step(batch, 0)
    before = state(model)
    for method in METHODS:
        rows = per_sample_gradients(model, batch, names, method)
        assert_same(state(model), before)
        # In bfloat16 products of one sample and of six round apart.
        tolerance = 2e-2 if "autocast" in wrap.__name__ and method != "loop" else 1e-6
        for name in names:
            wanted = torch.stack(expected[name])
            assert wanted.abs().min(0).values.max() > 0.01
            torch.testing.assert_close(rows[name], wanted, rtol=tolerance, atol=tolerance)
    torch._dynamo.reset()


class Unfollowed:
    """Holds on to a module as no copy can follow."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __deepcopy__(self, memo: Any) -> "Unfollowed":
        return self

    def __call__(self, *args: Any) -> Any:
        return self.held(*args)


def hold_forward(model: Model) -> None:
    model.net.forward = Unfollowed(model.net.forward)


def hold_counter(model: Model) -> None:
    """Only the buffers and attributes of the module are its own, not what the gradient passes."""
    original = model.net

    def count(x: Tensor) -> Tensor:
        original.calls += 1
        original.seen += 1
        return x

    first, hold = model.net.first, Unfollowed([count])
    model.net.inner = lambda x: first(hold.held[0](x))


@pytest.mark.parametrize("method", ["loop", "vmap", "hooks", "auto"])
@pytest.mark.parametrize("wrap", [hold_forward, hold_counter], ids=lambda way: way.__name__)
def test_what_cannot_be_bound_to_the_copy_is_refused_and_put_right(wrap: Callable[..., None], method: Any) -> None:
    model = Model()
    wrap(model)
    model.training_step(torch.randn(2, 4), 0)
    before = state(model)
    # Of an original's buffers torch.func says so first.
    reason = "the loss runs on the module itself" + "|would mutate a captured Tensor" * (method == "vmap")
    with pytest.raises(RuntimeError, match=reason) as caught:
        per_sample_gradients(model, torch.randn(6, 4), "net.first.weight", method)
    assert "\n" not in str(caught.value)
    assert_same(state(model), before)


@pytest.mark.parametrize("method", ["loop", "vmap", "hooks"])
def test_a_loss_function_that_uses_another_module_than_it_is_given_is_refused(method: Any) -> None:
    model = Model()
    before = state(model)
    for used, reason in (
        (model.net.last, "runs on the module itself"),
        (copy.deepcopy(model.net.last), "no parameter"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            per_sample_gradients(
                model, torch.randn(6, 5), "net.last.weight", method, loss_fn=lambda _, x, used=used: used(x).mean()
            )
    assert_same(state(model), before)


def test_a_part_that_is_shared_on_purpose_stays_shared() -> None:
    class Shared(nn.Linear):
        def __deepcopy__(self, memo: Any) -> "Shared":
            return self

    model = Model()
    model.net.first = Shared(4, 5).requires_grad_(False)
    x = torch.randn(3, 4)
    rows = per_sample_gradients(model, x, "net.last.weight", "loop")["net.last.weight"]
    mean = torch.autograd.grad(model.training_step(x, 0), model.net.last.weight)[0]
    torch.testing.assert_close(rows.mean(0), mean.flatten())
