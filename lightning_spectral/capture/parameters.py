"""Choosing parameters by name: glob patterns, or the attention output projections of the probed blocks."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_spectral.capture.contraction import is_linear
from lightning_spectral.capture.layers import resolve_layers
from lightning_spectral.capture.names import clean_name, matching
from lightning_spectral.capture.reparametrised import Made, made_tensors, sources_of

OUTPUT_NAMES = ("out", "o", "wo", "proj", "c_proj", "o_proj", "out_proj", "proj_out", "to_out", "out_lin", "dense")
"""What model families call the projection that mixes the heads' outputs."""

FROZEN = "it is not trained now: its requires_grad is False"


class Weight(NamedTuple):
    """A tensor that a layer uses as its weight."""

    ndim: int
    compute: Callable[[], Tensor]
    """Gives it as it is now."""


class _Entry(NamedTuple):
    """One name that a parameter answers to."""

    alias: str
    name: str
    """What it is called then."""
    parameter: nn.Parameter


def trainable_parameters(root: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters that are trained, by clean name relative to ``root``, in the model's order.

    One that several modules share comes once, under its first name. One that a layer's weight is made of (by pruning,
    spectral norm or a parametrisation) has the name of the weight, ``fc.weight`` for ``fc.weight_orig``, which it had
    before and will have again; where there are several for a weight, as under weight norm, each has its own.
    """
    return _once(entry for entry in _entries(root) if entry.parameter.requires_grad)


def named_parameters(root: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters by each of their names, trained or not; one that a weight is made of has that of the weight."""
    found: dict[str, nn.Parameter] = {}
    for entry in _entries(root):
        found.setdefault(entry.name, entry.parameter)
    return found


def resolve_parameters(root: nn.Module, parameters: str | Sequence[str] | None) -> dict[str, nn.Parameter]:
    """The parameters that a choice means, by clean name, in the model's order.

    Args:
        root: Any module tree; names are relative to it.
        parameters: None takes the weight of the attention output projection of blocks round(i (L - 1) / 4), i = 0..4,
            of the stack of equal blocks, as in *Spectral Lens*; in a block without attention that of its last linear
            layer. Of those that are trained: beside frozen weights it is the last matrix of an adapter. ``"all"`` takes
            every trainable parameter. Otherwise one or several clean names of trainable parameters, or glob patterns
            over them: ``*`` and ``?`` stay between two dots, or, where nothing matches so, run across them; brackets
            are tried as they stand first. A weight that a layer makes of parameters means those, see
            :func:`trainable_parameters`.

    Returns:
        Parameters by clean name, at least one, each once.

    Raises:
        ValueError: If no stack of blocks or no linear layer in a block is found, a pattern matches nothing, or nothing
            is trained.
    """
    if parameters is None:
        return _output_projections(root)
    entries = _entries(root)
    trained = [entry for entry in entries if entry.parameter.requires_grad]
    if not trained:
        raise ValueError(f"parameters must be trained, and {type(root).__name__} has none with requires_grad=True")
    if parameters == "all":
        return _once(trained)
    # A tied parameter answers to each of its names.
    names = list(dict.fromkeys(entry.alias for entry in trained))
    frozen = [entry.alias for entry in entries if not entry.parameter.requires_grad]
    chosen = matching("parameters", parameters, names, frozen)
    if not chosen:
        raise ValueError(f"parameters must name at least one, got {parameters!r}: use None for the default, or 'all'")
    return _once(entry for entry in trained if entry.alias in chosen)


def resolve_parameters_again(
    root: nn.Module, parameters: str | Sequence[str] | None, known: Sequence[str]
) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
    """What a choice of parameters means now, in a model that may have changed since it meant the ``known`` names.

    Names stay what they are, for they stand in keys: each is looked up again. Patterns and ``"all"`` take in what else
    they have come to mean, such as what is trained only now.

    Returns:
        Trained parameters by clean name, each once; and of the known names the reasons why others are not among them.
    """
    held = named_parameters(root)
    found = {name: held[name] for name in known if name in held and held[name].requires_grad}
    if parameters is not None:
        with suppress(ValueError):  # nothing is left of it
            seen = {id(p) for p in found.values()}
            found |= {name: p for name, p in resolve_parameters(root, parameters).items() if id(p) not in seen}
    made = {weight: names for weight, names in _made_of(root).items() if weight in known}
    reasons = {}
    for name in known:
        if name in held and name not in found:
            reasons[name] = FROZEN
        elif name in made:
            reasons[name] = f"it is made of {' and '.join(made[name])} now, which are trained in its place"
        elif name not in held:
            reasons[name] = "the model has no such parameter any more"
    return found, reasons


