"""The copy of a module on which losses are asked for: its own weights and state, nothing shared with training."""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from lightning_spectral.capture.reachable import BARE, MANY, PLAIN, is_opaque, is_trainer, slots_of, value_in
from lightning_spectral.capture.rebinding import Rebinding
from lightning_spectral.capture.reparametrised import made_by
from lightning_spectral.capture.stand_ins import Bystander, Undrawable, silence_logging

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)

WATCHERS = ("wandb",)
"""Packages whose hooks send what they see elsewhere; nothing of it comes back to the loss."""


def copy_of(module: nn.Module, trainer: Any = None) -> tuple[nn.Module, dict[int, Any], Bystander | None]:
    """A deep copy, with functions bound to it, that logs nowhere and sees of the Trainer only what can be read.

    Returns:
        The copy, what each of its parts was copied from, by the part's id, and what stands in for the Trainer.

    Raises:
        RuntimeError: If something in it cannot be copied, or waits for other ranks.
    """
    # Of no use to a copy, which would have to begin again for each sample, and most cannot be copied anyhow.
    instead = {id(iterator): Undrawable(iterator) for iterator in _iterators(module)}
    shadow, originals, bystander = _duplicate(module, trainer, instead)
    for part in shadow.modules():
        if isinstance(part, nn.SyncBatchNorm) and part.training and _many_ranks():
            raise RuntimeError("a loss of one sample cannot wait for other ranks in SyncBatchNorm: give loss_fn")
        if hasattr(part, "training_step") and hasattr(part, "log_dict"):
            silence_logging(part, bystander)
    return shadow, originals, bystander


def duplicate(module: nn.Module) -> tuple[nn.Module, dict[int, Any]]:
    """A deep copy, with functions bound to it, that may be trained in the module's place.

    Returns:
        The copy, and what each of its parts was copied from, by the part's id.

    Raises:
        RuntimeError: If something in it cannot be copied.
    """
    return _duplicate(module, None, {})[:2]


def _duplicate(
    module: nn.Module, trainer: Any, instead: dict[int, Any]
) -> tuple[nn.Module, dict[int, Any], Bystander | None]:
    memo = dict(instead)
    try:
        # To be differentiated, even where a validation pass allows nothing else to be.
        with torch.inference_mode(False), _CopyGraphTensors():
            # A lazy one, which has no numbers yet, is left to the deep copy.
            made = [p for p in module.parameters() if not is_lazy(p)]
            memo.update({id(p): _copy(p) for p in made})
            originals = {id(memo[id(p)]): p for p in made}
            bystander = None if trainer is None else Bystander(trainer, memo)
            if bystander is not None:
                memo[id(trainer)] = bystander
            shadow: nn.Module = copy.deepcopy(module, memo)
    except Exception as error:
        raise RuntimeError(f"{type(module).__name__} cannot be copied: {str(error).partition(chr(10))[0]}") from error
    if bystander is not None:
        bystander.stand_before(shadow)
    Rebinding(memo).rebind()
    # A deep copy keeps all alive that it has copied.
    originals |= {id(memo[id(part)]): part for part in memo.get(id(memo), ()) if id(part) in memo}
    for part in shadow.modules():
        _guard_hooks(part)
    return shadow, originals, bystander


def _iterators(module: nn.Module) -> Iterator[Any]:
    """Those that a deep copy comes across, and that do not keep in attributes how far they are."""
    left: list[Any] = [vars(module)]
    seen: set[int] = set()
    while left:
        part = left.pop()
        for value in list(part.values()) if isinstance(part, dict) else part:
            if isinstance(value, PLAIN) or id(value) in seen:
                continue
            if isinstance(value, BARE):
                if 0 < len(value) <= MANY:
                    seen.add(id(value))
                    left.append(value)
                continue
            seen.add(id(value))
            if isinstance(value, nn.Module):
                left.append(vars(value))
            elif is_opaque(value):
                yield value
            elif not isinstance(value, Tensor) and not is_trainer(value):
                if isinstance(attributes := getattr(value, "__dict__", None), dict):
                    left.append(attributes)
                if slots := slots_of(value):
                    left.append([value_in(slot, value) for slot in slots])


def _many_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _copy(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)


class _CopyGraphTensors(TorchFunctionMode):
    """Lets a deep copy pass over tensors with a history, which a module may well keep: losses of an epoch, say."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and args[0].grad_fn is not None:
            return args[0].detach().clone()
        return func(*args, **(kwargs or {}))


def _guard_hooks(part: nn.Module) -> None:
    """Keep the user's hooks, where they can look at one sample."""
    for attribute in HOOKS:
        hooks = getattr(part, attribute, {})
        for key, hook in list(hooks.items()):
            package = (getattr(hook, "__module__", None) or type(hook).__module__).partition(".")[0]
            if package in WATCHERS:
                del hooks[key]
            elif package != "torch" and made_by(hook) is None:  # those compute weights
                hooks[key] = functools.partial(_run_if_it_can, hook)


def _run_if_it_can(hook: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A hook that looks at a whole batch may not be able to look at one sample, and is passed over there.

    If it did more than look, the losses of samples are others than that of the batch, which the self-check finds.
    """
    try:
        return hook(*args, **kwargs)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:
        return None
