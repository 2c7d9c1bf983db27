"""Whether the axis that rows by hooks take for that of samples is that, and not one as long by chance."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from torch import nn

from lightning_spectral.capture.batch import Cut
from lightning_spectral.capture.contraction import LayerRows, owners
from lightning_spectral.capture.shadow import BatchLoss
from lightning_spectral.capture.time_first import shapes_of

UNKNOWN_AXIS = (
    "its rows may be of samples or of as many others, positions say, and no pass of one sample could be made to tell: "
    "give batch_dim, 0 for samples first"
)

NOT_RUN = (
    "its rows may be of samples or of as many others, tokens of an expert say, for its layer did not run for the first "
    "samples alone: give batch_dim, 0 for samples first, or use method='vmap'"
)


class AxesFound(NamedTuple):
    """Whether the axis that is taken for that of samples is that, by name of the parameter."""

    right: set[str]
    wrong: dict[str, str]
    """With the reason."""


def axes_of_samples(
    loss: BatchLoss, parameters: Mapping[str, nn.Parameter], axes: Mapping[str, set[tuple[int, int]]], batch: Cut
) -> AxesFound:
    """Tell an axis of samples from one that is as long as the batch by chance, of positions or of an expert's tokens.

    Of one sample alone it is of length one, of two of length two, and of all but one of as many. What then does not run
    is in neither answer. To be called inside the loss's isolation.

    Args:
        loss: Of a shadow.
        parameters: Of the shadow, by name.
        axes: By name, how many axes outputs of their layers had, and which of them was taken for that of samples.
        batch: Of some samples, the more the better.
    """
    layers = {
        f"{number}.{name}": module
        for name, parameter in parameters.items()
        for number, (module, _) in enumerate(owners(loss.shadow, parameter))
    }
    right, wrong = set(parameters), dict[str, str]()
    for size in sorted({1, 2, batch.size - 1} & set(range(1, batch.size + 1))):
        ran = set()
        for key, shapes in shapes_of(loss, layers, batch, size).items():
            name = key.partition(".")[2]
            ran.add(name)
            for shape in shapes:
                taken = {axis for num_axes, axis in axes.get(name, ()) if num_axes == len(shape)}
                if taken and not any(shape[axis] == size for axis in taken):
                    wrong[name] = (
                        f"for {size} of its samples alone its layer gives {shape}, so axis {min(taken)}, as long as "
                        "the batch, is not that of samples: give batch_dim, or use method='vmap'"
                    )
        right &= ran
    return AxesFound(right - wrong.keys(), wrong)


Ask = Callable[[set[str], Mapping[str, set[tuple[int, int]]]], AxesFound]


class SampleAxes:
    """What has been seen so far of the axes of what layers give, by name of the parameter.

    Args:
        is_said: Whether a user says which axis is that of samples: what cannot be told then passes.
    """

    def __init__(self, is_said: bool) -> None:
        self.can_ask = True
        """Whether passes could be made, or have not been tried yet."""
        self._is_said = is_said
        self._right: set[str] = set()
        self._misfits: dict[str, str] = {}
        self._axes: dict[str, set[tuple[int, int]]] = {}
        self._unclear: set[str] = set()

    def note(self, rows: LayerRows) -> None:
        """A batch has passed; once an axis was not as long as the batch, it is of something else for good."""
        self._misfits |= rows.misfits
        self._unclear |= rows.unclear
        for name, axes in rows.axes.items():
            self._axes.setdefault(name, set()).update(axes)

    def is_worth_asking(self, names: Iterable[str]) -> bool:
        """Whether of some of these it is not known, and might be."""
        return self.can_ask and not set(names) <= self._right | self._misfits.keys()

    def judge(self, names: set[str], ask: Ask | None, anyway: bool = False) -> dict[str, str]:
        """Why rows of some parameters are not, or may not be, of samples, by name.

        Args:
            names: Of those whose rows are there.
            ask: Makes passes of fewer samples, see :func:`axes_of_samples`; None, or what it raises, says that
                none can be made.
            anyway: Make them though all is known, as other ranks may that know less.
        """
        wrong = {name: reason for name, reason in self._misfits.items() if name in names}
        unknown = names - self._right - wrong.keys()
        if not unknown and not anyway:
            return wrong
        try:
            found = None if ask is None else ask(unknown, self._axes)
        except Exception:  # whatever a model does with a batch of one
            found = None
        self.can_ask = found is not None
        if found is not None:
            self._right |= found.right
            self._misfits |= found.wrong
            wrong |= found.wrong
            unknown = unknown - found.right - found.wrong.keys()
        if not self._is_said:
            # Of an output with more axes the first may be of anything only if the batch does not tell it from others.
            is_flat = {name for name in unknown for num_axes, _ in self._axes.get(name, ()) if num_axes == 2}
            reason, doubted = (UNKNOWN_AXIS, set()) if found is None else (NOT_RUN, is_flat)
            wrong |= dict.fromkeys(unknown & (doubted | self._unclear), reason)
        return wrong
