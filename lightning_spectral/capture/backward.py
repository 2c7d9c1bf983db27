"""Per-sample gradients read off the backward pass of training, which happens anyway, by hooks that change nothing."""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from lightning_spectral.capture.activations import no_hook, outside_dynamo
from lightning_spectral.capture.compiled import compiled_around
from lightning_spectral.capture.contraction import LayerRows, contracts, owners
from lightning_spectral.capture.one_line import reason_of
from lightning_spectral.capture.reparametrised import made_tensors

NO_GRADIENT = "no gradient reached its layers, or they ran compiled: use method='vmap'"

SET_TO_ZERO = (
    "the shard of its gradient on this rank is zero between backward passes, and whether it was set so cannot be told: "
    "use zero_grad(set_to_none=True)"
)


class BackwardReader:
    """Hooks on the layers of chosen parameters that turn gradients of outputs into rows while a batch is open.

    A forward hook asks the output's gradient to come by (a tensor hook: no node is added to the graph) and keeps the
    layer's input until then. Where the parameter's own gradient comes by, it is compared with the sum of rows. In a
    compiled graph nothing happens. Under non-reentrant activation checkpointing the kept inputs are memory that
    checkpointing would have saved. ``timer`` makes a context to spend the time in that rows take within a backward
    pass. Given the name of a parameter, a layer's input and the gradient of its output, ``localise`` says which parts
    of them give the rows that are wanted here.
    """

    def __init__(
        self,
        timer: Callable[[], AbstractContextManager[Any]] = nullcontext,
        localise: Callable[[str, Tensor, Tensor], tuple[Tensor, Tensor]] = lambda name, x, grad: (x, grad),
    ) -> None:
        self._timer = timer
        self._localise = localise
        self.rows: LayerRows | None = None
        """Where the rows of the batch go; None while none is wanted."""
        self._parameters: dict[str, nn.Parameter] = {}
        self._places: dict[str, list[tuple[nn.Module, str]]] = {}
        self._new: set[str] = set()
        """Those of which no batch has shown whether their gradient comes in one part."""
        self._in_parts: set[str] = set()
        """Those whose gradient came more than once in a batch: none is the last for sure."""
        self._completed: set[str] = set()
        self._streams: dict[str, torch.cuda.Stream] = {}
        """Of a GPU, in which rows of the batch were written, by name."""
        self._gradients: dict[str, Tensor] = {}
        self._batch_handles: list[RemovableHandle] = []
        self.passes: dict[str, set[int]] = {}
        """Backward passes of the batch that were read, by name of the parameter and autograd's number."""

    def add(self, name: str, parameter: nn.Parameter, root: nn.Module) -> None:
        """Watch one more parameter of the tree, or another one of that name, that can be read (:func:`why_unreadable`).

        Nothing happens to one that is watched already, where it is.
        """
        places = owners(root, parameter)
        if self._places.get(name) == places and self._parameters.get(name) is parameter:
            return
        self.drop(name)
        self._parameters[name], self._places[name] = parameter, places
        self._new.add(name)

    def drop(self, name: str) -> None:
        """Watch a parameter no longer, if it is."""
        self._parameters.pop(name, None)
        self._places.pop(name, None)
        self._new.discard(name)
        self._in_parts.discard(name)

    def come_whole(self) -> None:
        """Take for granted that the gradient of each parameter comes in one part, as an earlier batch has shown."""
        self._new.clear()

    def begin(self, rows: LayerRows, on_complete: Callable[[str], None] | None = None) -> None:
        """Open for the passes of one batch.

        ``on_complete`` is called within the backward pass with the name of a parameter whose rows are all there; not
        for one whose gradient came in parts before, nor in its first batch. None where a later pass of the batch may be
        the one that counts.
        """
        self.rows = rows
        self.passes.clear()
        # Only now, for in evaluation mode torch looks for hooks before it takes a fast path; and first of all, for a
        # user's may make something else of what the layer gave.
        for name, places in self._places.items():
            for module, attribute in places:
                hook = _ForwardHook(self, name, attribute)
                self._batch_handles.append(module.register_forward_hook(hook, prepend=True, with_kwargs=True))
        for name, parameter in self._parameters.items():
            if not parameter.requires_grad or is_lazy(parameter):
                continue  # frozen, or made by this very batch: there is nothing to hook yet
            # Autograd sums the gradients of all layers that share a parameter before it comes by here.
            read = functools.partial(self._add_gradient, name)
            if on_complete is not None and name not in self._new | self._in_parts:
                read = functools.partial(self._complete, name, on_complete)
            self._batch_handles.append(_register_first(parameter, read))

    def end(self) -> LayerRows | None:
        """Close after the batch and give its rows, or None if there was no :meth:`begin`."""
        rows, self.rows = self.rows, None
        for handle in self._batch_handles:
            handle.remove()
        self._batch_handles.clear()
        self._completed.clear()
        self._streams.clear()
        if rows is not None:
            for name, gradient in self._gradients.items():
                try:
                    rows.compare(name, gradient)
                except Exception as error:  # of whatever kind a gradient may be
                    rows.failures.setdefault(name, reason_of(error))
            rows.settle()
            # One that fails is looked at again as if it were new: how its gradient comes has not been shown.
            self._new -= self._gradients.keys() - rows.failures.keys()
        self._gradients.clear()
        return rows

    def remove(self) -> None:
        """Take every hook off again."""
        self.end()
        for name in list(self._parameters):
            self.drop(name)

    def begin_pass(self, is_first: bool = False) -> None:
        """Tell the passes of one batch apart: where a gradient was set to zero, what came before is of another loss.

        So is, before the first of them, what gave a parameter no gradient: a gradient was asked of something else.
        """
        if self.rows is None:
            return
        for name in self.rows.seen - self.rows.final:
            gradient: Any = self._parameters[name].grad
            if hasattr(gradient, "to_local"):
                gradient = gradient.to_local()
                if not bool(gradient.any()):
                    # Of a shard alone; None would be known for sure.
                    self.rows.failures.setdefault(name, SET_TO_ZERO)
                continue
            is_beside = is_first and name not in self._completed and name not in self._gradients
            if is_beside or gradient is None or not bool(gradient.any()):
                self.rows.stale.add(name)
                self._gradients.pop(name, None)

    def end_passes(self, parameters: Iterable[Tensor]) -> None:
        """An optimizer takes the gradients of its parameters as they are: of these no further pass is looked at."""
        if self.rows is None:
            return
        taken = {id(parameter) for parameter in parameters}
        self.rows.final |= {name for name in self.rows.seen if id(self._parameters[name]) in taken}

    def _add_gradient(self, name: str, gradient: Any) -> None:
        if self.rows is not None and name in self.rows.final:
            return
        try:
            local = self._comparable(name, gradient)
            if local is None:
                return
            seen = self._gradients.get(name)
            if seen is not None:
                # Reentrant checkpoints that share a parameter do this, and several backward passes in one step.
                self._in_parts.add(name)
            self._gradients[name] = local.clone() if seen is None else seen + local
        except Exception as error:  # never raised: a backward pass is under way
            self._fail(name, error)

    def _fail(self, name: str, error: Exception) -> None:
        if self.rows is not None:
            self.rows.failures.setdefault(name, reason_of(error))

    def _complete(self, name: str, on_complete: Callable[[str], None], gradient: Any) -> None:
        rows = self.rows
        if rows is None or name not in rows.seen or name in rows.failures or name in rows.final:
            return
        if name in self._completed:
            self._came_in_parts(rows, name)
            return
        self._completed.add(name)
        try:
            local = self._comparable(name, gradient)
            with self._timer(), self._stream_of_rows(name, local):
                if local is not None:
                    rows.compare(name, local)
                on_complete(name)
        except Exception as error:  # never raised: a backward pass is under way
            rows.failures[name] = reason_of(error)

    def _came_in_parts(self, rows: LayerRows, name: str) -> None:
        self._in_parts.add(name)
        rows.failures[name] = "its gradient came in parts for the first time; the next report will allow for it"

    def _comparable(self, name: str, gradient: Any) -> Tensor | None:
        """The part of a gradient that is of this rank's rows; None if it is still to be reduced over ranks."""
        if hasattr(gradient, "to_local"):
            is_reduced = gradient.placements == getattr(self._parameters[name], "placements", None)
            gradient = gradient.to_local() if is_reduced else None
        return None if gradient is None else gradient.detach()

    @contextmanager
    def _stream_of_rows(self, name: str, gradient: Tensor | None) -> Iterator[None]:
        """Work in the stream in which rows were written, if that is on a GPU.

        A parameter's hooks run in the stream in which it was first used, which under DDP is another: memory that is let
        go of there would be written over while it is still read.
        """
        stream = self._streams.get(name)
        if stream is None:
            yield
            return
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        if gradient is not None:
            gradient.record_stream(stream)
        with torch.cuda.stream(stream):
            yield

    def watch(self, name: str, attribute: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Ask for the gradient of what a layer returned; ``attribute`` is the parameter's name in the layer."""
        rows = self.rows
        if rows is None or not isinstance(output, Tensor) or not output.requires_grad:
            return
        try:
            self._ask(rows, name, attribute, module, inputs, output)
        except Exception as error:  # never raised: a forward pass is under way
            self._fail(name, error)

    def _ask(
        self, rows: LayerRows, name: str, attribute: str, module: nn.Module, inputs: tuple[Any, ...], output: Tensor
    ) -> None:
        x = inputs[0].detach()

        def read(grad: Tensor) -> None:
            if name in rows.final:
                return
            self.passes.setdefault(name, set()).add(torch._C._current_graph_task_id())
            if name in self._completed:
                self._came_in_parts(rows, name)
                return
            try:
                with self._timer():
                    rows.add(name, module, attribute, *self._localise(name, x, grad))
                if grad.is_cuda:
                    self._streams[name] = torch.cuda.current_stream(grad.device)
            except Exception as error:  # never raised: a backward pass is under way
                self._fail(name, error)

        output.register_hook(read)


def _register_first(parameter: nn.Parameter, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """A hook that sees the gradient before a user's hooks make another of it for the optimizer."""
    handle = parameter.register_hook(hook)
    hooks: Any = parameter._backward_hooks
    for key in [key for key in hooks if key != handle.id]:
        hooks[key] = hooks.pop(key)
    return handle


def check_contracts(root: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    """Refuse parameters whose per-sample gradients cannot be read off inputs and gradients of outputs.

    A ValueError names them and their layers.
    """
    for name, parameter in parameters.items():
        if (reason := why_unreadable(root, name, parameter)) is not None:
            raise ValueError(reason)


def why_unreadable(root: nn.Module, name: str, parameter: nn.Parameter) -> str | None:
    """Why the per-sample gradients of a parameter cannot be read off inputs and gradients of outputs; None if they can.

    Of a weight that its layer makes of the parameter they are gradients of the weight; only a mask of pruning is
    passed.
    """
    found = owners(root, parameter)
    if found and all(contracts(module, attribute) for module, attribute in found):
        compiled = next((part for module, _ in found if (part := compiled_around(root, module)) is not None), None)
        if compiled is None:
            return None
        return (
            f"method='hooks' reads layers that run as they are written, got parameter {name!r} inside {compiled}, "
            "which is compiled: use method='vmap', or choose other parameters"
        )
    kinds = ", ".join(sorted({type(module).__name__ for module, _ in found}))
    made = [source for module in root.modules() for one in made_tensors(module) for source in one.sources.values()]
    if any(source is parameter for source in made):
        return (
            f"method='hooks' reads weights as they are, got parameter {name!r} that they are made of: use "
            "method='vmap', or 'loop'"
        )
    return (
        f"method='hooks' reads linear layers and embeddings, got parameter {name!r} of {kinds}: "
        "use method='vmap', or choose other parameters"
    )


class _ForwardHook:
    """Holds its reader; a module that is copied or saved leaves the hook behind."""

    def __init__(self, reader: BackwardReader, name: str, attribute: str) -> None:
        self.reader = reader
        self.name = name
        self.attribute = attribute
        self.watch = outside_dynamo(reader.watch, type(self))

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not torch.compiler.is_compiling():
            self.watch(self.name, self.attribute, module, args or tuple(kwargs.values()), output)

    def __reduce__(self) -> Any:
        return no_hook, ()
