"""What callbacks read of models with other axes: channels first, time first, masks of all kinds, cut batches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_spectral import ActivationSpectrum, GradientSpectrum, HeadDrift, Run, RunRecord, TailForecaster
from tests._reference import contiguous_groups, covariance_spectrum, rankme
from tests.models import tiny_trainer


class Maps(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[nn.Sequential(nn.Conv2d(c, 6, 3, padding=1), nn.ReLU()) for c in (3, 6)])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.blocks(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.0)


class TimeFirst(LightningModule):
    """Embeds ``(batch, time)`` tokens, and works on ``(time, batch, width)``."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.place, self.layer = nn.Embedding(20, 6), nn.Embedding(12, 6), nn.Linear(6, 6)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        x = self.embedding(batch["input_ids"]) + 3 * self.place(batch["positions"])
        return (self.layer(x.transpose(0, 1)).tanh() - 1).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.0)


class Translator(LightningModule):
    """Whose sources and targets are padded to one length; the decoder adds the mean of the source's tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 6), nn.Linear(6, 20)
        self.encoder, self.decoder = (nn.ModuleList(nn.Sequential(nn.Linear(6, 6)) for _ in range(2)) for _ in "ed")

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        x, y = self.embedding(batch["input_ids"]), self.embedding(batch["decoder_input_ids"])
        for block in self.encoder:
            x = block(x).tanh()
        y = y + (x * batch["attention_mask"].unsqueeze(-1)).mean(1, keepdim=True)
        for block in self.decoder:
            y = block(y).tanh()
        loss = F.cross_entropy(self.head(y).flatten(0, 1), batch["labels"].flatten())
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.0)


def translations() -> dict[str, Tensor]:
    lengths = torch.tensor([[7, 2], [5, 1], [6, 3], [4, 7], [7, 2], [6, 1], [5, 2], [7, 3]])
    source, target = (torch.arange(7) < lengths[:, side : side + 1] for side in (0, 1))
    ids = torch.randint(20, (2, 8, 7))
    labels = ids[1].masked_fill(~target, -100)
    return {"input_ids": ids[0], "attention_mask": source.long(), "decoder_input_ids": ids[1], "labels": labels}


class Sequences(LightningModule):
    """Takes a list of sequences of any lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(20, 6), nn.Linear(6, 20)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return torch.stack([F.cross_entropy(self.layer(self.embedding(ids)), ids) for ids in batch]).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.0)


def one_by_one(batch: list[Tensor]) -> list[list[Tensor]]:
    return [[ids] for ids in batch]


def fit(folder: Path, model: LightningModule, batches: list[Any], *callbacks: Any, **kwargs: Any) -> Trainer:
    trainer = tiny_trainer(folder, callbacks=list(callbacks), max_steps=len(batches), **kwargs)
    trainer.fit(model, DataLoader(batches, batch_size=None))
    return trainer


