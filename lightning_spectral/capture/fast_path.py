"""Layers that torch runs on a fast path, off which a hook on any of their parts takes them, and how to see them run."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.hooks import RemovableHandle

from lightning_spectral.capture.compiled import compiled_around

SKIPPED = (
    "it never ran, for torch's fast path of nn.TransformerEncoderLayer in evaluation mode calls none of its parts: "
    "choose the layer itself, or torch.backends.mha.set_fastpath_enabled(False)"
)

Saw = Callable[[nn.Module, tuple[Any, ...], Any], None]


def may_take_it(root: nn.Module, layer: nn.Module) -> bool:
    """Whether a hook on a layer would keep torch from its fast path: results differ by rounding then, or in NaN.

    In evaluation mode ``nn.TransformerEncoderLayer`` looks for hooks on itself and its parts, not for those on all
    modules.
    """
    return any(part is layer for outer in _on_fast_path(root) for part in outer.modules())


def is_skipped(root: nn.Module, layer: nn.Module) -> bool:
    """Whether a layer is a part that does not run where the fast path is taken."""
    return not layer.training and any(part is layer for outer in _on_fast_path(root) for part in outer.children())


def refuse_compiled(root: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Refuse, in a ValueError of one line, layers by name that cannot be read in a graph without leaving the fast path.

    There a hook has to be on the module itself.
    """
    for name, layer in layers.items():
        if may_take_it(root, layer) and (compiled := compiled_around(root, layer)) is not None:
            raise ValueError(
                f"layers must stay on torch's fast path, got {name!r} of an nn.TransformerEncoderLayer in {compiled}, "
                "which is compiled, where a hook takes it off: call torch.backends.mha.set_fastpath_enabled(False)"
            )


def _on_fast_path(root: nn.Module) -> list[nn.TransformerEncoderLayer]:
    """Layers that run on the fast path in evaluation mode, given inputs that allow it."""
    if not torch.backends.mha.get_fastpath_enabled():
        return []
    return [part for part in root.modules() if isinstance(part, nn.TransformerEncoderLayer) and _may_be_fast(part)]


def _may_be_fast(layer: nn.TransformerEncoderLayer) -> bool:
    attention = getattr(layer, "self_attn", None)
    is_fit = isinstance(attention, nn.MultiheadAttention) and attention.batch_first and attention.num_heads % 2 == 0
    return is_fit and bool(getattr(layer, "activation_relu_or_gelu", False))


class Onlooker:
    """Sees modules run, by a hook on all modules while it stands by.

    Args:
        saw: Called with a module that is looked for, its positional inputs and its output.
    """

    def __init__(self, saw: Saw) -> None:
        self.looked_for: dict[int, nn.Module] = {}
        """By ``id``."""
        self._saw = saw
        self._handle: RemovableHandle | None = None

    def stand_by(self, stands: bool) -> None:
        """Be there, or not."""
        stands = stands and bool(self.looked_for)
        if stands and self._handle is None:
            self._handle = register_module_forward_hook(self._look)
        elif not stands and self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _look(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling() and id(module) in self.looked_for:
            self._saw(module, inputs, output)
