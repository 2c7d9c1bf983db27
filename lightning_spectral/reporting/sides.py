"""Two sides of runs on a page: the verdict of ``compare``, and the numbers behind it, or why there is none."""

from typing import Any

from lightning_spectral.reporting.words import short
from lightning_spectral.runs import Comparison, compare
from lightning_spectral.runs.finding import RunPaths
from lightning_spectral.runs.tables import QUANTITIES

GAINS = {"tokens": "tokens to loss", "throughput": "tokens a second", "seconds": "seconds to loss"}


def compared(
    base: RunPaths, variant: RunPaths, at_loss: float | None = None, floor: RunPaths | None = None
) -> dict[str, Any]:
    """What a page holds of a comparison.

    Args:
        base: One side.
        variant: The other.
        at_loss: See :func:`lightning_spectral.compare`.
        floor: Likewise.

    Returns:
        With ``refused`` in the place of all else where two sides do not compare: a page shows them all the same.
    """
    try:
        found = compare(base, variant, at_loss, floor)
    except ValueError as error:
        return {"refused": str(error)}
    return {
        "verdict": found.verdict.text,
        "kind": found.verdict.kind,
        "rule": found.verdict.rule,
        "loss": found.loss,
        "loss_text": f"{found.loss:.4g}",
        "loss_name": found.loss_name,
        "gains": [_gain(gain) for gain in found.gains.values()],
        "shifts": [_shift(shift) for shift in found.shifts],
        "notes": list(_notes(found)),
    }


def _gain(gain: Any) -> dict[str, Any]:
    return {"name": GAINS[gain.quantity], "detected": gain.is_detected} | {
        field: getattr(gain, field) for field in ("base", "variant", "gain", "low", "high", "run_floor")
    }


def _shift(shift: Any) -> dict[str, Any]:
    label, digits = QUANTITIES[shift.quantity]
    fields = ("kind", "name", "base", "variant", "shift", "low", "high", "sampling_floor", "run_floor")
    return {"label": label, "digits": digits, "detected": shift.is_detected} | {
        field: getattr(shift, field) for field in fields
    }


def _notes(found: Comparison) -> Any:
    """What else is to be said of it."""
    for movement in found.movements.values():
        moved = "moved" if movement.has_moved else "did not move"
        ratios = ", ".join(short(ratio, 2) for ratio in movement.ratios)
        yield (
            f"{movement.kind} spectra {moved}: between sides {ratios} times as far apart as between seeds, "
            f"at {found.loss_name} {', '.join(f'{loss:.4g}' for loss in movement.losses)}"
        )
    if found.timing.reason:
        done = "compared day by day" if found.timing.compared_by else "left out"
        yield f"tokens a second and seconds are {done}: {found.timing.reason}"
    if found.pairs.seeds:
        yield f"compared pair by pair, of seeds {', '.join(map(str, found.pairs.seeds))}"
    for key, reason in found.left_out.items():
        yield f"without {key.kind} {key.name}: {reason}"
