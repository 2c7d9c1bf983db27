"""Finding what a model is a stack of: its blocks in the order of depth, of one tower or of several."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TypeAlias

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_spectral.capture.names import clean_name, wrapped

Stack: TypeAlias = dict[str, nn.Module]
"""Blocks by clean name, in the order of depth."""

Path: TypeAlias = tuple[str, ...]
"""A clean name in parts."""

TOWERS = (
    (("encoder", "enc"), ("decoder", "dec")),
    (("down",), ("mid", "middle", "bottleneck"), ("up",)),
    (("input",), ("middle",), ("output",)),
    (("text", "language"), ("vision", "visual", "image", "audio")),
)
"""Families of words in the names of towers that belong together, in the order in which data pass them."""

LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def find_stacks(root: nn.Module) -> list[Stack]:
    """The stack of equal blocks of a model, and its other towers if it has several.

    A block holds modules, so that a run of Linear layers is no stack, or is recurrent, and it has parameters. Siblings
    of one class make a stack, two at least. Those in a ModuleList, Sequential or ModuleDict are preferred to plain
    attributes; of several stacks that which is trained and has most parameters is taken, not counting those that the
    first batch is yet to make; one that is frozen, such as a teacher, only where none is trained. Then

    - of modules that are plain attributes, those that are frozen beside one that is trained are none of it;
    - what a ModuleList holds and never runs, having no ``forward``, such as another, gives its place to what is in it;
    - siblings of other classes belong to the stack if they stand between its blocks, or are of a class of which some do
      (attention among state-space layers), or, in a ModuleList, hold a part of the same class as they do;
    - stacks of the same class whose names differ in one number (``layer1`` to ``layer4``) are stages of one stack;
    - stacks whose names part by words of :data:`TOWERS` (``encoder`` and ``decoder``; ``down``, ``mid`` and ``up``) are
      towers of one model, unless they are not trained; a single block may stand between ``down`` and ``up``.

    Args:
        root: Any module tree.

    Returns:
        Its towers in the order in which data pass them, one where there are no others, none if no stack is found.
    """
    groups = [_Siblings(root, name, module) for name, module in root.named_modules()]
    listed = [group for group in groups if isinstance(group.parent, LISTS)]
    for some in (listed, groups):
        stacks = [group for group in some if group.is_stack]
        if stacks:
            # The first of equals, so that the choice does not depend on anything but the model.
            return _towers(max(stacks, key=lambda group: (group.is_trained, group.size)), listed, groups)
    return []


class _Siblings:
    """The blocks that one module holds.

    Args:
        root: The model.
        name: Of the module, as ``named_modules`` of the root gives it.
        parent: The module.
    """

    def __init__(self, root: nn.Module, name: str, parent: nn.Module) -> None:
        self.parent = parent
        self.path: Path = tuple(part for part in clean_name(root, name).split(".") if part)
        self.blocks = dict(_blocks_in(root, name, parent, isinstance(parent, nn.ModuleList)))
        """By clean name, wrappers included, in the order of registration."""
        if not isinstance(parent, LISTS) and self.is_trained:
            # A frozen network beside one that is trained, such as its teacher, is no other depth of it.
            self.blocks = {name: block for name, block in self.blocks.items() if _is_trained(block)}
        self.kinds = [type(_unwrap(block)) for block in self.blocks.values()]
        counts = Counter(self.kinds)
        several = [kind for kind, count in counts.items() if count >= 2]
        self.kind = max(several or counts, key=self._size_of, default=None)
        """The class with most parameters, if possible of several blocks."""
        self.is_stack = bool(several)
        self.size = self._size_of(self.kind)
        """Parameters of the blocks of this class."""

    def _size_of(self, kind: type | None) -> int:
        parts = zip(self.kinds, self.blocks.values(), strict=True)
        return sum(_num_parameters(block) for one, block in parts if one is kind)

    def stack(self) -> Stack:
        """The blocks of the class, with the siblings that belong to them."""
        names, blocks = list(self.blocks), list(self.blocks.values())
        places = [place for place, kind in enumerate(self.kinds) if kind is self.kind]
        among = set(self.kinds[places[0] : places[-1] + 1])
        parts = {part for place in places for part in _parts(blocks[place])}
        families = {family for place in places for family in _words(names[place])}

        def belongs(place: int) -> bool:
            if places[0] <= place <= places[-1] or self.kinds[place] in among:
                return True
            if isinstance(self.parent, nn.ModuleList):
                return not parts.isdisjoint(_parts(blocks[place]))
            return not families.isdisjoint(_words(names[place]))

        return {names[place]: blocks[place] for place in range(len(names)) if belongs(place)}

    @property
    def is_trained(self) -> bool:
        """Whether any of its blocks is."""
        return any(map(_is_trained, self.blocks.values()))


def _is_trained(block: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in block.parameters())


def _towers(first: _Siblings, listed: Sequence[_Siblings], groups: Sequence[_Siblings]) -> list[Stack]:
    """The stack of these siblings, with its stages, among the other towers."""
    by_tower: dict[Path, list[_Siblings]] = {}
    for group in listed:
        index = _parting(first, group)
        if index is not None and group.is_trained >= first.is_trained:
            tower = (*group.path[:index], _without_numbers(group.path[index]))
            by_tower.setdefault(tower, []).append(group)
    found = {first.path: _stages(first, listed)}
    for tower, some in by_tower.items():
        found[tower] = _stages(max(some, key=lambda group: group.size), some)
    # Rather than what stands inside one: it is to them what a block is to its tower.
    found |= {(*first.path[:-1], _without_numbers(name)): stack for name, stack in _singles(first, groups)}
    # A name without a word, beside `decoder_blocks` say, comes first.
    return [found[path] for path in sorted(found, key=_place)]


def _parting(first: _Siblings, other: _Siblings) -> int | None:
    """Where in their names towers part; None for what is no tower beside the first."""
    parts = zip(first.path, other.path, strict=False)
    index = next((index for index, (one, two) in enumerate(parts) if one != two), None)
    if index is None or not other.blocks:
        return None
    own, its = _words(first.path[index]), _words(other.path[index])
    if any(family in own and own[family] != place for family, place in its.items()):
        return index
    # As in masked autoencoders: `blocks` and `decoder_blocks`.
    return index if not own and 0 in its and first.kind in other.kinds else None


def _singles(first: _Siblings, groups: Sequence[_Siblings]) -> Iterator[tuple[str, Stack]]:
    """Single blocks that stand between towers, beside the list that holds the blocks of one."""
    families = {family for family in _words(first.path[-1]) if family > 0} if first.path else set()
    for group in groups:
        if not families or group.path != first.path[:-1]:
            continue
        for name, block in group.blocks.items():
            last, inner = name.rpartition(".")[2], _unwrap(block)
            if not any(_words(last).get(family) == 1 for family in families) or isinstance(inner, LISTS):
                continue
            if _runs(inner):
                yield last, {name: block}
            else:
                yield last, {f"{name}.{part}": module for part, module in _blocks_in(block, "", block, True)}


def _stages(group: _Siblings, others: Sequence[_Siblings]) -> Stack:
    """The stack of these siblings, after and before those of the same class whose names differ in one number."""
    stack: Stack = {}
    for other in others if group in others else [group]:
        if other is group or (group.kind in other.kinds and _is_stage(group.path, other.path)):
            stack |= other.stack()
    return stack


def _is_stage(one: Path, other: Path) -> bool:
    if len(one) != len(other):
        return False
    differing = [(a, b) for a, b in zip(one, other, strict=True) if a != b]
    return len(differing) == 1 and _without_numbers(differing[0][0]) == _without_numbers(differing[0][1])


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _words(name: str) -> dict[int, int]:
    """Of each family of :data:`TOWERS` that the last part of a name has a word of: which place it has there."""
    words = {word.removesuffix("s") for word in re.split(r"[\W\d_]+", name.rpartition(".")[2].lower())}
    return {
        family: place
        for family, towers in enumerate(TOWERS)
        for place, synonyms in enumerate(towers)
        if not words.isdisjoint(synonyms)
    }


def _place(path: Path) -> int:
    """Where among its towers one comes, by the last of its words."""
    places = [place for part in path for place in _words(part).values()]
    return places[-1] if places else 0


def _blocks_in(root: nn.Module, name: str, parent: nn.Module, opens: bool) -> Iterator[tuple[str, nn.Module]]:
    """Blocks under their clean names; those in what never runs as well, if it is to be opened."""
    for child_name, child in parent.named_children():
        full = f"{name}.{child_name}" if name else child_name
        inner = _unwrap(child)
        if opens and not _runs(inner):
            yield from _blocks_in(root, full, child, opens)
        elif _is_block(inner):
            yield clean_name(root, full), child


def _runs(module: nn.Module) -> bool:
    """Whether a module has a forward of its own; lists and dictionaries of modules have none."""
    return type(module).forward is not nn.Module.forward or "forward" in vars(module)


def _is_block(module: nn.Module) -> bool:
    holds = next(module.children(), None) is not None or isinstance(module, nn.RNNBase)
    return holds and next(module.parameters(), None) is not None


def _parts(block: nn.Module) -> set[type]:
    """Classes of what a block is put together from: of modules inside that hold modules, but torch's own."""
    inside = {type(part) for part in block.modules() if part is not block and next(part.children(), None) is not None}
    return {kind for kind in inside if not kind.__module__.startswith("torch.")}


def _unwrap(module: nn.Module) -> nn.Module:
    attribute = wrapped(module)
    inner = None if attribute is None else module._modules.get(attribute)
    return module if inner is None else _unwrap(inner)


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if not is_lazy(parameter))
