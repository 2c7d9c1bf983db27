"""A slow float64 twin of the activation measurement, and a recorder of what it should be given."""

from collections import defaultdict
from collections.abc import Callable

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from tests._reference import contiguous_groups, covariance_spectrum, head_share, jackknife, power_law, rankme

Samples = list[np.ndarray]
"""One layer's rows, an array ``(rows, width)`` per sample."""


class Recorder(Callback):
    """Keeps the output of every block, sample by sample, by layer, stage and step; with plain hooks of its own."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, str, int], Samples] = defaultdict(list)
        self._handles = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for index, block in enumerate(pl_module.network.blocks):
            name = f"network.blocks.{index}"
            hook = lambda _, __, output, name=name: self._keep(trainer, name, output)  # noqa: E731
            self._handles.append(block.register_forward_hook(hook))

    def _keep(self, trainer: Trainer, name: str, output: torch.Tensor) -> None:
        stage = "sanity" if trainer.sanity_checking else "validate" if trainer.validating else "train"
        self.seen[name, stage, trainer.global_step].extend(output.detach().double().numpy().copy())

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for handle in self._handles:
            handle.remove()

    def samples(self, name: str, stage: str, steps: list[int]) -> Samples:
        return [sample for step in steps for sample in self.seen[name, stage, step]]


def rms_normalized(rows: np.ndarray) -> np.ndarray:
    return rows / np.sqrt((rows**2).mean(-1, keepdims=True) + 1e-6)


def layer_values(samples: Samples, num_groups: int = 4) -> dict[str, float]:
    """What ActivationSpectrum logs of one layer with its default bands; groups are contiguous."""
    width = samples[0].shape[-1]
    tail, head = (max(1, width // 8), width // 2), (1, 10)
    normalized = [rms_normalized(sample) for sample in samples]
    groups = [np.concatenate(group) for group in contiguous_groups(normalized, num_groups)]
    spectrum = covariance_spectrum(np.concatenate(groups))

    def exponent_of(band: tuple[int, int]) -> Callable[[np.ndarray], float]:
        return lambda rows: power_law(covariance_spectrum(rows), *band)[0]

    corrected, tail_stderr = jackknife(exponent_of(tail), groups)
    _, head_stderr = jackknife(exponent_of(head), groups)
    alpha_tail, r2_tail = power_law(spectrum, *tail)
    return {
        "alpha_tail": alpha_tail,
        "alpha_tail_stderr": tail_stderr,
        "alpha_tail_corrected": corrected,
        "r2_tail": r2_tail,
        "alpha_head": power_law(spectrum, *head)[0],
        "alpha_head_stderr": head_stderr,
        "rankme": rankme(spectrum),
        "head_share": head_share(spectrum, head[1]),
        "num_tokens": float(sum(map(len, samples))),
    }
