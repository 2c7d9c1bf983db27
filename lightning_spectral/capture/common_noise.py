"""The same random numbers for every sample, alone or with others, so that their losses can be compared."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

DROPOUTS = {
    "dropout",
    "dropout_",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "alpha_dropout",
    "alpha_dropout_",
    "feature_dropout",
    "feature_dropout_",
    "feature_alpha_dropout",
    "feature_alpha_dropout_",
}
RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
"""With dropout between their layers, the one float among their arguments."""
ATTENTION_DROPOUT = 10
"""Where ``multi_head_attention_forward`` hands on its dropout; what it calls inside is out of this mode's sight."""
DRAWS = {"rand", "randn", "randint", "rand_like", "randn_like", "randint_like", "normal", "bernoulli", "poisson"}
FILLS = {"bernoulli_", "uniform_", "normal_", "exponential_", "random_", "log_normal_", "cauchy_", "geometric_"}


class CommonNoise(TorchFunctionMode):
    """Drops nothing, and gives each sample in the n-th draw of an evaluation what the first sample got in the first."""

    def __init__(self) -> None:
        super().__init__()
        self._first: list[Tensor] = []
        self._next = 0

    def rewind(self) -> None:
        """The next evaluation begins."""
        self._next = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in DROPOUTS:
            return args[0] if args else kwargs["input"]
        if name == "scaled_dot_product_attention":
            kept = args if len(args) < 5 else (*args[:4], 0.0, *args[5:])
            return func(*kept, **{key: value for key, value in kwargs.items() if key != "dropout_p"})
        if name == "multi_head_attention_forward":
            args = (*args[:ATTENTION_DROPOUT], 0.0, *args[ATTENTION_DROPOUT + 1 :])
        if name in RECURRENT:
            args = tuple(0.0 if isinstance(part, float) else part for part in args)
        drawn = func(*args, **kwargs)
        if (name in DRAWS or name in FILLS) and isinstance(drawn, Tensor):
            return self._common(drawn)
        return drawn

    @torch.no_grad()
    def _common(self, drawn: Tensor) -> Tensor:
        if self._next == len(self._first):
            self._first.append(drawn.detach().clone())
        first = self._first[self._next]
        self._next += 1
        if first.ndim == drawn.ndim and first.shape[1:] == drawn.shape[1:]:
            drawn.copy_(first[:1].expand_as(drawn) if drawn.ndim > 0 else first)
        return drawn
