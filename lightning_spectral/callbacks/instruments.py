"""What a user may give to have a loop watched, checked."""

from collections.abc import Sequence
from typing import Any

from lightning_spectral.callbacks.activation_spectrum import ActivationSpectrum
from lightning_spectral.callbacks.gradient_spectrum import GradientSpectrum
from lightning_spectral.callbacks.head_drift import HeadDrift
from lightning_spectral.callbacks.participant import Participant
from lightning_spectral.callbacks.run_record import RunRecord
from lightning_spectral.callbacks.tail_forecaster import TailForecaster
from lightning_spectral.capture.one_line import shown


def instruments_of(activations: Any, gradients: Any, drift: Any, forecast: Any, record: Any) -> list[Participant]:
    """Those that are wanted; ValueError for what is none. The record speaks before anybody starts."""
    chosen = (
        _chosen("record", record, RunRecord, needs="RunRecord()"),
        _chosen("activations", activations, ActivationSpectrum),
        _chosen("gradients", gradients, GradientSpectrum),
        _chosen("drift", drift, HeadDrift),
        _chosen("forecast", forecast, TailForecaster, needs="TailForecaster(target_loss)"),
    )
    return [one for one in chosen if one is not None]


def loggers_of(logger: Any) -> list[Any]:
    """One or several; ValueError for what is none."""
    loggers = listed(logger)
    for one in loggers:
        if not callable(getattr(one, "log_metrics", None)):
            raise ValueError(
                f"logger must be a Lightning logger, with log_metrics, got {shown(one)}: give a TensorBoardLogger"
            )
    return loggers


def listed(given: Any) -> list[Any]:
    """None, one or several."""
    if given is None or given is False:
        return []
    return list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]


def _chosen(name: str, given: Any, kind: type, needs: str | None = None) -> Any:
    if given is None or given is False:
        return None
    if given is True and needs is None:
        return kind()
    if not isinstance(given, kind):
        remedy = f"give True or {kind.__name__}(...)" if needs is None else f"give {needs}"
        raise ValueError(f"{name} must be a {kind.__name__}, got {shown(given)}: {remedy}")
    return given
