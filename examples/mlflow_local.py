"""Spectra in a local MLflow store: what is there to be found, and the record of the run read back from its artifacts.

`python examples/mlflow_local.py` trains a small GPT; metrics go to a database, figures, values and the record to a
folder beside it. With the full `mlflow` installed, `mlflow ui --backend-store-uri sqlite:///FOLDER/runs.db` shows them.
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import MLFlowLogger

from lightning_spectral import ActivationSpectrum, GradientSpectrum, Run, RunRecord
from lightning_spectral.nanogpt import NanoGPT, TextData

LAYER = "gpt.blocks.1"


def train(folder: Path, max_steps: int) -> MLFlowLogger:
    """Train, with all that is measured in the store."""
    seed_everything(1, verbose=False)
    every = max(1, max_steps // 10)
    logger = MLFlowLogger(
        "spectra",
        tracking_uri=f"sqlite:///{folder.resolve()}/runs.db",
        artifact_location=f"file://{folder.resolve()}/artifacts",
    )
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=folder,  # where the record is written: the store's own folder is not MLFlowLogger's to tell
        max_steps=max_steps,
        val_check_interval=every,
        check_val_every_n_epoch=None,
        limit_val_batches=16,
        num_sanity_val_steps=0,
        logger=logger,
        callbacks=[
            ActivationSpectrum("all", stage="validate", every_n_steps=every, num_tokens=8192),
            GradientSpectrum(stage="validate", every_n_steps=5 * every, num_samples=64),
            RunRecord(upload=True),  # to the artifacts, at the end
        ],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=every,
    )
    model = NanoGPT(num_layers=2, width=32, block_size=64, warmup_steps=every, lr_multiplier=2.0)
    trainer.fit(model, TextData(block_size=64, batch_size=8))
    return logger


def artifacts(logger: MLFlowLogger, path: str | None = None) -> Iterator[str]:
    """Paths of all files of the run, as the client lists them."""
    for found in logger.experiment.list_artifacts(logger.run_id, path):
        if found.is_dir:
            yield from artifacts(logger, found.path)
        else:
            yield found.path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-steps", type=int, default=200, help="optimizer steps, reported ten times")
    parser.add_argument("--folder", type=Path, default=Path("lightning_logs/mlflow_local"), help="where the store is")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}

    logger = train(arguments.folder, arguments.max_steps)
    client, run_id = logger.experiment, logger.run_id
    history = client.get_metric_history(run_id, f"activation/{LAYER}/rankme")
    print(f"RankMe of {LAYER}, by step:", ", ".join(f"{point.step}: {point.value:.1f}" for point in history))
    folders = sorted({path.rpartition("/")[0] for path in artifacts(logger)})
    print(f"{len(client.get_run(run_id).data.metrics)} metrics, and files in", ", ".join(folders))
    client.download_artifacts(run_id, "spectra", str(arguments.folder))
    run = Run(arguments.folder)
    tail = run.spectrum("activation", LAYER, step=run.steps("activation")[-1]).exponent((0.125, 0.5))
    print(f"the record is one of them; its last tail exponent of {LAYER}: {tail.value:.3f} +/- {tail.stderr:.3f}")
    print(f"See how it came about: lightning-spectral show {arguments.folder}")


if __name__ == "__main__":
    main()
