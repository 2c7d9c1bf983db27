"""The eigenvalues of a covariance as a metric that accumulates, merges and synchronises exactly."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric
from typing_extensions import override

from lightning_spectral.functional.arguments import check_rows, describe
from lightning_spectral.functional.moments import Moments, moments, pool
from lightning_spectral.functional.spectrum import spectrum_or_warning
from lightning_spectral.metrics.reduction import reduce_packed

MAX_FEATURES = 2**16


class CovarianceSpectrum(Metric):
    """Eigenvalues of the covariance of all rows seen, centred and accumulated in float64.

    The state is one tensor: count, mean and centred outer sum. Each update is centred about its own mean and merged, so
    that neither a large nor a drifting mean costs digits. Ranks synchronise in a single all-reduce. The precision of
    the state does not follow the module's: casting a model to bfloat16 leaves it in float64.

    Args:
        num_features: Length d of a row, at least 1.
        kwargs: Keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``num_features`` is not an int from 1 to 65,536, whose covariance takes 32 GiB.

    Example:
        >>> import torch
        >>> metric = CovarianceSpectrum(num_features=2)
        >>> metric.update(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))
        >>> metric.update(torch.tensor([[4.0, 1.0]]))
        >>> metric.compute()
        tensor([4., 0.], dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    packed: Tensor

    def __init__(self, num_features: int, **kwargs: Any) -> None:
        if isinstance(num_features, bool) or not isinstance(num_features, int) or not 1 <= num_features <= MAX_FEATURES:
            raise ValueError(
                f"num_features must be a positive int, the length of a row, got {describe(num_features)}: "
                f"at most {MAX_FEATURES}"
            )
        # torchmetrics' own gather costs a barrier and W copies of every state; one sum is exact.
        kwargs.setdefault("dist_sync_fn", partial(_sync, num_features=num_features))
        super().__init__(**kwargs)
        self.num_features = num_features
        empty = torch.zeros(1 + num_features + num_features**2, dtype=torch.float64)
        self.add_state("packed", default=empty, dist_reduce_fx=partial(_merge, num_features=num_features))

    @override
    def update(self, x: Tensor) -> None:
        """Add rows.

        Args:
            x: ``(..., num_features)``, any floating dtype; all leading axes are rows.

        Raises:
            ValueError: If the last axis has another length, or the rows are of no floating type.
        """
        check_rows("x", x)
        if x.ndim == 0 or x.shape[-1] != self.num_features:
            raise ValueError(f"x must have {self.num_features} features in its last axis, got shape {tuple(x.shape)}")
        block = moments(x.detach().to(self.packed.device).reshape(-1, self.num_features))
        self.packed = _merge(torch.stack([self.packed, _pack(block)]), self.num_features)

    @override
    def compute(self) -> Tensor:
        """Eigenvalues of the covariance of all rows, on all ranks the same.

        Returns:
            ``(num_features,)`` float64, descending (torchmetrics makes a lone one ``()``); NaN, with a warning that
            says why, for fewer than two rows, for rows that are not finite and where the eigensolver fails.
        """
        return spectrum_or_warning(_unpack(self.packed, self.num_features), "CovarianceSpectrum.compute")

    @override
    def merge_state(self, incoming_state: "dict[str, Any] | Metric") -> None:
        """Add the rows of another metric, as if this one had seen them.

        Args:
            incoming_state: A CovarianceSpectrum of as many features, or its state by name.

        Raises:
            ValueError: If it has another number of features.
        """
        state = incoming_state if isinstance(incoming_state, dict) else getattr(incoming_state, "__dict__", {})
        packed = state.get("packed")
        if isinstance(packed, Tensor) and packed.shape != self.packed.shape:
            expected, got = self.packed.numel(), packed.numel()
            raise ValueError(f"incoming_state must have {self.num_features} features, {expected} numbers, got {got}")
        super().merge_state(incoming_state)
        # torchmetrics leaves both as they were: compute() would return its cache, or warn of a metric never updated.
        self._computed = None
        self._update_count += 1

    @override
    def _apply(self, fn: Any, exclude_state: Any = ("",)) -> Module:
        # A module's .to(torch.bfloat16) reaches its metrics too: follow the move, refuse the cast.
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, exclude_state)


def _sync(packed: Tensor, group: Any = None, *, num_features: int) -> list[Tensor]:
    """What torchmetrics calls in the place of its gather; one reduced state stands for the list of all."""
    return [reduce_packed(packed, num_features, group)]


def _merge(packed: Tensor, num_features: int) -> Tensor:
    """One packed state for a stack of them, ``(K, 1 + d + d * d)``: how batches, metrics and ranks are merged."""
    return _pack(pool(_unpack(packed, num_features)))


def _pack(sample: Moments) -> Tensor:
    return torch.cat([sample.num_rows.reshape(1), sample.mean, sample.scatter.flatten()])


def _unpack(packed: Tensor, num_features: int) -> Moments:
    scatter = packed[..., 1 + num_features :].unflatten(-1, (num_features, num_features))
    return Moments(packed[..., 0], packed[..., 1 : 1 + num_features], scatter)
