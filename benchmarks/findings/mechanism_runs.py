"""The runs of the study of the mechanism: a small transformer on modular arithmetic, looked at as it trains."""

import json
import logging
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot, rms_norm

from benchmarks.findings.control import HEAD, TAIL, measured
from lightning_spectral.capture.activations import ActivationReader
from lightning_spectral.functional.spectrum import head_share
from lightning_spectral.nanogpt import ModularArithmetic, NanoGPT
from lightning_spectral.theory import band_concentration, harmonic_energy, task_power


class Task(NamedTuple):
    """Sizes of modular arithmetic, and how long to train on it."""

    vocab: int
    length: int
    warmup_tokens: int
    steps: dict[int, int]
    """Optimizer steps by batch size, in sequences."""


TASKS = {
    "short": Task(32, 16, 32_768, {32: 480, 128: 160, 512: 48}),
    "long": Task(64, 32, 65_536, {32: 640, 128: 240, 512: 96}),
}
WIDTH = 128
SEEDS = (1, 2, 3, 4)
RATE = 2e-3
"""Learning rate at a batch of 32."""
MOST_AT_ONCE = 128
"""Sequences in a forward pass; larger batches are accumulated."""
NUM_LOOKS = 16
HELD_OUT_TOKENS = 8192
CYCLES, PROBES, FIRST_POSITION = (11, 17, 29), 192, 8
"""Prime, so that every step visits every state; sequences each at the most; the first position that counts."""
STRONGEST, NUM_PERMUTATIONS = 3, 20


@dataclass(frozen=True)
class Setting:
    """One run."""

    task: str
    batch_size: int
    seed: int

    @property
    def sizes(self) -> Task:
        """Of its task."""
        return TASKS[self.task]

    @property
    def num_steps(self) -> int:
        """Optimizer steps."""
        return self.sizes.steps[self.batch_size]

    @property
    def name(self) -> str:
        return f"{self.task}-batch_{self.batch_size}-seed_{self.seed}"

    @property
    def looks(self) -> list[int]:
        """Steps after which the model is looked at, evenly spread over their logarithm; 0 is before the first."""
        grid = np.geomspace(1, self.num_steps, NUM_LOOKS).round().astype(int)
        return [0, *np.unique(grid).tolist()]


def settings(task: str) -> list[Setting]:
    """All runs of one task; seeds outermost, so that an interrupted study has whole sets."""
    return [Setting(task, size, seed) for seed in SEEDS for size in TASKS[task].steps]


class Probe(NamedTuple):
    """Sequences of one cycle from offset 0, whose tokens are their states."""

    cycle: int
    states: Tensor
    """``(sequences, length)``."""
    harmonics: list[int]
    """The task's: see :func:`task_harmonics`."""


