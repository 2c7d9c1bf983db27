"""Small runs under sharded strategies, for test_meshes.py: what the callbacks find of a model that lies on a mesh."""

import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.data import DataLoader

from lightning_spectral import ActivationSpectrum, GradientSpectrum, RunRecord

WIDTH, HIDDEN, VOCABULARY, LENGTH, BATCH, STEPS = 8, 12, 16, 6, 4, 3
NUM_HELD_OUT = 60
LAYERS = ["embed", "blocks.*", "blocks.0.inner.0", "blocks.0.down", "blocks.1.norm", "blocks.1.inner", "head"]
PARAMETERS = ["embed.weight", "blocks.*.inner.0.*", "blocks.*.down.*", "head.weight"]


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.down = nn.LayerNorm(WIDTH), nn.Linear(HIDDEN, WIDTH)
        self.inner = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.inner(self.norm(x)))


class Model(LightningModule):
    """Predicts the next of a cycle of tokens; lies on the mesh as ``layout`` says."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        # Without weights that are the same where data are, ranks go ways of their own.
        torch.manual_seed(torch.distributed.get_rank() if layout == "unlike" else 0)
        self.layout = layout
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.is_laid_out = False
        self.double()

    def configure_model(self) -> None:
        if self.is_laid_out or self.layout == "one":
            return
        self.is_laid_out = True
        mesh = self.device_mesh
        if mesh["tensor_parallel"].size() > 1:
            self._share(mesh["tensor_parallel"])
        if "fsdp" in self.layout or self.layout == "hsdp":
            data = mesh["data_parallel"]
            if self.layout == "hsdp":
                data = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
            for part in (self.embed, *self.blocks, self.head):
                fully_shard(part, mesh=data)

    def _share(self, mesh: DeviceMesh) -> None:
        if "sequence" not in self.layout:
            plan = {"blocks.*.inner.0": ColwiseParallel(), "blocks.*.down": RowwiseParallel()}
            parallelize_module(self, mesh, plan | {"head": ColwiseParallel(output_layouts=Replicate())})
            return
        is_local = "dtensor" not in self.layout
        plan = {
            "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1), use_local_output=is_local),
            "blocks.*.norm": SequenceParallel(),
            "blocks.*.inner.0": ColwiseParallel(input_layouts=Shard(1)),
            "blocks.*.down": RowwiseParallel(output_layouts=Shard(1), use_local_output=is_local),
            "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
        }
        parallelize_module(self, mesh, plan)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=len(batch))

    def loss(self, batch: Tensor) -> Tensor:
        x = self.embed(batch)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), batch.roll(1, 1).flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def batches(data_rank: int, num_data: int) -> list[Tensor]:
    """Of a data rank: its part of each step's samples, which are as many however many ranks share them."""
    samples = torch.randint(VOCABULARY, (STEPS, 2 * BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    return list(samples.chunk(num_data, 1)[data_rank])


def fit(
    folder: Path, layout: str, data: int = 1, shared: int = 1, watch: bool = True, **gradients: Any
) -> dict[str, Any]:
    """What one run and its callbacks leave, on this rank."""
    strategy = "auto" if layout == "one" else ModelParallelStrategy(data, shared, process_group_backend="gloo")
    sums = {"every_n_steps": STEPS, "num_groups": 2, "head": (1, 4), "tail": (2, 6)}
    activations = ActivationSpectrum(LAYERS, num_tokens=10_000, dtype="float64", normalize=False, **sums)
    settings = {"num_samples": 2 * BATCH, "method": "auto", "row_dtype": "float64", **sums} | gradients
    spectrum = GradientSpectrum(PARAMETERS["sequence" in layout :], **settings)
    held_out = ActivationSpectrum(
        LAYERS, stage="validate", num_tokens=NUM_HELD_OUT, dtype="float64", prefix="held out/", **sums
    )
    reports: dict[str, Any] = {}
    callbacks = [activations, held_out, spectrum]
    for callback in callbacks:

        def keep(report: Any, measured: Any = callback.measured, prefix: str = callback.prefix) -> dict[str, float]:
            reports.update({prefix + kind: spectra for kind, spectra in report.spectra.items()})
            return measured(report)

        callback.measured = keep
    trainer = Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=data * shared,
        max_steps=STEPS,
        logger=CSVLogger(folder, layout, 0),
        callbacks=[*callbacks, RunRecord(family="F")] if watch else [],
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    rank, model = trainer.global_rank // shared, Model(layout)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loader = DataLoader(batches(rank, data), batch_size=None)
        trainer.fit(model, loader, loader)
    return {
        "spectra": {
            kind: {name: (one.values.numpy(), one.failure, one.count) for name, one in reports[kind].items()}
            for kind in reports
            if kind != "weight"
        },
        "metrics": {key: float(value) for key, value in trainer.callback_metrics.items() if "seconds" not in key},
        "weights": [p.detach().clone() for p in map(_local, model.parameters())],
        "said": [str(one.message) for one in said],
    }


def runs(rank: int, folder: Path, wanted: list[tuple[str, int, int]]) -> dict[str, Any]:
    """Several runs, one after the other; for :func:`tests.distributed.run_distributed`."""
    found = {layout: fit(folder, layout, data, shared) for layout, data, shared in wanted}
    layout, *sizes = wanted[1]
    found["bare"] = fit(folder / "bare", layout, *sizes, watch=False)
    return found


def _local(parameter: Any) -> Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
