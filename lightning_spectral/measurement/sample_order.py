"""Where the samples of a batch are in outputs of layers, and which of their tokens a mask keeps."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lightning_spectral.capture.batch import tensors
from lightning_spectral.capture.channels import rows_last
from lightning_spectral.capture.masks import Mask, Meaning, fit_rows
from lightning_spectral.capture.time_first import is_square


class SampleOrder:
    """Rows of outputs as they are collected: channels last, samples first where it is known where they are.

    Samples are on ``batch_dim``, where it is given; else on the axis as long as there are samples. Where two axes are,
    a pass of one sample tells, and where none can be made a mask is refused and rows are of nobody knows which sample.

    Args:
        batch_dim: Axis of the samples; None if nothing says.
        mask: Key of the batch under which its mask is; None for all tokens.
        ask: Gives, by a pass of the first sample of a batch, whether a layer's samples are on its second axis, by name.
        fail: Takes note that a batch cannot be read, one odd one among many.
    """

    def __init__(
        self,
        batch_dim: int | None,
        mask: str | None,
        ask: Callable[[Any], Mapping[str, bool]],
        fail: Callable[[Exception], None],
    ) -> None:
        self.mask: Tensor | None = None
        """Of the batch under way, samples first where it is known where they are."""
        self._batch_dim = batch_dim
        self._key = mask
        self._reader = None if mask is None else Mask(mask)
        self._ask, self._fail = ask, fail
        self._size = 0
        self._is_time_first: Mapping[str, bool] | None = None
        """By layer, without those that do not tell; None before it was asked."""
        self._has_seen_mask = False
        self._has_seen_square = False

    @property
    def meaning(self) -> Meaning | None:
        """What the mask's values mean, once a batch has told; None for booleans, which need no telling, too."""
        return None if self._reader is None else self._reader.meaning

    def begin_batch(self, batch: Any, size: int | None, is_read: bool) -> None:
        """Look at a batch before the model sees it.

        Args:
            batch: Of the step.
            size: Its samples; None if they cannot be counted.
            is_read: Whether rows of it may be collected; else it has no mask.

        Raises:
            ValueError: For a mask that the first batch does not have, or of which nothing tells where its samples are.
        """
        self._size = size or 0
        self.mask = self._mask_of(batch) if is_read else None
        if is_read and self._may_be_square(batch):
            try:
                self._is_time_first = self._ask(batch)
            except Exception:  # whatever the step makes of one sample
                self._is_time_first = {}

    def rows(self, name: str, output: Tensor, axis: int) -> Tensor:
        """The rows of a layer's output, ``(..., width)``.

        Args:
            name: Of the layer.
            output: Of the batch under way.
            axis: Of the channels.

        Raises:
            ValueError: For a mask that does not fit.
        """
        rows = rows_last(output, axis)
        if (batch_dim := self._batch_dim) is not None:
            if batch_dim and batch_dim < rows.ndim - 1 and rows.shape[batch_dim] == self._size:
                rows = rows.movedim(batch_dim, 0)
            return rows if self.mask is None else fit_rows(rows, self.mask, False)
        is_time_first = (self._is_time_first or {}).get(name)
        if self.mask is not None:
            return fit_rows(rows, self.mask, bool(is_time_first))
        # Of maps with channels first, and of more axes, samples are the first.
        if self._size < 2 or rows.ndim != 3 or axis != output.ndim - 1 or rows.shape[1] != self._size:
            return rows
        if is_time_first:
            return rows.transpose(0, 1)
        if is_time_first is None and rows.shape[0] == self._size:
            self._has_seen_square = True
            return rows.unsqueeze(0)  # one sample of nobody knows what
        return rows

    def _mask_of(self, batch: Any) -> Tensor | None:
        if self._reader is None:
            return None
        try:
            mask = self._reader(batch)
        except Exception as error:
            if isinstance(error, ValueError) and not self._has_seen_mask:
                raise
            # One odd batch among many costs a report, not the run.
            self._fail(error)
            return None
        self._has_seen_mask = True
        axis = self._batch_dim
        if axis and mask.shape[axis : axis + 1] == (self._size,):
            return mask.movedim(axis, 0)
        if axis is None and self._is_time_first is None and is_square(mask, self._size):
            self._tell_by_one_sample(batch, mask)
        return mask

    def _tell_by_one_sample(self, batch: Any, mask: Tensor) -> None:
        """Settle where samples are if a mask fits outputs either way; ValueError if nothing settles it."""
        try:
            self._is_time_first = self._ask(batch)
        except Exception as error:  # whatever the step makes of one sample
            raise ValueError(
                f"batch_dim must say where samples are, for mask={self._key!r} {tuple(mask.shape)} fits either "
                f"way, and a pass of one sample does not tell ({str(error).partition(chr(10))[0]}): give batch_dim=0, "
                f"or batches of another size than {len(mask)}"
            ) from error

    def _may_be_square(self, batch: Any) -> bool:
        """Whether outputs are, or may be, as long as there are samples, and nothing has said where samples are."""
        if self._batch_dim is not None or self._reader is not None or self._is_time_first is not None:
            return False
        size = self._size
        return size > 1 and (self._has_seen_square or any(t.shape[:2] == (size, size) for t in tensors(batch)))
