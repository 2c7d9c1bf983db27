"""Who gives the gradient of each sample: our engines, the published protocol, Opacus and BackPACK, on one model."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_spectral.capture.backward import BackwardReader
from lightning_spectral.capture.contraction import LayerRows, owners
from lightning_spectral.capture.engines import ByHooks, Engine, by_loop, by_vmap
from lightning_spectral.capture.parameters import resolve_parameters
from lightning_spectral.capture.per_sample import fill_rows, per_sample_gradients
from lightning_spectral.capture.shadow import BatchLoss
from lightning_spectral.functional.singular import gram, roots_of_gram
from lightning_spectral.measurement.row_store import RowStore
from lightning_spectral.nanogpt import NanoGPT
from lightning_spectral.nanogpt.model import next_token_loss

KINDS = ("attention.q", "attention.v", "attention.out", "mlp.down")
"""Query, value, attention output and MLP output projections, as in the published scripts."""

PEERS = ("opacus", "backpack")

SIZES = ("num_layers", "width", "tokens", "samples", "chunk")
SMALL = {"num_layers": 2, "width": 64, "tokens": 8, "samples": 2, "chunk": 1}
"""Sizes at which everything that is imported or started on first use is imported and started."""


class Rows(NamedTuple):
    """Rows of each matrix, ``(N, P)``, and the factor that makes them gradients of the samples' own losses."""

    matrices: Iterable[Tensor]
    """Taken one by one: who can let go of a matrix once it is looked at does."""
    scale: float = 1.0

    def scaled(self) -> list[Tensor]:
        return [self.scale * matrix for matrix in self.matrices]

    def grams(self) -> Tensor:
        """Gram matrices, ``(matrices, N, N)`` float64."""
        return self.scale**2 * torch.stack([gram(matrix) for matrix in self.matrices])


