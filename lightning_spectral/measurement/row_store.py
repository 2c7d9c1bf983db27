"""Where rows of per-sample gradients wait for their report: in the type that was asked for, where there is room."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lightning_spectral.measurement.placement import CPU, Keep, Placement, placed, room
from lightning_spectral.measurement.stopwatch import settle


class RowStore:
    """Rows of several parameters, of P numbers each as ``sizes`` says by name, up to ``capacity`` samples.

    Rows are made on ``device``, and kept in ``dtype`` there or on the CPU, see :func:`placed`; copies to the CPU's
    page-locked memory are not waited for until rows are taken. A parameter's memory is taken when its first rows are
    about to be written, and given back when they are taken.
    """

    def __init__(
        self, sizes: dict[str, int], capacity: int, dtype: torch.dtype, device: torch.device, keep: Keep = "auto"
    ) -> None:
        self.sizes = sizes
        self.capacity = capacity
        self.dtype = dtype
        self.count = 0
        """Samples whose rows are there."""
        self.placement: Placement | None = None
        """Where rows are kept; None until the first are about to be written."""
        self._keep_where = keep
        self._device = device
        self._compute_dtype = torch.promote_types(dtype, torch.float32)
        self._kept: dict[str, Tensor] = {}
        self._open: _Open | None = None

    @property
    def room(self) -> int:
        """Samples that still fit."""
        return self.capacity - self.count

    def open(self, num_samples: int, by_layer: bool = False) -> Mapping[str, Tensor]:
        """Where to write the rows of b samples, ``(b, P)`` by name; b is no more than there is ``room`` for.

        In float32 or float64 on the device that makes them: the store itself where type and device agree. ``by_layer``
        says that each parameter's will be taken early, so that they never are all there at a time.
        """
        self._open = _Open(self, num_samples, by_layer and not self._kept)
        return self._open

    def _make(self, name: str, num_samples: int, by_layer: bool) -> Tensor:
        kept = self._kept.get(name)
        if kept is None:
            kept = self._kept[name] = self._room_for(self.sizes[name], by_layer)
        if self._compute_dtype == self.dtype and self._device == kept.device:
            return kept[self.count : self.count + num_samples]
        return torch.empty(num_samples, kept.shape[1], dtype=self._compute_dtype, device=self._device)

    def _room_for(self, size: int, by_layer: bool) -> Tensor:
        if self.placement is None:
            numbers = self.capacity * (max if by_layer else sum)(self.sizes.values())
            self.placement = placed(self._keep_where, numbers * self.dtype.itemsize, self._device)
        try:
            return room(self.capacity, size, dtype=self.dtype, device=self.placement.device, beside=self._device)
        except torch.OutOfMemoryError:
            if self._keep_where != "auto" or self.placement.device == CPU:
                raise
            self.placement = self.placement._replace(device=CPU)
            return room(self.capacity, size, dtype=self.dtype, device=CPU, beside=self._device)

    def commit(self) -> None:
        """Keep what was written since :meth:`open`."""
        if self._open is None:
            return
        for name, rows in self._open.made.items():
            self._keep(name, rows)
        self.count += self._open.num_samples
        self._open = None

    def _keep(self, name: str, rows: Tensor) -> None:
        target = self._kept[name][self.count : self.count + len(rows)]
        if target.data_ptr() != rows.data_ptr():
            target.copy_(rows, non_blocking=True)

    def take_early(self, name: str) -> Tensor:
        """As :meth:`take`, before :meth:`commit`, with the rows that were written since :meth:`open`.

        Nothing more may be written of that parameter.
        """
        assert self._open is not None
        stop = self.count + self._open.num_samples
        self._keep(name, self._open.made.pop(name))
        return self._settled(self._kept.pop(name)[:stop])

    def take(self, name: str) -> Tensor:
        """The rows of a parameter, ``(count, P)``, empty if none was ever written; the store lets go of them."""
        kept = self._kept.pop(name, None)
        if kept is None:
            return torch.empty(0, self.sizes[name], dtype=self.dtype, device=self._device)
        return self._settled(kept[: self.count])

    def _settled(self, rows: Tensor) -> Tensor:
        if rows.device != self._device:
            settle(self._device)
        return rows

    def clear(self) -> None:
        """Give all memory back."""
        self._kept, self._open, self.count = {}, None, 0


class _Open(Mapping[str, Tensor]):
    """Where to write rows; a parameter's memory is taken when it is first asked for."""

    def __init__(self, store: RowStore, num_samples: int, by_layer: bool) -> None:
        self.num_samples = num_samples
        self.by_layer = by_layer
        self.made: dict[str, Tensor] = {}
        self._store = store

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.made:
            self.made[name] = self._store._make(name, self.num_samples, self.by_layer)
        return self.made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._store.sizes)

    def __len__(self) -> int:
        return len(self._store.sizes)
