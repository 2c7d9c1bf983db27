"""The eigenvalues of a training run, in float32 and in mixed bfloat16, are those of a float64 twin on the same rows."""

from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch import seed_everything

from lightning_spectral import ActivationSpectrum
from tests._reference import covariance_spectrum
from tests.callbacks._reference import Recorder, rms_normalized
from tests.models import LanguageModel, tiny_trainer, token_loader


class Kept(ActivationSpectrum):
    """Keeps its last report."""

    def measured(self, report):
        self.report = report
        return super().measured(report)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(("dtype", "above"), [("float32", 1e-3), ("float64", 1e-6)])
@pytest.mark.parametrize("normalize", [True, False])
def test_eigenvalues_meet_the_promised_precision(
    tmp_path: Path, precision: str, dtype: str, above: float, normalize: bool
) -> None:
    seed_everything(0, verbose=False)
    recorder, spectrum = Recorder(), Kept(every_n_steps=4, num_tokens=10_000, dtype=dtype, normalize=normalize)
    trainer = tiny_trainer(
        tmp_path, max_steps=4, limit_val_batches=0, precision=precision, callbacks=[recorder, spectrum]
    )
    trainer.fit(LanguageModel(), token_loader(batch_size=8), token_loader())
    for name, layer in spectrum.report.spectra["activation"].items():
        rows = np.concatenate(recorder.samples(name, "train", range(4)))
        expected = covariance_spectrum(rms_normalized(rows) if normalize else rows)
        assert layer.count == len(rows)
        large = expected > above * expected[0]
        np.testing.assert_allclose(layer.values.numpy()[large], expected[large], rtol=1e-5)
