"""What the model may be asked is refused by name in one line where it is none."""

import pytest
import torch

from lightning_spectral import theory

ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: theory.sgd_risk(ONE, ONE, 1e200, 4, 0.0, 10), r"rate must keep .* got 1e\+200 with spectrum to 1 and"),
        (lambda: theory.sgd_risk(ONE, ONE, 0.1, ONE.expand(2), 0.0, 10), "batch_size must be a positive number"),
        (lambda: theory.steps_to_risk(ONE, ONE, 10**300, 4, 0.0, 0.1), "rate must keep "),
        (lambda: theory.readout_loss("2", ONE, ONE, 0.1, 1.0), "loss must be a number, got '2'"),
        (lambda: theory.readout_loss(2.0, [1.0], ONE, 0.1, 1.0), r"eigenvalues must be a tensor, got \[1.0\]"),
        (lambda: theory.task_power(ONE, [[1.0]], ONE[None]), r"basis must be a tensor, got \[\[1.0\]\]"),
        (lambda: theory.task_power(ONE, ONE[None], None), "readout_gradient must be a tensor, got None"),
        (lambda: theory.harmonic_energy([[1.0]]), r"state_means must be a tensor, got \[\[1.0\]\]"),
        (lambda: theory.band_concentration([1.0], [1]), r"energy must be a tensor, got \[1.0\]"),
        (lambda: theory.band_concentration(torch.ones(4), 1), "harmonics must be a list of whole numbers, got 1"),
        (lambda: theory.power_law_spectrum(torch.ones(2, 2), 1.0), "num must be an int from 1 to 100000000, got fl"),
        (lambda: theory.power_law_spectrum(10**300, 1.0), "num must be an int from 1 to 100000000, got 1000"),
        (lambda: theory.power_law_spectrum(2, 1.0, torch.ones(2, 2)), "normalize must be 'trace' or 'top', got float"),
    ],
)
def test_what_is_none_is_refused_by_name(call, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as raised:
        call()
    assert "\n" not in str(raised.value)


def test_whole_numbers_beyond_an_int64_are_numbers() -> None:
    assert float(theory.gradient_flow_risk(ONE, ONE, 10**300, 1.0)) == 0.0
    assert not theory.stability(ONE, 10**300, 10**300).is_stable
