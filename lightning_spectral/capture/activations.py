"""Reading the outputs of layers as they pass: forward hooks that survive torch.compile and leave no trace."""

import dataclasses
import itertools
import sys
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_spectral.capture.fast_path import Onlooker, may_take_it
from lightning_spectral.capture.one_line import reason_of

_readers: "weakref.WeakValueDictionary[int, ActivationReader]" = weakref.WeakValueDictionary()
_next_reader = itertools.count()


def always() -> bool:
    """Of a loop that cannot tell its step from what runs beside it."""
    return True


class ActivationReader:
    """Forward hooks on named layers that hand each output to a consumer while the reader is open.

    ``consume`` is called with the layer's name and its output tensor, detached. Whatever it raises, or an output is
    unfit for, never reaches the forward pass: ``fail`` is called with the layer's name and the reason. What runs while
    ``is_in_step`` is false is somebody else's, of a callback that samples from the model, say, and is not read.
    """

    def __init__(
        self,
        consume: Callable[[str, Tensor], None],
        fail: Callable[[str, str], None] = lambda name, reason: None,
        is_in_step: Callable[[], bool] = always,
    ) -> None:
        self._is_open = False
        self.names: list[str] = []
        """Of all layers that are, or were, watched."""
        self.inputs: tuple[Any, ...] = ()
        """Positional inputs of the layer whose output is being handed on; none where it ran in a compiled graph."""
        self._consume = consume
        self._fail = fail
        self._is_in_step = is_in_step
        self._watched: dict[str, tuple[nn.Module, RemovableHandle | None]] = {}
        self._onlooker = Onlooker(self._read_apart)
        self.id = next(_next_reader)
        _readers[self.id] = self

    @property
    def is_open(self) -> bool:
        """Whether outputs are handed on."""
        return self._is_open

    @is_open.setter
    def is_open(self, is_open: bool) -> None:
        self._is_open = is_open
        self._onlooker.stand_by(is_open)

    def add(self, name: str, layer: nn.Module, root: nn.Module | None = None) -> None:
        """Watch one more layer, or another one instead, under the name that is handed to the consumer.

        A module that was compiled and *called* before no longer looks at its hooks: add layers before the first step.
        Given the tree that the layer is in, one that hooks would take off torch's fast path is seen without any.
        """
        self.drop(name)
        if name not in self.names:
            self.names.append(name)
        if root is not None and may_take_it(root, layer):
            self._onlooker.looked_for[id(layer)] = layer
            self._watched[name] = layer, None
            return
        hook = _Hook(self.id, self.names.index(name))
        self._watched[name] = layer, layer.register_forward_hook(hook)

    def watches(self, name: str, layer: nn.Module) -> bool:
        """Whether this very layer is watched under a name."""
        return name in self._watched and self._watched[name][0] is layer

    def drop(self, name: str) -> None:
        """Watch a layer no longer, if it is; its name stays."""
        if name not in self._watched:
            return
        layer, handle = self._watched.pop(name)
        if handle is not None:
            handle.remove()
        elif all(other is not layer for other, _ in self._watched.values()):
            del self._onlooker.looked_for[id(layer)]

    def layer(self, name: str) -> nn.Module:
        """The layer that is watched under a name."""
        return self._watched[name][0]

    def remove(self) -> None:
        """Take every hook off again; the reader stays usable."""
        self.is_open = False
        for name in list(self._watched):
            self.drop(name)
        self.names.clear()

    def _read_apart(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        for name, (layer, handle) in self._watched.items():
            if layer is module and handle is None:
                self.read(self.names.index(name), output, inputs)

    def read(self, index: int, output: Any, inputs: tuple[Any, ...] = ()) -> None:
        """Hand on whatever the layer ``names[index]`` returned, if open."""
        # Within a backward pass activation checkpointing repeats what was read.
        if not self.is_open or torch._C._current_graph_task_id() != -1 or not self._is_in_step():
            return
        name = self.names[index]
        self.inputs = inputs
        try:
            states = hidden_states(output)
            with torch.no_grad():
                self._consume(name, states.detach())
        except Exception as error:  # the user's forward pass is under way
            self._fail(name, reason_of(error))
        finally:
            self.inputs = ()


def hidden_states(output: Any) -> Tensor:
    """The hidden states in a layer's output, ``(..., d)``: its first floating-point tensor with at least two axes.

    The output may be a tensor, or a tuple, list, mapping or dataclass of such (nested). Where there is none it is an
    empty ``(0, 0)`` one, which no consumer can take for rows.
    """
    found = _first_rows(output)
    return torch.empty(0, 0) if found is None else found


def _first_rows(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output if output.is_floating_point() and output.ndim >= 2 else None
    if isinstance(output, Mapping):
        parts = list(output.values())
    elif isinstance(output, (tuple, list)):
        parts = list(output)
    elif dataclasses.is_dataclass(output):
        parts = [getattr(output, field.name) for field in dataclasses.fields(output)]
    else:
        return None
    for part in parts:
        if (found := _first_rows(part)) is not None:
            return found
    return None


class _Hook:
    """A forward hook that holds no tensor of the model and no strong reference to its reader.

    Inside a compiled graph a Python side effect would be traced away, or split or re-specialise the graph. There the
    hook calls an opaque operator instead, which finds its reader at run time by the numbers in a small tensor: equal
    blocks share one graph, and opening or closing the reader recompiles nothing.
    """

    def __init__(self, reader_id: int, index: int) -> None:
        self.reader_id = reader_id
        self.index = index
        self.tag = torch.tensor([reader_id, index])
        self.deliver = outside_dynamo(_deliver, type(self))

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            states = hidden_states(output)
            # The operator takes plain tensors of one shape; whoever asks hears that the layer was not seen. Of a plain
            # one nothing more is asked, which torch 2.4 does not compile.
            if type(states) is Tensor or not (states.is_nested or hasattr(states, "placements")):
                torch.ops.lightning_spectral.observe(states.detach(), self.tag)
        else:
            self.deliver(self.reader_id, self.index, output, args)

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        # A module that is copied (an average of weights, a teacher), saved whole or sent to another process is not ours
        # to watch: its rows would count as those of the original.
        return no_hook, ()


def _deliver(reader_id: int, index: int, output: Any, inputs: tuple[Any, ...] = ()) -> None:
    reader = _readers.get(reader_id)
    if reader is not None:
        reader.read(index, output, inputs)


def _ignore(*_: Any) -> None:
    return None


def no_hook() -> Callable[..., None]:
    """What a hook of ours becomes in a copy of its module: a hook that does nothing."""
    return _ignore


def outside_dynamo(deliver: Callable[..., None], hook: type) -> Callable[..., None]:
    """A hook's delivery, kept from being compiled itself under a module that was compiled in place.

    ``module.compile()`` runs hooks of the module outside its graph, yet within reach of dynamo, which would make a
    small graph of the hook. Skipping the code of the hook's ``__call__`` when it is called, not when it is inlined,
    avoids that. Without compilation in the process there is nothing to avoid, and no need to import dynamo.
    """
    if "torch._dynamo" not in sys.modules:
        return deliver
    skip_code = getattr(torch._dynamo.eval_frame, "skip_code", None)
    if skip_code is not None:
        skip_code(hook.__call__.__code__)
    return torch.compiler.disable(deliver)


# The tag is declared as mutated so that no pass removes a call whose result nobody uses.
@torch.library.custom_op("lightning_spectral::observe", mutates_args=("tag",))
def _observe(output: Tensor, tag: Tensor) -> None:
    _deliver(int(tag[0]), int(tag[1]), output)


@_observe.register_fake
def _(output: Tensor, tag: Tensor) -> None:
    return None
