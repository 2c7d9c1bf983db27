"""Under the Trainer of transformers a model is measured as under Lightning's: the same numbers, keys and records."""

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from lightning_spectral import ActivationSpectrum, GradientSpectrum, HeadDrift, Run, RunRecord, cli, compare, forecast
from lightning_spectral.integrations.transformers import HFSpectralCallback
from tests.callbacks.test_do_no_harm import assert_identical
from tests.distributed import run_distributed
from tests.models import tiny_trainer

LENGTH = 12
WEIGHTS = "transformer.h.*.attn.c_proj.weight"

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*", "ignore:.*use_cpu.*")


class Padded(Dataset):
    """Sequences of unequal lengths, padded, whose padding counts in no loss."""

    def __init__(self, num_samples: int = 64, seed: int = 0, num_lengths: int = 4) -> None:
        self.num_samples = num_samples
        self.seed = seed
        self.num_lengths = num_lengths

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1000 * self.seed + index)
        tokens = torch.randint(40, (LENGTH,), generator=generator)
        mask = (torch.arange(LENGTH) < LENGTH - index % self.num_lengths).long()
        return {"input_ids": tokens, "attention_mask": mask, "labels": torch.where(mask == 1, tokens, -100)}


def gpt2(dropout: float = 0.0, num_layers: int = 3) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=40,
        n_positions=LENGTH,
        n_embd=32,
        n_layer=num_layers,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    # By the class's name the Trainer does not know that labels are shifted, and divides by too many of them.
    model.loss_type = "ForCausalLM"
    return model


def arguments(folder: Path, **kwargs: Any) -> TrainingArguments:
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_steps": 4}
    steps = {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 4, "per_device_eval_batch_size": 8}
    fit = {
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
    }
    fit |= {"max_grad_norm": 0.0, "optim": "adamw_torch", "weight_decay": 0.0, "train_sampling_strategy": "sequential"}
    return TrainingArguments(str(folder), **(quiet | steps | fit | kwargs))


def trainer_of(folder: Path, model: nn.Module | None = None, num_lengths: int = 4, **kwargs: Any) -> Trainer:
    data = {"train_dataset": Padded(64, 0, num_lengths), "eval_dataset": Padded(16, 1, num_lengths)}
    return Trainer(gpt2() if model is None else model, arguments(folder, **kwargs), **data)


def instruments(start: str = "", method: str = "loop", **kwargs: Any) -> dict[str, Any]:
    gradients = {"num_samples": 16, "method": method} | kwargs
    return {
        "activations": ActivationSpectrum(every_n_steps=4, num_tokens=1000, mask="attention_mask", overlap=False),
        "gradients": GradientSpectrum(f"{start}{WEIGHTS}", every_n_steps=4, **gradients),
        "drift": HeadDrift(rank=4, every_n_steps=4, num_tokens=96, mask="attention_mask"),
    }


class Lightning(LightningModule):
    """The same model, data and steps."""

    def __init__(self) -> None:
        super().__init__()
        self.model = gpt2()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("eval_loss", self.model(**batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2, weight_decay=0.0)


def under_lightning(folder: Path, given: dict[str, Any], num_lengths: int = 4, **kwargs: Any) -> dict[str, float]:
    limits = {"max_steps": 8, "val_check_interval": 4, "num_sanity_val_steps": 0}
    trainer = tiny_trainer(folder, callbacks=[*given.values(), RunRecord(family="F")], **(limits | kwargs))
    trainer.fit(Lightning(), DataLoader(Padded(64, 0, num_lengths), 4), DataLoader(Padded(16, 1, num_lengths), 8))
    found = {key.replace("model.transformer", "transformer"): float(v) for key, v in trainer.callback_metrics.items()}
    return {key: value for key, value in found.items() if "/" in key and "seconds" not in key}


def numbers(callback: HFSpectralCallback) -> dict[str, float]:
    return {key: value for key, value in callback.metrics.items() if "/" in key and "seconds" not in key}


def watched(folder: Path, given: dict[str, Any], **kwargs: Any) -> HFSpectralCallback:
    """A whole run."""
    trainer = trainer_of(folder, **kwargs)
    callback = HFSpectralCallback(**given, record=RunRecord(family="F"), trainer=trainer)
    trainer.add_callback(callback)
    trainer.train()
    return callback


def assert_same(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-6, nan_ok=True), key


@pytest.mark.parametrize("method", ["loop", "hooks"])
def test_numbers_keys_and_record_are_those_of_the_callbacks(tmp_path: Path, method: str) -> None:
    expected = under_lightning(tmp_path / "lightning", instruments("model.", method))
    found = numbers(watched(tmp_path / "hf", instruments("", method)))
    assert_same(found, expected)
    assert found["activation/failed"] == found["gradient/failed"] == found["drift/failed"] == 0
    assert found["activation/transformer.h.0/num_tokens"] == 4 * (12 + 11 + 10 + 9)  # without padding
    runs = [Run(tmp_path / name) for name in ("lightning", "hf")]
    for name in ("step", "tokens", "train_loss", "val_loss"):
        mine, theirs = (getattr(run.history, name) for run in runs)
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, err_msg=name)
    same = ("batch_tokens", "validation_data", "validation_samples", "val_loss", "world_size")
    assert [runs[0].about[key] for key in same] == [runs[1].about[key] for key in same]


