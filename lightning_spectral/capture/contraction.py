"""What a layer's input and the gradient of its output say about each sample's gradient of its parameters."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_spectral.capture.one_line import reason_of
from lightning_spectral.capture.precision import SHORT, has_reduced_products, ieee_products
from lightning_spectral.capture.reparametrised import sources_of, used_as

CHECK_TOLERANCE = 1e-3
"""Share of a gradient that may come from elsewhere than the layers that use the parameter."""

CHECK_TOLERANCE_IN_SHORT = 0.05
"""Likewise where layers compute in 16 bits, or multiply in as few: their rounding is below 0.01."""

NOT_OF_LAYERS = (
    "its gradient is not the sum of what its own layers gave: it is used outside them or penalised, or they ran in a "
    "pass beside; use method='vmap'"
)

NO_MORE_THAN_ROUNDING = "its gradient is zero up to rounding"

ZERO = 1e-6
"""Gradient, relative to what was summed to it, that is rounding: of a key's bias, say, which softmax does not see."""

ROUNDING = 1e-5
"""Of a sum of rows in float32, relative to what rows that cancel would sum to if they were at right angles."""


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies its input with a weight matrix.

    True for ``nn.Linear``, the ``Conv1D`` of transformers and their subclasses.
    """
    return isinstance(module, nn.Linear) or (
        any(base.__name__ == "Conv1D" for base in type(module).__mro__)
        # Not the attribute: one that is made of parameters would be computed.
        and any(weight.ndim == 2 for weight in sources_of(module, "weight").values())
    )


def contracts(module: nn.Module, parameter: str) -> bool:
    """Whether :func:`contract` can give the rows of a module's parameter, ``weight`` for example.

    True for weight and bias of linear layers, and for the weight of a plain embedding, pruned ones too.
    """
    parameter, _ = used_as(module, parameter)
    if is_linear(module):
        return parameter in ("weight", "bias")
    return (
        isinstance(module, nn.Embedding)
        and parameter == "weight"
        and not (module.scale_grad_by_freq or module.sparse or module.max_norm)
    )


def owners(root: nn.Module, parameter: nn.Parameter) -> list[tuple[nn.Module, str]]:
    """The modules that hold a parameter, several for a tied one, each with its name for it, in the tree's order."""
    return [
        (module, name)
        for module in root.modules()
        for name, held in module.named_parameters(recurse=False, remove_duplicate=False)
        if held is parameter
    ]


def contract(
    module: nn.Module, parameter: str, x: Tensor, grad: Tensor, out: Tensor, add: bool, scale: float = 1.0
) -> None:
    r"""Per-sample gradients of a parameter: one contraction over everything but samples and channels.

    For :math:`y = x W^\top + c` the gradients of sample b are :math:`\sum_t g_{bt} x_{bt}^\top` and
    :math:`\sum_t g_{bt}`.

    Args:
        module: A layer that :func:`contracts` accepts.
        parameter: Its own name in the module.
        x: The layer's input, ``(B, ..., d_in)``; indices ``(B, ...)`` of an embedding.
        grad: Gradient of its output, ``(B, ..., d_out)``.
        out: ``(B, P)`` written in place; float32 or float64.
        add: Add to what is there: a shared layer runs several times for each sample.
        scale: Factor on the gradient.
    """
    used, mask = used_as(module, parameter)
    if mask is not None:
        # By the chain rule through the product with the mask.
        rows = torch.empty_like(out) if add else out
        contract(module, used, x, grad, rows, False, scale)
        rows.mul_(mask.flatten())
        if add:
            out.add_(rows)
        return
    num_samples, width = len(grad), grad.shape[-1]
    grad = grad.reshape(num_samples, -1, width).to(out.dtype)
    if isinstance(module, nn.Embedding):
        _scatter(module, x.reshape(num_samples, -1), grad * scale, out, add)
    elif parameter == "bias":
        torch.add(out if add else torch.zeros_like(out), grad.sum(1), alpha=scale, out=out)
    else:
        x = x.reshape(num_samples, -1, x.shape[-1]).to(out.dtype)
        left, right = (grad, x) if isinstance(module, nn.Linear) else (x, grad)
        rows = out.view(num_samples, left.shape[-1], right.shape[-1])
        torch.baddbmm(rows, left.mT, right, beta=int(add), alpha=scale, out=rows)


