"""Which layers have time first, told by a forward pass of one sample where lengths cannot tell."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_spectral.capture.activations import hidden_states
from lightning_spectral.capture.batch import Cut
from lightning_spectral.capture.shadow import BatchLoss


def time_first(loss: BatchLoss, module: nn.Module, layers: Mapping[str, nn.Module], batch: Cut) -> dict[str, bool]:
    """Whether the samples are on the second axis of layers' outputs, by name; without those that do not tell.

    A batch as long as its sequences gives outputs whose first two axes are equal. Of one sample, on a shadow of the
    module, the axis of samples is of length one.

    Args:
        loss: Of a shadow of the module.
        module: The tree that the layers are in.
        layers: Modules by name.
        batch: Of which the first sample is taken.
    """
    paths = {id(part): path for path, part in module.named_modules()}
    shapes: dict[str, tuple[int, ...]] = {}

    def keep(name: str, output: object) -> None:
        shapes.setdefault(name, tuple(hidden_states(output).shape))

    handles = []
    for name, layer in layers.items():
        copied = loss.shadow.get_submodule(paths[id(layer)])
        hook = lambda _, __, output, name=name: keep(name, output)  # noqa: E731
        handles.append(copied.register_forward_hook(hook))
    try:
        with loss.isolated(batch), torch.no_grad():
            loss(batch.part(0, 1))
            seen = dict(shapes)  # what hooks have filled is put back, too
    finally:
        for handle in handles:
            handle.remove()
    known = {name: shape[:2] for name, shape in seen.items() if len(shape) > 2 and (shape[0] == 1) != (shape[1] == 1)}
    return {name: shape[1] == 1 for name, shape in known.items()}


def is_square(mask: Tensor, num_samples: int | None) -> bool:
    """Whether a mask looks the same with its axes turned: as many samples as positions."""
    return mask.ndim >= 2 and mask.shape[0] == mask.shape[1] == num_samples and num_samples > 1
