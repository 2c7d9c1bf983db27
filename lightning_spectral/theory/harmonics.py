"""Which harmonics of a cycle a model's features are made of."""

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_spectral.functional.arguments import check_real, describe


def harmonic_energy(state_means: Tensor) -> Tensor:
    r"""Energy of each harmonic in the mean features of the states of a cycle.

    With :math:`H[m] = E[h \mid \text{state } m]`, m = 0 ... c - 1, less their mean,
    :math:`E_r = \sum_{\text{channels}} |F_r|^2` of the unitary discrete Fourier transform over m: what of
    :math:`\sum_m |H[m]|^2` goes r times round in a cycle. As features are real, :math:`E_{c - r} = E_r`.

    Args:
        state_means: ``(c, d)`` mean features of each state.

    Returns:
        ``(c,)`` float64; the first is 0.

    Raises:
        ValueError: If it is no matrix of finite real numbers of at least two states.

    References:
        Nanda, Chan, Lieberum et al., *Progress measures for grokking via mechanistic interpretability*, arXiv
        2301.05217 (2023), for the Fourier modes of modular arithmetic.

    Example:
        >>> import torch
        >>> energy = harmonic_energy(torch.tensor([[1.0], [0.0], [-1.0], [0.0]]))  # a cosine, once round
        >>> [round(value, 6) for value in energy.tolist()]
        [0.0, 1.0, 0.0, 1.0]
    """
    check_real(state_means=state_means)
    if state_means.ndim != 2 or state_means.shape[0] < 2 or not state_means.shape[1]:
        raise ValueError(
            f"state_means must be (states, channels) with two states or more, and a channel, "
            f"got {tuple(state_means.shape)}"
        )
    means = state_means.detach().to(torch.float64)
    if not bool(means.isfinite().all()):
        raise ValueError("state_means must be finite: leave out the cycle of a state that was never seen")
    energy = torch.fft.fft(means - means.mean(0), dim=0, norm="ortho").abs().square().sum(-1)
    energy[0] = 0.0
    return energy


def band_concentration(energy: Tensor, harmonics: Iterable[int]) -> float:
    r"""Share of the energy that lies in a task's harmonics, :math:`H_S = \sum_{r \in S} E_r / \sum_r E_r`.

    Args:
        energy: ``(c,)`` of :func:`harmonic_energy`.
        harmonics: S; r stands for c - r too, and counts once.

    Returns:
        From 0 to 1; NaN where there is no energy. Features without order have about the size of S, mirrored, over
        c - 1.

    Raises:
        ValueError: If a harmonic is no whole number from 1 to c - 1.

    Example:
        >>> import torch
        >>> band_concentration(torch.tensor([0.0, 3.0, 2.0, 3.0]), [1])
        0.75
    """
    check_real(energy=energy)
    if energy.ndim != 1:
        raise ValueError(f"energy must be a vector, got shape {tuple(energy.shape)}")
    num = len(energy)
    chosen = set()
    if not isinstance(harmonics, Iterable) or (isinstance(harmonics, Tensor) and harmonics.ndim == 0):
        raise ValueError(f"harmonics must be a list of whole numbers, got {describe(harmonics)}: write e.g. [1]")
    for harmonic in harmonics:
        if not isinstance(harmonic, int) or isinstance(harmonic, bool) or not 1 <= harmonic < num:
            raise ValueError(f"harmonics must be whole numbers from 1 to {num - 1}, got {describe(harmonic)}")
        chosen |= {harmonic, num - harmonic}
    return float(energy[sorted(chosen)].sum() / energy[1:].sum())