def weights_of(root: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, Weight]:
    """The weights that layers use, by clean name, of the parameters that they are, or are made of."""
    made: dict[int, tuple[str, Made]] = {}
    for name, tensor in _made(root):
        made |= {id(source): (clean_name(root, name), tensor) for source in tensor.sources.values()}
    found: dict[str, Weight] = {}
    for name, parameter in parameters.items():
        if id(parameter) in made:
            weight, tensor = made[id(parameter)]
            ndim = max(source.ndim for source in tensor.sources.values())
            found.setdefault(weight, Weight(ndim, tensor.compute))
        else:
            found[name] = Weight(parameter.ndim, parameter.detach)
    return found


def renamed(root: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """Which of some parameters are called by the weight that is made of them, with their own names."""
    own = {id(p): clean_name(root, name) for name, p in root.named_parameters()}
    weights = {clean_name(root, name) for name, _ in _made(root)}
    return {name: own[id(p)] for name, p in parameters.items() if name in weights and id(p) in own}


def _once(entries: Iterable[_Entry]) -> dict[str, nn.Parameter]:
    """Each parameter under the first of its names."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for entry in entries:
        found.setdefault(id(entry.parameter), (entry.name, entry.parameter))
    return dict(found.values())


def _made(root: nn.Module) -> Iterator[tuple[str, Made]]:
    """Tensors that are made, by full name; only parametrised modules cost more than a look."""
    for name, module in root.named_modules(remove_duplicate=False):
        for tensor in made_tensors(module):
            yield f"{name}.{tensor.attribute}" if name else tensor.attribute, tensor


def _made_of(root: nn.Module) -> dict[str, list[str]]:
    """Clean names of the sources of each weight that is made of several."""
    found = {}
    for name, tensor in _made(root):
        start = name.removesuffix(tensor.attribute)
        if len(tensor.sources) > 1:
            found[clean_name(root, name)] = [clean_name(root, start + source) for source in tensor.sources]
    return found


def _entries(root: nn.Module) -> list[_Entry]:
    """All names of all parameters, in the model's order, that of a weight before those of what it is made of."""
    weights: dict[str, tuple[str, bool]] = {}
    for name, tensor in _made(root):
        start = name.removesuffix(tensor.attribute)
        weights |= {start + source: (clean_name(root, name), len(tensor.sources) == 1) for source in tensor.sources}
    entries: list[_Entry] = []
    owners: dict[str, nn.Parameter] = {}
    for raw, parameter in root.named_parameters(remove_duplicate=False):
        name = clean_name(root, raw)
        if owners.setdefault(name, parameter) is not parameter:
            name = raw  # two of one clean name, which only a wrapper with parts of its own brings about
        if raw in weights:
            weight, is_alone = weights[raw]
            entries.append(_Entry(weight, weight if is_alone else name, parameter))
        entries.append(_Entry(name, name, parameter))
    return entries


def _output_projections(root: nn.Module) -> dict[str, nn.Parameter]:
    try:
        blocks = resolve_layers(root, None)
    except ValueError as error:
        raise ValueError(
            f"parameters must be patterns or 'all', got None, for there is no stack of equal blocks in "
            f"{type(root).__name__}: take for example parameters={_example(root)!r}"
        ) from error
    found = {}
    for block_name, block in blocks.items():
        projection = _output_projection(block)
        if projection is None:
            raise ValueError(
                f"parameters must be patterns or 'all', got None, for {block_name} has no trained linear layer: take "
                f"for example parameters={_example(root, f'{block_name}.')!r}"
            )
        name, module = projection
        start = f"{block_name}.{name}." if name else f"{block_name}."
        sources = sources_of(module, "weight")
        for source, parameter in sources.items():
            found[start + ("weight" if len(sources) == 1 else source)] = parameter
    return found


def _example(root: nn.Module, start: str = "") -> str:
    """The name of a trained matrix that could be chosen, if possible one whose name starts so."""
    matrices = [name for name, p in trainable_parameters(root).items() if not is_lazy(p) and p.ndim > 1]
    return next((name for name in matrices if name.startswith(start)), next(iter(matrices), "*.weight"))


def _output_projection(block: nn.Module) -> tuple[str, nn.Module] | None:
    """Name, relative to the block, and module of the projection that leads attention back to the residual stream.

    None where nothing linear is trained.
    """
    projections = {
        clean_name(block, name): module
        for name, module in block.named_modules()
        if is_linear(module) and any(p.requires_grad for p in sources_of(module, "weight").values())
    }
    if not projections:
        return None
    attentions = [clean_name(block, name) for name, _ in block.named_modules() if _is_attention(name)]
    for attention in attentions:
        inside = [name for name in projections if name.startswith(f"{attention}.")]
        if inside:
            named = [name for name in inside if name.rpartition(".")[2].lower() in OUTPUT_NAMES]
            # Every family that was looked at defines it after queries, keys and values.
            name = (named or inside)[-1]
            return name, projections[name]
    name = list(projections)[-1]
    return name, projections[name]


def _is_attention(name: str) -> bool:
    return "att" in name.rpartition(".")[2].lower()
