"""Choosing parameters by name: glob patterns, or the attention output projections of the probed blocks."""

from collections.abc import Sequence

from torch import nn

from lightning_spectral.capture.contraction import is_linear
from lightning_spectral.capture.layers import resolve_layers
from lightning_spectral.capture.names import clean_name, matching

OUTPUT_NAMES = ("out", "o", "wo", "proj", "c_proj", "o_proj", "out_proj", "proj_out", "to_out", "out_lin", "dense")
"""What model families call the projection that mixes the heads' outputs."""


def trainable_parameters(root: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters that are trained, by clean name relative to ``root``, in the model's order.

    One that several modules share comes once, under its first name.
    """
    return {clean_name(name): p for name, p in root.named_parameters() if p.requires_grad}


def resolve_parameters(root: nn.Module, parameters: str | Sequence[str] | None) -> dict[str, nn.Parameter]:
    """The parameters that a choice means, by clean name, in the model's order.

    Args:
        root: Any module tree; names are relative to it.
        parameters: None takes the weight of the attention output projection of blocks round(i (L - 1) / 4), i = 0..4,
            of the stack of equal blocks, as in *Spectral Lens*; in a block without attention that of its last linear
            layer. ``"all"`` takes every trainable parameter. Otherwise one or several glob patterns over clean names
            of trainable parameters: ``*`` and ``?`` stay between two dots, or, where nothing matches so, run across
            them.

    Returns:
        Parameters by clean name, at least one, each once.

    Raises:
        ValueError: If no stack of blocks or no linear layer in a block is found, a pattern matches nothing, or nothing
            is trained.
    """
    if parameters is None:
        return _output_projections(root)
    trainable = trainable_parameters(root)
    if not trainable:
        raise ValueError(f"parameters must be trained, and {type(root).__name__} has none with requires_grad=True")
    if parameters == "all":
        return trainable
    # A tied parameter answers to each of its names.
    named = [(clean_name(name), p) for name, p in root.named_parameters(remove_duplicate=False) if p.requires_grad]
    chosen = matching("parameters", parameters, [name for name, _ in named])
    if not chosen:
        raise ValueError(f"parameters must name at least one, got {parameters!r}: use None for the default, or 'all'")
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, parameter in named:
        if name in chosen:
            found.setdefault(id(parameter), (name, parameter))
    return dict(found.values())


def _output_projections(root: nn.Module) -> dict[str, nn.Parameter]:
    try:
        blocks = resolve_layers(root, None)
    except ValueError as error:
        example = next(iter(trainable_parameters(root)), "*.weight")
        raise ValueError(
            f"parameters must be patterns or 'all', got None, for there is no stack of equal blocks in "
            f"{type(root).__name__}: take for example parameters={example!r}"
        ) from error
    found = {}
    for block_name, block in blocks.items():
        name, weight = _output_projection(block_name, block)
        found[f"{block_name}.{name}.weight" if name else f"{block_name}.weight"] = weight
    return found


def _output_projection(block_name: str, block: nn.Module) -> tuple[str, nn.Parameter]:
    """Name, relative to the block, and weight of the projection that leads attention back to the residual stream."""
    weights = {
        clean_name(name): module.weight
        for name, module in block.named_modules()
        if is_linear(module) and module.weight.requires_grad
    }
    if not weights:
        raise ValueError(
            f"parameters must be patterns or 'all', got None, for {block_name} has no trained linear layer"
        )
    attentions = [clean_name(name) for name, _ in block.named_modules() if "att" in name.rpartition(".")[2].lower()]
    for attention in attentions:
        inside = [name for name in weights if name.startswith(f"{attention}.")]
        if inside:
            named = [name for name in inside if name.rpartition(".")[2].lower() in OUTPUT_NAMES]
            # Every family that was looked at defines it after queries, keys and values.
            name = (named or inside)[-1]
            return name, weights[name]
    name = list(weights)[-1]
    return name, weights[name]
