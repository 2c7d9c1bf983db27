"""Training watched by GradientSpectrum is training without it, bit by bit, by every method and in both stages."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_spectral import ActivationSpectrum, GradientSpectrum
from tests.callbacks.test_do_no_harm import NO_GRADIENTS, Dropping, assert_identical, small_model, train
from tests.models import LanguageModel, Network

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Counted(GradientSpectrum):
    """Keeps samples, failures and method of each report."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"num_samples": 12, "num_groups": 2, "head": (1, 3), "weights": True, **kwargs})
        self.found: list[tuple[int, set[tuple[int, str | None]], str]] = []
        self.values: dict[str, Tensor] = {}
        """Singular values of the last report, by parameter."""

    def measured(self, report: Any) -> dict[str, float]:
        spectra = {(parameter.count, parameter.failure) for parameter in report.spectra["gradient"].values()}
        self.values = {name: spectrum.values for name, spectrum in report.spectra["gradient"].items()}
        self.found.append((report.step, spectra, report.method))
        return super().measured(report)


SETTINGS = [
    pytest.param(Dropping, {}, id="plain"),
    pytest.param(Dropping, {"accumulate_grad_batches": 3}, id="accumulation"),
    pytest.param(Dropping, {"precision": "bf16-mixed"}, id="bf16-mixed"),
    pytest.param(Dropping, {"gradient_clip_val": 0.1}, id="clipping"),
    pytest.param(lambda: Dropping(use_reentrant=False), {}, id="checkpointing"),
    pytest.param(lambda: Dropping(use_reentrant=True), {}, id="reentrant checkpointing", marks=NO_GRADIENTS),
]


@pytest.mark.filterwarnings("ignore:Counted method='auto' loops over samples")
@pytest.mark.parametrize("method", ["auto", "loop", "hooks"])
@pytest.mark.parametrize(("make", "kwargs"), SETTINGS)
def test_run_is_bit_identical_with_and_without(tmp_path: Path, make, kwargs: dict[str, Any], method: str) -> None:
    kwargs = {"max_steps": 10, "val_check_interval": 5, "check_val_every_n_epoch": None, **kwargs}
    expected = train(tmp_path, make, [], **kwargs)
    # In validation hooks make a pass of their own, which ends where reentrant checkpointing hides the layers.
    is_reentrant = make().network.use_reentrant is True
    stages = ["train"] if method == "hooks" and is_reentrant else ["train", "validate"]
    spectra = [Counted(method=method, every_n_steps=4, stage=stage, prefix=f"{stage}/") for stage in stages]
    found = train(tmp_path, make, [*spectra, ActivationSpectrum(every_n_steps=4, num_tokens=96)], **kwargs)
    assert_identical(found, expected)
    for spectrum in spectra:
        assert len(spectrum.found) >= 1
        for _, samples, used in spectrum.found:
            assert samples == {(12, None)}
            assert used == {"auto": "vmap", "loop": "loop", "hooks": "hooks"}[method] or used == "loop"
    if method == "auto" and make().network.use_reentrant is None:
        assert {used for _, _, used in spectra[0].found} == {"vmap"}


@pytest.mark.filterwarnings("ignore:Counted at step .* NaN, because")
@pytest.mark.parametrize(("make", "kwargs"), SETTINGS)
def test_run_is_bit_identical_whether_vmap_works_or_fails(tmp_path: Path, make, kwargs: dict[str, Any]) -> None:
    kwargs = {"max_steps": 10, "val_check_interval": 5, "check_val_every_n_epoch": None, **kwargs}
    expected = train(tmp_path, make, [], **kwargs)
    stages = ("train", "validate")
    spectra = [Counted(method="vmap", every_n_steps=4, stage=stage, prefix=f"{stage}/") for stage in stages]
    assert_identical(train(tmp_path, make, spectra, **kwargs), expected)
    for spectrum in spectra:
        assert len(spectrum.found) >= 1
        for _, samples, _ in spectrum.found:
            # Through checkpointing torch.func may not see; nothing of the attempt may be left.
            assert samples == {(12, None)} or make().network.use_reentrant is not None