@pytest.mark.parametrize("method", ["loop", "hooks"])
def test_accumulation_is_seen(tmp_path: Path, method: str) -> None:
    """Under it the Trainer has each loss divided by the tokens of all batches of a step."""
    kwargs = {"accumulate_grad_batches": 2, "val_check_interval": 8}
    expected = under_lightning(tmp_path / "lightning", instruments("model.", method), 1, **kwargs)
    found = numbers(watched(tmp_path / "hf", instruments("", method), num_lengths=1, gradient_accumulation_steps=2))
    assert_same(found, expected)
    runs = [Run(tmp_path / name) for name in ("lightning", "hf")]
    np.testing.assert_allclose(runs[0].history.train_loss, runs[1].history.train_loss, rtol=1e-5)
    assert runs[0].about["batch_tokens"] == runs[1].about["batch_tokens"] == 96


def test_a_model_whose_labels_the_trainer_miscounts_passes_the_self_check(tmp_path: Path) -> None:
    model = gpt2()
    model.loss_type = None
    callback = watched(tmp_path, {"gradients": instruments()["gradients"]}, model=model)
    assert callback.metrics["gradient/failed"] == 0
    assert not math.isnan(callback.metrics["gradient/transformer.h.0.attn.c_proj.weight/alpha_tail"])


class OwnLoss(nn.Module):
    """A model whose loss is of its own make, by the labels of all batches of a step where it is told of them."""

    def __init__(self, is_plain: bool) -> None:
        super().__init__()
        self.model = gpt2()
        self.is_plain = is_plain

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        total = kwargs.get("num_items_in_batch", labels.numel())
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / total
        return {"loss": loss if self.is_plain else loss + 0 * logits.mean(), "logits": logits}


@pytest.mark.parametrize("method", ["loop", "hooks"])
@pytest.mark.parametrize("is_plain", [True, False])
def test_what_a_loss_was_divided_by_is_seen_or_not_guessed(tmp_path: Path, method: str, is_plain: bool) -> None:
    found = {}
    for batches in (1, 2):
        given = {"gradients": GradientSpectrum(f"model.{WEIGHTS}", every_n_steps=4, num_samples=16, method=method)}
        kwargs = {"num_lengths": 1, "gradient_accumulation_steps": batches, "learning_rate": 0.0}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            callback = watched(tmp_path / str(batches), given, model=OwnLoss(is_plain), **kwargs)
        said = [str(one.message) for one in caught if "losses are not recorded" in str(one.message)]
        assert len(said) == (batches > 1 and not is_plain)
        norm = callback.metrics["gradient/model.transformer.h.0.attn.c_proj.weight/grad_norm"]
        history = Run(tmp_path / str(batches)).history
        found[batches] = history.train_loss[1:] / history.with_loss()[1][-1], norm
    np.testing.assert_allclose(found[1][0], 1, rtol=0.05)
    if is_plain:
        np.testing.assert_allclose(found[2][0], 1, rtol=0.05)
        assert found[2][1] == pytest.approx(found[1][1], rel=0.3)
    else:
        assert np.isnan(found[2][0]).all()
        assert math.isnan(found[2][1])