class LayerRows:
    """One batch's rows of several parameters, filled as the gradients of layers' outputs come by.

    Args:
        num_samples: Samples B in the batch.
        out: ``(b, P)`` by name, where the rows of the first b samples go; float32 or float64. Asked for when a name's
            first rows come by.
        scale: Factor that makes a row the gradient of its sample's own loss: B times the number of accumulated batches
            for a mean over the batch, over the loss scale.
        batch_dim: Axis of samples of what a layer takes and gives, if it is as long as there are samples; else 0.
    """

    def __init__(self, num_samples: int, out: Mapping[str, Tensor], scale: float, batch_dim: int = 0) -> None:
        self.batch_dim = batch_dim
        self.num_samples = num_samples
        self.out = out
        self.scale = scale
        self.seen: set[str] = set()
        """Names whose rows have been written."""
        self.failures: dict[str, str] = {}
        """Why rows could not be had, by name."""
        self.final: set[str] = set()
        """Names of which further passes are of no concern: their optimizer has taken its gradient."""
        self.stale: set[str] = set()
        """Names whose gradient was set to zero since their rows were written: the next pass begins them anew."""
        self.axes: dict[str, set[tuple[int, int]]] = {}
        """By name, how many axes outputs had, and which of them was taken for that of samples."""
        self.unclear: set[str] = set()
        """Names of layers that gave as many of something else, or may have: of positions, say."""
        self.misfits: dict[str, str] = {}
        """Of failures those of layers of which no axis is as long as the batch."""
        self._sizes: dict[str, Tensor] = {}
        self._is_zero: dict[str, Tensor] = {}
        self._short: set[str] = set()
        self._rest: dict[str, Tensor] = {}
        self._is_missed: dict[str, Tensor] = {}

    def add(self, name: str, module: nn.Module, attribute: str, x: Tensor, grad: Tensor) -> None:
        """Take in one run of one layer; a failure is noted, never raised: a backward pass may be under way.

        ``attribute`` is the parameter's name in the layer, ``x`` its input and ``grad`` the gradient of its output.
        """
        if name in self.failures or name in self.final:
            return
        if name in self.stale:
            self.stale.remove(name)
            self.seen.discard(name)
        try:
            out = self.out[name]
            axis = 0
            if self.batch_dim and grad.shape[self.batch_dim : self.batch_dim + 1] == (self.num_samples,):
                axis = self.batch_dim
                x, grad = x.movedim(axis, 0), grad.movedim(axis, 0)
            if grad.ndim < 2 or not len(x) == len(grad) == self.num_samples:
                self.misfits[name] = self.failures[name] = (
                    f"the first axis of its layer's input {tuple(x.shape)} and output {tuple(grad.shape)} is not the "
                    f"batch of {self.num_samples} samples: use method='vmap'"
                )
                return
            with torch.no_grad(), torch.autocast(grad.device.type, enabled=False), ieee_products():
                contract(module, attribute, x[: len(out)], grad[: len(out)], out, name in self.seen, self.scale)
                if len(out) < self.num_samples:
                    self._add_rest(name, module, attribute, x[len(out) :], grad[len(out) :], out)
            self.seen.add(name)
            self.axes.setdefault(name, set()).add((grad.ndim, axis))
            if x.ndim == 1 or (grad.ndim > 2 and grad.shape[1] == self.num_samples):
                self.unclear.add(name)
            # What rows of any sign may add up to, up to rounding.
            size = _norm(grad) * (1.0 if attribute == "bias" or not x.is_floating_point() else _norm(x))
            self._sizes[name] = self._sizes.get(name, 0.0) + size
            if grad.dtype in SHORT or has_reduced_products(grad.device, module):
                self._short.add(name)
        except Exception as error:
            self.failures[name] = reason_of(error)

    def _add_rest(self, name: str, module: nn.Module, attribute: str, x: Tensor, grad: Tensor, out: Tensor) -> None:
        """Of samples whose rows are not wanted the sum: as if they were one."""
        if name not in self._rest:
            self._rest[name] = out.new_empty(1, out.shape[1])
        contract(module, attribute, x.unsqueeze(0), grad.unsqueeze(0), self._rest[name], name in self.seen, self.scale)

    def compare(self, name: str, gradient: Tensor) -> None:
        """Compare rows with the gradient of the whole batch, of which all samples' are the parts; see :meth:`settle`.

        A weight that is also used outside its layers, as an embedding is by a tied head written with ``F.linear``, gets
        gradient that no layer saw; and a forward pass whose gradient is asked of something else gives rows beside it.
        """
        if name in self.failures or name not in self.seen:
            return
        rows = self.out[name]
        total = rows.sum(0)
        if name in self._rest:
            total += self._rest[name][0]
        expected = gradient.flatten().to(rows)
        limit = (CHECK_TOLERANCE_IN_SHORT if name in self._short else CHECK_TOLERANCE) * expected.norm()
        some = rows[:: max(1, len(rows) // 8)]  # enough for the size of what rounds
        limit = limit + ROUNDING * some.norm() * math.sqrt(len(rows) / len(some)) / abs(self.scale)
        # To be read later: a GPU need not be waited for within a backward pass.
        self._is_missed[name] = (total / self.scale - expected).norm() > limit
        self._is_zero[name] = expected.norm() < ZERO * self._sizes[name]

    def settle(self) -> None:
        """Note as failures the names whose rows have been seen not to add up."""
        for name, is_missed in self._is_missed.items():
            if bool(is_missed):
                self.failures.setdefault(name, NO_MORE_THAN_ROUNDING if self._is_zero[name] else NOT_OF_LAYERS)
        self._is_missed.clear()


def _norm(tensor: Tensor) -> Tensor:
    """Frobenius norm, detached, which in 16 bits would overflow."""
    return torch.linalg.vector_norm(tensor.detach(), dtype=torch.promote_types(tensor.dtype, torch.float32))


def _scatter(module: nn.Embedding, indices: Tensor, grad: Tensor, out: Tensor, add: bool) -> None:
    num_samples, width = len(grad), grad.shape[-1]
    if module.padding_idx is not None:
        grad = grad.masked_fill((indices == module.padding_idx).unsqueeze(-1), 0.0)
    if not add:
        out.zero_()
    offsets = torch.arange(num_samples, device=indices.device).unsqueeze(-1) * module.num_embeddings
    rows = out.view(num_samples * module.num_embeddings, width)
    rows.index_add_(0, (indices + offsets).flatten(), grad.reshape(-1, width))
