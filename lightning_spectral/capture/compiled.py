"""Whether a layer runs inside a compiled graph, where hooks that read its backward pass cannot be."""

from typing import Any

from torch import nn

from lightning_spectral.capture.eager import is_eager
from lightning_spectral.capture.names import clean_name
from lightning_spectral.capture.rebinding import WRAPPED


def compiled_around(root: nn.Module, layer: nn.Module) -> str | None:
    """The name of a module, from the root down to a layer, that is compiled; None if the layer runs as it is written.

    Compiled are modules in ``torch.compile``'s wrapper, those compiled in place (``module.compile()``), and those whose
    ``forward``, or the root's ``training_step``, was replaced by a compiled one. Of a root with a ``training_step``
    only that counts, which need not call it. While compiling is switched off, nothing is.
    """
    if is_eager():
        return None
    if not hasattr(root, "training_step") and _runs_compiled(root):
        return type(root).__name__
    names = [name for name, module in root.named_modules(remove_duplicate=False) if module is layer]
    for name in names:
        if _is_compiled(vars(root).get("training_step")):
            return "training_step"
        path = name.split(".")
        for end in range(1, len(path) + 1):
            module = root.get_submodule(".".join(path[:end]))
            if _runs_compiled(module):
                return clean_name(root, ".".join(path[:end])) or type(module).__name__
    return None


def _runs_compiled(module: nn.Module) -> bool:
    in_place = getattr(module, "_compiled_call_impl", None) is not None
    return in_place or type(module).__name__ == "OptimizedModule" or _is_compiled(vars(module).get("forward"))


def _is_compiled(function: Any) -> bool:
    return hasattr(function, WRAPPED) and not getattr(function, "_torchdynamo_disable", False)