def test_a_model_that_is_told_of_labels_and_divides_by_none_is_seen(tmp_path: Path) -> None:
    """T5 takes whatever it is told, and its loss is the mean over its own batch."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_decoder_layers": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, num_heads=2, decoder_start_token_id=0, dropout_rate=0.0))
    gradients = GradientSpectrum("decoder.block.*.layer.0.SelfAttention.o.weight", every_n_steps=4, num_samples=16)
    callback = watched(
        tmp_path, {"gradients": gradients}, model=model, gradient_accumulation_steps=2, learning_rate=0.0
    )
    assert callback.metrics["gradient/failed"] == 0
    history = Run(tmp_path).history
    samples = Padded()
    with torch.no_grad():
        batches = [{key: value[None] for key, value in samples[index].items()} for index in range(len(samples))]
        losses = [float(model(**batch).loss) for batch in batches]
    np.testing.assert_allclose(history.train_loss[1:], np.mean(losses), rtol=0.02)


NORM = "gradient/transformer.h.1.attn.c_proj.weight/grad_norm"


def with_penalty(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    output = model(**batch)
    return 0.5 * output.loss + 5.0 * output.logits.square().mean()


def smoothed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(**batch).logits[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), label_smoothing=0.1)


class Penalised(Trainer):
    """Trains by more than what the model returns."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss = with_penalty(model, inputs)
        return (loss, model(**inputs)) if return_outputs else loss


class Added(Trainer):
    """Likewise, in its step."""

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        model.train()
        inputs = self._prepare_inputs(inputs)
        loss, output = self.compute_loss(model, inputs, return_outputs=True)
        loss = 0.5 * loss + 5.0 * output.logits.square().mean()
        self.accelerator.backward(loss)
        return loss.detach()


