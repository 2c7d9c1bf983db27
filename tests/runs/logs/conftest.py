"""One small training, logged by the real loggers and recorded by us: the logs must say what the record says."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_spectral import ActivationSpectrum

BATCH, LENGTH = 4, 8


class Ids(Dataset):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> torch.Tensor:
        return (torch.arange(LENGTH) * (index + 3)) % 16


class Small(LightningModule):
    """Two blocks over ids."""

    def __init__(self, lr: float = 0.5, batch_size: int = BATCH, seed: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embedding = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        logits = x @ self.embedding.weight.T
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten())

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        self.log("tokens", float((self.global_step + 1) * BATCH * LENGTH))
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Ids(), BATCH)

    val_dataloader = train_dataloader


class Logged(NamedTuple):
    """Where the logs of one training are."""

    record: Path
    csv: Path
    tensorboard: Path
    mlflow: Path
    mlflow_export: Path


@pytest.fixture(scope="session")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Logged:
    home = tmp_path_factory.mktemp("logs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        mlflow = MLFlowLogger(tracking_uri=f"file:{home}/mlruns")
        loggers: list[Any] = [TensorBoardLogger(home, "tb"), CSVLogger(home, "csv"), mlflow]
        torch.manual_seed(0)
        trainer = Trainer(
            default_root_dir=home,
            logger=loggers,
            callbacks=[ActivationSpectrum("blocks.*", stage="validate", every_n_steps=5, num_tokens=160, head=(1, 4))],
            **{"max_epochs": 2, "val_check_interval": 5, "log_every_n_steps": 1, "accelerator": "cpu"},
            **{"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False},
        )
        trainer.fit(Small())
        run = mlflow.experiment.get_run(mlflow.run_id)
        history = {
            name: [
                {"value": point.value, "timestamp": point.timestamp, "step": point.step}
                for point in mlflow.experiment.get_metric_history(mlflow.run_id, name)
            ]
            for name in run.data.metrics
        }
    # As mlflow-export-import writes a run.
    export = home / "run.json"
    held = {"info": {"run_id": mlflow.run_id, "start_time": run.info.start_time}, "params": dict(run.data.params)}
    export.write_text(json.dumps({"system": {}, "mlflow": {**held, "metrics": history, "tags": {}}}))
    folder = next(home.glob(f"mlruns/*/{mlflow.run_id}"))
    return Logged(home / "tb/version_0", home / "csv/version_0", home / "tb/version_0", folder, export)