class Setting:
    """A model, a batch and the matrices to be measured.

    Args:
        num_layers: Blocks.
        width: Of the residual stream.
        tokens: A sample.
        samples: N.
        chunk: Samples at a time, where an engine works in chunks.
        recipe: Of the model.
        parameters: Names of what is measured; None for the matrices of the published scripts in five layers.
    """

    def __init__(
        self,
        num_layers: int,
        width: int,
        tokens: int,
        samples: int,
        chunk: int,
        recipe: Any = "rope",
        parameters: str | None = None,
    ) -> None:
        torch.manual_seed(0)
        sizes = {"num_layers": num_layers, "width": width, "num_heads": max(1, width // 64), "block_size": tokens}
        self.module = NanoGPT(recipe=recipe, **sizes)
        for parameter in self.module.parameters():
            if not parameter.any():  # what is initialised to zero keeps gradients behind it at zero
                torch.nn.init.normal_(parameter, std=0.02)
        self.batch = {key: torch.randint(256, (samples, tokens)) for key in ("input_ids", "labels")}
        probes = sorted({round(i * (num_layers - 1) / 4) for i in range(5)})
        names = [f"gpt.blocks.{layer}.{kind}.weight" for layer in probes for kind in KINDS]
        self.parameters = resolve_parameters(self.module, parameters or names)
        self.samples = samples
        self.chunk = chunk
        self._hooks = ByHooks()

    @property
    def modules(self) -> list[nn.Module]:
        """The layers that hold what is measured."""
        return [module for parameter in self.parameters.values() for module, _ in owners(self.module, parameter)]

    def loss_of(self, batch: dict[str, Tensor], model: nn.Module | None = None) -> Tensor:
        return next_token_loss((model or self.module)(batch["input_ids"]), batch["labels"])

    def plain(self) -> None:
        """One forward and backward pass of the batch: what a training step does anyway."""
        self.module.zero_grad()
        self.loss_of(self.batch).backward()

    # Rows wanted alone.

    def published(self) -> Tensor:
        """The protocol of the scripts released with *Spectral Lens*, written afresh: a pass per sample and matrix."""
        values = []
        for parameter in self.parameters.values():
            rows = []
            for index in range(self.samples):
                one = {key: value[index : index + 1] for key, value in self.batch.items()}
                self.module.zero_grad()
                self.loss_of(one).backward()
                assert parameter.grad is not None
                rows.append(parameter.grad.detach().flatten().clone())
            values.append(torch.linalg.svdvals(torch.stack(rows)).double())
        return torch.stack(values)

    def by_engine(self, engine: Engine, chunk: int | None) -> Rows:
        """Rows as a report makes them: a fresh shadow and fresh memory."""
        loss = BatchLoss(self.module)
        out = {name: torch.empty(self.samples, p.numel()) for name, p in self.parameters.items()}
        with loss.isolated():
            fill_rows(engine, loss, list(out), self.batch, out, chunk)
        return Rows(out.values())

    def loop(self) -> Rows:
        return self.by_engine(by_loop, None)

    def vmap(self) -> Rows:
        return self.by_engine(by_vmap, self.chunk)

    def hooks(self) -> Rows:
        """The check that rows add up to the gradient belongs to the first report alone, here to the warm-up."""
        return self.by_engine(self._hooks, self.chunk)

    def hooks_at_once(self) -> Rows:
        return self.by_engine(self._hooks, self.samples)

    def opacus(self) -> Rows:
        with self._chosen_alone(), self._opacus_hooks() as model:
            self.loss_of(self.batch, model).backward()
        return Rows(self._peers_rows("grad_sample"))

    def backpack(self) -> Rows:
        with self._chosen_alone(), self._backpack_hooks():
            self.loss_of(self.batch).backward()
        return Rows(self._peers_rows("grad_batch"), self.samples)

    # Within a training step, which computes all gradients too.

    def step_hooks(self) -> Tensor:
        """As in training: a matrix's Gram is taken, and its rows let go of, once its last samples are there."""
        grams: dict[str, Tensor] = {}
        store = self._store()

        def reduce(name: str) -> None:
            grams[name] = gram(store.take_early(name))

        self._step_with_reader(store, reduce)
        return torch.stack([grams[name] for name in self.parameters])

    def step_hooks_kept(self) -> Rows:
        """As in all batches but the last before a report: rows stay."""
        store = self._store()
        self._step_with_reader(store, None)
        return Rows(map(store.take, self.parameters))

    def _store(self) -> RowStore:
        cpu = torch.device("cpu")
        return RowStore({name: p.numel() for name, p in self.parameters.items()}, self.samples, torch.float32, cpu, cpu)

    def _step_with_reader(self, store: RowStore, reduce: Callable[[str], None] | None) -> None:
        reader = BackwardReader()
        for name, parameter in self.parameters.items():
            reader.add(name, parameter, self.module)
        reader.come_whole()
        reader.begin(LayerRows(self.samples, store.open(self.samples), float(self.samples)), reduce)
        self.plain()
        rows = reader.end()
        reader.remove()
        store.commit()
        assert rows is not None
        assert not rows.failures, rows.failures
        self._check_all_gradients()

    def step_opacus(self) -> Rows:
        with self._chosen_alone():  # hooks are put on what asks for a gradient
            hooks = self._opacus_hooks()
            model = hooks.__enter__()
        self.module.zero_grad()
        self.loss_of(self.batch, model).backward()
        hooks.__exit__(None, None, None)
        self._check_all_gradients()
        return Rows(self._peers_rows("grad_sample"))

    def step_backpack(self) -> Rows:
        with self._backpack_hooks():
            self.plain()
        self._check_all_gradients()
        return Rows(self._peers_rows("grad_batch"), self.samples)

    def step_backpack_in_place(self) -> Tensor:
        """Each matrix's Gram taken in BackPACK's extension hook, which its manual names as the way to save memory."""
        grams: dict[int, Tensor] = {}

        def reduce(module: nn.Module) -> None:
            for parameter in module.parameters(recurse=False):
                rows: Any = parameter.grad_batch
                grams[id(parameter)] = gram(rows.flatten(1))
                del parameter.grad_batch

        with self._backpack_hooks(reduce):
            self.plain()
        self._check_all_gradients()
        return self.samples**2 * torch.stack([grams[id(p)] for p in self.parameters.values()])

    @contextmanager
    def _chosen_alone(self) -> Iterator[None]:
        """What is measured asks for a gradient, nothing else does."""
        for parameter in self.module.parameters():
            parameter.requires_grad_(any(parameter is p for p in self.parameters.values()))
        self.module.zero_grad()
        try:
            yield
        finally:
            self.module.requires_grad_(True)

    @contextmanager
    def _opacus_hooks(self) -> Iterator[nn.Module]:
        from opacus import GradSampleModule

        model = GradSampleModule(self.module.gpt, loss_reduction="mean", strict=False)
        try:
            yield model
        finally:
            model.remove_hooks()

    @contextmanager
    def _backpack_hooks(self, reduce: Callable[[nn.Module], None] | None = None) -> Iterator[None]:
        from backpack import backpack, extend
        from backpack.context import CTX
        from backpack.extensions import BatchGrad

        for module in self.modules:
            extend(module)
        try:
            with backpack(BatchGrad(), extension_hook=reduce):
                yield
        finally:
            CTX.remove_hooks()
            for module in self.modules:
                del module._backpack_extend

    def _peers_rows(self, field: str) -> Iterator[Tensor]:
        for name, parameter in self.parameters.items():
            rows = getattr(parameter, field, None)
            if rows is None:
                raise LookupError(f"no rows of {name}, and no word of it")
            delattr(parameter, field)
            yield rows.flatten(1)

    def _check_all_gradients(self) -> None:
        assert all(parameter.grad is not None for parameter in self.module.parameters())


def contender(name: str, settings: dict[str, Any]) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """What the harness runs in a process of its own: a small run, and that of the given settings."""
    sizes = {size: settings[size] for size in SIZES}
    return partial(run, Setting(**SMALL), name), partial(run, Setting(**sizes), name)


def run(setting: Setting, name: str) -> Any:
    """One contender's work: singular values, or rows alone where the name ends so.

    Args:
        setting: On what.
        name: A method of :class:`Setting`, with ``_rows`` behind it to stop there.

    Returns:
        Singular values, or rows.
    """
    if name.endswith("_rows"):
        rows = getattr(setting, name.removesuffix("_rows"))()
        return list(rows.matrices)
    found = getattr(setting, name)()
    if isinstance(found, Rows):
        found = found.grams()
    return found if name in ("plain", "published") else roots_of_gram(found)


def error_of_ours(setting: Setting) -> float:
    """How far rows by ``method="auto"`` are from those by a loop: the worst parameter's relative error."""
    names = list(setting.parameters)
    return _error(setting, list(per_sample_gradients(setting.module, setting.batch, names, method="auto").values()))


def error_of_peer(setting: Setting, peer: str) -> float | str:
    """The same of a peer that is given the whole model, or what it says instead."""
    try:
        return _error(setting, getattr(setting, peer)().scaled())
    except LookupError as error:
        return str(error)
    except Exception as error:  # what peers raise is of all kinds
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _error(setting: Setting, found: list[Tensor]) -> float:
    names = list(setting.parameters)
    expected = per_sample_gradients(setting.module, setting.batch, names, method="loop")
    parts = zip(found, expected.values(), strict=True)
    return max(float((mine - right).norm() / right.norm()) for mine, right in parts)


def is_installed(peer: str) -> bool:
    return find_spec(peer) is not None