def keep(layer: nn.Module, read: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Rows ``(n, C)`` of each pass that follows."""
    kept: list[Tensor] = []
    layer.register_forward_hook(lambda _, __, output: kept.append(read(output.detach())))
    return kept


def expected_rankme(rows: list[Tensor]) -> float:
    return rankme(covariance_spectrum(torch.cat([part.reshape(-1, part.shape[-1]) for part in rows]).double().numpy()))


ARGUMENTS: dict[str, Any] = {"head": (1, 3), "tail": (2, 5), "normalize": False, "dtype": "float64", "num_groups": 2}


@pytest.mark.parametrize("size", [6, 5], ids=["as wide as channels", "narrower"])
def test_rows_of_maps_are_positions(tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int) -> None:
    torch.manual_seed(0)
    model, batches = Maps(), [torch.randn(4, 3, size, size) for _ in range(2)]
    kept = keep(model.blocks[1], lambda output: output.permute(0, 2, 3, 1))
    trainer = fit(tmp_path, model, batches, ActivationSpectrum(every_n_steps=2, **ARGUMENTS))
    metrics = trainer.callback_metrics
    assert float(metrics["activation/blocks.1/rankme"]) == pytest.approx(expected_rankme(kept), rel=1e-6)
    assert float(metrics["activation/blocks.1/num_tokens"]) == 2 * 4 * size * size
    assert "activation spectra, train; rows: positions of a 6-channel map" in capsys.readouterr().out
    settings = Run(tmp_path).settings("activation")
    assert settings["rows"] == dict.fromkeys(["blocks.0", "blocks.1"], "positions of a 6-channel map")
    assert settings["channel_dim"] is None


@pytest.mark.parametrize("channel_dim", [-1, 3])
def test_channels_may_be_said(tmp_path: Path, channel_dim: int) -> None:
    torch.manual_seed(0)
    model = Maps()
    kept = keep(model.blocks[1], lambda output: output)
    drift = HeadDrift("blocks.1", rank=2, every_n_steps=1, stage="train", channel_dim=channel_dim)
    spectrum = ActivationSpectrum("blocks.1", every_n_steps=1, channel_dim=channel_dim, **ARGUMENTS)
    trainer = fit(tmp_path, model, [torch.randn(4, 3, 6, 5)], spectrum, drift)
    found = float(trainer.callback_metrics["activation/blocks.1/rankme"])
    assert found == pytest.approx(expected_rankme(kept), rel=1e-6)
    assert drift.measurement is None or drift.measurement.widths == {"blocks.1": 5}


@pytest.mark.filterwarnings("ignore:TailForecaster makes no forecast")
@pytest.mark.parametrize(
    "make",
    [
        lambda: ActivationSpectrum("heads", every_n_steps=1),
        lambda: HeadDrift("heads", rank=2, every_n_steps=1, stage="train"),
        lambda: TailForecaster(1.0, "train_loss", layer="heads", every_n_steps=1, stage="train"),
    ],
    ids=["spectrum", "drift", "forecaster"],
)
def test_layers_that_may_be_read_either_way_are_refused_in_the_first_batch(tmp_path: Path, make) -> None:
    class Heads(Maps):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.Sequential(nn.Linear(6, 8), nn.Unflatten(-1, (2, 4)))

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = self.heads(batch).square().mean()
            self.log("train_loss", loss)
            return loss

    message = r"^channel_dim must say which axis of the output \(3, 5, 2, 4\) of layer 'heads' holds its channels"
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, Heads(), [torch.randn(3, 5, 6)] * 2, make())


@pytest.mark.parametrize("size", [12, 5], ids=["as many samples as positions", "fewer"])
@pytest.mark.parametrize("turned", [False, True], ids=["time first", "batch first"])
def test_masks_find_their_rows_wherever_time_is(tmp_path: Path, size: int, turned: bool) -> None:
    class Model(TimeFirst):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            if not turned:
                return super().training_step(batch, batch_idx)
            return self.layer(self.embedding(batch["input_ids"]) + self.place(batch["positions"])).square().mean()

    torch.manual_seed(0)
    model, positions = Model(), torch.arange(12)
    mask = (positions < torch.arange(1, size + 1).unsqueeze(1)).long()
    batch = {"positions": positions, "input_ids": torch.randint(20, (size, 12)), "mask": mask}
    kept = keep(model.layer, lambda output: (output if turned else output.transpose(0, 1))[mask.bool()])
    spectrum = ActivationSpectrum("layer", every_n_steps=1, mask="mask", **(ARGUMENTS | {"num_groups": 1}))
    gradients = GradientSpectrum(
        "layer.weight", every_n_steps=1, num_samples=size, num_groups=1, head=(1, 3), tail=(2, 4)
    )
    trainer = fit(tmp_path, model, [batch], spectrum, gradients)
    found = float(trainer.callback_metrics["activation/layer/rankme"])
    assert found == pytest.approx(expected_rankme(kept), rel=1e-6)
    whole = torch.autograd.grad(model.training_step(batch, 0), model.layer.weight)[0]
    assert float(trainer.callback_metrics["gradient/layer.weight/grad_norm"]) == pytest.approx(
        float(whole.norm()), rel=1e-4
    )


def test_the_pass_that_tells_time_from_samples_does_no_harm(tmp_path: Path) -> None:
    class Random(TimeFirst):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("num_forwards", torch.zeros(()))

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            self.num_forwards += 1
            return super().training_step(batch, batch_idx) * torch.rand(())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    batch = {"input_ids": torch.arange(144).view(12, 12) % 20, "positions": torch.arange(12)}
    batch["mask"] = torch.ones(12, 12, dtype=torch.long).tril()
    found = []
    for callbacks in ([], [ActivationSpectrum("layer", every_n_steps=1, mask="mask", **ARGUMENTS)]):
        torch.manual_seed(0)
        model = Random()
        fit(tmp_path, model, [batch] * 3, *callbacks)
        found.append({**model.state_dict(), "random": torch.random.get_rng_state()})
    for name, tensor in found[0].items():
        assert torch.equal(found[1][name], tensor), name


@pytest.mark.parametrize("kind", ["time first", "batch first", "nothing tells", "said"])
def test_groups_of_square_outputs_are_of_samples_whichever_axis_they_are_on(tmp_path: Path, kind: str) -> None:
    class Model(TimeFirst):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            if kind in ("nothing tells", "said") and len(batch["input_ids"]) == 1:
                raise IndexError("this step takes pairs")
            x = self.embedding(batch["input_ids"]) + self.place(batch["positions"])
            return self.layer(x if kind == "batch first" else x.transpose(0, 1)).square().mean()

    class Kept(ActivationSpectrum):
        def measured(self, report: Any) -> dict[str, float]:
            spectra.append(report.spectra["activation"]["layer"])
            return super().measured(report)

    torch.manual_seed(0)
    model, spectra = Model(), []
    batches = [{"input_ids": torch.randint(20, (12, 12)), "positions": torch.arange(12)} for _ in range(2)]
    outputs = keep(model.layer, lambda output: output if kind == "batch first" else output.transpose(0, 1))
    said = {"batch_dim": 1} if kind == "said" else {}
    if said:  # tokens have their samples there, too
        batches = [batch | {"positions": torch.arange(12).unsqueeze(1).expand(12, 12)} for batch in batches]
        outputs = keep(model.layer, lambda output: output.transpose(0, 1))
    fit(tmp_path, model, batches, Kept("layer", every_n_steps=2, **(ARGUMENTS | said)))
    assert spectra[0].count == 2 * 12 * 12
    # Whole samples, one after the other; whole passes where it is not known where samples are.
    samples = list(torch.stack(outputs) if kind == "nothing tells" else torch.cat(outputs))
    for group, left_out in enumerate(contiguous_groups(range(len(samples)), 2)):
        rows = torch.cat([sample.reshape(-1, 6) for index, sample in enumerate(samples) if index not in left_out])
        expected = covariance_spectrum(rows.double().numpy())
        np.testing.assert_allclose(spectra[0].leave_one_out[group].numpy(), expected, rtol=1e-6)


def test_a_square_mask_that_nothing_settles_names_batch_dim(tmp_path: Path) -> None:
    class Manual(TimeFirst):
        automatic_optimization = False

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:  # type: ignore[override]
            self.optimizers().zero_grad()
            self.manual_backward(TimeFirst.training_step(self, batch, batch_idx))
            self.optimizers().step()

    def batch() -> dict[str, Tensor]:
        return {
            "input_ids": torch.randint(20, (12, 12)),
            "positions": torch.arange(12),
            "mask": torch.ones(12, 12, dtype=torch.long),
        }

    model = Manual()
    model.automatic_optimization = False
    with pytest.raises(
        ValueError, match=r"^batch_dim must say where samples are, for mask='mask' \(12, 12\) "
    ) as caught:
        fit(tmp_path, model, [batch()], ActivationSpectrum("layer", every_n_steps=1, mask="mask", **ARGUMENTS))
    assert "\n" not in str(caught.value)
    spectrum = ActivationSpectrum("layer", every_n_steps=1, mask="mask", batch_dim=0, **ARGUMENTS)
    trainer = fit(tmp_path, model, [batch()], spectrum)
    assert np.isfinite(float(trainer.callback_metrics["activation/layer/rankme"]))


def test_ragged_batches_are_refused_at_once_or_cut_by_the_user(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Sequences()
    batches = [[torch.randint(20, (3 + index % 4,)) for index in range(8)] for _ in range(2)]
    arguments: dict[str, Any] = {"every_n_steps": 2, "num_samples": 16, "head": (1, 3), "tail": (2, 5)}
    with pytest.raises(ValueError, match=r"^batch_dim=0 must be the axis .* samples, a function that cuts a batch"):
        fit(tmp_path / "refused", model, batches, GradientSpectrum("layer.weight", **arguments))
    spectrum = GradientSpectrum("layer.weight", samples=f"{__name__}.one_by_one", method="loop", **arguments)
    trainer = fit(tmp_path / "cut", model, batches, spectrum)
    rows = torch.stack(
        [
            torch.autograd.grad(model.training_step([ids], 0), model.layer.weight)[0].flatten()
            for batch in batches
            for ids in batch
        ]
    ).double()
    mean = float(rows.mean(0).square().sum())
    trace = 16 / 15 * (float(rows.square().sum(1).mean()) - mean)
    found = trainer.callback_metrics
    assert float(found["gradient/layer.weight/num_samples"]) == 16
    assert float(found["gradient/layer.weight/noise_scale"]) == pytest.approx(trace / (mean - trace / 16), rel=1e-4)
    run = Run(tmp_path / "cut")
    assert run.history.tokens[-1] == sum(len(ids) for batch in batches for ids in batch)
    assert run.settings("gradient")["samples"] == f"{__name__}.one_by_one"


@pytest.mark.filterwarnings("ignore:TailForecaster makes no forecast")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            ActivationSpectrum,
            r"^mask must be of all .*, got 'attention_mask' for layers=None, of several towers: ",
        ),
        (lambda **kwargs: HeadDrift("*.?", 2, stage="train", **kwargs), "^mask must be of all layers .* for layers='"),
        (
            lambda **kwargs: TailForecaster(1.0, "train_loss", stage="train", **kwargs),
            r"^layer must be one that mask is of, got None with mask='attention_mask' .*, layer='decoder.1' for ",
        ),
    ],
    ids=["spectrum", "drift", "forecaster"],
)
def test_the_encoder_s_mask_is_not_laid_over_the_decoder_unasked(tmp_path: Path, make, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        fit(tmp_path, Translator(), [translations()], make(every_n_steps=1, mask="attention_mask"))
    assert "\n" not in str(raised.value)


def test_each_tower_has_its_mask(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batch = Translator(), translations()
    real = {"encoder": batch["attention_mask"] == 1, "decoder": batch["labels"] >= 0}
    assert real["encoder"].shape == real["decoder"].shape
    kept = {side: keep(getattr(model, side)[1], lambda rows, side=side: rows[real[side]]) for side in real}
    shared = keep(model.decoder[1], lambda rows: rows[real["encoder"]])
    arguments = ARGUMENTS | {"every_n_steps": 1}
    spectra = [
        ActivationSpectrum("encoder.*", mask="attention_mask", **arguments),
        ActivationSpectrum("decoder.*", mask="labels", prefix="decoder/", **arguments),
        ActivationSpectrum(["encoder.*", "decoder.*"], mask="attention_mask", prefix="shared/", **arguments),
    ]
    metrics = fit(tmp_path, model, [batch], *spectra).callback_metrics
    for key, rows in (
        ("activation/encoder.1", kept["encoder"]),
        ("decoder/activation/decoder.1", kept["decoder"]),
        ("shared/activation/decoder.1", shared),
    ):
        assert float(metrics[f"{key}/num_tokens"]) == len(rows[0])
        assert float(metrics[f"{key}/rankme"]) == pytest.approx(expected_rankme(rows), rel=1e-6)
    assert len(shared[0]) != len(kept["decoder"][0])


def test_a_mask_means_the_same_in_every_batch(tmp_path: Path) -> None:
    labels = [torch.tensor([[0, 1, 1, -1]] * 6), torch.tensor([[0, 1, 1, 0]] * 6)]
    positions = torch.arange(4)
    batches = [
        {"inputs": {"m": m}, "input_ids": torch.randint(20, (6, 4)), "positions": positions, "m": m} for m in labels
    ]
    spectrum = ActivationSpectrum("layer", every_n_steps=2, mask="inputs.m", **ARGUMENTS)
    record = RunRecord(tokens_per_sample="inputs.m")
    trainer = fit(tmp_path, TimeFirst(), batches, spectrum, record)
    assert float(trainer.callback_metrics["activation/layer/num_tokens"]) == 6 * 3 + 6 * 4
    assert Run(tmp_path).history.tokens[-1] == 6 * 3 + 6 * 4


def test_a_mask_that_can_mean_anything_is_refused_in_the_first_batch(tmp_path: Path) -> None:
    batch = {
        "input_ids": torch.randint(20, (6, 4)),
        "positions": torch.arange(4),
        "pack": torch.tensor([[1, 1, 2, 0]] * 6),
    }
    with pytest.raises(ValueError, match=r"^mask must name .*, got 'pack' of integers from 0 to 2: add to the batch"):
        fit(tmp_path, TimeFirst(), [batch] * 2, ActivationSpectrum("layer", every_n_steps=2, mask="pack", **ARGUMENTS))


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("channel_dim", 1.5, "channel_dim must be an axis, or None, got 1.5"),
        ("batch_dim", -1, "batch_dim must be an int from 0, or None, got -1"),
        ("samples", 3, "samples must be a function that cuts a batch, its import path or None, got 3"),
    ],
)
def test_arguments_check_themselves(argument: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        ActivationSpectrum(**{argument: value})


def test_samples_go_with_methods_that_take_them_one_by_one() -> None:
    with pytest.raises(
        ValueError, match=r"^samples cuts into batches of one, which method='loop' takes, got method='vmap'$"
    ):
        GradientSpectrum(samples=one_by_one, method="vmap")
    with pytest.raises(ValueError, match=r"^samples cuts batches by itself: give either it or batch_dim=1$"):
        GradientSpectrum(samples=one_by_one, batch_dim=1)
