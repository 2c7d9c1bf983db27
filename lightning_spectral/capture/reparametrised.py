"""Tensors that a layer makes of its parameters before it uses them: pruned, normalised and parametrised weights."""

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


class Made(NamedTuple):
    """A tensor that a module makes of parameters."""

    attribute: str
    """Under which the module uses it, ``weight`` for example."""
    sources: dict[str, nn.Parameter]
    """What it is made of, by name relative to the module: one, as ``weight_orig``, or several, as direction and length.
    What a parametrisation learns of its own is not among them."""
    compute: Callable[[], Tensor]
    """Makes it of the parameters as they are now, and leaves the module as it is."""


def made_tensors(module: nn.Module) -> Iterator[Made]:
    """What a module, without those inside it, makes by the means of :mod:`torch.nn.utils`."""
    for attribute, computed in _parametrised(module).items():
        originals = computed.named_parameters(recurse=False)
        sources = {f"parametrizations.{attribute}.{name}": parameter for name, parameter in originals}
        yield Made(attribute, sources, lambda computed=computed: _compute(computed))  # type: ignore[misc]
    hooks = [hook for hook in module._forward_pre_hooks.values() if made_by(hook) is not None]
    for hook in hooks:
        yield Made(str(made_by(hook)), _sources(module, hook, hooks), _maker(module, hook))


def sources_of(module: nn.Module, attribute: str) -> dict[str, nn.Parameter]:
    """The parameters behind a tensor of a module, by name relative to it: itself, what it is made of, or none.

    The tensor itself is not asked for: a parametrised one is computed at that, which may move buffers.
    """
    parameter = dict(module.named_parameters(recurse=False)).get(attribute)
    if parameter is not None:
        return {attribute: parameter}
    return next((made.sources for made in made_tensors(module) if made.attribute == attribute), {})


def used_as(module: nn.Module, parameter: str) -> tuple[str, Tensor | None]:
    """What a parameter is to its module where it is used: itself, or, if it is pruned, the weight behind a mask."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod) and parameter == f"{hook._tensor_name}_orig":
            return hook._tensor_name, module._buffers[f"{hook._tensor_name}_mask"]
    return parameter, None


def _parametrised(module: nn.Module) -> dict[str, ParametrizationList]:
    found = dict(module.named_children()).get("parametrizations")  # TorchScript's own table has no ``get``
    children = {} if found is None else found._modules
    return {name: child for name, child in children.items() if isinstance(child, ParametrizationList)}


def _compute(computed: ParametrizationList) -> Tensor:
    # In training the power iteration of a spectral norm, or whatever a user's own does, would go one step further.
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in computed.parameters()}
    with torch.inference_mode(False), torch.no_grad(), isolate_rng(include_cuda=torch.cuda.is_available()):
        made: Tensor = copy.deepcopy(computed, memo).eval()()
    return made


def made_by(hook: Any) -> str | None:
    """The tensor that a hook makes before its module runs; None if it is no hook of that kind."""
    if isinstance(hook, BasePruningMethod):
        return hook._tensor_name
    return hook.name if isinstance(hook, (SpectralNorm, WeightNorm)) else None


def _sources(module: nn.Module, hook: Any, hooks: list[Any]) -> dict[str, nn.Parameter]:
    endings = ("_g", "_v") if isinstance(hook, WeightNorm) else ("_orig",)
    found: dict[str, nn.Parameter] = {}
    for name in (f"{made_by(hook)}{ending}" for ending in endings):
        parameter = module._parameters.get(name)
        if parameter is not None:
            found[name] = parameter
        else:  # what it is made of may be made in its turn
            inner = [other for other in hooks if other is not hook and made_by(other) == name]
            found |= {key: p for other in inner for key, p in _sources(module, other, []).items()}
    return found


def _maker(module: nn.Module, hook: Any) -> Callable[[], Tensor]:
    def compute() -> Tensor:
        with torch.no_grad():
            if isinstance(hook, BasePruningMethod):
                return hook.apply_mask(module)
            if isinstance(hook, SpectralNorm):
                return hook.compute_weight(module, do_power_iteration=False)
            made: Tensor = hook.compute_weight(module)
            return made

    return compute
