"""Choosing layers by name: glob patterns, or the stack of equal blocks that every transformer has."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_spectral.capture.names import clean_name, matching, wrapped

NUM_PROBES = 5
"""Layers measured by default, as in the scripts released with *Spectral Lens* (arXiv 2605.05683)."""


def resolve_layers(root: nn.Module, layers: str | Sequence[str] | None) -> dict[str, nn.Module]:
    """The modules that a choice of layers means, by clean name, in the model's order.

    A wrapper and the module inside it have one clean name; the wrapper is returned, since a hook on it sees what the
    rest of the model sees.

    Args:
        root: Any module tree; names are relative to it.
        layers: None finds the stack of equal blocks and takes blocks round(i (L - 1) / 4), i = 0..4. ``"all"`` takes
            each block of that stack. Otherwise one or several clean names, or glob patterns over them: ``*`` and ``?``
            stay between two dots, or, where nothing matches so, run across them; brackets are tried as they stand
            first.

    Returns:
        Modules by clean name, at least one.

    Raises:
        ValueError: If no stack of blocks is found, or a pattern matches nothing.
    """
    if layers is None or layers == "all":
        blocks = find_blocks(root)
        return blocks if layers == "all" else _probes(blocks)
    modules = _by_clean_name(root)
    chosen = matching("layers", layers, list(modules))
    if not chosen:
        raise ValueError(f"layers must name at least one layer, got {layers!r}: use None for the stack of blocks")
    return {name: module for name, module in modules.items() if name in chosen}


def resolve_layers_again(
    root: nn.Module, layers: str | Sequence[str] | None, known: Sequence[str]
) -> dict[str, nn.Module]:
    """What a choice of layers means now, in a model that may have changed since it meant the ``known`` names.

    Names stay what they are, for they stand in keys: each is looked up again, and is missing if nothing is left under
    it. Patterns and ``"all"`` take in what else they have come to mean.
    """
    modules = _by_clean_name(root)
    found = {name: modules[name] for name in known if name in modules}
    if layers is not None:
        with suppress(ValueError):  # nothing is left of it
            found |= {name: layer for name, layer in resolve_layers(root, layers).items() if name not in found}
    return found


def find_blocks(root: nn.Module) -> dict[str, nn.Module]:
    """The stack of equal blocks of a model: the largest group of siblings of one class.

    Siblings in a ModuleList, Sequential or ModuleDict are preferred to plain attributes; a block has sub-modules of its
    own, so that a run of Linear layers is not a stack; among several stacks (encoder and decoder) the one with most
    parameters is taken, not counting those that the first batch is yet to make. At least two are found, by clean name,
    or it is a ValueError.
    """
    containers = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
    modules = list(root.named_modules())
    for parents in ([m for m in modules if isinstance(m[1], containers)], modules):
        stacks = [stack for name, parent in parents for stack in _sibling_groups(root, name, parent)]
        if stacks:
            # The first of equals, so that the choice does not depend on anything but the model.
            return max(stacks, key=lambda stack: sum(_num_parameters(block) for block in stack.values()))
    raise ValueError(
        f"layers must be patterns, got None or 'all', for there is no stack of equal blocks in {type(root).__name__}: "
        f"take for example layers={_example(root)!r}"
    )


def _sibling_groups(root: nn.Module, name: str, parent: nn.Module) -> Iterator[dict[str, nn.Module]]:
    groups: dict[type, dict[str, nn.Module]] = defaultdict(dict)
    for child_name, child in parent.named_children():
        inner = _unwrap(child)
        if next(inner.children(), None) is not None:
            groups[type(inner)][clean_name(root, f"{name}.{child_name}" if name else child_name)] = child
    return (group for group in groups.values() if len(group) >= 2)


def _unwrap(module: nn.Module) -> nn.Module:
    attribute = wrapped(module)
    inner = None if attribute is None else module._modules.get(attribute)
    return module if inner is None else _unwrap(inner)


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if not is_lazy(parameter))


def _probes(blocks: dict[str, nn.Module]) -> dict[str, nn.Module]:
    names = list(blocks)
    indices = sorted({round(i * (len(names) - 1) / (NUM_PROBES - 1)) for i in range(NUM_PROBES)})
    return {names[i]: blocks[names[i]] for i in indices}


def _by_clean_name(root: nn.Module) -> dict[str, nn.Module]:
    modules: dict[str, nn.Module] = {}
    for name, module in root.named_modules():
        # The root, and what wrappers of it hold, has no name.
        if name and (cleaned := clean_name(root, name)):
            modules.setdefault(cleaned, module)
    return modules


def _example(root: nn.Module) -> str:
    leaves = [clean_name(root, name) for name, module in root.named_modules() if name and not list(module.children())]
    return leaves[0] if leaves else "encoder.*"
