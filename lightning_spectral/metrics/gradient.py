"""The singular values of per-sample gradients as a metric that accumulates, merges and synchronises exactly."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from typing_extensions import override

from lightning_spectral.functional.arguments import check_flag, check_rows
from lightning_spectral.functional.singular import singular_spectrum
from lightning_spectral.functional.spectrum import eigenvectors
from lightning_spectral.metrics.exchange import gram_share, sum_over_ranks
from lightning_spectral.metrics.reduction import gather_numbers


class PerSampleGradientSpectrum(Metric):
    r"""Singular values of the matrix whose rows are the gradients of single samples.

    The state is the rows. When ranks synchronise they exchange columns, so that no rank holds all rows; what stands for
    them is a factor F of their Gram matrix, :math:`F F^\top = G G^\top`, with as many rows and the same singular
    values: those of one process with all rows.

    Args:
        centred: Subtract the mean row first. *Spectral Lens* (arXiv 2605.05683) does not.
        kwargs: Keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``centred`` is neither True nor False.

    Example:
        >>> import torch
        >>> metric = PerSampleGradientSpectrum()
        >>> metric.update(torch.tensor([[3.0, 0.0, 0.0]]))
        >>> metric.update(torch.tensor([[0.0, 4.0, 0.0]]))
        >>> metric.compute()
        tensor([4., 3.], dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    rows: list[Tensor] | Tensor

    def __init__(self, centred: bool = False, **kwargs: Any) -> None:
        check_flag(centred=centred)
        kwargs.setdefault("dist_sync_fn", _factor_of_all_ranks)
        super().__init__(**kwargs)
        self.centred = centred
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    @override
    def update(self, g: Tensor) -> None:
        """Add the gradients of some samples.

        Args:
            g: ``(samples, P)``, any floating dtype; kept as it is.

        Raises:
            ValueError: If it is no matrix of a floating type, or has another number of columns than before.
        """
        check_rows("g", g)
        assert isinstance(self.rows, list)
        # Of the rows themselves, so that merged and loaded ones count.
        columns = self.rows[0].shape[1] if self.rows else "P"
        if g.ndim != 2 or (self.rows and g.shape[1] != columns):
            raise ValueError(f"g must have shape (samples, {columns}), got {tuple(g.shape)}: flatten each gradient")
        self.rows.append(g.detach().to(self.device))

    @override
    def compute(self) -> Tensor:
        """Singular values of all rows, on all ranks the same; a collective where there are several.

        Returns:
            ``(min(N, P),)`` float64, descending (torchmetrics makes a lone one ``()``); NaN, with a warning that says
            why, for rows that are not finite. Empty without rows.
        """
        rows = dim_zero_cat(self.rows) if len(self.rows) else torch.zeros(0, 0)
        if rows.numel() == 0:
            return torch.zeros(0, dtype=torch.float64, device=self.device)
        return singular_spectrum(rows, self.centred)


def _factor_of_all_ranks(rows: Tensor, group: Any = None) -> list[Tensor]:
    """What torchmetrics calls in the place of its gather of all rows onto every rank."""
    rows = rows if rows.ndim == 2 else rows.new_zeros(0, 0)
    of_ranks = gather_numbers([rows.shape[0], rows.shape[1]], rows.device, group)
    counts, num_columns = [int(count) for count in of_ranks[:, 0]], int(of_ranks[:, 1].max())
    if rows.shape[0] == 0:
        rows = rows.new_zeros(0, num_columns)
    # One type for all: a rank without rows cannot know that of the others.
    gram = sum_over_ranks(gram_share(rows, counts, dtype=torch.float64, group=group), group)
    values, vectors = eigenvectors(gram, min(len(gram), num_columns))
    return [vectors * values[: vectors.shape[1]].sqrt()]
