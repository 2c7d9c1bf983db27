"""Which model a run trains: its class and configuration, and the name that all runs of it share."""

import json
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_spectral.capture.names import clean_name
from lightning_spectral.runs.swept import OF_A_SEED, OF_THE_RUN

_OF_OPTIMIZERS = ("weight_decay", "momentum", "betas", "nesterov")


def describe_model(module: nn.Module) -> dict[str, Any]:
    """Class and configuration of the module that is trained.

    ``class``; ``config``, the hyperparameters it saved, without batch size, learning rate, seed and lengths of the
    schedule, or, where it saved none, the shapes of its parameters; and ``num_parameters``. All JSON-like.
    """
    hyperparameters = _without_settings_of_the_run(getattr(module, "hparams", None) or {})
    if not hyperparameters:
        hyperparameters = {clean_name(module, name): _shape(p) for name, p in module.named_parameters()}
    return {
        "class": f"{type(module).__module__}.{type(module).__qualname__}",
        "config": hyperparameters,
        "num_parameters": sum(parameter.numel() for parameter in module.parameters() if not is_lazy(parameter)),
    }


def _shape(parameter: nn.Parameter) -> list[int] | None:
    """None for one that the first batch is yet to make: the same before every run of the family."""
    return None if is_lazy(parameter) else list(parameter.shape)


def family_name(description: Mapping[str, Any]) -> str:
    """The name that all runs of one model and configuration share, from what :func:`describe_model` gave.

    The class and eight digits of a digest of the configuration: ``NanoGPT-3f9a01c2``.
    """
    identity = [description["class"], description["config"]]
    digest = sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return f"{description['class'].rpartition('.')[2]}-{digest[:8]}"


def describe_setting(module: Any, datamodule: Any, optimizers: Sequence[Any]) -> dict[str, Any]:
    """What a sweep sweeps beside the batch size, which is counted: what tells runs of a family apart, but for seeds.

    Args:
        module: Whose saved hyperparameters are looked through for batch size, learning rate and the schedule's lengths.
        datamodule: Likewise; or None.
        optimizers: Class, first learning rate and decay of each group of parameters, each combination once.

    Returns:
        ``hyperparameters``, by dotted name, and ``optimizers``. All JSON-like.
    """
    found: dict[str, Any] = {}
    for one in (module, datamodule):
        found |= dict(_settings_of_the_run(getattr(one, "hparams", None) or {}))
    groups = [
        {"class": type(optimizer).__qualname__, "lr": _plain(group.get("initial_lr", group.get("lr")))}
        | {name: _plain(group[name]) for name in _OF_OPTIMIZERS if name in group}
        for optimizer in optimizers
        for group in optimizer.param_groups
    ]
    return {
        "hyperparameters": found,
        "optimizers": [group for i, group in enumerate(groups) if group not in groups[:i]],
    }


def _settings_of_the_run(config: Mapping[Any, Any], start: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in ((str(key), value) for key, value in config.items()):
        if isinstance(value, Mapping):
            yield from _settings_of_the_run(value, f"{start}{key}.")
        elif OF_THE_RUN.search(key) and not OF_A_SEED.search(key):
            yield f"{start}{key}", _plain(value)


def _plain(value: Any) -> Any:
    """A learning rate may be a tensor, a pair of betas a tuple."""
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else value.tolist()
    return value if value is None or isinstance(value, (str, int, float, bool)) else type(value).__qualname__


def _without_settings_of_the_run(config: Any) -> Any:
    if isinstance(config, Mapping):
        items = ((str(key), value) for key, value in config.items())
        return {
            key: _without_settings_of_the_run(value)
            for key, value in items
            if not key.startswith("_") and not OF_THE_RUN.search(key)
        }
    if isinstance(config, (list, tuple)):
        return [_without_settings_of_the_run(value) for value in config]
    # The address in the repr of an object would make every run a family of its own.
    return config if config is None or isinstance(config, (str, int, float, bool)) else type(config).__qualname__
