"""Which layers have time first, told by a forward pass of one sample where lengths cannot tell."""

from collections.abc import Mapping

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
    copied = {name: loss.shadow.get_submodule(paths[id(layer)]) for name, layer in layers.items()}
    with loss.isolated(batch):
        shapes = {name: found[0] for name, found in shapes_of(loss, copied, batch, 1).items()}
    known = {name: shape[:2] for name, shape in shapes.items() if len(shape) > 2 and (shape[0] == 1) != (shape[1] == 1)}
    return {name: shape[1] == 1 for name, shape in known.items()}


def shapes_of(
    loss: BatchLoss, layers: Mapping[str, nn.Module], batch: Cut, size: int
) -> dict[str, list[tuple[int, ...]]]:
    """Shapes of what layers give for the first samples of a batch, run by run; called inside the loss's isolation.

    Args:
        loss: Of a shadow.
        layers: Modules of the shadow by name.
        batch: Of samples.
        size: How many of them.
    """
    shapes: dict[str, list[tuple[int, ...]]] = {}

    def keep(name: str, output: object) -> None:
        shapes.setdefault(name, []).append(tuple(hidden_states(output).shape))

    handles = []
    for name, layer in layers.items():
        hook = lambda _, __, output, name=name: keep(name, output)  # noqa: E731
        handles.append(layer.register_forward_hook(hook))
    try:
        # Not without gradients: a step may ask for some itself.
        loss(batch.part(0, size))
        # What hooks have filled is put back, too.
        return {name: list(found) for name, found in shapes.items()}
    finally:
        for handle in handles:
            handle.remove()
        loss.reset()


def is_square(mask: Tensor, num_samples: int | None) -> bool:
    """Whether a mask looks the same with its axes turned: as many samples as positions."""
    return mask.ndim >= 2 and mask.shape[0] == mask.shape[1] == num_samples and num_samples > 1
