"""Small runs under each strategy, precision and compiler, for the table of engines: what is found, or what is said.

The model is that of ``examples/tensor_parallel.py``. All runs make one step on the same eight samples from the same
weights, and are compared with a naive twin in float64, which uses nothing of the package.
"""

import io
import json
import os
import sys
import tempfile
import warnings
from contextlib import redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.data import DataLoader

from lightning_spectral import ActivationSpectrum, GradientSpectrum
from lightning_spectral.capture.one_line import reason_of

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from tensor_parallel import BLOCK_SIZE, ByteModel  # type: ignore[import-not-found]

SAMPLES = 8
LAYERS = ("blocks.0", "blocks.3")
PARAMETERS = ("blocks.0.up.weight", "blocks.3.down.weight")
ENGINES = ("activations", "hooks", "vmap", "loop")
WORLDS = {"single": (1, 1), "ddp": (2, 1), "fsdp2": (2, 1), "tp": (1, 2), "sequence": (1, 2), "hsdp": (4, 1)}
"""Ranks with data of their own, and ranks that share them."""

SEQUENCE = {"up": ColwiseParallel(), "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False)}
WHOLE = PrepareModuleOutput(output_layouts=Shard(1), desired_output_layouts=Replicate())
"""Before positions are mixed the sequence is brought together."""

COMPILED = ("blocks in place", "blocks wrapped", "whole module", "blocks in place, run before")


class Model(ByteModel):
    """Lies on the mesh as its layout says; its weights stay where they are, whichever passes come before a step."""

    def __init__(self, layout: str = "single", is_double: bool = True) -> None:
        super().__init__()
        self.layout = layout
        if is_double:
            self.double()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.0)

    def lay_out(self, mesh: DeviceMesh) -> None:
        if self.layout == "tp":
            super().lay_out(mesh)
        elif self.layout == "sequence":
            embed = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1), use_local_output=False)
            head = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
            parallelize_module(self, mesh["tensor_parallel"], {"embed": embed, "head": head})
            for block in self.blocks:
                parallelize_module(block, mesh["tensor_parallel"], {"norm": SequenceParallel(), **SEQUENCE})
                parallelize_module(block, mesh["tensor_parallel"], {"norm": WHOLE})
        else:
            data = mesh["data_parallel"]
            if self.layout == "hsdp":
                data = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
            for part in (self.embed, *self.blocks, self.head):
                fully_shard(part, mesh=data)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return loss_of(self, batch)  # a step that logs cannot be compiled as a whole


def loss_of(model: ByteModel, batch: dict[str, Tensor]) -> Tensor:
    x = model.embed(batch["input_ids"])
    for block in model.blocks:
        x = block(x)
    return nn.functional.cross_entropy(model.head(x).flatten(0, 1), batch["labels"].flatten())


def samples() -> dict[str, Tensor]:
    tokens = torch.randint(256, (SAMPLES, BLOCK_SIZE + 1), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}


def expected() -> dict[str, dict[str, list[float]]]:
    """The naive twin: eigenvalues of the covariance of each layer's rows, singular values of each sample's gradient."""
    model = Model()
    outputs: dict[str, Tensor] = {}
    for name in LAYERS:
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: outputs.__setitem__(name, output.detach())
        )
    batch = samples()
    loss_of(model, batch)
    found: dict[str, dict[str, list[float]]] = {"activation": {}, "gradient": {}}
    for name, output in outputs.items():
        values = torch.linalg.eigvalsh(torch.cov(output.flatten(0, 1).T, correction=1))
        found["activation"][name] = values.flip(0).tolist()
    rows: dict[str, list[Tensor]] = {name: [] for name in PARAMETERS}
    for index in range(SAMPLES):
        model.zero_grad()
        loss_of(model, {key: value[index : index + 1] for key, value in batch.items()}).backward()
        for name in PARAMETERS:
            gradient = model.get_parameter(name).grad
            assert gradient is not None
            rows[name].append(gradient.flatten().clone())
    for name, gradients in rows.items():
        found["gradient"][name] = torch.linalg.svdvals(torch.stack(gradients)).tolist()
    return found


def found_by(engine: str, layout: str = "single", precision: Any = "64-true", compiled: str = "") -> dict[str, Any]:
    """What one engine finds in a run of one step: values and reasons by name, or the line that refuses it.

    In 64-true the model itself is in float64, which not every strategy would make of it.
    """
    data, shared = WORLDS[layout]
    callback: Any
    bands: dict[str, Any] = {"every_n_steps": 1, "num_groups": 1, "head": (1, 2), "tail": (2, 6)}
    if engine == "activations":
        callback = ActivationSpectrum(list(LAYERS), num_tokens=10**6, normalize=False, dtype="float64", **bands)
    else:
        rows = {"num_samples": SAMPLES, "row_dtype": "float64", "method": engine}
        callback = GradientSpectrum(list(PARAMETERS), **rows, **bands)
    reports: list[Any] = []
    measured = callback.measured

    def keep(report: Any) -> dict[str, float]:
        reports.append(report)
        return measured(report)

    callback.measured = keep
    strategy: Any = ModelParallelStrategy(data, shared, process_group_backend="gloo")
    if layout in ("single", "ddp"):
        strategy = "auto" if layout == "single" else DDPStrategy(process_group_backend="gloo")
    is_double = precision == "64-true"
    try:
        with (
            warnings.catch_warnings(),
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
            tempfile.TemporaryDirectory() as folder,
        ):
            warnings.simplefilter("ignore")
            trainer = Trainer(
                strategy=strategy,
                accelerator="cpu",
                devices=data * shared,
                precision="32-true" if is_double else precision,
                default_root_dir=folder,
                max_steps=1,
                callbacks=[callback],
                use_distributed_sampler=False,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            rank = trainer.global_rank // shared
            part = {key: value.chunk(data)[rank] for key, value in samples().items()}
            trainer.fit(_compiled(Model(layout, is_double), compiled), DataLoader([part], batch_size=None))
    except Exception as error:  # whatever is refused, by whom it may be
        return {"refused": reason_of(error), "by": type(error).__name__}
    (report,) = reports
    (spectra,) = (report.spectra[kind] for kind in ("activation", "gradient") if kind in report.spectra)
    return {name: {"values": one.values.tolist(), "failure": one.failure} for name, one in spectra.items()}


def _compiled(model: Model, how: str) -> Any:
    if how.startswith("blocks in place"):
        for block in model.blocks:
            block.compile(backend="eager")
    if how.endswith("run before"):
        loss_of(model, samples())
    if how == "blocks wrapped":
        model.blocks = nn.ModuleList(torch.compile(block, backend="eager") for block in model.blocks)
    return torch.compile(model, backend="eager") if how == "whole module" else model


def in_ranks(layout: str) -> dict[str, dict[str, Any]]:
    """What each engine finds under a strategy, in as many gloo processes as it needs."""
    world = WORLDS[layout][0] * WORLDS[layout][1]
    if world == 1:
        return {engine: found_by(engine) for engine in ENGINES}
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (world, layout, folder), nprocs=world)
        return json.loads((Path(folder) / "found.json").read_text())


def _rank(rank: int, world: int, layout: str, folder: str) -> None:
    torch.set_num_threads(1)
    # Lightning takes its place in the world from these.
    places = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in places.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", TORCHELASTIC_RUN_ID="engines")
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=300))
    found = {engine: found_by(engine, layout) for engine in ENGINES}
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
