"""Where rows of per-sample gradients wait for their report: in the type and on the device that were asked for."""

import torch
from torch import Tensor


class RowStore:
    """Rows of several parameters, up to a number of samples; memory is taken with the first and given back at the end.

    Args:
        sizes: Numbers P of each parameter.
        capacity: Samples at the most.
        dtype: In which rows are kept.
        device: Where rows are kept.
        compute_device: Where rows are made.
    """

    def __init__(
        self,
        sizes: dict[str, int],
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        compute_device: torch.device,
    ) -> None:
        self.sizes = sizes
        self.capacity = capacity
        self.dtype = dtype
        self.count = 0
        """Samples whose rows are there."""
        self._device = device
        self._compute_device = compute_device
        self._compute_dtype = torch.promote_types(dtype, torch.float32)
        self._kept: dict[str, Tensor] = {}
        self._open: dict[str, Tensor] = {}

    @property
    def room(self) -> int:
        """Samples that still fit."""
        return self.capacity - self.count

    def open(self, num_samples: int) -> dict[str, Tensor]:
        """Where to write the rows of some samples, in float32 or float64 on the device that makes them.

        Args:
            num_samples: b, no more than there is ``room`` for.

        Returns:
            ``(b, P)`` by name: the store itself where type and device agree.
        """
        if not self._kept:
            for name, size in self.sizes.items():
                self._kept[name] = torch.empty(self.capacity, size, dtype=self.dtype, device=self._device)
        is_direct = self._compute_dtype == self.dtype and self._compute_device == self._device
        stop = self.count + num_samples
        self._open = {
            name: kept[self.count : stop]
            if is_direct
            else torch.empty(num_samples, kept.shape[1], dtype=self._compute_dtype, device=self._compute_device)
            for name, kept in self._kept.items()
        }
        return self._open

    def commit(self) -> None:
        """Keep what was written since :meth:`open`."""
        for name, rows in self._open.items():
            target = self._kept[name][self.count : self.count + len(rows)]
            if target.data_ptr() != rows.data_ptr():
                target.copy_(rows)
        self.count += len(next(iter(self._open.values()), ()))
        self._open = {}

    def take(self, name: str) -> Tensor:
        """The rows of one parameter; the store lets go of them.

        Args:
            name: The parameter.

        Returns:
            ``(count, P)``; empty where nothing was ever written.
        """
        kept = self._kept.pop(name, None)
        if kept is None:
            return torch.empty(0, self.sizes[name], dtype=self.dtype, device=self._device)
        return kept[: self.count]

    def clear(self) -> None:
        """Give all memory back."""
        self._kept, self._open, self.count = {}, {}, 0