class Looking(Trainer):
    """Trains by what the model returns, and looks at it."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, output = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        self.seen = loss.item(), output.logits.std()
        return (loss, output) if return_outputs else loss


def of_a_step(folder: Path, kind: type[Trainer], method: str, batches: int = 1, **kwargs: Any) -> dict[str, float]:
    """The numbers of one step on eight samples."""
    given = {name: kwargs.pop(name) for name in ("loss_fn", "compute_loss_func") if name in kwargs}
    bands = {"head": (1, 4), "tail": (1, 4), "num_groups": 1}
    weight = "transformer.h.1.attn.c_proj.weight"
    gradients = GradientSpectrum(weight, every_n_steps=1, num_samples=8, method=method, **bands)
    callback = HFSpectralCallback(gradients=gradients, record=RunRecord(), loss_fn=given.pop("loss_fn", None))
    shape = {"per_device_train_batch_size": 8 // batches, "gradient_accumulation_steps": batches, "max_steps": 1}
    of = arguments(folder, **shape, learning_rate=0.0, eval_strategy="no", **kwargs)
    trainer = kind(gpt2(), of, train_dataset=Padded(8, 0, 1), callbacks=[callback], **given)
    trainer.train()
    assert not {"compute_loss"} & vars(trainer).keys()
    assert "backward" not in vars(trainer.accelerator)
    return callback.metrics


def batch_of_eight() -> dict[str, Tensor]:
    data = Padded(8, 0, 1)
    return {key: torch.stack([data[index][key] for index in range(8)]) for key in data[0]}


def norm_of(loss_fn: Any) -> float:
    """Of the gradient of a loss of eight samples, by autograd alone."""
    model, batch = gpt2(), batch_of_eight()
    weight = model.get_parameter("transformer.h.1.attn.c_proj.weight")
    return float(torch.autograd.grad(loss_fn(model, batch), weight)[0].norm())


CASES = [
    ("loop", Penalised, "another loss than GPT2LMHeadModel"),
    ("vmap", Penalised, "another loss than GPT2LMHeadModel"),
    ("loop", Added, "training_step"),
    ("hooks", Added, "training_step"),  # of which what compute_loss returns is a part of nobody knows what size
]


@pytest.mark.parametrize(("method", "kind", "match"), CASES)
def test_gradients_of_another_loss_than_is_trained_are_nan(
    tmp_path: Path, method: str, kind: type[Trainer], match: str
) -> None:
    with pytest.warns(UserWarning, match=f"NaN, because {kind.__name__}.*{match}.*give loss_fn"):
        found = of_a_step(tmp_path, kind, method)
    assert math.isnan(found[NORM])
    assert found["gradient/failed"] == 1


@pytest.mark.parametrize("method", ["loop", "hooks"])
def test_a_loss_fn_that_does_what_compute_loss_does_is_measured_and_checked(tmp_path: Path, method: str) -> None:
    found = of_a_step(tmp_path / "right", Penalised, method, loss_fn=with_penalty)
    assert found[NORM] == pytest.approx(norm_of(with_penalty), rel=1e-5)
    with pytest.warns(UserWarning, match="training's loss of a batch was"):
        wrong = of_a_step(tmp_path / "wrong", Penalised, method, loss_fn=lambda model, batch: model(**batch).loss)
    assert math.isnan(wrong[NORM])


def test_rows_off_the_backward_pass_are_of_the_loss_that_is_trained(tmp_path: Path) -> None:
    found = of_a_step(tmp_path, Penalised, "hooks")
    assert found[NORM] == pytest.approx(norm_of(with_penalty), rel=1e-5)
    assert Run(tmp_path).history.train_loss[-1] == pytest.approx(with_penalty(gpt2(), batch_of_eight()).item())


@pytest.mark.parametrize("method", ["loop", "hooks"])
@pytest.mark.parametrize("batches", [1, 2])
def test_a_compute_loss_that_returns_the_models_own_loss_is_no_other(tmp_path: Path, method: str, batches: int) -> None:
    found = of_a_step(tmp_path, Looking, method, batches)
    assert found[NORM] == pytest.approx(norm_of(lambda model, batch: model(**batch).loss), rel=1e-5)
    assert found["gradient/failed"] == 0
    assert found["gradient/sample_weights_ratio"] == pytest.approx(1)


def of_labels(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logits, labels = outputs["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
    return loss / num_items_in_batch if num_items_in_batch is not None else loss / len(labels)


@pytest.mark.parametrize("batches", [1, 2])
def test_losses_of_labels_that_the_model_is_not_told(tmp_path: Path, batches: int) -> None:
    found = of_a_step(tmp_path / "hooks", Trainer, "hooks", batches, compute_loss_func=of_labels)
    assert found[NORM] == pytest.approx(norm_of(lambda model, batch: model(**batch).loss), rel=1e-5)
    with pytest.warns(UserWarning, match="NaN, because GPT2LMHeadModel returns no loss to Trainer"):
        assert math.isnan(of_a_step(tmp_path / "loop", Trainer, "loop", batches, compute_loss_func=of_labels)[NORM])


def test_smoothed_labels(tmp_path: Path) -> None:
    found = of_a_step(tmp_path, Trainer, "hooks", label_smoothing_factor=0.1)
    assert found[NORM] == pytest.approx(norm_of(smoothed), rel=1e-5)


def test_a_size_that_is_not_known_is_not_guessed(tmp_path: Path) -> None:
    """Whether the loss was divided by the labels of all batches nothing tells."""
    with (
        pytest.warns(UserWarning, match="training losses are not recorded"),
        pytest.warns(UserWarning, match="NaN, because Penalised trains by another loss"),
    ):
        assert math.isnan(of_a_step(tmp_path, Penalised, "hooks", 2)[NORM])


def test_who_calls_without_a_trainer_is_told(tmp_path: Path) -> None:
    callback = HFSpectralCallback(gradients=True)
    with pytest.raises(ValueError, match="trainer must be given for gradients"):
        callback.on_train_begin(arguments(tmp_path), TrainerState(), TrainerControl(), model=gpt2())


def test_a_copy_of_the_model_is_not_watched(tmp_path: Path) -> None:
    """Nor does it take the callback, and with it the Trainer, along."""
    copies: list[nn.Module] = []

    class Copying(Looking):
        def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            copies[:] = copies or [copy.deepcopy(model)]
            copies[0](**args[0])
            return super().compute_loss(model, *args, **kwargs)

    assert of_a_step(tmp_path, Copying, "loop")["gradient/failed"] == 0


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")  # as it is called in the oldest version
def test_training_is_bit_identical(tmp_path: Path) -> None:
    def trained(given: dict[str, Any]) -> tuple[Any, ...]:
        model = gpt2(dropout=0.1)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        trainer = trainer_of(tmp_path / "run", model, seed=3)
        callback = HFSpectralCallback(**given)
        if given:
            trainer.add_callback(callback)
        trainer.train()
        hooks = [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in trainer.model.modules()]
        logged = [{key: value for key, value in one.items() if "loss" in key} for one in trainer.state.log_history]
        rows = callback.metrics.get("activation/transformer.h.0/num_tokens")
        return trainer.model.state_dict(), torch.get_rng_state(), hooks, logged, rows

    *expected, nothing = trained({})
    *found, rows = trained(instruments())
    assert nothing is None
    assert rows == 4 * 42  # what checkpointing repeats is not counted
    assert_identical(found, expected)


def test_without_the_trainer_the_first_rows_of_an_evaluation_are_read(tmp_path: Path) -> None:
    drift = HeadDrift(rank=4, every_n_steps=4, num_tokens=96)
    trainer = Trainer(
        gpt2(),
        arguments(tmp_path),
        train_dataset=Padded(),
        eval_dataset=Padded(16, 1),
        callbacks=[HFSpectralCallback(drift=drift, log_dir=tmp_path / "elsewhere")],
    )
    readings = []
    trainer.add_callback(Spy(lambda: readings.append(drift.measurement and drift.measurement.reading)))
    trainer.train()
    assert readings[0] == "the first of a pass whose length is not known"
    assert Run(tmp_path / "elsewhere").steps("activation") == [4, 8]


class Spy(TrainerCallback):
    """Looks after each evaluation."""

    def __init__(self, look: Any) -> None:
        self.look = look

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.look()


def test_what_others_try_after_an_evaluation_is_none(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, eval_steps=2)
    drift = HeadDrift(rank=4, every_n_steps=1, num_tokens=10_000)
    trainer.add_callback(HFSpectralCallback(drift=drift, trainer=trainer))
    trainer.add_callback(Spy(lambda: trainer.model(torch.zeros(1, 2, dtype=torch.long))))
    trainer.train()
    run = Run(tmp_path)
    assert run.steps("activation") == [2, 4, 6, 8]
    assert {run.spectrum("activation", "transformer.h.0", step).count for step in (2, 8)} == {16 * LENGTH}
    assert np.isfinite(run.history.val_loss).tolist() == [True] * 4


def test_a_forecaster_ends_training(tmp_path: Path) -> None:
    callback = HFSpectralCallback(activations=ActivationSpectrum(every_n_steps=2, num_groups=1, overlap=False))
    trainer = trainer_of(tmp_path)
    trainer.add_callback(callback)
    trainer.add_callback(Spy(lambda: callback._loop.host.stop()))
    trainer.train()
    assert trainer.state.global_step == 5  # the evaluation after step 4 was the last before


def test_a_resumed_run_goes_on(tmp_path: Path) -> None:
    def part(**kwargs: Any) -> tuple[dict[str, float], Run]:
        trainer = trainer_of(tmp_path / "run", save_strategy="steps", save_steps=4)
        drift = HeadDrift(rank=4, every_n_steps=2, stage="train", num_tokens=96, overlap=False)
        callback = HFSpectralCallback(drift=drift)
        trainer.add_callback(callback)
        trainer.train(**kwargs)
        return numbers(callback), Run(tmp_path / "run")

    expected, whole = part()
    found, resumed = part(resume_from_checkpoint=str(tmp_path / "run/checkpoint-4"))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-6), key
    assert resumed.history.tokens[-1] == whole.history.tokens[-1] == 8 * 48
    assert resumed.steps("activation") == [2, 4, 6, 8]


def test_a_run_without_a_state_says_so(tmp_path: Path) -> None:
    trainer_of(tmp_path, save_strategy="steps", save_steps=4).train()
    trainer = trainer_of(tmp_path)
    trainer.add_callback(HFSpectralCallback(activations=ActivationSpectrum(every_n_steps=2, num_groups=1)))
    with (
        pytest.warns(UserWarning, match="HFSpectralCallback begins anew at step 4: there is no"),
        pytest.warns(UserWarning, match="RunRecord cannot tell how many tokens the first 4 steps took"),
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert math.isnan(Run(tmp_path).history.tokens[-1])


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"torch_compile": True}, {}, "torch_compile must be False"),
    ({"label_smoothing_factor": 0.1}, {"gradients": GradientSpectrum(WEIGHTS)}, "label_smoothing_factor must be 0"),
    ({}, {"activations": ActivationSpectrum("nothing.*")}, "matches no layer"),
]


@pytest.mark.parametrize(("kwargs", "given", "message"), REFUSED, ids=[message[:14] for *_, message in REFUSED])
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, kwargs: dict[str, Any], given: dict[str, Any], message: str
) -> None:
    trainer = trainer_of(tmp_path)
    callback = HFSpectralCallback(**given)
    for name, value in kwargs.items():
        setattr(trainer.args, name, value)
    trainer.add_callback(callback)
    with pytest.raises(ValueError, match=message) as caught:
        trainer.train()
    assert "\n" not in str(caught.value)


def copying(folder: Path, batch_size: int, seed: int, steps: int) -> None:
    """A run that learns to repeat itself."""
    model = gpt2(num_layers=2)
    kwargs = {"max_steps": steps, "per_device_train_batch_size": batch_size, "seed": seed}
    trainer = Trainer(model, arguments(folder, **kwargs), train_dataset=Same(), eval_dataset=Same(16))
    spectrum = ActivationSpectrum("transformer.h.1", every_n_steps=4, num_tokens=96, num_groups=2, stage="validate")
    trainer.add_callback(HFSpectralCallback(activations=spectrum, trainer=trainer))
    trainer.train()


class Same(Padded):
    """One token again and again."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = super().__getitem__(index)["input_ids"][:1].expand(LENGTH).contiguous()
        return {"input_ids": tokens, "labels": tokens}


