"""Choosing layers by name: glob patterns, or the stack of equal blocks that every transformer has."""

from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate, chain, takewhile

from torch import nn

from lightning_spectral.capture.names import clean_name, matching
from lightning_spectral.capture.stacks import Stack, find_stacks

NUM_PROBES = 5
"""Layers measured by default, as in the scripts released with *Spectral Lens* (arXiv 2605.05683)."""


def resolve_layers(
    root: nn.Module, layers: str | Sequence[str] | None, argument: str = "layers"
) -> dict[str, nn.Module]:
    """The modules that a choice of layers means, by clean name, in the model's order.

    A wrapper and the module inside it have one clean name; the wrapper is returned, since a hook on it sees what the
    rest of the model sees.

    Args:
        root: Any module tree; names are relative to it.
        layers: None finds the stack of equal blocks and takes blocks round(i (L - 1) / 4), i = 0..4, of each of its
            towers where it has several (encoder and decoder). ``"all"`` takes each block of them, see
            :func:`lightning_spectral.capture.stacks.find_stacks`. Otherwise one or several clean names, or glob
            patterns over them: ``*`` and ``?`` stay between two dots, or, where nothing matches so, run across them;
            brackets are tried as they stand first.
        argument: Which gave the choice, for error messages.

    Returns:
        Modules by clean name, at least one.

    Raises:
        ValueError: If no stack of blocks is found, or a pattern matches nothing.
    """
    if layers == "all":
        return find_blocks(root, argument)
    if layers is None:
        return {name: block for stack in _stacks(root, argument) for name, block in _probes(stack).items()}
    modules = _by_clean_name(root)
    chosen = matching(argument, layers, list(modules))
    if not chosen:
        raise ValueError(f"{argument} must name at least one layer, got {layers!r}: use None for the stack of blocks")
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


def find_blocks(root: nn.Module, argument: str = "layers") -> dict[str, nn.Module]:
    """Each block of the stack of equal blocks of a model, and of its other towers, by clean name.

    Raises:
        ValueError: If there is none, see :func:`lightning_spectral.capture.stacks.find_stacks`.
    """
    return {name: block for stack in _stacks(root, argument) for name, block in stack.items()}


def check_one_mask(root: nn.Module, layers: str | Sequence[str] | None, mask: str | None) -> None:
    """Refuse, by a ValueError, one mask for layers of several towers which no pattern of its own names as such."""
    if mask is None or not (towers := towers_spanned(root, layers)):
        return
    first, every = towers[0], [pattern for tower in towers for pattern in tower]
    raise ValueError(
        f"mask must be of all layers that it is laid over, got {mask!r} for layers={layers!r}, of several towers: give "
        f"layers={first[0] if len(first) == 1 else first!r} and each other tower a callback with its own mask and "
        f"prefix, or, where the mask is of all, layers={every!r}"
    )


def towers_spanned(root: nn.Module, layers: str | Sequence[str] | None) -> list[list[str]]:
    """Patterns of what a choice takes of each tower, where one part of it (None, ``"all"``, a pattern) spans several.

    To a tower belongs whatever is held by a module that holds blocks of it and of no other. Empty where each part stays
    in one, which says which towers are meant.
    """
    if len(stacks := find_stacks(root)) < 2:
        return []
    held: dict[str, set[int]] = {}
    for tower, stack in enumerate(stacks):
        for holder in chain.from_iterable(map(_holders, stack)):
            held.setdefault(holder, set()).add(tower)
    for part in [layers] if layers is None or isinstance(layers, str) else [[pattern] for pattern in layers]:
        names: dict[int, list[str]] = {}
        for name in resolve_layers(root, part):
            alone = (towers for holder in _holders(name) if len(towers := held.get(holder, set())) == 1)
            for tower in next(alone, set()):
                names.setdefault(tower, []).append(name)
        if len(names) > 1:
            return [_patterns(names[tower]) for tower in sorted(names)]
    return []


def _holders(name: str) -> list[str]:
    """A module and those that hold it, by clean name, the outermost first."""
    return list(accumulate(name.split("."), "{}.{}".format))


def _patterns(names: Sequence[str]) -> list[str]:
    """Patterns that match names, one for each number of parts."""
    split: dict[int, list[list[str]]] = {}
    for name in names:
        parts = name.split(".")
        split.setdefault(len(parts), []).append(parts)
    return [".".join(map(_pattern, zip(*some, strict=True))) for some in split.values()]


def _pattern(parts: Sequence[str]) -> str:
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*parts, strict=False))
    return parts[0] if len(set(parts)) == 1 else "".join(letters[0] for letters in alike) + "*"


def _stacks(root: nn.Module, argument: str) -> list[Stack]:
    stacks = find_stacks(root)
    if not stacks:
        raise ValueError(
            f"{argument} must be {'patterns' if argument.endswith('s') else 'a name'}, got None or 'all', for there is "
            f"no stack of equal blocks in {type(root).__name__}: take for example {argument}={_example(root)!r}"
        )
    return stacks


def _probes(blocks: Stack) -> Stack:
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
