"""Arguments of callbacks that are of another type, or out of range, are refused by name in one line."""

import math

import pytest

import lightning_spectral as ls


@pytest.mark.parametrize(
    ("callback", "arguments", "message"),
    [
        (ls.ActivationSpectrum, {"normalize": "false"}, "normalize must be True or False, got 'false': give a bool"),
        (ls.ActivationSpectrum, {"num_groups": 10**9}, "num_groups must be at most 64, got 1000000000"),
        (ls.ActivationSpectrum, {"num_tokens": 10**30}, "num_tokens must be a positive int, got 1000000000000"),
        (ls.ActivationSpectrum, {"mask": ""}, "mask must be a key of the batch, or None for all tokens, got ''"),
        (ls.ActivationSpectrum, {"channel_dim": 10**9}, "channel_dim must be an axis, or None, got 1000000000"),
        (ls.ActivationSpectrum, {"stage": ["train"]}, "stage must be 'train' or 'validate', got"),
        (ls.ActivationSpectrum, {"samples": [1]}, "samples must be a function"),
        (ls.ActivationSpectrum, {"every_n_steps": "9\n9"}, r"every_n_steps must be a positive int, got '9\\n9'"),
        (ls.GradientSpectrum, {"weights": "no"}, "weights must be True or False, got 'no'"),
        (ls.GradientSpectrum, {"num_samples": 10**9}, "num_samples must be at most 65536, got 1000000000"),
        (ls.GradientSpectrum, {"row_device": -0.5}, "row_device must be 'auto', 'device' or 'cpu', got -0.5"),
        (ls.ActivationSpectrum, {"sums_device": "gpu"}, "sums_device must be 'auto', 'device' or 'cpu', got 'gpu'"),
        (ls.HeadDrift, {"reference": None}, "reference must be 'first', 'previous' or the path of a run, got None"),
        (ls.TailForecaster, {"target_loss": 10**400}, "target_loss must be a finite number, got 1000"),
        (ls.TailForecaster, {"target_loss": 2, "references": 5}, "references must be a path, a pattern or a list"),
        (ls.TailForecaster, {"target_loss": 2, "references": [5]}, "references must be a path, got 5"),
        (ls.TailForecaster, {"target_loss": 2, "monitor": ["a"]}, r"monitor must be a name, got \['a'\]"),
        (
            ls.TailForecaster,
            {"target_loss": 2, "stop_if_relative_above": "3"},
            "stop_if_relative_above must be at least",
        ),
        (ls.TailForecaster, {"target_loss": 2, "stop_if_relative_above": math.nan}, "stop_if_relative_above must be"),
        (ls.RunRecord, {"family": "a\nb"}, "family must be a name of one line, or None"),
        (ls.RunRecord, {"tokens_per_sample": 10**30}, "tokens_per_sample must be a positive int"),
        (ls.CovarianceSpectrum, {"num_features": 10**9}, "num_features must be a positive int.*: at most 65536"),
        (ls.PerSampleGradientSpectrum, {"centred": "no"}, "centred must be True or False, got 'no'"),
    ],
)
def test_wrong_arguments_are_refused_by_name(callback, arguments, message) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        callback(**arguments)
    assert "\n" not in str(caught.value)
