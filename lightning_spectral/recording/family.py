"""Which model a run trains: its class and configuration, and the name that all runs of it share."""

import json
import re
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_spectral.capture.names import clean_name

_OF_THE_RUN = re.compile(
    r"(^|_)(lrs?|learning_rates?|seed|batch_?(size|tokens)|warm_?up|(max|total)_(steps|epochs)|stop_at_loss)(_|$)",
    re.IGNORECASE,
)
"""Settings that differ between runs of one family: what a sweep sweeps, not what the model is. Among them are lengths
of the schedule, which are given in steps and follow the batch size."""


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


def _without_settings_of_the_run(config: Any) -> Any:
    if isinstance(config, Mapping):
        items = ((str(key), value) for key, value in config.items())
        return {
            key: _without_settings_of_the_run(value)
            for key, value in items
            if not key.startswith("_") and not _OF_THE_RUN.search(key)
        }
    if isinstance(config, (list, tuple)):
        return [_without_settings_of_the_run(value) for value in config]
    # The address in the repr of an object would make every run a family of its own.
    return config if config is None or isinstance(config, (str, int, float, bool)) else type(config).__qualname__
