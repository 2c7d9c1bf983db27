"""What torch.func has no rule for by itself: attention under autocast, and norms of batches in training."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_spectral import GradientSpectrum
from lightning_spectral.capture.batch import Samples, hold
from lightning_spectral.capture.engines import ByVmapOrLoop, Engine, by_loop, by_vmap
from lightning_spectral.capture.per_sample import fill_rows
from lightning_spectral.capture.shadow import BatchLoss
from lightning_spectral.capture.vmap_rules import buffers_of_samples
from tests.models import tiny_trainer

SAMPLES, LENGTH, WIDTH = 5, 7, 16


class Attention(nn.Module):
    """Of four heads, or of four that share two."""

    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.how = how
        self.num_keys = 2 if how.get("enable_gqa") else 4
        self.parts = nn.ModuleList(nn.Linear(WIDTH, 4 * heads) for heads in (4, self.num_keys, self.num_keys))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, 4)).transpose(1, 2) for part in self.parts)
        how = {
            key: value.to(x) if isinstance(value, Tensor) and value.is_floating_point() else value
            for key, value in self.how.items()
        }
        return self.out(F.scaled_dot_product_attention(q, k, v, **how).transpose(1, 2).flatten(2))


class Multihead(nn.Module):
    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.attention, self.need_weights = nn.MultiheadAttention(WIDTH, 4, batch_first=True), need_weights

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=self.need_weights)[0]


ALLOWED = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
ATTENTIONS: dict[str, Callable[[], nn.Module]] = {
    "plain": Attention,
    "causal": lambda: Attention(is_causal=True),
    "scaled": lambda: Attention(scale=0.3),
    "boolean mask": lambda: Attention(attn_mask=ALLOWED),
    "additive mask": lambda: Attention(attn_mask=torch.where(ALLOWED, 0.5, -1e4)),
    "grouped queries": lambda: Attention(is_causal=True, enable_gqa=True),
    "multihead": lambda: Multihead(need_weights=False),
    "multihead with weights": lambda: Multihead(need_weights=True),
    "encoder layer": lambda: nn.TransformerEncoderLayer(WIDTH, 4, 32, dropout=0.0, batch_first=True),
}
if "enable_gqa" not in str(F.scaled_dot_product_attention.__doc__):  # torch 2.4
    del ATTENTIONS["grouped queries"]


class Tokens(LightningModule):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(20, WIDTH), body, nn.Linear(WIDTH, 20)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.body(self.embedding(batch))).mT, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


class Maps(LightningModule):
    def __init__(self, norm: nn.Module, kernel: type[nn.Module] = nn.Conv2d) -> None:
        super().__init__()
        self.conv, self.norm, self.head = kernel(2, 4, 3), norm, nn.Linear(4, 3)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        maps, labels = batch
        return F.cross_entropy(self.head(F.relu(self.norm(self.conv(maps))).flatten(2).mean(2)), labels)


def rows(module: nn.Module, batch: Any, engine: Engine, dtype: torch.dtype | None = None, chunk: int = 3) -> Tensor:
    """Of all parameters side by side, under autocast if a type is given."""
    context = nullcontext if dtype is None else lambda: torch.autocast("cpu", dtype)
    loss, cut = BatchLoss(module, context=context), Samples().cut(hold(batch))
    found = {name: torch.full((SAMPLES, p.numel()), torch.nan, dtype=p.dtype) for name, p in module.named_parameters()}
    with loss.isolated(cut):
        fill_rows(engine, loss, list(found), cut, found, chunk)
    return torch.cat(list(found.values()), 1)


def in_float64(module: nn.Module, batch: Any) -> Tensor:
    """By a loop in float64."""
    wide = (
        [part.double() if part.is_floating_point() else part for part in batch] if isinstance(batch, tuple) else batch
    )
    return rows(copy.deepcopy(module).double(), wide if isinstance(wide, Tensor) else tuple(wide), by_loop)


def error(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_under_autocast_is_as_exact_by_vmap_as_by_a_loop(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module, batch = Tokens(ATTENTIONS[name]()), torch.randint(20, (SAMPLES, LENGTH))
    truth = in_float64(module, batch)
    by_one, by_all = (error(rows(module, batch, engine, dtype), truth) for engine in (by_loop, by_vmap))
    assert 0 < by_one < 0.02
    assert by_all < 1.5 * by_one
    assert error(rows(module, batch, by_vmap), truth) < 1e-6
    assert torch.is_autocast_enabled("cpu") is False


NORMS: dict[str, tuple[Callable[[], nn.Module], type[nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.BatchNorm1d(4), nn.Conv1d, (9,)),
    "2d": (lambda: nn.BatchNorm2d(4), nn.Conv2d, (6, 5)),
    "3d": (lambda: nn.BatchNorm3d(4), nn.Conv3d, (4, 4, 5)),
    "a mean of all batches": (lambda: nn.BatchNorm2d(4, momentum=None), nn.Conv2d, (6, 5)),
    "without running statistics": (lambda: nn.BatchNorm2d(4, track_running_stats=False), nn.Conv2d, (6, 5)),
    "of instances": (lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.Conv2d, (6, 5)),
    "of groups": (lambda: nn.GroupNorm(2, 4), nn.Conv2d, (6, 5)),
    "of layers": (lambda: nn.LayerNorm((4, 4, 3)), nn.Conv2d, (6, 5)),
    "of root mean squares": (lambda: nn.RMSNorm((4, 4, 3)), nn.Conv2d, (6, 5)),
    "in evaluation": (lambda: nn.BatchNorm2d(4).eval(), nn.Conv2d, (6, 5)),
}


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's own word on nn.RMSNorm
@pytest.mark.parametrize("name", NORMS)
def test_norms_in_training_are_vectorised(name: str) -> None:
    torch.manual_seed(0)
    make, kernel, size = NORMS[name]
    module, batch = Maps(make(), kernel), (torch.randn(SAMPLES, 2, *size), torch.randint(3, (SAMPLES,)))
    for buffer in module.norm.buffers():
        buffer.add_(1)
    before = copy.deepcopy(module.state_dict())
    truth, engine = in_float64(module, batch), ByVmapOrLoop()
    for chunk in (1, 3, 5):
        assert error(rows(module, batch, engine, chunk=chunk), truth) < 1e-5
    assert engine.cause is None
    by_one, by_all = (error(rows(module, batch, one, torch.bfloat16), truth) for one in (by_loop, by_vmap))
    assert by_all < 1.5 * by_one < 0.2
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_buffers_of_samples_are_those_that_training_writes() -> None:
    norms = nn.Sequential(
        nn.BatchNorm1d(2), nn.BatchNorm1d(2).eval(), nn.GroupNorm(1, 2), nn.Sequential(nn.BatchNorm1d(2))
    )
    expected = {"0.running_mean", "0.running_var", "3.0.running_mean", "3.0.running_var"}
    assert buffers_of_samples(norms) == expected
    assert buffers_of_samples(norms[0]) == {"running_mean", "running_var"}
    assert buffers_of_samples(norms.eval()) == set()


def test_auto_takes_vmap_in_mixed_precision(tmp_path: Path) -> None:
    class Kept(GradientSpectrum):
        def measured(self, report: Any) -> dict[str, float]:
            self.report = report
            return super().measured(report)

    torch.manual_seed(0)
    batches = torch.utils.data.DataLoader(torch.randint(20, (32, LENGTH)), batch_size=8)
    model = Tokens(ATTENTIONS["encoder layer"]())
    reports = {}
    for method in ("auto", "loop"):
        spectrum = Kept("head.weight", 4, num_samples=16, method=method, head=(1, 3), tail=(2, 8), num_groups=2)
        trainer = tiny_trainer(tmp_path, max_steps=4, limit_val_batches=0, precision="bf16-mixed", callbacks=[spectrum])
        trainer.fit(copy.deepcopy(model), batches)
        reports[method] = spectrum.report
    assert reports["auto"].method == "vmap"
    assert reports["auto"].checked == reports["loop"].checked == "loss: passed; span: passed"
    ours, theirs = (one.parameters["head.weight"].spectrum.values for one in reports.values())
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=1e-3 * float(theirs[0]))
