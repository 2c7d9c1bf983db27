"""Checks what `make demo` left behind: the loss it reached, the keys of the contract, whole histograms."""

import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_spectral import Run

QUANTITIES = {
    *("alpha_tail", "alpha_tail_stderr", "alpha_tail_corrected", "r2_tail", "alpha_head", "alpha_head_stderr"),
    *("rankme", "head_share", "num_tokens"),
}
GRADIENT_QUANTITIES = {
    *("alpha_tail", "alpha_tail_stderr", "r2_tail", "alpha_head", "alpha_head_stderr", "alpha_tail_centred"),
    *("rankme", "noise_scale", "noise_scale_low", "noise_scale_high", "noise_scale_smoothed"),
    *("grad_norm", "num_samples"),
}
FORECAST_QUANTITIES = {
    *("tokens_to_target", "low", "high", "relative", "num_references", "skill", "median_error", "alpha_tail", "actual"),
}
KINDS = ("activation", "gradient", "drift", "forecast")
DRIFT_QUANTITIES = {"overlap", "max_angle", "js", "overlap_floor", "max_angle_floor", "js_floor"}
WEIGHT_QUANTITIES = {"alpha_tail", "r2_tail", "alpha_head", "rankme"}
OVERVIEW = {
    *("tail_exponent", "rankme_share", "turned_beyond_floor"),
    *("tokens_in_batch", "tokens_in_noise_scale", "tokens_to_target"),
}
FAILURES = "a_problems/failures"
NUM_SAMPLES = 128
LAYERS, WIDTH = {f"gpt.blocks.{index}" for index in range(4)}, 128


def main(folder: Path) -> None:
    """Raise AssertionError for anything that is missing."""
    (run,) = folder.glob("lightning_logs/version_*")
    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "histograms": 0, "images": 0})
    events.Reload()
    tags = events.Tags()
    val_loss = events.Scalars("val_loss")[-1].value
    assert val_loss < 2.2, f"val_loss must be below 2.2 nats per byte, got {val_loss}"
    wanted = {f"activation/{layer}/{quantity}" for layer in LAYERS for quantity in QUANTITIES}
    wanted |= {f"drift/{layer}/{quantity}" for layer in LAYERS for quantity in DRIFT_QUANTITIES}
    weights = {f"{layer}.attention.out.weight" for layer in LAYERS}
    wanted |= {f"gradient/{weight}/{quantity}" for weight in weights for quantity in GRADIENT_QUANTITIES}
    wanted |= {f"weight/{weight}/{quantity}" for weight in weights for quantity in WEIGHT_QUANTITIES}
    wanted |= {f"forecast/{quantity}" for quantity in FORECAST_QUANTITIES}
    wanted |= {f"a_overview/{quantity}" for quantity in OVERVIEW}
    wanted |= {f"{kind}/failed" for kind in KINDS} | {"spectral/seconds", FAILURES}
    missing = wanted - set(tags["scalars"])
    assert not missing, f"missing: {missing}"
    for key in (FAILURES, *(f"{kind}/failed" for kind in KINDS)):
        assert events.Scalars(key)[-1].value == 0
    for kind in ("activation", "gradient"):
        assert f"{kind}/spectra" in tags["images"]
    for layer in LAYERS:
        for event in events.Histograms(f"activation/{layer}/log10_eigenvalues"):
            assert sum(event.histogram_value.bucket) == WIDTH, f"{layer} at {event.step}"
    for weight in weights:
        for event in events.Histograms(f"gradient/{weight}/log10_singular_values"):
            assert sum(event.histogram_value.bucket) == NUM_SAMPLES, f"{weight} at {event.step}"
    record = Run(run)
    steps = [event.step for event in events.Scalars("activation/failed")]
    assert record.history.step.tolist() == record.steps("activation") == steps
    assert record.steps("gradient") == [event.step for event in events.Scalars("gradient/failed")]
    assert any(event.value > 0 for event in events.Scalars("forecast/tokens_to_target")), "no forecast"
    assert record.history.val_loss[-1] == events.Scalars("val_loss")[-1].value
    assert record.history.tokens.tolist() == [step * 8 * 256 for step in steps]
    seconds = events.Scalars("spectral/seconds")[-1].value
    print(f"demo: val_loss {val_loss:.3f} nats per byte, {seconds:.1f} s of measuring, all keys and the record there")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
