"""Choosing layers by name: glob patterns, or the stack of equal blocks that every transformer has."""

import difflib
import fnmatch
from collections import defaultdict
from collections.abc import Iterator, Sequence

from torch import nn

WRAPPERS = ("_orig_mod", "module", "_checkpoint_wrapped_module")
"""Attributes under which torch.compile, DistributedDataParallel and checkpoint_wrapper keep the wrapped module."""

NUM_PROBES = 5
"""Layers measured by default, as in the scripts released with *Spectral Lens* (arXiv 2605.05683)."""


def clean_name(name: str) -> str:
    """A module's or parameter's name without the wrappers' parts.

    Args:
        name: Dotted name as ``named_modules`` gives it.

    Returns:
        The name that the unwrapped model would have.

    Example:
        >>> clean_name("model._orig_mod.blocks.0._checkpoint_wrapped_module.mlp")
        'model.blocks.0.mlp'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def resolve_layers(root: nn.Module, layers: str | Sequence[str] | None) -> dict[str, nn.Module]:
    """The modules that a choice of layers means, by clean name, in the model's order.

    A wrapper and the module inside it have one clean name; the wrapper is returned, since a hook on it sees what the
    rest of the model sees.

    Args:
        root: Any module tree; names are relative to it.
        layers: None finds the stack of equal blocks and takes blocks round(i (L - 1) / 4), i = 0..4. ``"all"`` takes
            each block of that stack. Otherwise one or several glob patterns over clean names: ``*`` and ``?`` stay
            between two dots, or, where nothing matches so, run across them.

    Returns:
        Modules by clean name, at least one.

    Raises:
        ValueError: If no stack of blocks is found, or a pattern matches nothing.
    """
    if layers is None or layers == "all":
        blocks = find_blocks(root)
        return blocks if layers == "all" else _probes(blocks)
    modules = _by_clean_name(root)
    chosen: set[str] = set()
    for pattern in [layers] if isinstance(layers, str) else layers:
        chosen.update(_matches(pattern, list(modules)))
    if not chosen:
        raise ValueError(f"layers must name at least one layer, got {layers!r}: use None for the stack of blocks")
    return {name: module for name, module in modules.items() if name in chosen}


def find_blocks(root: nn.Module) -> dict[str, nn.Module]:
    """The stack of equal blocks of a model: the largest group of siblings of one class.

    Siblings in a ModuleList, Sequential or ModuleDict are preferred to plain attributes; a block has sub-modules of its
    own, so that a run of Linear layers is not a stack; among several stacks (encoder and decoder) the one with most
    parameters is taken.

    Args:
        root: Any module tree.

    Returns:
        The blocks by clean name, at least two.

    Raises:
        ValueError: If there is no such stack.
    """
    containers = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
    modules = list(root.named_modules())
    for parents in ([m for m in modules if isinstance(m[1], containers)], modules):
        stacks = [stack for name, parent in parents for stack in _sibling_groups(name, parent)]
        if stacks:
            # The first of equals, so that the choice does not depend on anything but the model.
            return max(stacks, key=lambda stack: sum(_num_parameters(block) for block in stack.values()))
    raise ValueError(
        f"layers must be patterns, got None or 'all', for there is no stack of equal blocks in {type(root).__name__}: "
        f"take for example layers={_example(root)!r}"
    )


def _sibling_groups(name: str, parent: nn.Module) -> Iterator[dict[str, nn.Module]]:
    groups: dict[type, dict[str, nn.Module]] = defaultdict(dict)
    for child_name, child in parent.named_children():
        inner = _unwrap(child)
        if next(inner.children(), None) is not None:
            groups[type(inner)][clean_name(f"{name}.{child_name}" if name else child_name)] = child
    return (group for group in groups.values() if len(group) >= 2)


def _unwrap(module: nn.Module) -> nn.Module:
    for attribute in WRAPPERS:
        inner = getattr(module, attribute, None)
        if isinstance(inner, nn.Module) and len(list(module.children())) == 1:
            return _unwrap(inner)
    return module


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _probes(blocks: dict[str, nn.Module]) -> dict[str, nn.Module]:
    names = list(blocks)
    indices = sorted({round(i * (len(names) - 1) / (NUM_PROBES - 1)) for i in range(NUM_PROBES)})
    return {names[i]: blocks[names[i]] for i in indices}


def _by_clean_name(root: nn.Module) -> dict[str, nn.Module]:
    modules: dict[str, nn.Module] = {}
    for name, module in root.named_modules():
        if cleaned := clean_name(name):
            modules.setdefault(cleaned, module)
    return modules


def _matches(pattern: str, names: list[str]) -> list[str]:
    parts = pattern.split(".")
    within = [
        name
        for name in names
        if name.count(".") == len(parts) - 1 and all(map(fnmatch.fnmatchcase, name.split("."), parts))
    ]
    matched = within or fnmatch.filter(names, pattern)
    if not matched:
        raise ValueError(f"layers={pattern!r} matches no layer: did you mean {_close(pattern, names)}?")
    return matched


def _close(pattern: str, names: list[str]) -> str:
    close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or names[:3]
    return ", ".join(repr(name) for name in close)


def _example(root: nn.Module) -> str:
    leaves = [clean_name(name) for name, module in root.named_modules() if name and not list(module.children())]
    return leaves[0] if leaves else "encoder.*"