def test_the_seed_is_the_trainers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")  # of a run before, under Lightning
    copying(tmp_path, 2, 7, 4)
    assert Run(tmp_path).about["seed"] == 7


def test_its_runs_are_shown_compared_and_forecast(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for batch_size in (2, 4, 8):
        for seed in (0, 1):
            copying(tmp_path / f"{batch_size}-{seed}", batch_size, seed, 40)
    copying(tmp_path / "new", 4, 2, 8)
    cli.main(["show", str(tmp_path / "2-0")])
    assert "transformer.h.1" in capsys.readouterr().out
    assert not compare(str(tmp_path / "2-*"), str(tmp_path / "8-*")).left_out
    (found,) = forecast(str(tmp_path / "*"), target=2.9)
    (new,) = found.forecasts
    assert new.reason is None
    assert new.low < new.value < new.high


def of_a_rank(rank: int, folder: str, world: int) -> dict[str, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the Trainer's, on being run by two processes of a test
        given = {
            "activations": ActivationSpectrum(every_n_steps=4, num_tokens=10_000, mask="attention_mask", num_groups=1),
            "gradients": GradientSpectrum(WEIGHTS, every_n_steps=4, num_samples=16, num_groups=1, method="hooks"),
            "drift": HeadDrift(rank=4, every_n_steps=4, num_tokens=10_000, mask="attention_mask", num_groups=1),
        }
        kwargs = {"per_device_train_batch_size": 4 // world, "per_device_eval_batch_size": 8 // world}
        return numbers(watched(Path(folder), given, num_lengths=1, **kwargs))


def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    expected = of_a_rank(0, str(tmp_path / "one"), 1)
    found = run_distributed(of_a_rank, 2, str(tmp_path / "two"), 2)
    assert found[0] == pytest.approx(found[1], rel=1e-12, nan_ok=True)
    assert expected["activation/transformer.h.0/num_tokens"] == 4 * 48
    assert found[0]["gradient/sample_weights_ratio"] == pytest.approx(1)
    assert found[0] == pytest.approx(expected, rel=1e-4, nan_ok=True)
    one, two = Run(tmp_path / "one"), Run(tmp_path / "two")
    assert one.history.tokens.tolist() == two.history.tokens.tolist()
    np.testing.assert_allclose(one.history.train_loss, two.history.train_loss, rtol=1e-5)