def task_harmonics(cycle: int) -> list[int]:
    """The fewest harmonics that hold half of the energy of what the present state says of the next.

    Over all steps d that are drawn, the next state is m + d; the discrete Fourier transform of the distribution of d
    says how much of each harmonic of the state is found again in the next.
    """
    chances = np.zeros(cycle)
    chances[-(-cycle // 8) :] = 1.0
    energy = np.abs(np.fft.fft(chances / chances.sum()))[1 : cycle // 2 + 1] ** 2
    order = np.argsort(-energy)
    num = int((np.cumsum(energy[order]) < energy.sum() / 2).sum()) + 1
    return sorted((order[:num] + 1).tolist())


def probe_of(cycle: int, length: int) -> Probe:
    """All starts and steps of a cycle, or as many of them by chance, the same for every run."""
    pairs = [(start, step) for start in range(cycle) for step in range(-(-cycle // 8), cycle)]
    chosen = np.random.default_rng(cycle).permutation(len(pairs))[:PROBES]
    places = torch.tensor([pairs[index] for index in chosen])
    states = (places[:, :1] + places[:, 1:] * torch.arange(length)) % cycle
    return Probe(cycle, states, task_harmonics(cycle))


class Observer:
    """Looks at a model, without a trace of it: the package's forward hooks, and no gradients."""

    def __init__(self, task: Task) -> None:
        num = HELD_OUT_TOKENS // task.length
        data = ModularArithmetic(1, task.length, num, task.vocab, num_val_sequences=num, seed=0)
        self._held_out = next(iter(data.val_dataloader()))
        self._probes = [probe_of(cycle, task.length) for cycle in CYCLES]

    @torch.no_grad()
    def __call__(self, module: NanoGPT) -> dict[str, Any]:
        """Loss, spectra and harmonics of a model as it is."""
        outputs: dict[str, Tensor] = {}
        reader = ActivationReader(outputs.__setitem__)
        for index, block in enumerate(module.gpt.blocks):
            reader.add(f"block {index}", block)
        reader.is_open = True
        was_training = module.training
        module.eval()
        try:
            logits, labels = module(self._held_out["input_ids"]), self._held_out["labels"]
            found: dict[str, Any] = {
                "loss": float(cross_entropy(logits.flatten(0, 1), labels.flatten())),
                "accuracy": float((logits.argmax(-1) == labels)[:, FIRST_POSITION:].double().mean()),
                "layers": {name: spectral(output) for name, output in outputs.items()},
            }
            last = f"block {len(module.gpt.blocks) - 1}"
            found |= readout(features(outputs[last]), logits, labels)
            found["harmonics"] = {}
            for probe in self._probes:
                module(probe.states)
                found["harmonics"][str(probe.cycle)] = concentrations(features(outputs[last]), probe)
        finally:
            reader.remove()
            module.train(was_training)
        return found


def features(output: Tensor) -> Tensor:
    """What the head reads of the last block's output, ``(..., WIDTH)``, in float64."""
    return rms_norm(output.double(), (output.shape[-1],), eps=1e-6)


def spectral(output: Tensor) -> dict[str, float]:
    """What a callback would say of these rows."""
    spectrum = measured(output.double(), normalize=True)
    return {
        "alpha_head": spectrum.exponent(HEAD).value,
        "alpha_tail": spectrum.exponent(TAIL).value,
        "rankme": spectrum.rankme().value,
        "head_share": float(head_share(spectrum.values, HEAD[1])),
    }


def readout(hidden: Tensor, logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Task power of the head's input: its sum, and the share in the ten modes of most variance."""
    rows, errors = hidden.flatten(0, -2), logits.double().softmax(-1).flatten(0, -2)
    errors = errors - one_hot(labels.flatten(), errors.shape[-1])
    values, vectors = torch.linalg.eigh(rows.mT @ rows / len(rows))
    power = task_power(values.flip(0).clamp(min=0), vectors.flip(1), errors.mT @ rows / len(rows))
    return {"task_power": float(power.sum()), "task_head_share": float(power[: HEAD[1]].sum() / power.sum())}


def concentrations(hidden: Tensor, probe: Probe) -> dict[str, float]:
    """H_S of the mean features of the states, the share of the strongest harmonics, and the same of shuffled states."""
    rows, states = hidden[:, FIRST_POSITION:].flatten(0, 1), probe.states[:, FIRST_POSITION:].flatten()
    sums = torch.zeros(probe.cycle, rows.shape[-1], dtype=rows.dtype).index_add_(0, states, rows)
    means = sums / states.bincount(minlength=probe.cycle)[:, None]
    generator = torch.Generator().manual_seed(probe.cycle)
    shuffled = [strongest(means[torch.randperm(probe.cycle, generator=generator)]) for _ in range(NUM_PERMUTATIONS)]
    return {
        "task": band_concentration(harmonic_energy(means), probe.harmonics),
        "strongest": strongest(means),
        "strongest_shuffled": float(np.mean(shuffled)),
    }


def strongest(means: Tensor) -> float:
    """Share of the energy in the few harmonics that have most."""
    energy = harmonic_energy(means)
    order = energy[1 : len(means) // 2 + 1].argsort(descending=True)[:STRONGEST] + 1
    return band_concentration(energy, order.tolist())


class _Looks(Callback):
    def __init__(self, setting: Setting, observe: Observer) -> None:
        self.wanted = setting.looks
        self.observe = observe
        self.found: list[dict[str, Any]] = []

    def _look(self, step: int, module: LightningModule) -> None:
        if step in self.wanted and (not self.found or self.found[-1]["step"] != step):
            assert isinstance(module, NanoGPT)
            self.found.append({"step": step, **self.observe(module)})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(0, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._look(trainer.global_step, pl_module)


def train(setting: Setting, observe: Observer) -> list[dict[str, Any]]:
    """Train one model; what was seen of it, by step."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    size, at_once, task = setting.batch_size, min(setting.batch_size, MOST_AT_ONCE), setting.sizes
    seed_everything(setting.seed, verbose=False)
    data = ModularArithmetic(32_768, task.length, at_once, task.vocab, num_val_sequences=1, seed=setting.seed)
    module = NanoGPT(
        recipe="rope",
        num_layers=2,
        num_heads=4,
        width=WIDTH,
        block_size=task.length,
        vocab_size=task.vocab,
        learning_rate=RATE * (size / 32) ** 0.5,
        cooldown=1e-6,
        warmup_steps=task.warmup_tokens // (size * task.length),
        switches={"tied_head": False},
    )
    looks = _Looks(setting, observe)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=setting.num_steps,
        accumulate_grad_batches=size // at_once,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[looks],
    )
    trainer.fit(module, data)
    return looks.found


def done(setting: Setting, work: Path) -> list[dict[str, Any]] | None:
    """What is kept of a run; None where it was not made, or with other sizes."""
    path = work / f"{setting.name}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    return kept["looks"] if kept.get("setting") == facts(setting) else None


def facts(setting: Setting) -> dict[str, Any]:
    """What a run is, as JSON has it."""
    sizes = {**setting.sizes._asdict(), "steps": setting.num_steps}
    return asdict(setting) | sizes


def train_all(wanted: Iterable[Setting], work: Path, tell: Any) -> None:
    """Train what is missing, one after the other, and keep each as it ends."""
    work.mkdir(parents=True, exist_ok=True)
    for setting in wanted:
        if done(setting, work) is None:
            text = json.dumps({"setting": facts(setting), "looks": train(setting, Observer(setting.sizes))})
            path = work / f"{setting.name}.json"
            path.with_suffix(".part").write_text(text)
            path.with_suffix(".part").replace(path)
            tell(f"{setting.name}: done")