@pytest.mark.parametrize("compiled", [(True, False), (False, True)], ids=["blocks", "model"])
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*attribute of a Tensor that is not a leaf.*")
def test_compiled_run_is_bit_identical(tmp_path: Path, compiled: tuple[bool, bool]) -> None:
    runs, graphs = [], []
    auto = Counted(parameters="*.linear.weight", every_n_steps=3, method="auto", prefix="auto/")
    hooks = Counted(parameters="*.logits.weight", every_n_steps=3, method="hooks", prefix="hooks/")
    # Of a network that is compiled as a whole no layer can be read by hooks, which is said at the start.
    spectra = [auto] if compiled[1] else [auto, hooks]
    for callbacks in ([], spectra):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        runs.append(train(tmp_path, lambda: small_model(*compiled), callbacks, max_steps=7, limit_val_batches=0))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    assert_identical(runs[1], runs[0])
    assert graphs[0] == graphs[1]
    expected = {(12, None)}
    if compiled[1] and torch.__version__.startswith("2.4."):
        # What torch 2.4 makes of a module holds a generator, of which nobody knows that it is not the step's own.
        ((_, reason),) = spectra[0].found[0][1]
        assert "must not draw from an iterator that a copy shares" in reason
        expected = {(0, reason)}
    for spectrum in spectra:
        assert [(step, samples) for step, samples, _ in spectrum.found] == [(3, expected), (6, expected)]


class Quiet(LanguageModel):
    """Counts its steps in a buffer and in an attribute; a step that logs cannot be compiled as a whole."""

    def __init__(self) -> None:
        super().__init__(Network())
        self.num_steps = 0

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.num_steps += 1
        return self.loss(batch)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)


def compiled_whole() -> Any:
    return torch.compile(Quiet(), backend="eager")


def compiled_forward() -> Quiet:
    model = Quiet()
    model.network.forward = torch.compile(model.network.forward, backend="aot_eager")
    return model


def decorated_step() -> Quiet:
    model = Quiet()
    step = model.training_step
    model.training_step = lambda batch, batch_idx: step(batch, batch_idx)
    return model


def autocast_forward() -> Quiet:
    model = Quiet()
    model.network.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.network.forward)
    return model


@pytest.mark.parametrize(
    ("make", "layer", "part"),
    [
        (lambda: small_model(True, False), "linear", "network.blocks.0"),
        (lambda: small_model(False, True), "linear", "network"),
        (compiled_whole, "mix", "training_step"),
        (compiled_forward, "mix", "network"),
    ],
    ids=["blocks", "network", "module", "forward"],
)
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")
def test_hooks_on_compiled_layers_are_refused_before_training_in_one_line(
    tmp_path: Path, make: Any, layer: str, part: str
) -> None:
    expected = f"method='hooks' reads layers that run as they are written, got parameter '.*' inside {part}, which is"
    spectrum = Counted(parameters=f"network.blocks.0.{layer}.weight", every_n_steps=3, method="hooks")
    with pytest.raises(ValueError, match=expected) as raised:
        train(tmp_path, make, [spectrum], max_steps=3, limit_val_batches=0)
    assert "\n" not in str(raised.value)
    torch._dynamo.reset()


WAYS = [compiled_whole, compiled_forward, decorated_step, autocast_forward]


@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*attribute of a Tensor that is not a leaf.*")
@pytest.mark.parametrize("make", WAYS, ids=lambda way: way.__name__)
def test_a_run_of_wrapped_methods_is_bit_identical_and_its_rows_are_those_of_none(tmp_path: Path, make: Any) -> None:
    methods = ["auto", "vmap", "loop", *(["hooks"] if "compiled" not in make.__name__ else [])]

    def spectra() -> list[Counted]:
        return [Counted(parameters="*.mix.weight", every_n_steps=3, method=m, prefix=f"{m}/") for m in methods]

    runs = []
    for callbacks in ([], found := spectra()):
        torch._dynamo.reset()
        runs.append(train(tmp_path, make, callbacks, max_steps=4, limit_val_batches=0))
    torch._dynamo.reset()
    assert_identical(runs[1], runs[0])
    train(tmp_path, Quiet, plain := spectra(), max_steps=4, limit_val_batches=0)
    tolerance = 0.05 if make is autocast_forward else 1e-4
    for ours, theirs in zip(found, plain, strict=True):
        ((step, samples, method),) = ours.found
        assert (step, samples, method) == theirs.found[0] == (3, {(12, None)}, method)
        assert method == ("vmap" if ours.prefix == "auto/" else ours.prefix[:-1])
        for name, values in ours.values.items():
            atol = tolerance * float(values[0])
            assert atol > 0
            torch.testing.assert_close(values, theirs.values[name], rtol=tolerance, atol=atol)
